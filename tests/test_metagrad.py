"""Meta-gradients against closed forms, and what stays the same however they are computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from metagrad_problems import inner_loss, mlp, mlp_inputs, predict, relative_error, unrolled

from mftjax import metagrad
from mftjax.metagrad import smoothness

KEYS = jax.random.split(jax.random.key(0), 7)
LENGTH, START, RATE = 7, 2.0, 0.1
half_square = lambda p, m, b, rng: 0.5 * p**2


def trained_quadratic(optimizer, meta_params, inner_loss=half_square, **options):
  """d (x_T^2 / 2) / d (meta_params, x_0) through `metagrad.unroll`, where x_0 = 2 and T = 7."""
  problem = metagrad.Problem(inner_loss, half_square, optimizer)
  run = metagrad.unroll(problem, **options)

  def loss(meta_params, start):
    state, _ = run(meta_params, metagrad.init(problem, meta_params, start), jnp.zeros(LENGTH), KEYS)
    return 0.5 * state.params**2

  return jax.grad(loss, argnums=(0, 1))(meta_params, jnp.asarray(START))


@pytest.mark.parametrize("recovery", ["store", "checkpoint", "invert"])
def test_sgd_on_a_quadratic(recovery):
  """x_T = (1 - a)^T x_0, so dL/da = -T (1 - a)^(2T - 1) x_0^2 and dL/dx_0 = (1 - a)^(2T) x_0."""
  slopes = trained_quadratic(lambda m: optax.sgd(m), jnp.asarray(RATE), recovery=recovery)
  np.testing.assert_allclose(slopes[0], -LENGTH * 0.9 ** (2 * LENGTH - 1) * START**2, rtol=1e-5)
  np.testing.assert_allclose(slopes[1], 0.9 ** (2 * LENGTH) * START, rtol=1e-5)


@pytest.mark.parametrize("recovery", ["store", "checkpoint", "invert"])
def test_momentum_on_a_quadratic(recovery):
  """(x, v)_T = M^T (x_0, 0) with M = [[1 - a, -a b], [1, b]]; dM^T/dz = sum_k M^k (dM/dz) M^(T - 1 - k)."""
  a, b = RATE, 0.6
  matrix = np.array([[1 - a, -a * b], [1, b]])
  by_rate, by_momentum = np.array([[-1, -b], [0, 0]]), np.array([[0, -a], [0, 1]])
  power = functools.partial(np.linalg.matrix_power, matrix)
  derivative = lambda inner: sum(power(k) @ inner @ power(LENGTH - 1 - k) for k in range(LENGTH))[0, 0] * START
  end = power(LENGTH)[0, 0] * START
  found = trained_quadratic(
    lambda m: optax.sgd(m["rate"], momentum=m["momentum"]),
    {"rate": jnp.asarray(a), "momentum": jnp.asarray(b)},
    recovery=recovery,
  )
  np.testing.assert_allclose(found[0]["rate"], end * derivative(by_rate), rtol=1e-4)
  np.testing.assert_allclose(found[0]["momentum"], end * derivative(by_momentum), rtol=1e-4)
  np.testing.assert_allclose(found[1], end * power(LENGTH)[0, 0], rtol=1e-5)


def test_decoupled_weight_decay():
  """x_T = (1 - a (1 + w))^T x_0, so dL/dw = -a T (1 - a (1 + w))^(2T - 1) x_0^2."""
  optimizer = lambda decay: optax.chain(optax.add_decayed_weights(decay), optax.sgd(RATE))
  shrink = 1 - RATE * 1.5
  found = trained_quadratic(optimizer, jnp.asarray(0.5))[0]
  np.testing.assert_allclose(found, -RATE * LENGTH * shrink ** (2 * LENGTH - 1) * START**2, rtol=1e-5)


@pytest.mark.parametrize("method", ["mixed", "reverse", "forward"])
def test_a_mixture_of_quadratics(method):
  """f = sum_i w_i (x - c_i)^2 / 2, w = softmax(z): x_T - c = (1 - a)^T (x_0 - c) around the mean c = sum_i w_i c_i.

  So dL/dz_i = x_T (1 - (1 - a)^T) w_i (c_i - c) for L = x_T^2 / 2.
  """
  centres, logits = np.array([1.0, -2.0, 4.0], np.float32), np.array([0.3, -0.2, 0.1], np.float32)
  problem = metagrad.Problem(
    lambda p, m, b, rng: 0.5 * jnp.sum(jax.nn.softmax(m) * (p - centres) ** 2), half_square, lambda m: optax.sgd(RATE)
  )
  out = unrolled(problem, (jnp.asarray(logits), jnp.asarray(START), jnp.zeros(LENGTH), jnp.zeros(())), method)
  weights = np.exp(logits) / np.exp(logits).sum()
  centre, kept = weights @ centres, 0.9**LENGTH
  end = centre + kept * (START - centre)
  np.testing.assert_allclose(out.grad, end * (1 - kept) * weights * (centres - centre), rtol=1e-4)
  np.testing.assert_allclose(out.loss, end**2 / 2, rtol=1e-5)


def test_the_output_has_the_shapes_that_it_promises():
  meta_params, params, inner, outer = mlp_inputs(LENGTH)
  out = unrolled(mlp("adam"), (meta_params, params, inner, outer))
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(out.grad) == shapes(meta_params)
  assert shapes(out.state) == shapes(metagrad.init(mlp("adam"), meta_params, params))
  assert out.loss.shape == () and int(out.state.step) == LENGTH
  assert out.metrics["inner_loss"].shape == (LENGTH,)
  assert out.metrics["is_finite"].dtype == bool and bool(out.metrics["is_finite"])
  finite = out.metrics["finite"]
  assert {name: (x.shape, bool(x.all())) for name, x in finite.items()} == {
    **dict.fromkeys(("inner_loss", "inner_gradient", "update", "hessian_product"), ((LENGTH,), True)),
    "outer_loss": ((), True),
  }


@pytest.mark.parametrize("method", ["mixed", "reverse"])
def test_further_values_of_the_outer_loss_come_back(method):
  """They are those of the final params, and leave the gradient alone."""
  inputs = mlp_inputs(3)
  plain = mlp("sgd")
  with_aux = mlp(
    "sgd", has_aux=True, outer_loss=lambda *a: (plain.outer_loss(*a), {"predicted": predict(a[0], a[2][0])})
  )
  out, want = (unrolled(problem, inputs, method) for problem in (with_aux, plain))
  np.testing.assert_allclose(out.metrics["aux"]["predicted"], predict(out.state.params, inputs[3][0]), rtol=1e-5)
  assert relative_error((out.grad, out.loss), (want.grad, want.loss)) < 1e-6
  assert "aux" not in want.metrics


@pytest.mark.parametrize(
  ("method", "options"),
  [("mixed", {}), ("mixed", {"recovery": "invert", "save": "nothing"}), ("reverse", {})],
)
def test_micro_batches_change_no_number(method, options):
  with jax.enable_x64(True):
    inputs = mlp_inputs(5, rows=6)
    out, want = (unrolled(mlp("adam", micro_batches=count), inputs, method, **options) for count in (3, 1))
  assert relative_error((out.grad, out.state), (want.grad, want.state)) < 1e-9
  np.testing.assert_allclose(out.metrics["inner_loss"], want.metrics["inner_loss"], rtol=1e-10)


def test_micro_batches_draw_a_key_each_and_are_used_one_by_one():
  """With f = p <noise>, SGD and L = p, the gradient is the mean of the parts' draws: 2 parts, 2 numbers."""
  noise = lambda p, m, b, rng: p * m * jax.random.normal(rng) * jnp.mean(b)
  problem = metagrad.Problem(noise, lambda p, m, b, rng: p, lambda m: optax.sgd(1.0), micro_batches=2)
  batches = jnp.array([[1.0, 1.0, 3.0, 3.0]])
  out = unrolled(problem, (jnp.asarray(1.0), jnp.asarray(0.0), batches, jnp.zeros(())))
  draws = jax.vmap(jax.random.normal)(jax.random.split(metagrad.problem.split_keys(jax.random.key(1), 1)[0][0], 2))
  np.testing.assert_allclose(out.grad, -(draws[0] + 3 * draws[1]) / 2, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"recovery": "invert", "save": "nothing", "every": 4}])
