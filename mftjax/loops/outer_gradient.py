"""The meta-gradient of an outer step: of the objective, or of each ability and then balanced."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mftjax import balancing, metagrad, objectives
from mftjax import config as config_lib
from mftjax.loops import outer_objective
from mftjax.loops import task as task_lib
from mftjax.metagrad import problem as problem_lib


def value_and_grad(
  config: ml_collections.ConfigDict,
  build: Callable[[Callable[[jax.Array], jax.Array]], metagrad.Problem],
  state: outer_objective.ObjectiveState,
) -> Callable[..., metagrad.Output]:
  """As `metagrad.value_and_grad` with the config's method, of the config's objective and balancing.

  Args:
    build: `(losses [num_abilities] -> scalar) -> Problem`, whose outer loss has the losses as its further value.
    state: of the objective.

  Returns:
    `step(meta_params, inner, inner_batches, outer_batch, rng) -> Output`. With `mgda` and `pcgrad` it takes one
    meta-gradient for each ability whose weight is above 0, one after the other: as many times the time of one, at its
    memory. Then `loss` is the weighted mean and `metrics["alignment"]` `[num_abilities]` the cosine of `grad` with
    each ability's gradient, NaN for the others.
  """
  if config.objective.balancing in balancing.BALANCERS:
    return lambda *args: _balanced(config, build, *args)
  return _of(config, build(lambda losses: outer_objective.loss(config, state, losses)))


def _of(config: ml_collections.ConfigDict, problem: metagrad.Problem) -> Callable[..., metagrad.Output]:
  return metagrad.value_and_grad(problem, config.meta.method, **config_lib.method_options(config))


def _balanced(config, build, meta_params, inner, inner_batches, outer_batch, rng) -> metagrad.Output:
  all_weights = task_lib.ability_weights(config)
  present = np.flatnonzero(all_weights)
  weights = jnp.asarray(all_weights[present] / all_weights.sum())

  def one(_, ability):
    out = _of(config, build(lambda losses: losses[ability]))(meta_params, inner, inner_batches, outer_batch, rng)
    kept = ("inner_loss", "is_finite", "aux", "finite")
    metrics = {name: value for name, value in out.metrics.items() if name in kept}
    return out.state, (out.grad, metrics)

  # The state is carried and not stacked: it is the same each time.
  after, (grads, metrics) = jax.lax.scan(one, inner, jnp.asarray(present))
  # 3: the methods fold in what is below.
  grad = balancing.balance(config.objective.balancing, grads, weights, jax.random.fold_in(rng, 3))
  losses = metrics["aux"][0]
  found = {
    "inner_loss": metrics["inner_loss"][0],
    "aux": losses,
    "is_finite": jnp.all(metrics["is_finite"]) & problem_lib.is_finite(grad),
    "finite": jax.tree.map(lambda ok: jnp.all(ok, axis=0), metrics.get("finite", {})),
    "alignment": jnp.full(len(all_weights), jnp.nan).at[present].set(_cosines(grads, grad)),
  }
  return metagrad.Output(objectives.weighted_mean(losses, jnp.asarray(all_weights)), grad, after, found)


def _cosines(grads: Any, grad: Any) -> jax.Array:
  """`[num_abilities]` cosines of the stacked gradients with one; 0 where either is zero."""
  rows, _ = balancing.flatten(grads)
  row = balancing.flatten(jax.tree.map(lambda x: x[None], grad))[0][0]
  norms = jnp.linalg.norm(rows, axis=1) * jnp.linalg.norm(row)
  return jnp.matmul(rows, row, precision=jax.lax.Precision.HIGHEST) / jnp.where(norms > 0, norms, 1.0)


def losses_after(
  problem: metagrad.Problem, meta_params: Any, inner: metagrad.State, inner_batches: Any, outer_batch: Any, rng: Any
) -> jax.Array:
  """`[num_abilities]` losses of the same window under other meta-parameters: one more plain run of it."""
  inner = metagrad.State(inner.params, inner.opt_state, inner.step)
  keys, outer_rng = problem_lib.split_keys(rng, problem_lib.unroll_length(inner_batches))
  end, _ = metagrad.run(problem, meta_params, inner, inner_batches, keys)
  return problem_lib.outer_loss(problem, end, meta_params, outer_batch, outer_rng)[1]
