"""Implicit meta-gradients where the inner optimum is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mftjax import errors
from mftjax.metagrad import implicit, reverse
from mftjax.metagrad import problem as problem_lib

DIM = 4


def ridge_problem(num_parts: int = 1) -> problem_lib.Problem:
  """f = mean over rows (x p - y)^2 / 2 + exp(m) |p|^2 / 2, with p cut into two leaves; the outer loss sees m too."""

  def joined(params):
    return jnp.concatenate([params["head"], params["tail"]])

  def inner_loss(params, meta_params, batch, rng):
    x, y = batch
    p = joined(params)
    return 0.5 * jnp.mean((x @ p - y) ** 2) + 0.5 * jnp.sum(jnp.exp(meta_params["log_decay"]) * p**2)

  def outer_loss(params, meta_params, batch, rng):
    x, y = batch
    return 0.5 * jnp.mean((x @ joined(params) - y) ** 2) + 0.1 * jnp.sum(meta_params["log_decay"] ** 2)

  return problem_lib.Problem(inner_loss, outer_loss, lambda m: optax.sgd(m["learning_rate"]), micro_batches=num_parts)


def ridge_inputs(length: int = 3, from_optimum: bool = True):
  """(meta_params, state, inner_batches, outer_batch, rng); starts at the optimum of the window's mean loss."""
  draw = np.random.default_rng(0).standard_normal
  x, y = jnp.asarray(draw((length, 6, DIM))), jnp.asarray(draw((length, 6)))
  outer = jnp.asarray(draw((6, DIM))), jnp.asarray(draw(6))
  # A rate of 1e-9 keeps the steps of the single batches from leaving the optimum of their mean.
  meta_params = {"log_decay": jnp.linspace(-1.0, 0.5, DIM), "learning_rate": jnp.asarray(np.float64(1e-9))}
  p = optimum(meta_params["log_decay"], x, y) if from_optimum else jnp.ones(DIM)
  state = problem_lib.init(ridge_problem(), meta_params, {"head": p[:1], "tail": p[1:]})
  return meta_params, state, (x, y), outer, jax.random.key(1)


def optimum(log_decay, x, y):
  """(X^T X / n + diag(exp(m)))^-1 X^T y / n over all rows of the window."""
  x, y = x.reshape(-1, DIM), y.reshape(-1)
  return jnp.linalg.solve(x.T @ x / len(y) + jnp.diag(jnp.exp(log_decay)), x.T @ y / len(y))


def closed_form(meta_params, inner, outer):
  """The gradient of the outer loss at the optimum, by differentiating the solution itself."""

  def loss(log_decay):
    p = optimum(log_decay, *inner)
    return 0.5 * jnp.mean((outer[0] @ p - outer[1]) ** 2) + 0.1 * jnp.sum(log_decay**2)

  return jax.grad(loss)(meta_params["log_decay"])


SOLVERS = {"cg": {}, "neumann": {"num_terms": 200, "step_size": 0.4}}


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("solver", SOLVERS)
def test_exact_at_the_optimum(solver, num_parts):
  with jax.enable_x64(True):
    meta_params, state, inner, outer, rng = ridge_inputs()
    step = jax.jit(implicit.build(ridge_problem(num_parts), solver=solver, **SOLVERS[solver]))
    out = step(meta_params, state, inner, outer, rng)
    np.testing.assert_allclose(out.grad["log_decay"], closed_form(meta_params, inner, outer), rtol=1e-5)
    assert out.grad["learning_rate"] == 0.0  # no stationary point moves with it
    assert out.metrics["residual"] < 1e-6 and out.metrics["inner_gradient_norm"] < 1e-6


def test_a_converged_unroll_agrees_with_reverse():
  """300 steps on one repeated batch: reverse mode through all of them and the implicit gradient at the end meet."""
  with jax.enable_x64(True):
    meta_params, state, inner, outer, rng = ridge_inputs(from_optimum=False)
    meta_params = {**meta_params, "learning_rate": jnp.asarray(0.3)}
    inner = jax.tree.map(lambda x: jnp.broadcast_to(x[0], (300, *x.shape[1:])), inner)
    got = jax.jit(implicit.build(ridge_problem()))(meta_params, state, inner, outer, rng)
    want = jax.jit(reverse.build(ridge_problem()))(meta_params, state, inner, outer, rng)
    np.testing.assert_allclose(got.grad["log_decay"], want.grad["log_decay"], rtol=1e-6)
    np.testing.assert_allclose(want.grad["learning_rate"], 0.0, atol=1e-9)
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-12)
    np.testing.assert_allclose(got.metrics["inner_loss"], want.metrics["inner_loss"], rtol=1e-12)


