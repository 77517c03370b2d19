"""Evolution strategies: unbiased within their standard error, persistent ones also over truncated windows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mftjax import errors
from mftjax.metagrad import evolution, reverse
from mftjax.metagrad import problem as problem_lib

NUM_WINDOWS, WINDOW = 5, 2
SEEDS, PAIRS = 48, 64
TARGET = np.array([2.0, -1.0])


def tracking_problem() -> problem_lib.Problem:
  """p follows the meta-parameter m plus data by SGD of rate 0.1: p stays linear in m and the outer loss quadratic.

  Antithetic differences are then exactly linear in the perturbations, so smoothing adds no bias at any sigma.
  """
  return problem_lib.Problem(
    inner_loss=lambda p, m, batch, rng: 0.5 * jnp.sum((p - m - batch) ** 2),
    outer_loss=lambda p, m, batch, rng: 0.5 * jnp.sum((p - batch) ** 2),
    optimizer=lambda m: optax.sgd(0.1),
  )


def tracking_inputs():
  """(meta_params, state, [windows, steps] batches, outer batch)"""
  meta_params, params = jnp.asarray([0.3, 0.8]), jnp.asarray([2.0, -1.0])
  batches = jnp.asarray(np.random.default_rng(0).standard_normal((NUM_WINDOWS, WINDOW, 2)))
  return meta_params, problem_lib.init(tracking_problem(), meta_params, params), batches, jnp.asarray(TARGET)


def over_windows(step, meta_params, state, batches, outer, rng):
  """The sum over windows of the estimates, each window going on from the last one's state."""

  def body(state, window):
    out = step(meta_params, state, window[0], outer, window[1])
    return out.state, out.grad

  _, grads = jax.lax.scan(body, state, (batches, jax.random.split(rng, len(batches))))
  return grads.sum(0)


def full_horizon(meta_params, state, batches, outer):
  """Reverse mode through the sum of the window losses, nothing truncated."""
  problem = tracking_problem()

  def total(meta_params):
    def body(state, window):
      state, _ = problem_lib.run(problem, meta_params, state, window, jax.random.split(jax.random.key(0), WINDOW))
      return state, problem.outer_loss(state.params, meta_params, outer, None)

    return jax.lax.scan(body, state, batches)[1].sum()

  return jax.grad(total)(meta_params)


@pytest.fixture(scope="module")
def sums():
  """What each method makes of the sum over windows: `[SEEDS, 2]` for es and pes, `[2]` for the exact ones; f64."""
  with jax.enable_x64(True):
    meta_params, state, batches, outer = tracking_inputs()
    keys = jax.random.split(jax.random.key(1), SEEDS)
    options = {"num_pairs": PAIRS, "sigma": 0.3}

    def seeds(step, state):
      return jax.jit(jax.vmap(lambda key: over_windows(step, meta_params, state, batches, outer, key)))(keys)

    problem = tracking_problem()
    particles = evolution.init_particles(problem, meta_params, state.params, num_pairs=PAIRS)
    found = {
      "es": seeds(evolution.build_es(problem, **options), state),
      "pes": seeds(evolution.build_pes(problem, **options), particles),
      "truncated": over_windows(reverse.build(problem), meta_params, state, batches, outer, keys[0]),
      "full": full_horizon(meta_params, state, batches, outer),
    }
    return jax.tree.map(np.asarray, found)


def deviation(samples, want) -> np.ndarray:
  """How far the mean of `[SEEDS, 2]` samples is from `want`, in standard errors of that mean."""
  return np.abs(samples.mean(0) - want) / (samples.std(0, ddof=1) / np.sqrt(len(samples)))


def test_pes_is_unbiased_over_truncated_windows(sums):
  assert np.all(deviation(sums["pes"], sums["full"]) < 4)


def test_es_is_unbiased_for_the_truncated_gradient_alone(sums):
  assert np.all(deviation(sums["es"], sums["truncated"]) < 4)
  # The truncation is what pes is for: its bias is far outside the noise of either.
  assert np.all(deviation(sums["es"], sums["full"]) > 10)
  assert np.all(deviation(sums["pes"], sums["truncated"]) > 10)


@pytest.fixture(scope="module")
def cubic_outputs():
  """es on L = p^3 with p = m after one step, over `[SEEDS]` keys; sigma 0.5."""
  problem = problem_lib.Problem(
    inner_loss=lambda p, m, batch, rng: 0.5 * (p - m) ** 2,
    outer_loss=lambda p, m, batch, rng: p**3,
    optimizer=lambda m: optax.sgd(1.0),
  )
  meta_params = jnp.asarray(0.7)
  state = problem_lib.init(problem, meta_params, jnp.asarray(2.0))
  step = evolution.build_es(problem, num_pairs=PAIRS, sigma=0.5)
  keys = jax.random.split(jax.random.key(2), 8 * SEEDS)
  return jax.jit(jax.vmap(lambda key: step(meta_params, state, jnp.zeros(1), 0.0, key)))(keys)


