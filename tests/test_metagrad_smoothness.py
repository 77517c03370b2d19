"""Metasmoothness on dynamics whose answer is known, and the average of the params."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mftjax import errors
from mftjax.metagrad import problem as problem_lib
from mftjax.metagrad import smoothness

MEASURE = jax.jit(smoothness.metasmoothness, static_argnums=0, static_argnames=("num_directions", "build"))


def measure(problem, meta_params, params, batches, **options):
  state = problem_lib.init(problem, meta_params, params)
  return MEASURE(problem, meta_params, state, batches, 0.0, jax.random.key(0), **options)


def test_linear_dynamics_are_perfectly_smooth():
  """Targets m on a quadratic: the trained params are linear in m, and so is a linear outer loss."""
  problem = problem_lib.Problem(
    inner_loss=lambda p, m, b, rng: 0.5 * jnp.sum((p - m["target"]) ** 2),
    outer_loss=lambda p, m, b, rng: jnp.sum(p * jnp.arange(1.0, 6.0)),
    optimizer=lambda m: optax.sgd(0.1, momentum=0.5),
  )
  found = measure(problem, {"target": jnp.ones(5)}, jnp.zeros(5), jnp.zeros(8), step_size=0.5, num_directions=6)
  np.testing.assert_allclose(found.by_direction, np.ones(6), rtol=1e-6)
  np.testing.assert_allclose([found.smoothness, found.objective_agreement], 1.0, rtol=1e-4)
  assert found.smoothness_error < 1e-6 and found.objective_agreement_error < 1e-4
  np.testing.assert_allclose(found.measured, found.predicted, rtol=1e-3)


def test_a_kink_gives_the_weighted_sign_agreement():
  """x = m exactly after one SGD step of rate 1; the loss's kink turns the second coordinate back after the first step.

  D(z) = (0.3, 0.1), D(z + h v) = (0.3, -0.1): S = (0.3 - 0.1) / (0.3 + 0.1).
  """

  def bend(m):
    return jnp.stack([m[0], 0.1 - jnp.abs(m[1] - 0.1)])

  problem = problem_lib.Problem(
    inner_loss=lambda p, m, b, rng: 0.5 * jnp.sum((p - bend(m)) ** 2),
    outer_loss=lambda p, m, b, rng: p[0],
    optimizer=lambda m: optax.sgd(1.0),
  )
  direction = jnp.array([3.0, 1.0])
  found = measure(problem, jnp.zeros(2), jnp.ones(2), jnp.zeros(1), direction=direction, step_size=0.1)
  np.testing.assert_allclose(found.smoothness, 0.5, rtol=1e-5)
  np.testing.assert_allclose([found.predicted[0], found.measured[0]], 0.3, rtol=1e-5)
  assert np.isnan(found.smoothness_error)  # one direction has no spread


def test_chaotic_training_jumps_about_and_its_gradient_predicts_nothing():
  """Gradient descent on cos, x to x + rate sin(x): stable below the rate 2, chaotic at 4.

  Increments of independent Gaussians correlate by -1/2, and so do their weighted signs.
  """
  loss = lambda p, m, b, rng: jnp.mean(jnp.cos(p + m))
  problem = lambda rate: problem_lib.Problem(loss, loss, lambda m: optax.sgd(64 * rate))
  start = jnp.linspace(0.5, 2.5, 64)
  options = {"step_size": 0.1, "num_directions": 4}
  calm = measure(problem(0.1), jnp.zeros(64), start, jnp.zeros(12), **options)
  wild = measure(problem(4.0), jnp.zeros(64), start, jnp.zeros(12), **options)
  assert calm.smoothness > 0.95 and abs(calm.objective_agreement - 1) < 0.1
  assert abs(wild.smoothness + 0.5) < 0.2 and abs(wild.objective_agreement) < 0.1


def test_the_average_is_its_closed_form_and_changes_nothing_else():
  """a_T = (1 - d) / (1 - d^T) sum_t d^(T-t) p_t."""
  decay, length = 0.7, 6
  optimizer = optax.adam(0.3)
  wrapped = optax.chain(optax.clip_by_global_norm(5.0), smoothness.averaged(optimizer, decay))
  loss = lambda p, m, b, rng: jnp.sum((p["a"] - b) ** 2)
  problem = problem_lib.Problem(loss, loss, lambda m: wrapped)
  plain = dataclasses.replace(problem, optimizer=lambda m: optax.chain(optax.clip_by_global_norm(5.0), optimizer))
  params, batches, keys = (
    {"a": jnp.arange(3.0)},
    jnp.linspace(-2, 2, length),
    jax.random.split(jax.random.key(0), length),
  )
  state = problem_lib.init(problem, None, params)
  np.testing.assert_array_equal(smoothness.averaged_params(state)["a"], params["a"])
  history, reference = [], problem_lib.init(plain, None, params)
  for batch, key in zip(batches, keys, strict=True):
    state, _, _ = problem_lib.inner_step(problem, None, state, batch, key)
    reference, _, _ = problem_lib.inner_step(plain, None, reference, batch, key)
    history.append(np.asarray(state.params["a"]))
  np.testing.assert_array_equal(state.params["a"], reference.params["a"])
  weights = (1 - decay) / (1 - decay**length) * decay ** np.arange(length - 1, -1, -1)
  np.testing.assert_allclose(weights.sum(), 1.0)
  np.testing.assert_allclose(smoothness.averaged_params(state)["a"], weights @ np.stack(history), rtol=1e-5)
  with pytest.raises(errors.InputError, match="wrap it in smoothness"):
    smoothness.averaged_params(reference)


def test_the_outer_loss_sees_the_average():
  """p_t = p_0 - t m, so the average after two steps is p_0 - m (d + 2) / (1 + d)."""
  problem = problem_lib.Problem(
    inner_loss=lambda p, m, b, rng: jnp.sum(p * m),
    outer_loss=lambda p, m, b, rng: jnp.sum(p),
    optimizer=lambda m: smoothness.averaged(optax.sgd(1.0), 0.5),
    readout=smoothness.averaged_params,
  )
  direction = jnp.array([1.0, 3.0])
  found = measure(problem, jnp.ones(2), jnp.zeros(2), jnp.zeros(2), direction=direction, step_size=0.1)
  np.testing.assert_allclose(found.loss, -2 * 2.5 / 1.5, rtol=1e-5)
  np.testing.assert_allclose([found.predicted[0], found.measured[0]], -0.4 * 2.5 / 1.5, rtol=1e-5)
  np.testing.assert_allclose(found.smoothness, 1.0, rtol=1e-5)


def test_the_average_keeps_the_dtype_and_can_be_differentiated_in_its_decay():
  def last_average(decay):
    optimizer = smoothness.averaged(optax.sgd(1.0), decay)
    params, state = jnp.zeros((), jnp.bfloat16), optimizer.init(jnp.zeros((), jnp.bfloat16))
    for _ in range(2):  # p_1 = -1, p_2 = -2: a_2 = -(d + 2) / (1 + d), whose derivative in d is 1 / (1 + d)^2
      updates, state = optimizer.update(jnp.ones((), jnp.bfloat16), state, params)
      params = optax.apply_updates(params, updates)
    assert state.average.dtype == jnp.bfloat16
    return state.average.astype(jnp.float32)

  value, slope = jax.value_and_grad(last_average)(0.5)
  np.testing.assert_allclose([value, slope], [-2.5 / 1.5, 1 / 1.5**2], rtol=1e-2)


def test_bad_input_is_refused():
  problem = problem_lib.Problem(lambda p, m, b, r: p, lambda p, m, b, r: p, lambda m: optax.sgd(1.0))
  with pytest.raises(errors.InputError, match="num_directions must be at least 1, got 0"):
    measure(problem, jnp.zeros(()), jnp.zeros(()), jnp.zeros(2), num_directions=0)
  optimizer = smoothness.averaged(optax.sgd(1.0), 0.9)
  with pytest.raises(ValueError, match="needs the params"):
    optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))
