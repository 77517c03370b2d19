"""Windows of an inner run, and the bias of their meta-gradients against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mftjax import errors
from mftjax.metagrad import problem as problem_lib
from mftjax.metagrad import reverse, windows

CURVATURES = np.array([1.0, 0.02])
START = np.array([1.0, 3.0])
HORIZON = 16


def quadratic_problem() -> problem_lib.Problem:
  """L(x) = sum h x^2 / 2 on both levels, SGD with learning rate exp(meta_params)."""
  loss = lambda params, meta_params, batch, rng: 0.5 * jnp.sum(jnp.asarray(CURVATURES, jnp.float32) * params**2)
  return problem_lib.Problem(loss, loss, lambda meta_params: optax.sgd(jnp.exp(meta_params)))


def closed_form(rate: float, length: int) -> float:
  """Mean over windows of d L / d log rate: x_t = (1 - rate h)^t x_0, the window's start constant."""
  shrink = 1 - rate * CURVATURES
  starts = length * np.arange(HORIZON // length)
  terms = -length * CURVATURES**2 * shrink ** (2 * length - 1 + 2 * starts[:, None]) * START**2
  return rate * terms.sum(axis=1).mean()


def report_at(rate: float, **options) -> windows.TruncationReport:
  meta_params = jnp.log(jnp.float32(rate))
  problem = quadratic_problem()
  state = problem_lib.init(problem, meta_params, jnp.asarray(START, jnp.float32))
  batches = jnp.zeros(HORIZON)
  return windows.truncation_bias(problem, meta_params, state, batches, 0.0, jax.random.key(0), **options)


def test_short_windows_want_a_smaller_learning_rate_as_the_closed_form_says():
  """Wu et al. (2018): between the optima of a short horizon and of the whole, the sign of d L / d rate differs."""
  rate = 1.6  # overshoots along the first axis, crawls along the second
  exact = {length: closed_form(rate, length) for length in (1, 2, 4, 8, 16)}
  assert exact[1] > 0 > exact[16]
  report = report_at(rate)
  for length, agreement in report.overall.items():
    same = np.sign(exact[length]) == np.sign(exact[16])
    np.testing.assert_allclose(agreement.norm_ratio, abs(exact[length] / exact[16]), rtol=1e-4)
    np.testing.assert_allclose(agreement.cosine, 1.0 if same else -1.0, rtol=1e-6)
    assert agreement.sign_agreement == same
    assert report.by_parameter[length] == {"meta_params": agreement}
  wrong = [length for length in exact if exact[length] > 0]
  assert report.enough == 2 * max(wrong) < HORIZON
  assert f"Windows of {report.enough} steps are enough" in report.table()


def test_a_learning_rate_that_is_too_low_for_every_window():
  assert all(closed_form(0.1, length) < 0 for length in (1, 2, 4, 8, 16))
  assert report_at(0.1).enough == 1
  report = report_at(1.6, lengths=[1])
  assert report.enough is None and list(report.overall) == [1, 16]
  assert "Only the whole horizon of 16" in report.table()


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_every_window_draws_what_the_whole_run_draws(micro_batches):
  """With inner loss <m * noise(rng), x>, SGD and L = <c, x>, the gradient is -c sum_t noise_t: windows add up."""
  noise = lambda batch, rng: jax.random.normal(rng, (8,)) + batch.mean()
  problem = problem_lib.Problem(
    inner_loss=lambda p, m, batch, rng: jnp.sum(p * m["a"]["b"] * noise(batch, rng)) + 0.0 * jnp.sum(m["none"]),
    outer_loss=lambda p, m, batch, rng: jnp.sum(p * jax.random.normal(rng, (8,))),
    optimizer=lambda m: optax.sgd(1.0),
    micro_batches=micro_batches,
  )
  meta_params = {"a": {"b": jnp.ones(8)}, "none": jnp.zeros(2)}
  state = problem_lib.init(problem, meta_params, jnp.zeros(8))
  batches = jax.random.normal(jax.random.key(1), (7, 2))
  report = windows.truncation_bias(problem, meta_params, state, batches, 0.0, jax.random.key(2), lengths=[1, 7])
  assert report.by_parameter[1]["a.b"].cosine > 1 - 1e-6
  np.testing.assert_allclose(report.by_parameter[1]["a.b"].norm_ratio, 1 / 7, rtol=1e-5)
  assert report.by_parameter[1]["none"] == windows.Agreement(1.0, 1.0, 1.0)
  assert report.enough == 1


def test_advance_is_the_unroll_without_its_gradient():
  noisy = lambda p, m, b, rng: jnp.sum((p - m - b - jax.random.normal(rng, (3,))) ** 2)
  problem = problem_lib.Problem(noisy, noisy, lambda m: optax.adam(0.1))
  meta_params, batches, key = jnp.ones(3), jnp.arange(5.0), jax.random.key(3)
  state = problem_lib.init(problem, meta_params, jnp.zeros(3))
  got = windows.advance(problem, meta_params, state, batches, key)
  want = reverse.build(problem)(meta_params, state, batches, 0.0, key).state
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_random_starts_are_all_the_windows_that_fit():
  starts = jax.vmap(lambda key: windows.random_start(key, 10, 7))(jax.random.split(jax.random.key(0), 200))
  assert set(starts.tolist()) == {0, 1, 2, 3}
  assert int(windows.random_start(jax.random.key(0), 7, 7)) == 0


def test_bad_input_is_refused():
  for length in (0, 11):
    with pytest.raises(errors.InputError, match="1 <= unroll_length <= horizon = 10"):
      windows.random_start(jax.random.key(0), 10, length)
  with pytest.raises(errors.InputError, match=r"1 .. 16 \(the horizon\), got 32"):
    report_at(0.1, lengths=[2, 32])