def test_the_outer_loss_may_see_an_average(options):
  def problem(readout):
    optimizer = lambda m: smoothness.averaged(optax.adam(m["rate"], b1=m["decay"]), m["decay"])
    return mlp("adam", optimizer=optimizer, readout=readout)

  with jax.enable_x64(True):
    inputs = mlp_inputs()
    out = unrolled(problem(smoothness.averaged_params), inputs, **options)
    want = unrolled(problem(smoothness.averaged_params), inputs, "reverse")
    assert relative_error((out.grad, out.loss), (want.grad, want.loss)) < 1e-9
    assert relative_error(out.grad, unrolled(problem(None), inputs, "reverse").grad) > 0.1


@pytest.mark.parametrize("options", [{}, {"recovery": "invert", "save": "nothing", "every": 3}], ids=["auto", "invert"])
def test_compiled_or_not_and_mapped_over_tasks_gives_the_same_numbers(options):
  meta_params, params, inner, outer = mlp_inputs(4)
  problem = mlp("momentum")
  step = metagrad.value_and_grad(problem, **options)

  def gradient(rate, outer):
    meta = {**meta_params, "rate": rate}
    out = step(meta, metagrad.init(problem, meta, params), inner, outer, jax.random.key(1))
    return out.grad, out.state.params, out.metrics["finite"]

  rates, outers = jnp.asarray([0.01, 0.05]), jax.tree.map(lambda x: jnp.stack([x, -x]), outer)
  tasks = jax.jit(jax.vmap(gradient))(rates, outers)
  for task in range(2):
    arguments = (rates[task], jax.tree.map(lambda x: x[task], outers))  # noqa: B023 (used at once)
    want = jax.jit(gradient)(*arguments)
    assert relative_error(jax.tree.map(lambda x: x[task], tasks), want) < 1e-5  # noqa: B023
  assert relative_error(gradient(*arguments), want) < 1e-5


