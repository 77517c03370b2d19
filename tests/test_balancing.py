"""Gradient balancing: closed forms, optimality conditions, second implementations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mftjax import balancing, errors

few = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31 - 1)
KEY = jax.random.key(0)
mgda = jax.jit(balancing.mgda)
pcgrad = jax.jit(balancing.pcgrad)


@few
@given(seeds, st.floats(0.05, 20), st.floats(-2, 2))
def test_mgda_of_two_gradients_is_the_closed_form(seed, scale, lean):
  g1, g2 = np.random.default_rng(seed).normal(size=(2, 6))
  g2 = scale * g2 + lean * g1  # all three cases: inside, and either end
  share = np.clip((g2 - g1) @ g2 / np.sum((g1 - g2) ** 2), 0, 1)
  want = share * g1 + (1 - share) * g2
  got = mgda(jnp.array([g1, g2], jnp.float32), jnp.ones(2))
  np.testing.assert_allclose(got, want, atol=1e-4 * max(np.linalg.norm(g1), np.linalg.norm(g2)))


@few
@given(seeds)
@example(1014)  # slow to converge
def test_mgda_meets_the_condition_of_least_norm(seed):
  rng = np.random.default_rng(seed)
  grads = jnp.array(rng.normal(size=(6, 8)) * np.exp(rng.normal(size=(6, 1))), jnp.float32)
  coefficients = balancing.mgda_coefficients(grads, jnp.ones(6))
  assert float(coefficients.min()) >= 0 and float(coefficients.sum()) == pytest.approx(1.0, abs=1e-5)
  point = np.asarray(mgda(grads, jnp.ones(6)), np.float64)
  # The point is nearest to 0 in the hull if and only if no vertex lies on its near side.
  assert np.min(np.asarray(grads, np.float64) @ point) >= point @ point - 1e-4 * float(jnp.max(jnp.sum(grads**2, 1)))


def test_mgda_is_zero_where_the_hull_holds_the_origin_and_survives_degenerate_gradients():
  angles = 2 * np.pi * np.arange(3) / 3
  grads = jnp.array(np.stack([np.cos(angles), np.sin(angles)], 1), jnp.float32) * jnp.array([[1.0], [10.0], [0.1]])
  assert float(jnp.linalg.norm(mgda(grads, jnp.ones(3)))) < 1e-3
  np.testing.assert_array_equal(mgda(jnp.zeros((3, 2)), jnp.ones(3)), 0.0)
  same = jnp.tile(jnp.array([1.0, -2.0]), (3, 1))
  np.testing.assert_allclose(mgda(same, jnp.ones(3)), same[0], rtol=1e-6)
  np.testing.assert_allclose(mgda(1e-15 * grads[:2], jnp.ones(2)) * 1e15, mgda(grads[:2], jnp.ones(2)), rtol=1e-4)


def test_pcgrad_makes_a_conflicting_pair_orthogonal_to_each_other():
  grads = jnp.array([[1.0, 0.0, 0.5], [-1.0, 2.0, 0.0]])
  first = pcgrad(grads, jnp.array([1.0, 1e-30]), KEY)
  second = pcgrad(grads, jnp.array([1e-30, 1.0]), KEY)
  assert float(first @ grads[1]) == pytest.approx(0.0, abs=1e-6)
  assert float(second @ grads[0]) == pytest.approx(0.0, abs=1e-6)
  np.testing.assert_allclose(first, grads[0] + grads[1] / 5, rtol=1e-6)
  np.testing.assert_allclose(pcgrad(grads, jnp.ones(2), KEY), first + second, rtol=1e-6)


@few
@given(seeds)
def test_pcgrad_without_conflict_is_the_sum(seed):
  grads = jnp.abs(jax.random.normal(jax.random.key(seed), (4, 5)))  # one orthant: every product is positive
  weights = jnp.array([1.0, 2.0, 0.5, 1.0])
  np.testing.assert_allclose(pcgrad(grads, weights, KEY), weights @ grads, rtol=1e-5)
  np.testing.assert_allclose(balancing.weighted_sum(grads, weights), weights @ grads, rtol=1e-5)


@few
@given(seeds)
def test_pcgrad_is_algorithm_1_on_vectors(seed):
  grads = np.random.default_rng(seed).normal(size=(4, 5))
  want = np.zeros(5)
  for i, key in enumerate(jax.random.split(KEY, 4)):
    g = grads[i].copy()
    for j in np.asarray(jax.random.permutation(key, 4)):
      if j != i and g @ grads[j] < 0:
        g -= (g @ grads[j]) / (grads[j] @ grads[j]) * grads[j]
    want += g
  np.testing.assert_allclose(pcgrad(jnp.array(grads, jnp.float32), jnp.ones(4), KEY), want, atol=1e-4)


def test_pcgrad_meets_the_others_in_an_order_drawn_by_the_key():
  grads = jnp.array([[1.0, 0.0], [-1.0, 1.0], [-1.0, -2.0]])
  results = {tuple(np.round(np.asarray(pcgrad(grads, jnp.ones(3), jax.random.key(i))), 4).tolist()) for i in range(12)}
  assert len(results) > 1


@pytest.mark.parametrize("name", sorted(balancing.BALANCERS))
@pytest.mark.parametrize("garbage", [0.0, -1e4, jnp.nan, jnp.inf])
def test_an_absent_ability_has_no_influence(name, garbage):
  # Two abilities, for which the order of pcgrad does not matter.
  grads = jnp.array([[1.0, 0.0, 0.5], [-1.0, 2.0, 0.0]])
  spoilt = jnp.insert(grads, 1, garbage, axis=0)
  weights = jnp.array([0.4, 0.0, 0.6])

  def total(grads, weights):
    direction = balancing.BALANCERS[name](grads, weights, KEY)
    return jnp.sum(direction * jnp.array([1.0, -2.0, 3.0])), direction

  (_, want), want_grad = jax.value_and_grad(total, has_aux=True)(grads, weights[jnp.array([0, 2])])
  (_, got), got_grad = jax.jit(jax.value_and_grad(total, has_aux=True))(spoilt, weights)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(got_grad[1], 0.0)
  np.testing.assert_allclose(np.delete(got_grad, 1, axis=0), want_grad, rtol=1e-3, atol=1e-4)
  assert np.linalg.norm(want_grad) > 0.1


def test_mgda_is_differentiable_as_its_closed_form():
  def closed(grads):
    g1, g2 = grads
    share = (g2 - g1) @ g2 / jnp.sum((g1 - g2) ** 2)
    return jnp.sum((share * g1 + (1 - share) * g2) * jnp.array([1.0, -2.0]))

  grads = jnp.array([[1.0, 0.2], [-0.5, 1.0]])
  got = jax.grad(lambda grads: jnp.sum(balancing.mgda(grads, jnp.ones(2), 1) * jnp.array([1.0, -2.0])))(grads)
  np.testing.assert_allclose(got, jax.grad(closed)(grads), rtol=1e-4)


def test_balance_takes_and_returns_pytrees():
  gradients = {
    "a": jnp.array([[1.0, 0.0], [-1.0, 2.0]]),
    "b": {"c": jnp.array([[[0.5]], [[0.0]]], jnp.bfloat16)},
  }
  rows = jnp.array([[1.0, 0.0, 0.5], [-1.0, 2.0, 0.0]])
  for name, balancer in balancing.BALANCERS.items():
    got = balancing.balance(name, gradients, jnp.ones(2), KEY)
    want = balancer(rows, jnp.ones(2), KEY)
    np.testing.assert_allclose(got["a"], want[:2], rtol=1e-6)
    np.testing.assert_allclose(got["b"]["c"].astype(jnp.float32), want[2:, None], rtol=1e-2)
    assert got["b"]["c"].shape == (1, 1) and got["b"]["c"].dtype == jnp.bfloat16
  with pytest.raises(errors.InputError, match="Did you mean 'pcgrad'"):
    balancing.balance("pcgard", gradients, jnp.ones(2), KEY)


def test_vmap_is_a_loop():
  many = jax.random.normal(KEY, (3, 4, 5))
  for balancer in balancing.BALANCERS.values():
    balancer = jax.jit(balancer)
    looped = jnp.stack([balancer(grads, jnp.ones(4), KEY) for grads in many])
    got = jax.vmap(lambda grads, balancer=balancer: balancer(grads, jnp.ones(4), KEY))(many)
    np.testing.assert_allclose(got, looped, atol=1e-4)


def test_famo_weights_and_update_are_algorithm_1():
  state = balancing.FamoState(logits=jnp.array([0.3, -0.2, 0.5]))
  before, after = np.array([1.0, 4.0, 2.0]), np.array([0.5, 3.0, 1.9])
  z = np.exp([0.3, -0.2, 0.5]) / np.exp([0.3, -0.2, 0.5]).sum()
  want = z / before / np.sum(z / before)
  np.testing.assert_allclose(balancing.famo_weights(state, jnp.array(before)), want, rtol=1e-5)
  # delta is the gradient in the logits of sum_i softmax(logits)_i r_i.
  rates = jnp.array(np.log(before / after))
  delta = jax.grad(lambda logits: jnp.sum(jax.nn.softmax(logits) * rates))(state.logits)
  got = balancing.famo_update(state, jnp.array(before), jnp.array(after), 0.4, decay=0.01)
  np.testing.assert_allclose(got.logits, state.logits - 0.4 * (delta + 0.01 * state.logits), rtol=1e-5)


@pytest.mark.parametrize("garbage", [0.0, -1.0, jnp.nan, jnp.inf])
def test_famo_leaves_absent_abilities_out(garbage):
  weights = jnp.array([1.0, 0.0, 1.0])
  state = balancing.FamoState(logits=jnp.array([0.3, 9.0, -0.2]))
  two = balancing.FamoState(logits=jnp.array([0.3, -0.2]))
  before, after = jnp.array([1.0, garbage, 2.0]), jnp.array([0.5, garbage, 1.9])
  keep = jnp.array([0, 2])
  got = balancing.famo_weights(state, before, weights)
  np.testing.assert_allclose(got[keep], balancing.famo_weights(two, before[keep]), rtol=1e-6)
  assert float(got[1]) == 0.0
  got = balancing.famo_update(state, before, after, 0.4, weights).logits
  np.testing.assert_allclose(got[keep], balancing.famo_update(two, before[keep], after[keep], 0.4).logits, rtol=1e-6)
  assert float(got[1]) == 9.0
  grad = jax.grad(lambda losses: jnp.sum(balancing.famo_weights(state, losses, weights) * losses**0))(before)
  assert bool(jnp.all(grad[keep] == 0))


def test_famo_equalises_the_decrease_of_two_quadratics_of_different_scale():
  losses_fn = lambda x: jnp.array([5.0, 0.5]) * x**2  # [2]
  start = jnp.array([1.0, 3.0])  # not 1 and 1, where equal shares of the log-losses are already right

  def train(weights_fn, logits_rate):
    def step(carry, _):
      x, state = carry
      losses, pullback = jax.vjp(losses_fn, x)
      weights = weights_fn(state, losses)
      x = x - 0.01 * pullback(weights)[0]
      return (x, balancing.famo_update(state, losses, losses_fn(x), logits_rate, decay=0.0)), weights

    (x, _), weights = jax.lax.scan(step, (start, balancing.famo_init(2)), length=200)
    fall = np.log(np.asarray(losses_fn(start) / losses_fn(x)))  # [2] how far each log-loss fell
    return fall, abs(fall[0] - fall[1]) / fall.max(), weights[-1]

  mean, mean_gap, _ = train(lambda state, losses: jnp.full(2, 0.5), 0.0)
  _, fixed_gap, _ = train(balancing.famo_weights, 0.0)
  famo, famo_gap, weights = train(balancing.famo_weights, 50.0)
  assert mean_gap > 0.85 and fixed_gap > 0.85  # the mean lowers each at the rate of its curvature, 10 to 1
  assert famo_gap < 0.05
  assert famo.min() > mean.min()
  # Rates are weight times curvature, so equal ones need weights of 1 to 10.
  np.testing.assert_allclose(weights, [1 / 11, 10 / 11], rtol=1e-2)
