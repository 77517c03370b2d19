"""Evolution strategies: meta-gradients from the losses of perturbed runs, nothing is differentiated twice."""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from mftjax import errors
from mftjax.metagrad import problem as problem_lib


@flax.struct.dataclass
class ParticleState(problem_lib.State):
  """The unperturbed run between two steps, and the perturbed ones beside it."""

  particles: problem_lib.State  # stacked [2 * num_pairs, ...], the + runs and then the - runs
  perturbations: Any  # like meta_params, stacked [num_pairs, ...]: each pair's sum of its unit normal draws so far


def init_particles(problem: problem_lib.Problem, meta_params: Any, params: Any, *, num_pairs: int = 8) -> ParticleState:
  """The state of `build_pes` before the first inner step: `2 * num_pairs` copies of `params` (pytree)."""
  return _start(meta_params, problem_lib.init(problem, meta_params, params), num_pairs)


def build_es(problem: problem_lib.Problem, *, num_pairs: int = 8, sigma: float = 0.01, batch_size: int | None = None):
  """`step(meta_params, state, inner_batches, outer_batch, rng) -> Output`, by antithetic evolution strategies.

  With L(m) the outer loss after the window and e_i standard normal,
  grad = 1/n sum_i e_i (L(m + sigma e_i) - L(m - sigma e_i)) / (2 sigma): unbiased for the gradient of the smoothed
  E[L(m + sigma e)], whose distance from that of L falls with sigma^2. All runs see the same batches and keys.

  Args:
    problem: its outer loss need not be differentiable.
    num_pairs: n, >= 1.
    sigma: standard deviation of the perturbation, > 0, in the units of meta_params, the same for every one.
    batch_size: perturbed runs that are computed at the same time; all by default.

  Returns:
    The step. `loss`, `state` and the common metrics are those of the unperturbed run; the metric `standard_error`
    (like meta_params) is that of `grad`, a mean over pairs; NaN for a single pair.

  Source: Salimans et al. (2017), Algorithm 1, with antithetic pairs.
  """
  _check_options(num_pairs, sigma, batch_size)

  def step(
    meta_params: Any, state: problem_lib.State, inner_batches: Any, outer_batch: Any, rng: jax.Array
  ) -> problem_lib.Output:
    run = _unroll(problem, meta_params, state, inner_batches, outer_batch, rng)
    noise = _draw(rng, meta_params, num_pairs)
    losses = jax.lax.map(
      lambda perturbed: run(perturbed, state)[0],
      _perturb(meta_params, noise, sigma),
      batch_size=batch_size or 2 * num_pairs,
    )
    grad, metrics = _estimate(losses, noise, sigma)
    loss, aux, final, inner_losses = run(meta_params, state)
    return problem_lib.output(loss, aux, grad, final, inner_losses, metrics)

  return step


def build_pes(problem: problem_lib.Problem, *, num_pairs: int = 8, sigma: float = 0.01, batch_size: int | None = None):
  """`step(meta_params, state, inner_batches, outer_batch, rng) -> Output`, by persistent evolution strategies.

  As `build_es`, but every perturbed run goes on from its own last state, and its loss is weighted by the sum of its
  draws since the start: grad = 1/n sum_i (sum_{k <= w} e_{k,i}) (L_w,i+ - L_w,i-) / (2 sigma) in window w. So the
  gradients summed over the windows of a run are unbiased, up to smoothing, for the sum of the window losses with
  nothing truncated, at meta_params that stay as they are. The variance grows with the number of windows.

  Args:
    problem, num_pairs, sigma, batch_size: as in `build_es`.

  Returns:
    The step. It takes and returns a `ParticleState`; a plain `State` starts new particles from there. Give each
    window its own rng. Metrics as in `build_es`.

  Source: Vicol, Metz and Sohl-Dickstein (2021), Algorithm 2, antithetic pairs.
  """
  _check_options(num_pairs, sigma, batch_size)

  def step(
    meta_params: Any, state: problem_lib.State, inner_batches: Any, outer_batch: Any, rng: jax.Array
  ) -> problem_lib.Output:
    carried = state if isinstance(state, ParticleState) else _start(meta_params, state, num_pairs)
    num_particles = len(jax.tree.leaves(carried.particles)[0])
    if num_particles != 2 * num_pairs:
      raise errors.InputError(
        f"The state carries {num_particles} particles, but num_pairs = {num_pairs} needs {2 * num_pairs}: make it with "
        f"init_particles(problem, meta_params, params, num_pairs={num_pairs})."
      )
    plain = problem_lib.State(state.params, state.opt_state, state.step)
    run = _unroll(problem, meta_params, plain, inner_batches, outer_batch, rng)
    noise = _draw(rng, meta_params, num_pairs)

    def run_particle(perturbed_and_particle):
      loss, _, particle, _ = run(*perturbed_and_particle)
      return loss, particle

    losses, particles = jax.lax.map(
      run_particle, (_perturb(meta_params, noise, sigma), carried.particles), batch_size=batch_size or 2 * num_pairs
    )
    perturbations = jax.tree.map(jnp.add, carried.perturbations, noise)
    grad, metrics = _estimate(losses, perturbations, sigma)
    loss, aux, final, inner_losses = run(meta_params, plain)
    after = ParticleState(final.params, final.opt_state, final.step, particles, perturbations)
    return problem_lib.output(loss, aux, grad, after, inner_losses, metrics)

  return step


