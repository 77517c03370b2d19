"""Whether a meta-gradient is worth following: metasmoothness, and training choices that raise it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mftjax import errors
from mftjax.metagrad import problem as problem_lib
from mftjax.metagrad import reverse


@flax.struct.dataclass
class Smoothness:
  """What `metasmoothness` measures along `num_directions` directions v with step size h, L the outer loss."""

  loss: jax.Array  # scalar, L(z)
  smoothness: jax.Array  # scalar, mean over directions, in [-1, 1]; NaN if no parameter moves
  smoothness_error: jax.Array  # scalar, its standard error; NaN with one direction
  objective_agreement: jax.Array  # scalar, least-squares slope of measured on predicted; 1 is a perfect prediction
  objective_agreement_error: jax.Array  # scalar, its standard error; NaN with one direction
  by_direction: jax.Array  # [num_directions], smoothness
  predicted: jax.Array  # [num_directions], <g, v> h, with g the meta-gradient at z
  measured: jax.Array  # [num_directions], (L(z + hv) - L(z - hv)) / 2


def metasmoothness(
  problem: problem_lib.Problem,
  meta_params: Any,
  state: problem_lib.State,
  inner_batches: Any,
  outer_batch: Any,
  rng: jax.Array,
  *,
  direction: Any = None,
  step_size: float = 0.1,
  num_directions: int = 8,
  build: Callable[[problem_lib.Problem], Callable[..., problem_lib.Output]] = reverse.build,
) -> Smoothness:
  """Measures how straight the trained params move as the meta-parameters move, and what the meta-gradient predicts.

  With A(z) the params trained under meta-parameters z (the same start, batches and draws) and
  D(z) = A(z + h v) - A(z), the metasmoothness along v is

    S = sign(D(z))^T diag(|D(z)| / |D(z)|_1) sign(D(z + h v)),

  the part of the first step's movement that goes on in the second step, less the part that turns back. 1: the path
  is straight on the scale of h, and a gradient says where it leads; about -1/2: the params jump about independently
  (both D share A(z + h v)). It takes three training runs a direction.

  A fourth, with one meta-gradient g for all directions, gives the prediction <g, v> h of the measured
  (L(z + h v) - L(z - h v)) / 2; `objective_agreement` is the sum of their products over the sum of the squares of
  the predictions (for one direction, measured / predicted).

  A pure function: to be jitted or vmapped (over seeds, for an error that is not of directions alone) by the caller.

  Args:
    problem: its outer loss sees `problem.readout(state)`, and so does A.
    meta_params: z, best unconstrained and of like scale (`spaces`), since one h holds for all.
    state: at the start of the run.
    inner_batches: `[steps, ...]`.
    outer_batch: of the outer loss.
    rng: key of the run; with `direction` None also of the directions.
    direction: v, like meta_params, taken as it is; None: `num_directions` random unit vectors.
    step_size: h. The scale that is asked about: about the length of an outer step. Where it is so small
      that D drowns in rounding, S says nothing.
    num_directions: random directions to average over.
    build: `problem -> step`, e.g. `metagrad.value_and_grad`, for g.

  Raises:
    InputError: num_directions below 1, or what the step refuses.

  Source: Engstrom et al. (2025), "Optimizing ML training with metagradient descent", Section 3, empirical
    metasmoothness.
  """
  if num_directions < 1:
    raise errors.InputError(f"num_directions must be at least 1, got {num_directions}.")
  out = build(problem)(meta_params, state, inner_batches, outer_batch, rng)
  keys, outer_rng = problem_lib.split_keys(rng, problem_lib.unroll_length(inner_batches))

  def train(meta_params):
    final, _ = problem_lib.run(problem, meta_params, state, inner_batches, keys)
    params = problem_lib.read_params(problem, final)
    return params, problem_lib.outer_loss(problem, final, meta_params, outer_batch, outer_rng)[0]

  trained, _ = train(meta_params)

  def along(direction):
    at = lambda scale: jax.tree.map(lambda z, v: z + (scale * step_size * v).astype(z.dtype), meta_params, direction)
    # One run after the other: three sets of params are alive, not three runs' activations.
    params, losses = jax.lax.map(lambda scale: train(at(scale)), jnp.array([1.0, 2.0, -1.0]))
    once, twice = (jax.tree.map(lambda x, i=i: x[i], params) for i in (0, 1))
    predicted = step_size * optax.tree_utils.tree_vdot(out.grad, direction)
    return _sign_correlation(trained, once, twice), predicted, (losses[0] - losses[2]) / 2

  if direction is None:
    directions = _random_directions(jax.random.fold_in(rng, 0), meta_params, num_directions)
  else:
    directions = jax.tree.map(lambda v: jnp.asarray(v)[None], direction)
  by_direction, predicted, measured = jax.lax.map(along, directions)
  count = by_direction.shape[0]
  slope = jnp.vdot(predicted, measured) / jnp.vdot(predicted, predicted)
  # Standard error of a regression through the origin that lets the residuals differ in size (White, 1980).
  residuals = predicted * (measured - slope * predicted)
  unbiased = jnp.sqrt(count / (count - 1.0)) if count > 1 else jnp.nan
  return Smoothness(
    loss=out.loss,
    smoothness=jnp.mean(by_direction),
    smoothness_error=unbiased * jnp.std(by_direction) / jnp.sqrt(count),
    objective_agreement=slope,
    objective_agreement_error=unbiased * jnp.linalg.norm(residuals) / jnp.vdot(predicted, predicted),
    by_direction=by_direction,
    predicted=predicted,
    measured=measured,
  )


class AveragedState(NamedTuple):
  """State of `averaged`."""

  inner_state: Any  # of the optimiser that is wrapped
  num_averaged: jax.Array  # int32 scalar, steps in the average
  average: Any  # like params


def averaged(optimizer: optax.GradientTransformation, decay: jax.typing.ArrayLike) -> optax.GradientTransformation:
  """The same optimiser, whose state also keeps an average of the params; the run itself does not change.

  With p_t the params after step t and d = decay, the average after T steps is

    a_T = (1 - d) / (1 - d^T) sum_{t=1..T} d^(T-t) p_t,

  the bias-corrected exponential average; a_0 = p_0. Set `Problem.readout = averaged_params` for an outer loss that
  sees it.

  Args:
    optimizer: the whole chain, learning rate included: the average is of the params that its updates lead to.
    decay: in [0, 1), about 1 / (1 - decay) steps long; a number or a traced scalar.

  Source: Polyak and Juditsky (1992); the exponential form with bias correction as in Kingma and Ba (2015), Section 3.
  """

  def init(params):
    return AveragedState(optimizer.init(params), jnp.zeros((), jnp.int32), params)

  def update(updates, state, params=None):
    if params is None:
      raise ValueError("averaged needs the params: call update(updates, state, params).")
    updates, inner_state = optimizer.update(updates, state.inner_state, params)
    num_averaged = state.num_averaged + 1
    weight = (1.0 - decay) / (1.0 - jnp.asarray(decay) ** num_averaged)
    new = optax.apply_updates(params, updates)
    average = jax.tree.map(lambda a, p: a + (weight * (p - a)).astype(a.dtype), state.average, new)
    return updates, AveragedState(inner_state, num_averaged, average)

  return optax.GradientTransformation(init, update)


def averaged_params(state: problem_lib.State) -> Any:
  """The average that `averaged`, anywhere in the optimiser, keeps; like `state.params`.

  Raises:
    InputError: the optimiser keeps none.
  """
  average = optax.tree_utils.tree_get(state.opt_state, "average")
  if average is None:
    raise errors.InputError("The optimiser keeps no average of its params: wrap it in smoothness.averaged.")
  return average


def _random_directions(rng: jax.Array, like: Any, count: int) -> Any:
  """`count` vectors of norm 1, uniform over the sphere of all leaves together; leaves `[count, ...]`."""
  leaves, structure = jax.tree.flatten(like)
  keys = jax.random.split(rng, len(leaves))
  draws = [jax.random.normal(k, (count, *jnp.shape(x)), jnp.result_type(x)) for k, x in zip(keys, leaves, strict=True)]
  norms = jax.vmap(optax.tree_utils.tree_norm)(draws)
  return structure.unflatten([x / norms.reshape(-1, *[1] * (x.ndim - 1)) for x in draws])


def _sign_correlation(start: Any, once: Any, twice: Any) -> jax.Array:
  """S of the path start -> once -> twice; scalar."""
  steps = [(b - a, c - b) for a, b, c in zip(*map(jax.tree.leaves, (start, once, twice)), strict=True)]
  # |x| sign(x) is x.
  return sum(jnp.sum(x * jnp.sign(y)) for x, y in steps) / sum(jnp.sum(jnp.abs(x)) for x, _ in steps)