def test_a_non_finite_batch_shows_at_its_step():
  meta_params, params, inner, outer = mlp_inputs(5)
  broken = (inner[0].at[2, 0, 0].set(jnp.nan), *inner[1:])
  out = unrolled(mlp("adam"), (meta_params, params, broken, outer))
  after = np.arange(5) < 2
  np.testing.assert_array_equal(out.metrics["finite"]["inner_loss"], after)
  np.testing.assert_array_equal(out.metrics["finite"]["inner_gradient"], after)
  assert not out.metrics["finite"]["outer_loss"] and not out.metrics["is_finite"]


def test_a_second_derivative_that_is_not_finite_shows_where_it_arises():
  """|x|^1.5 has the gradient 0 and no second derivative at 0, where step 2 stands; what comes before it is lost too."""
  loss = lambda p, m, b, rng: jnp.abs(p - b) ** 1.5
  problem = metagrad.Problem(loss, lambda p, m, b, rng: p, lambda m: optax.sgd(0.0 * m))
  batches = jnp.array([3.0, 3.0, 2.0, 3.0])
  out = unrolled(problem, (jnp.asarray(0.1), jnp.asarray(2.0), batches, jnp.zeros(())))
  finite = out.metrics["finite"]
  for name in ("inner_loss", "inner_gradient", "outer_loss"):
    assert finite[name].all(), name
  np.testing.assert_array_equal(finite["hessian_product"], [False, False, False, True])
  np.testing.assert_array_equal(finite["update"], [False, False, True, True])
  assert not out.metrics["is_finite"] and jnp.isfinite(out.loss)


def test_bf16_compute_with_f32_params_is_near_f64():
  def narrow(params, meta_params, batch, rng):
    x, y, group = batch
    cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
    return inner_loss(cast(params), meta_params, (*cast((x, y)), group), rng).astype(jnp.float32)

  out = unrolled(mlp("momentum", inner_loss=narrow), mlp_inputs())
  with jax.enable_x64(True):
    want = unrolled(mlp("momentum"), mlp_inputs(), "reverse")
  assert {leaf.dtype for leaf in jax.tree.leaves((out.grad, out.state.params))} == {jnp.dtype(jnp.float32)}
  assert 1e-4 < relative_error(out.grad, want.grad) < 5e-2
  assert out.metrics["is_finite"]


def test_bf16_params_are_possible():
  """The rounding of the params themselves is what shows."""
  meta_params, params, inner, outer = mlp_inputs(3)
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  out = unrolled(mlp("sgd"), (meta_params, narrow, inner, outer))
  want = unrolled(mlp("sgd"), (meta_params, params, inner, outer), "reverse")
  assert {leaf.dtype for leaf in jax.tree.leaves(out.state.params)} == {jnp.dtype(jnp.bfloat16)}
  assert out.grad["rate"].dtype == jnp.float32
  assert relative_error(out.grad, want.grad) < 5e-2
