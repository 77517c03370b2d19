"""Meta-gradients against closed forms and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mftjax import errors, metagrad

OPTIMIZERS = {
  "adam": lambda m: optax.adam(jnp.exp(m["log_learning_rate"]), b1=0.9, eps_root=1e-16),
  "momentum": lambda m: optax.sgd(jnp.exp(m["log_learning_rate"]), momentum=0.9),
}


def mlp_problem(optimizer) -> metagrad.Problem:
  def predict(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"]

  def inner_loss(params, meta_params, batch, rng):
    x, y = batch
    weights = jax.nn.softmax(meta_params["logits"])
    return jnp.sum(weights * jnp.mean((predict(params, x) - y) ** 2, axis=-1))

  def outer_loss(params, meta_params, batch, rng):
    x, y = batch
    return jnp.mean((predict(params, x) - y) ** 2)

  return metagrad.Problem(inner_loss=inner_loss, outer_loss=outer_loss, optimizer=optimizer)


def mlp_inputs(length=6, rows=4):
  keys = jax.random.split(jax.random.key(0), 6)
  params = {
    "w1": jax.random.normal(keys[0], (3, 8)) / 2,
    "w2": jax.random.normal(keys[1], (8, 2)) / 2,
  }
  meta_params = {"log_learning_rate": jnp.log(0.05), "logits": jax.random.normal(keys[5], (rows,))}
  inner = (jax.random.normal(keys[2], (length, rows, 3)), jax.random.normal(keys[3], (length, rows, 2)))
  outer = (jax.random.normal(keys[4], (rows, 3)), jnp.ones((rows, 2)))
  return params, meta_params, inner, outer


def relative_error(got, want) -> float:
  got, want = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (got, want))
  return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_mixed_equals_reverse(name):
  problem = mlp_problem(OPTIMIZERS[name])
  params, meta_params, inner, outer = mlp_inputs()
  state = metagrad.init(problem, meta_params, params)
  outputs = {
    method: jax.jit(metagrad.value_and_grad(problem, method))(meta_params, state, inner, outer, jax.random.key(1))
    for method in ("mixed", "reverse", "first_order")
  }
  assert relative_error(outputs["mixed"].grad, outputs["reverse"].grad) < 1e-5
  assert relative_error(outputs["mixed"].state.params, outputs["reverse"].state.params) < 1e-6
  # The Hessian term matters here, so first order must differ.
  assert relative_error(outputs["first_order"].grad, outputs["reverse"].grad) > 1e-3
  assert int(outputs["mixed"].state.step) == 6


@pytest.mark.parametrize("method", ["mixed", "reverse"])
def test_learning_rate_of_sgd_on_a_quadratic(method):
  """x_T = (1 - a)^T x_0 and L = x_T^2 / 2, so dL/da = -T (1 - a)^(2T - 1) x_0^2."""
  problem = metagrad.Problem(
    inner_loss=lambda p, m, b, r: 0.5 * p**2,
    outer_loss=lambda p, m, b, r: 0.5 * p**2,
    optimizer=lambda m: optax.sgd(m),
  )
  rate, start, length = jnp.asarray(0.1), jnp.asarray(2.0), 7
  state = metagrad.init(problem, rate, start)
  out = metagrad.value_and_grad(problem, method)(rate, state, jnp.zeros(length), 0.0, jax.random.key(0))
  np.testing.assert_allclose(out.grad, -length * 0.9 ** (2 * length - 1) * 4.0, rtol=1e-5)
  np.testing.assert_allclose(out.loss, 0.5 * (0.9**length * 2.0) ** 2, rtol=1e-5)


def test_vmap_over_tasks_gives_the_same_numbers():
  problem = mlp_problem(OPTIMIZERS["adam"])
  params, meta_params, inner, outer = mlp_inputs()
  state = metagrad.init(problem, meta_params, params)
  step = metagrad.value_and_grad(problem)
  rates = jnp.log(jnp.asarray([0.01, 0.05]))
  tasks = {
    "log_learning_rate": rates,
    "logits": jnp.broadcast_to(meta_params["logits"], (2, *meta_params["logits"].shape)),
  }
  both = jax.vmap(lambda m: step(m, state, inner, outer, jax.random.key(1)).grad)(tasks)
  one = step({**meta_params, "log_learning_rate": rates[1]}, state, inner, outer, jax.random.key(1)).grad
  assert relative_error(jax.tree.map(lambda x: x[1], both), one) < 1e-5


def test_a_non_finite_batch_is_reported():
  problem = mlp_problem(OPTIMIZERS["adam"])
  params, meta_params, inner, outer = mlp_inputs()
  state = metagrad.init(problem, meta_params, params)
  step = metagrad.value_and_grad(problem)
  assert bool(step(meta_params, state, inner, outer, jax.random.key(1)).metrics["is_finite"])
  broken = (inner[0].at[2, 0, 0].set(jnp.nan), inner[1])
  assert not bool(step(meta_params, state, broken, outer, jax.random.key(1)).metrics["is_finite"])


def test_bad_input_is_refused():
  problem = mlp_problem(OPTIMIZERS["adam"])
  params, meta_params, inner, outer = mlp_inputs()
  state = metagrad.init(problem, meta_params, params)
  with pytest.raises(errors.InputError, match="Did you mean 'mixed'"):
    metagrad.value_and_grad(problem, "mixd")
  with pytest.raises(errors.InputError, match="takes no option, got depth"):
    metagrad.value_and_grad(problem, "mixed", depth=3)
  step = metagrad.value_and_grad(problem)
  empty = jax.tree.map(lambda x: x[:0], inner)
  with pytest.raises(errors.InputError, match="unroll_length >= 1"):
    step(meta_params, state, empty, outer, jax.random.key(1))
  with pytest.raises(errors.InputError, match="int32"):
    step({**meta_params, "count": jnp.zeros((), jnp.int32)}, state, inner, outer, jax.random.key(1))
