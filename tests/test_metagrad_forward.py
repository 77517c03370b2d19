"""Forward mode against reverse mode and a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mftjax import errors
from mftjax.metagrad import forward, reverse
from mftjax.metagrad import problem as problem_lib


def regression_problem() -> problem_lib.Problem:
  """A two-layer regression on noisy inputs, with Adam; the meta-parameters weigh the rows and set the rate."""

  def predict(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"]

  def inner_loss(params, meta_params, batch, rng):
    x, y = batch
    x = x + 0.1 * jax.random.uniform(rng, x.shape)
    weights = jax.nn.softmax(meta_params["logits"])
    return jnp.sum(weights * jnp.mean((predict(params, x) - y) ** 2, axis=-1))

  def outer_loss(params, meta_params, batch, rng):
    x, y = batch
    x = x + 0.1 * jax.random.uniform(rng, x.shape)
    return jnp.mean((predict(params, x) - y) ** 2), {"mean_logit": meta_params["logits"].mean()}

  optimizer = lambda m: optax.adam(jnp.exp(m["log_learning_rate"]), eps_root=1e-16)
  return problem_lib.Problem(inner_loss, outer_loss, optimizer, has_aux=True)


def regression_inputs(length: int, rows: int, width: int):
  """(meta_params, state, inner_batches, outer_batch, rng)"""
  draw = np.random.default_rng(0).standard_normal
  array = lambda *shape: jnp.asarray(draw(shape))
  params = {"w1": array(3, width) / 2, "w2": array(width, 2) / 2}
  meta_params = {"log_learning_rate": jnp.log(array() * 0 + 0.05), "logits": array(rows)}
  inner, outer = (array(length, rows, 3), array(length, rows, 2)), (array(rows, 3), array(rows, 2))
  state = problem_lib.init(regression_problem(), meta_params, params)
  return meta_params, state, inner, outer, jax.random.key(1)


def assert_same(got, want, rtol: float):
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


@settings(max_examples=4, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.sampled_from([None, 1, 2, 3]))
def test_forward_equals_reverse(length, rows, width, batch_size):
  with jax.enable_x64(True):
    inputs = regression_inputs(length, rows, width)
    got = jax.jit(forward.build(regression_problem(), batch_size=batch_size))(*inputs)
    want = jax.jit(reverse.build(regression_problem()))(*inputs)
    assert_same(got, want, 1e-10)  # grad, loss, state and every metric


@pytest.mark.parametrize("batch_size", [None, 1])
def test_learning_rate_and_decay_of_sgd_on_a_quadratic(batch_size):
  """x_T = (1 - a - a d)^T x_0 and L = x_T^2 / 2: with s = 1 - a - a d,
  dL/da = -T s^(2T - 1) (1 + d) x_0^2 and dL/dd = -T s^(2T - 1) a x_0^2."""
  loss = lambda p, m, b, r: 0.5 * p**2
  optimizer = lambda m: optax.chain(optax.add_decayed_weights(m[1]), optax.sgd(m[0]))
  problem = problem_lib.Problem(loss, loss, optimizer)
  meta_params, length = jnp.asarray([0.1, 0.5]), 7
  state = problem_lib.init(problem, meta_params, jnp.asarray(2.0))
  step = jax.jit(forward.build(problem, batch_size=batch_size))
  out = step(meta_params, state, jnp.zeros(length), 0.0, jax.random.key(0))
  np.testing.assert_allclose(out.grad, -length * 0.85 ** (2 * length - 1) * np.array([1.5, 0.1]) * 4.0, rtol=1e-5)
  np.testing.assert_allclose(out.loss, 0.5 * (0.85**length * 2.0) ** 2, rtol=1e-5)


def test_memory_stays_flat_in_the_unroll_length():
  step = jax.jit(forward.build(regression_problem()))
  short, long = (step.lower(*regression_inputs(length, 2, 128)).compile().memory_analysis() for length in (8, 64))
  assert long.temp_size_in_bytes < 1.1 * short.temp_size_in_bytes


def test_the_run_is_computed_once_for_all_directions():
  """FLOPs are a + k b for k directions, and what is left at k = 0 is the run itself."""
  meta_params, state, inner, outer, rng = regression_inputs(1, 16, 16)
  step = jax.jit(forward.build(regression_problem()))

  def flops(num_unused):
    more = {**meta_params, "unused": jnp.zeros(num_unused)}
    return step.lower(more, state, inner, outer, rng).cost_analysis()["flops"]

  plain = jax.jit(lambda *args: problem_lib.run(regression_problem(), *args))
  run = plain.lower(meta_params, state, inner, rng[None]).cost_analysis()["flops"]
  per_direction = (flops(28) - flops(8)) / 20
  assert flops(8) - (17 + 8) * per_direction > 0.9 * run


def test_jit_and_vmap_give_the_same_numbers():
  meta_params, state, inner, outer, rng = regression_inputs(3, 2, 4)
  step = forward.build(regression_problem(), batch_size=2)
  tasks = jax.tree.map(lambda x: jnp.stack([x - 0.5, x]), meta_params)
  both = jax.jit(jax.vmap(step, in_axes=(0, None, None, None, None)))(tasks, state, inner, outer, rng)
  one = jax.jit(step)(meta_params, state, inner, outer, rng)
  assert_same(jax.tree.map(lambda x: x[1], both), one, 1e-5)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, "all"])
def test_a_bad_batch_size_is_refused(batch_size):
  with pytest.raises(errors.InputError, match="batch_size must be a whole number >= 1"):
    forward.build(regression_problem(), batch_size=batch_size)