def _check_options(num_pairs: Any, sigma: Any, batch_size: Any) -> None:
  for name, count in (("num_pairs", num_pairs), ("batch_size", 1 if batch_size is None else batch_size)):
    problem_lib.check_count(name, count)
  if not (isinstance(sigma, int | float) and 0 < sigma < math.inf):
    raise errors.InputError(f"sigma must be a number > 0, got {sigma!r}.")


def _start(meta_params: Any, state: problem_lib.State, num_pairs: int) -> ParticleState:
  stack = lambda x: jnp.broadcast_to(x, (2 * num_pairs, *jnp.shape(x)))
  nothing = jax.tree.map(lambda x: jnp.zeros((num_pairs, *jnp.shape(x)), jnp.result_type(x)), meta_params)
  return ParticleState(state.params, state.opt_state, state.step, jax.tree.map(stack, state), nothing)


def _unroll(problem: problem_lib.Problem, meta_params: Any, state: Any, inner_batches: Any, outer_batch: Any, rng: Any):
  """`(meta_params, state) -> (outer loss, aux, state, inner losses)` over the window, on the same keys each time."""
  length = problem_lib.check(problem, meta_params, state, inner_batches, outer_batch)
  keys, outer_rng = problem_lib.split_keys(rng, length)

  def run(meta_params, state):
    final, inner_losses = problem_lib.run(problem, meta_params, state, inner_batches, keys)
    loss, aux = problem_lib.outer_loss(problem, final, meta_params, outer_batch, outer_rng)
    return loss, aux, final, inner_losses

  return run


def _draw(rng: jax.Array, meta_params: Any, num_pairs: int) -> Any:
  """Standard normal draws, like meta_params, stacked `[num_pairs, ...]`."""
  leaves, treedef = jax.tree.flatten(meta_params)
  # Not 0 or 1: fold_in with those gives the two keys that split_keys has taken.
  keys = jax.random.split(jax.random.fold_in(rng, 2), len(leaves))
  shape = lambda leaf: (num_pairs, *jnp.shape(leaf))
  return treedef.unflatten(
    [jax.random.normal(key, shape(x), jnp.result_type(x)) for key, x in zip(keys, leaves, strict=True)]
  )


def _perturb(meta_params: Any, noise: Any, sigma: float) -> Any:
  """meta_params + sigma noise and then meta_params - sigma noise, stacked `[2 * num_pairs, ...]`."""
  return jax.tree.map(lambda m, e: jnp.concatenate([m + sigma * e, m - sigma * e]), meta_params, noise)


def _estimate(losses: jax.Array, noise: Any, sigma: float) -> tuple[Any, dict[str, Any]]:
  """The mean over pairs of noise times slope, and the metrics, from `[2 * num_pairs]` losses."""
  plus, minus = jnp.split(losses, 2)
  slopes = (plus - minus) / (2 * sigma)  # [num_pairs]
  products = jax.tree.map(lambda e: jax.vmap(jnp.multiply)(slopes, e).astype(e.dtype), noise)
  grad = jax.tree.map(lambda x: x.mean(0), products)
  standard_error = jax.tree.map(lambda x: x.std(0, ddof=1) / math.sqrt(len(x)), products)
  return grad, {"standard_error": standard_error}
