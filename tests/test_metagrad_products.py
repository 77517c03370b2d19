"""Hessian products: exact, by differences and without the Hessian, and the errors that they report."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from metagrad_problems import inner_loss, mlp, mlp_inputs, relative_error, unrolled

from mftjax import metagrad
from mftjax.metagrad import products

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def dense():
  """((params, meta_params, batch, u), the product in params and meta_params by dense Hessians), numpy f64."""
  with jax.enable_x64(True):
    meta_params, params, inner, _ = mlp_inputs(1)
    batch = jax.tree.map(lambda x: x[0], inner)
    u = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    meta_flat, meta_unravel = jax.flatten_util.ravel_pytree(meta_params)
    loss = lambda p, m: inner_loss(unravel(p), meta_unravel(m), batch, KEY)
    hessian, cross = jax.jit(jax.jacrev(jax.grad(loss), argnums=(0, 1)))(flat, meta_flat)  # reverse over reverse
    along = jax.flatten_util.ravel_pytree(u)[0]
    found = (params, meta_params, batch, u), (unravel(along @ hessian), meta_unravel(along @ cross))
    return jax.tree.map(np.asarray, found)


def apply(build, inputs, loss=inner_loss):
  """A product in (params, meta_params) and its reported error, at the dtype that JAX is set to."""
  params, meta_params, batch, u = jax.tree.map(jnp.asarray, inputs)
  made = build(metagrad.Problem(loss, loss, lambda m: optax.sgd(0.1)))
  _, _, saved = made.evaluate(params, meta_params, batch, KEY)
  *bars, error = jax.jit(lambda saved: made.apply(params, meta_params, batch, KEY, saved, u))(saved)
  return tuple(bars), np.asarray(error)


@pytest.mark.parametrize("name", ["exact", "linearized"])
def test_the_exact_ones_equal_the_dense_hessian(name, dense):
  inputs, want = dense
  with jax.enable_x64(True):
    linearized = lambda problem: products.linearized(problem, inputs[1], inputs[0], inputs[2], KEY)[0]
    bars, error = apply({"exact": products.exact, "linearized": linearized}[name], inputs)
  for got, expected in zip(bars, want, strict=True):
    assert relative_error(got, expected) < 1e-12
  np.testing.assert_array_equal(error, [0, 0])


def test_linearized_keeps_what_differs_between_steps_alone():
  """For sum(tanh(x frozen w)) it keeps bytes that do not count the frozen matrix, nor the params themselves."""
  frozen = jnp.ones((50, 60))
  loss = lambda p, m, b, rng: jnp.sum(jnp.tanh(b @ frozen @ p) ** 2)
  problem = metagrad.Problem(loss, loss, lambda m: optax.sgd(0.1))
  _, num_bytes = products.linearized(problem, jnp.ones(()), jnp.ones((60, 2)), jnp.ones((3, 50)), KEY)
  assert 3 * 2 * 4 <= num_bytes < 60 * 50 * 4


@pytest.mark.parametrize("x64", [True, False], ids=["f64", "f32"])
def test_one_sided_differences_are_as_near_as_they_say(x64, dense):
  """The step balances rounding and truncation: either is about half the digits, sqrt(eps)."""
  inputs, want = dense
  with jax.enable_x64(x64):
    bars, (rounding, truncation) = apply(products.finite_one_sided, inputs)
  true = relative_error(bars, want)
  eps = np.finfo(np.float64 if x64 else np.float32).eps
  assert 0.01 * eps**0.5 < true < 30 * eps**0.5
  assert true / 30 < rounding < 30 * true
  assert truncation == 0  # which a one-sided difference cannot see


@pytest.mark.parametrize("x64", [True, False], ids=["f64", "f32"])
def test_central_differences_are_nearer_and_see_the_truncation(x64, dense):
  inputs, want = dense
  with jax.enable_x64(x64):
    bars, (rounding, _) = apply(products.finite_central, inputs)
    one_sided, _ = apply(products.finite_one_sided, inputs)
  true = relative_error(bars, want)
  assert true < relative_error(one_sided, want) / (20 if x64 else 2)
  assert true / 50 < rounding < 50 * true


def test_the_truncation_is_the_closed_form_of_a_cubic():
  """For sum p^3 / 6 a one-sided difference is off by h u^2 / 2 beside p u, with h |u| = eps^(1/3) (1 + |p|) / 5."""
  p, u = np.array([1.0, -2.0, 0.5]), np.array([0.3, 0.1, -0.2])
  loss = lambda params, m, b, rng: jnp.sum(params**3) / 6 + 0.0 * m
  with jax.enable_x64(True):
    bars, (rounding, truncation) = apply(products.finite_central, (p, np.float64(1.0), np.zeros(1), u), loss)
  h = np.finfo(np.float64).eps ** (1 / 3) / 5 * (1 + np.linalg.norm(p)) / np.linalg.norm(u)
  off = np.linalg.norm(h * u**2 / 2) / np.linalg.norm(p * u)
  np.testing.assert_allclose(bars[0], p * u, rtol=1e-9)
  np.testing.assert_allclose(truncation, off, rtol=1e-3)
  assert rounding < off / 100


def test_the_rounding_of_a_constant_hessian_is_bounded_closely():
  """For |A p|^2 / 2 nothing is truncated: what is off is rounding alone, here of 40 products in f32."""
  draw = np.random.default_rng(0)
  errors, bounds = [], []
  for _ in range(20):
    matrix, p, u = draw.normal(size=(8, 8)), draw.normal(size=8), draw.normal(size=8)
    loss = lambda params, m, b, rng: jnp.sum((b @ params) ** 2) / 2 + 0.0 * m
    bars, (rounding, _) = apply(products.finite_one_sided, (p, np.float32(1.0), matrix, u), loss)
    errors.append(relative_error(bars[0], matrix.T @ matrix @ u))
    bounds.append(rounding)
  ratio = np.array(errors) / np.array(bounds)
  assert 0.1 < np.median(ratio) < 3 and ratio.max() < 10


def test_no_cotangent_gives_no_product():
  inputs = (np.ones(3), np.float32(1.0), np.ones(3), np.zeros(3))
  loss = lambda params, m, b, rng: jnp.sum(params**3) * m
  for build in (products.finite_one_sided, products.finite_central):
    bars, error = apply(build, inputs, loss)
    np.testing.assert_array_equal(np.concatenate([np.ravel(x) for x in jax.tree.leaves(bars)]), 0)
    np.testing.assert_array_equal(np.isfinite(error), True)


@pytest.mark.parametrize("central", [False, True])
def test_finite_differences_through_an_unroll(central):
  """Their errors come back step by step; the meta-gradient is off by about as much."""
  with jax.enable_x64(True):
    inputs = mlp_inputs(4)
    want = unrolled(mlp("momentum"), inputs, "reverse").grad
    out = unrolled(mlp("momentum"), inputs, "finite_difference", central=central, recovery="checkpoint", every=2)
  error = np.asarray(out.metrics["product_error"])
  assert error.shape == (4, 2) and (error[:, 0] > 0).all() and ((error[:, 1] > 0) == central).all()
  true = relative_error(out.grad, want)
  assert 0 < true < 30 * error[:, 0].max() and true < (1e-9 if central else 1e-7)


def test_finite_differences_keep_the_dtype_of_bf16_params():
  meta_params, params, inner, outer = mlp_inputs(2)
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  out = unrolled(mlp("sgd"), (meta_params, narrow, inner, outer), "finite_difference")
  want = unrolled(mlp("sgd"), (meta_params, narrow, inner, outer), "reverse")
  assert relative_error(out.grad, want.grad) < 0.3


def test_first_order_differs_where_the_hessian_matters():
  with jax.enable_x64(True):
    inputs = mlp_inputs()
    out, want = (unrolled(mlp("momentum"), inputs, method) for method in ("first_order", "reverse"))
  for name in ("rate", "decay", "logits"):
    assert relative_error(out.grad[name], want.grad[name]) > 0.05, name
  assert relative_error(out.state, want.state) < 1e-12


def test_first_order_is_exact_where_the_loss_is_linear_in_params():
  """Then the Hessian is zero, and what goes through Adam's moments and the weights of the loss stays."""

  def linear(params, meta_params, batch, rng):
    weights = jax.nn.softmax(meta_params["logits"])[batch[2]]
    return jnp.sum(weights @ jnp.tanh(batch[0]) @ params["w1"]) + jnp.sum(params["w2"] * meta_params["decay"])

  with jax.enable_x64(True):
    problem = mlp("adamw", inner_loss=linear)
    out, want = (unrolled(problem, mlp_inputs(), method) for method in ("first_order", "reverse"))
  for name in ("rate", "decay", "logits"):
    assert np.linalg.norm(want.grad[name]) > 1e-4
    assert relative_error(out.grad[name], want.grad[name]) < 1e-10, name
