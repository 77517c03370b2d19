"""What a meta-gradient is taken of: an inner loss, an outer loss and an optimiser, on any pytrees."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mftjax import errors


@dataclasses.dataclass(frozen=True)
class Problem:
  """A bilevel problem whose inner level is a run of an optax optimiser.

  Attributes:
    inner_loss: `(params, meta_params, batch, rng) -> scalar`, lowered by the inner steps.
    outer_loss: the same signature, lowered by the outer step.
    optimizer: `(meta_params) -> optax.GradientTransformation`, built from traced values.
  """

  inner_loss: Callable[..., jax.Array]
  outer_loss: Callable[..., jax.Array]
  optimizer: Callable[..., optax.GradientTransformation]


@flax.struct.dataclass
class State:
  """The inner run between two steps."""

  params: Any  # pytree of floating arrays
  opt_state: Any  # optax state of `optimizer(meta_params)`
  step: jax.Array  # int32 scalar, inner steps done


@flax.struct.dataclass
class Output:
  """What one unroll gives."""

  loss: jax.Array  # scalar, outer loss after the unroll
  grad: Any  # like meta_params, d loss / d meta_params
  state: State  # after the unroll
  metrics: dict[str, jax.Array]  # inner_loss [unroll_length]; is_finite bool scalar


def init(problem: Problem, meta_params: Any, params: Any) -> State:
  """The state before the first inner step."""
  return State(params, problem.optimizer(meta_params).init(params), jnp.zeros((), jnp.int32))


def update(problem: Problem, meta_params: Any, state: State, grads: Any) -> State:
  """The optimiser's part of an inner step: the state after it, given the inner gradient."""
  updates, opt_state = problem.optimizer(meta_params).update(grads, state.opt_state, state.params)
  return State(optax.apply_updates(state.params, updates), opt_state, state.step + 1)


def inner_step(
  problem: Problem, meta_params: Any, state: State, batch: Any, rng: jax.Array
) -> tuple[State, Any, jax.Array]:
  """One ordinary training step.

  Returns:
    The state after it, the inner gradient (like params) and the inner loss before it (scalar).
  """
  loss, grads = jax.value_and_grad(problem.inner_loss)(state.params, meta_params, batch, rng)
  return update(problem, meta_params, state, grads), grads, loss


def unroll_length(meta_params: Any, inner_batches: Any) -> int:
  """Steps of the unroll, from the leading axis of `inner_batches`.

  Raises:
    InputError: there is no step, steps differ in number between leaves, or a meta-parameter is not floating.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(meta_params):
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      name = jax.tree_util.keystr(path)
      raise errors.InputError(
        f"meta_params{name} has dtype {jnp.result_type(leaf)}; meta-parameters must be floating arrays."
      )
  lengths = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0 for leaf in jax.tree.leaves(inner_batches)}
  if len(lengths) != 1 or 0 in lengths:
    raise errors.InputError(
      "inner_batches needs one leading axis [unroll_length >= 1, ...] on every leaf, "
      f"got leading sizes {sorted(lengths)}."
    )
  return lengths.pop()


def is_finite(*trees: Any) -> jax.Array:
  """Whether every floating number of the trees is finite; bool scalar."""
  leaves = [x for x in jax.tree.leaves(trees) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))
