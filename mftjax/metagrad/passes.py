"""The unroll forwards and backwards: what is kept on the way, and how each state is had again."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from mftjax.metagrad import problem as problem_lib
from mftjax.metagrad.recovery import Plan


@flax.struct.dataclass
class Record:
  """What is kept of one step; None for what is not."""

  state: Any  # problem.State before it; with an inverse its leaves that are not solved for
  grads: Any  # like params
  saved: Any  # of the product


@flax.struct.dataclass
class Cotangents:
  """Of the outer loss, in the state before a step and in the meta-parameters."""

  params: Any
  opt_floats: list[jax.Array]  # floating leaves of opt_state
  meta_params: Any


def forward(problem: problem_lib.Problem, plan: Plan, meta_params: Any, state: problem_lib.State, batches, keys):
  """Runs the steps.

  Returns:
    The final state, metrics (`inner_loss` `[steps]`; whether loss and gradient are finite, `[steps]` each), and the
    residuals for `backward`.
  """

  step = functools.partial(_step, problem, plan, meta_params)

  def segment(state, batches_and_keys):
    kept = None if plan.recovery == "store" else _to_host(plan, state)
    after, (records, metrics) = jax.lax.scan(step, state, batches_and_keys)
    if plan.recovery == "checkpoint":
      records = None
    return after, (kept, _to_host(plan, records), metrics)

  head, tail = _split(plan, (batches, keys))
  after, (kept, records, metrics) = jax.lax.scan(segment, state, head)
  metrics = jax.tree.map(jnp.concatenate, metrics)  # [segments, every] -> [steps]
  tail_kept = None
  if tail is not None:
    after, (*tail_kept, tail_metrics) = segment(after, tail)
    metrics = jax.tree.map(lambda *parts: jnp.concatenate(parts), metrics, tail_metrics)
  return after, metrics, (after, (kept, records), tail_kept)


def backward(problem: problem_lib.Problem, plan: Plan, meta_params: Any, residuals, params_bar, opt_bar, batches, keys):
  """Carries the cotangents of the final state back to the first.

  Returns:
    `Cotangents` (meta_params: the sum over the steps), and metrics, `[steps]` each: whether the update's and the loss's
    part are finite, the error of the product, and with `invert` that of the recovered states.
  """
  after, head_kept, tail_kept = residuals
  head, tail = _split(plan, (batches, keys))
  zeros = jax.tree.map(jnp.zeros_like, meta_params)
  carry = (Cotangents(params_bar, opt_bar, zeros), after if plan.inverse else None)

  def segment(carry, inputs):
    (kept, records), batches_and_keys = inputs
    kept, records = _to_device(plan, (kept, records))
    if plan.recovery == "checkpoint":
      _, (records, _) = jax.lax.scan(functools.partial(_step, problem, plan, meta_params), kept, batches_and_keys)
    is_first = jnp.arange(len(batches_and_keys[1])) == 0
    body = functools.partial(_step_back, problem, plan, meta_params, kept)
    return jax.lax.scan(body, carry, (records, *batches_and_keys, is_first), reverse=True)

  tail_metrics = None
  if tail is not None:
    carry, tail_metrics = segment(carry, (tail_kept, tail))
  (bars, _), metrics = jax.lax.scan(segment, carry, (head_kept, head), reverse=True)
  metrics = jax.tree.map(jnp.concatenate, metrics)
  if tail is not None:
    metrics = jax.tree.map(lambda *parts: jnp.concatenate(parts), metrics, tail_metrics)
  return bars, metrics


def split_floats(tree: Any):
  """The floating leaves of an optimiser state, and how to put them back among its counters."""
  leaves, treedef = jax.tree.flatten(tree)
  is_float = [problem_lib.is_floating(leaf) for leaf in leaves]

  def rebuild(floats):
    remaining = iter(floats)
    return treedef.unflatten([next(remaining) if use else leaf for use, leaf in zip(is_float, leaves, strict=True)])

  return [leaf for use, leaf in zip(is_float, leaves, strict=True) if use], rebuild


def _step(problem, plan: Plan, meta_params, state, batch_and_key):
  """One inner step forwards; what is kept of it."""
  loss, grads, saved = plan.product.evaluate(state.params, meta_params, *batch_and_key)
  after = problem_lib.update(problem, meta_params, state, grads)
  metrics = {
    "inner_loss": loss,
    "finite": {"inner_loss": problem_lib.is_finite(loss), "inner_gradient": problem_lib.is_finite(grads)},
  }
  if not plan.saves_gradients:
    grads = saved = None
  return after, (Record(_kept_leaves(plan, state), grads, saved), metrics)


def _step_back(problem, plan: Plan, meta_params, exact, carry, inputs):
  """One inner step backwards; `exact` is the state at the start of its segment, if it is kept."""
  bars, after = carry
  record, batch, key, is_first = inputs
  before, grads, saved, recovery_error = record.state, record.grads, record.saved, None
  evaluate = lambda params: plan.product.evaluate(params, meta_params, batch, key)
  if plan.inverse:
    choose = lambda known, solved: jax.tree.map(lambda x, y: jnp.where(is_first, x, y), known, solved)
    solved, grads, saved = plan.inverse(
      meta_params, after, record.state, grads, saved, lambda params: evaluate(choose(exact.params, params))
    )
    # The first state of an unroll is exact too: where Adam's moments are zero, its derivative is steepest.
    before = choose(exact, solved)
    # Like the distance, so that within shard_map both branches vary over the same axes; never computed.
    no_distance = lambda *states: jnp.zeros_like(_distance(*states))
    recovery_error = jax.lax.cond(is_first, _distance, no_distance, solved, exact, after)
  elif not plan.saves_gradients:
    _, grads, saved = evaluate(before.params)
  floats, rebuild = split_floats(before.opt_state)

  def update(params, floats, grads, meta_params):
    state = before.replace(params=params, opt_state=rebuild(floats))
    after = problem_lib.update(problem, meta_params, state, grads)
    return after.params, split_floats(after.opt_state)[0]

  _, pullback = jax.vjp(update, before.params, floats, grads, meta_params)
  params_bar, floats_bar, u, meta_bar = pullback((bars.params, bars.opt_floats))
  params_loss, meta_loss, error = plan.product.apply(before.params, meta_params, batch, key, saved, u)
  add = functools.partial(jax.tree.map, jnp.add)
  bars = Cotangents(add(params_bar, params_loss), floats_bar, add(bars.meta_params, add(meta_bar, meta_loss)))
  finite = {
    "update": problem_lib.is_finite(params_bar, floats_bar, u, meta_bar),
    "hessian_product": problem_lib.is_finite(params_loss, meta_loss),
  }
  return (bars, before if plan.inverse else None), {
    "finite": finite,
    "product_error": error,
    "recovery_error": recovery_error,
  }


def _kept_leaves(plan: Plan, state: problem_lib.State):
  """The state, or with an inverse the list of its leaves, None where they are solved for."""
  if plan.inverse is None:
    return state
  leaves = jax.tree.leaves((state.params, state.opt_state))
  return [leaf if info.is_kept else None for leaf, info in zip(leaves, plan.inverse.leaves, strict=True)]


def _distance(solved: problem_lib.State, exact: problem_lib.State, after: problem_lib.State) -> jax.Array:
  """The largest relative error of a leaf; relative to the leaf a step later, where it is zero itself."""

  def relative(x, y, later):
    size = jnp.linalg.norm(jnp.ravel(jnp.maximum(abs(y), abs(later))))
    return (jnp.linalg.norm(jnp.ravel(x - y)) / jnp.where(size > 0, size, 1)).astype(jnp.float32)

  leaves = zip(*(jax.tree.leaves((state.params, state.opt_state)) for state in (solved, exact, after)), strict=True)
  return jnp.max(jnp.stack([relative(*x) for x in leaves if problem_lib.is_floating(x[0])]))


def _split(plan: Plan, tree: Any):
  """`[steps, ...]` as `[segments, every, ...]` and the rest `[less than every, ...]` (None if there is none)."""
  length = len(jax.tree.leaves(tree)[0])
  whole = length - length % plan.every
  head = jax.tree.map(lambda x: x[:whole].reshape(whole // plan.every, plan.every, *x.shape[1:]), tree)
  return head, (jax.tree.map(lambda x: x[whole:], tree) if whole < length else None)


def _to_host(plan: Plan, tree: Any) -> Any:
  return jax.device_put(tree, jax.memory.Space.Host) if plan.offload else tree


def _to_device(plan: Plan, tree: Any) -> Any:
  return jax.device_put(tree, jax.memory.Space.Device) if plan.offload else tree