def test_smoothing_bias_is_that_of_the_closed_form(cubic_outputs):
  """E[e ((m + s e)^3 - (m - s e)^3) / 2 s] = 3 m^2 + s^2 E[e^4] = 3 m^2 + 3 s^2."""
  grads = np.asarray(cubic_outputs.grad)[:, None]
  assert np.all(deviation(grads, 3 * 0.7**2 + 3 * 0.5**2) < 4)
  assert np.all(deviation(grads, 3 * 0.7**2) > 10)
  np.testing.assert_allclose(cubic_outputs.loss, 0.7**3, rtol=1e-5)  # of the unperturbed run


def test_the_standard_error_is_that_of_the_estimates(cubic_outputs):
  """Its mean square estimates the variance over seeds without bias; 384 seeds give that to about 15%."""
  claimed = np.mean(np.asarray(cubic_outputs.metrics["standard_error"]) ** 2)
  np.testing.assert_allclose(claimed, np.var(np.asarray(cubic_outputs.grad), ddof=1), rtol=0.3)


@pytest.fixture(scope="module")
def pes_step():
  return jax.jit(evolution.build_pes(tracking_problem(), num_pairs=3, sigma=0.3))


def test_pairs_are_antithetic_and_perturbations_add_up(pes_step):
  """The runs are linear in m, so each pair's mean is the unperturbed run and its gap follows the draws.

  With rate 0.1 and windows of 2 steps a draw e moves p by 0.19 s e, and an older one by 0.81 times that.
  """
  meta_params, state, batches, outer = tracking_inputs()
  one = pes_step(meta_params, state, batches[0], outer, jax.random.key(3))
  two = pes_step(meta_params, one.state, batches[1], outer, jax.random.key(4))
  draws = one.state.perturbations, two.state.perturbations - one.state.perturbations  # [3, 2] each
  plus, minus = jnp.split(two.state.particles.params, 2)
  middle = np.broadcast_to(two.state.params, plus.shape)
  np.testing.assert_allclose((plus + minus) / 2, middle, rtol=1e-5)
  np.testing.assert_allclose(plus - minus, 2 * 0.19 * 0.3 * (draws[1] + 0.81 * draws[0]), atol=1e-5)
  losses = 0.5 * jnp.sum((two.state.particles.params - outer) ** 2, -1)
  slopes = (losses[:3] - losses[3:]) / (2 * 0.3)
  np.testing.assert_allclose(two.grad, jnp.mean(slopes[:, None] * two.state.perturbations, 0), rtol=1e-4)
  assert not np.allclose(draws[0], draws[1])  # each window draws anew
  assert int(two.state.step) == 2 * WINDOW and np.all(two.state.particles.step == 2 * WINDOW)


def test_the_first_window_of_pes_is_es(pes_step):
  """From a plain state and from fresh particles alike."""
  meta_params, state, batches, outer = tracking_inputs()
  rng = jax.random.key(5)
  es_step = jax.jit(evolution.build_es(tracking_problem(), num_pairs=3, sigma=0.3))
  want = es_step(meta_params, state, batches[0], outer, rng)
  particles = evolution.init_particles(tracking_problem(), meta_params, state.params, num_pairs=3)
  for start in (state, particles):
    got = pes_step(meta_params, start, batches[0], outer, rng)
    np.testing.assert_allclose(got.grad, want.grad, rtol=1e-5)
    np.testing.assert_allclose(got.metrics["standard_error"], want.metrics["standard_error"], rtol=1e-5)
    np.testing.assert_allclose(got.state.params, want.state.params, rtol=1e-6)


@pytest.mark.parametrize("build", [evolution.build_es, evolution.build_pes])
def test_batches_of_particles_and_vmap_give_the_same_numbers(build):
  meta_params, state, batches, outer = tracking_inputs()
  rng = jax.random.key(6)
  want = jax.jit(build(tracking_problem(), num_pairs=3))(meta_params, state, batches[0], outer, rng)
  tasks = jnp.stack([meta_params + 1, meta_params])
  step = jax.jit(jax.vmap(build(tracking_problem(), num_pairs=3, batch_size=4), in_axes=(0, None, None, None, None)))
  got = jax.tree.map(lambda x: x[1], step(tasks, state, batches[0], outer, rng))
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-5)  # f32 differences of losses over 2 sigma = 0.02


def test_bad_options_are_refused(pes_step):
  for build in (evolution.build_es, evolution.build_pes):
    for options, message in [
      ({"num_pairs": 0}, "num_pairs must be a whole number >= 1, got 0"),
      ({"num_pairs": 2.0}, "num_pairs must be a whole number >= 1, got 2.0"),
      ({"sigma": 0.0}, "sigma must be a number > 0, got 0.0"),
      ({"sigma": float("nan")}, "sigma must be a number > 0, got nan"),
      ({"batch_size": 0}, "batch_size must be a whole number >= 1"),
    ]:
      with pytest.raises(errors.InputError, match=message):
        build(tracking_problem(), **options)
  meta_params, state, batches, outer = tracking_inputs()
  particles = evolution.init_particles(tracking_problem(), meta_params, state.params, num_pairs=2)
  with pytest.raises(errors.InputError, match="carries 4 particles, but num_pairs = 3 needs 6"):
    pes_step(meta_params, particles, batches[0], outer, jax.random.key(0))