def test_neumann_converges_with_its_terms():
  """The residual is |(I - step_size A)^num_terms b| / |b|, and the gradient is that of such a v."""
  with jax.enable_x64(True):
    inputs = meta_params, state, (x, _), outer, _ = ridge_inputs()
    rows = x.reshape(-1, DIM)
    matrix = rows.T @ rows / len(rows) + jnp.diag(jnp.exp(meta_params["log_decay"])) + 0.1 * jnp.eye(DIM)
    p = jnp.concatenate([state.params["head"], state.params["tail"]])
    b = outer[0].T @ (outer[0] @ p - outer[1]) / len(outer[1])
    for num_terms in (1, 4, 16):
      step = implicit.build(ridge_problem(), solver="neumann", num_terms=num_terms, step_size=0.4, damping=0.1)
      out = jax.jit(step)(*inputs)
      left = jnp.linalg.matrix_power(jnp.eye(DIM) - 0.4 * matrix, num_terms) @ b
      np.testing.assert_allclose(out.metrics["residual"], jnp.linalg.norm(left) / jnp.linalg.norm(b), rtol=1e-6)
      v = jnp.linalg.solve(matrix, b - left)
      direct = 0.2 * meta_params["log_decay"]
      want = direct - v * jnp.exp(meta_params["log_decay"]) * p  # d2 f / d p d m = diag(exp(m) p)
      np.testing.assert_allclose(out.grad["log_decay"], want, rtol=1e-6)


def test_metrics_tell_how_far_from_stationary():
  with jax.enable_x64(True):
    meta_params, state, inner, outer, rng = ridge_inputs(from_optimum=False)
    out = jax.jit(implicit.build(ridge_problem(), num_terms=1))(meta_params, state, inner, outer, rng)
    flat = lambda batch: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    gradient = jax.grad(ridge_problem().inner_loss)(state.params, meta_params, flat(inner), rng)
    np.testing.assert_allclose(out.metrics["inner_gradient_norm"], optax.tree.norm(gradient), rtol=1e-6)
    assert out.metrics["residual"] > 1e-2  # one iteration does not solve four unknowns


@pytest.mark.parametrize("solver", SOLVERS)
def test_jit_and_vmap_give_the_same_numbers(solver):
  meta_params, state, inner, outer, rng = ridge_inputs()
  step = implicit.build(ridge_problem(), solver=solver, num_terms=5)
  tasks = jax.tree.map(lambda x: jnp.stack([x + 0.5, x]), meta_params)
  both = jax.jit(jax.vmap(step, in_axes=(0, None, None, None, None)))(tasks, state, inner, outer, rng)
  one = jax.jit(step)(meta_params, state, inner, outer, rng)
  for x, y in zip(jax.tree.leaves(both.grad), jax.tree.leaves(one.grad), strict=True):
    np.testing.assert_allclose(x[1], y, rtol=1e-4)


def test_no_outer_gradient_is_no_error():
  problem = dataclasses.replace(ridge_problem(), outer_loss=lambda p, m, b, r: m["learning_rate"])
  out = jax.jit(implicit.build(problem))(*ridge_inputs())
  assert out.grad["learning_rate"] == 1.0 and np.all(out.grad["log_decay"] == 0.0)
  assert bool(out.metrics["is_finite"]) and out.metrics["residual"] == 0.0


@pytest.mark.parametrize(
  "options, message",
  [
    ({"solver": "newmann"}, "solver of method 'implicit': 'newmann'. Did you mean 'neumann'"),
    ({"num_terms": 0}, "num_terms must be a whole number >= 1, got 0"),
    ({"damping": -0.1}, "damping must be a number >= 0, got -0.1"),
    ({"step_size": 0.0}, "step_size must be a number > 0, got 0.0"),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(errors.InputError, match=message):
    implicit.build(ridge_problem(), **options)
