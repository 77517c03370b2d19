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
    outer_loss: the same signature, lowered by the outer step; `(scalar, aux)` with `has_aux`.
    optimizer: `(meta_params) -> optax.GradientTransformation`, built from traced values.
    micro_batches: parts, along the leading axis of each leaf, that an inner batch is cut into; the inner loss is
      the mean of theirs, and only one part's activations are alive at a time.
    has_aux: whether the outer loss returns further values, which go to `Output.metrics["aux"]`.
    readout: `(state) -> params` that the outer loss sees, such as an average kept by the optimiser; None: its params.
  """

  inner_loss: Callable[..., jax.Array]
  outer_loss: Callable[..., Any]
  optimizer: Callable[..., optax.GradientTransformation]
  micro_batches: int = 1
  has_aux: bool = False
  readout: Callable[..., Any] | None = None


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
  # inner_loss [unroll_length]; is_finite bool scalar; aux, if the outer loss has it; more by method
  metrics: dict[str, Any]


def init(problem: Problem, meta_params: Any, params: Any) -> State:
  """The state before the first inner step."""
  return State(params, problem.optimizer(meta_params).init(params), jnp.zeros((), jnp.int32))


def gradient(problem: Problem, params: Any, meta_params: Any, batch: Any, rng: jax.Array, argnums: Any = 0):
  """The inner loss (scalar) and its gradient in params (`argnums=0`), meta_params (1) or both (`(0, 1)`)."""
  value_and_grad = jax.value_and_grad(problem.inner_loss, argnums)
  count = problem.micro_batches
  if count == 1:
    return value_and_grad(params, meta_params, batch, rng)
  parts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)

  def body(total, part_and_key):
    return jax.tree.map(jnp.add, total, value_and_grad(params, meta_params, *part_and_key)), None

  shapes = jax.eval_shape(value_and_grad, params, meta_params, jax.tree.map(lambda x: x[0], parts), rng)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  total, _ = jax.lax.scan(body, zeros, (parts, jax.random.split(rng, count)))
  return jax.tree.map(lambda x: x / count, total)


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
  loss, grads = gradient(problem, state.params, meta_params, batch, rng)
  return update(problem, meta_params, state, grads), grads, loss


def run(problem: Problem, meta_params: Any, state: State, batches: Any, keys: jax.Array) -> tuple[State, jax.Array]:
  """Ordinary training over `[steps, ...]` batches and keys; the state after it and the `[steps]` inner losses."""

  def body(state, batch_and_key):
    state, _, loss = inner_step(problem, meta_params, state, *batch_and_key)
    return state, loss

  return jax.lax.scan(body, state, (batches, keys))


def read_params(problem: Problem, state: State) -> Any:
  """The params that the outer loss sees, and that a finished run is judged by."""
  return problem.readout(state) if problem.readout else state.params


def outer_loss(problem: Problem, state: State, meta_params: Any, batch: Any, rng: jax.Array) -> tuple[jax.Array, Any]:
  """The outer loss (scalar) of a state, and its further values (None without `has_aux`)."""
  found = problem.outer_loss(read_params(problem, state), meta_params, batch, rng)
  return found if problem.has_aux else (found, None)


def split_keys(rng: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
  """The keys of an unroll, `[length]` of its inner steps and one of the outer loss; the same for every method."""
  inner_rng, outer_rng = jax.random.split(rng)
  return jax.random.split(inner_rng, length), outer_rng


def output(
  loss: jax.Array, aux: Any, grad: Any, state: State, inner_losses: jax.Array, metrics: dict[str, Any] | None = None
) -> Output:
  """What a method returns, with the metrics that all have in common."""
  common = {"inner_loss": inner_losses, "is_finite": is_finite(loss, grad, inner_losses)}
  if aux is not None:
    common["aux"] = aux
  return Output(loss, grad, state, common | (metrics or {}))


def is_finite(*trees: Any) -> jax.Array:
  """Whether every floating number of the trees is finite; bool scalar."""
  leaves = [x for x in jax.tree.leaves(trees) if is_floating(x)]
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves])) if leaves else jnp.array(True)


def is_floating(leaf: Any) -> bool:
  return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def unroll_length(inner_batches: Any) -> int:
  """Steps of an unroll, from the leading axis of `inner_batches`.

  Raises:
    InputError: there is no step, or leaves differ in their number.
  """
  lengths = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0 for leaf in jax.tree.leaves(inner_batches)}
  if len(lengths) != 1 or 0 in lengths:
    raise errors.InputError(
      "inner_batches needs one leading axis [unroll_length >= 1, ...] on every leaf, got leading sizes "
      f"{sorted(lengths)}. Stack batches of equal shapes; pad the ones that differ."
    )
  return lengths.pop()


def check(problem: Problem, meta_params: Any, state: State, inner_batches: Any, outer_batch: Any) -> int:
  """Traces one step of the problem, compiles nothing; returns the unroll length.

  Raises:
    InputError: no step or ragged batches, a meta-parameter that is not floating, a batch that does not divide into
      micro-batches, an optimiser that needs concrete values, a loss that is not a scalar, or a step that changes the
      shape or dtype of its state.
  """
  _check_floating(meta_params, "meta_params", "meta-parameters")
  _check_floating(state.params, "params", "params (freeze the others by leaving them out)")
  check_count("micro_batches", problem.micro_batches)
  length = unroll_length(inner_batches)
  for path, leaf in jax.tree_util.tree_leaves_with_path(inner_batches):
    if problem.micro_batches > 1 and (leaf.ndim < 2 or leaf.shape[1] % problem.micro_batches):
      raise errors.InputError(
        f"inner_batches{jax.tree_util.keystr(path)} of shape {leaf.shape} does not divide into "
        f"micro_batches = {problem.micro_batches} along its axis 1."
      )
  fresh = _trace_optimizer(lambda meta_params: problem.optimizer(meta_params).init(state.params), meta_params)
  layout = lambda tree: (jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)])
  if layout(fresh) != layout(state.opt_state):
    raise errors.InputError(
      "The state does not fit this optimiser: make it with metagrad.init(problem, meta_params, params)."
    )
  rng = jax.eval_shape(lambda: jax.random.key(0))
  batch = jax.eval_shape(lambda batches: jax.tree.map(lambda x: x[0], batches), inner_batches)
  for name, fn, data in (("inner", problem.inner_loss, batch), ("outer", problem.outer_loss, outer_batch)):
    found = jax.eval_shape(fn, state.params, meta_params, data, rng)
    if name == "outer" and problem.has_aux:
      if not (isinstance(found, tuple) and len(found) == 2):
        raise errors.InputError(f"outer_loss must return (loss, further values) with has_aux, got {found}.")
      found, _ = found
    if getattr(found, "shape", None) != () or not is_floating(found):
      raise errors.InputError(f"{name}_loss must return a floating scalar, got {found}.")
  after = _trace_optimizer(lambda *args: inner_step(problem, *args)[0], meta_params, state, batch, rng)
  if jax.tree.structure(after) != jax.tree.structure(state):
    raise errors.InputError(
      "The state does not fit this optimiser: make it with metagrad.init(problem, meta_params, params)."
    )
  for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(after), strict=True):
    if jnp.shape(old) != new.shape or jnp.result_type(old) != new.dtype:
      raise errors.InputError(
        f"An inner step changes state{jax.tree_util.keystr(path)} from {jnp.result_type(old)}{jnp.shape(old)} to "
        f"{new.dtype}{new.shape}: cast the meta-parameters or the state so that both agree."
      )
  return length


def _trace_optimizer(fn: Callable, *args: Any) -> Any:
  try:
    return jax.eval_shape(fn, *args)
  except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
    raise errors.InputError(
      "optimizer(meta_params) needs concrete values, so nothing can be differentiated through it: build it from the "
      f"traced arrays, without float(), bool() or numpy on them. JAX says: {str(error).splitlines()[0]}"
    ) from error


def check_count(name: str, value: Any) -> None:
  """Raises InputError unless an option is a whole number >= 1."""
  if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
    raise errors.InputError(f"{name} must be a whole number >= 1, got {value!r}.")


def _check_floating(tree: Any, where: str, what: str) -> None:
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if not is_floating(leaf):
      name = jax.tree_util.keystr(path)
      raise errors.InputError(f"{where}{name} has dtype {jnp.result_type(leaf)}; {what} must be floating arrays.")
