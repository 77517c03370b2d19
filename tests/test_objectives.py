"""Objectives over the abilities: closed forms, properties, and no influence of absent abilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mftjax import errors, objectives

few = settings(max_examples=30, deadline=None)
abilities = st.lists(
  st.tuples(st.floats(0, 8, width=32), st.floats(0.125, 4, width=32)), min_size=5, max_size=5
)  # (loss, weight); one length: one compilation
LOSSES = jnp.array([1.0, 3.0, 2.0, 0.5])
BASE = jnp.array([2.0, 4.0, 2.5, 1.0])
REFERENCE = jnp.array([0.5, 2.0, 2.25, 0.25])
WEIGHTS = jnp.array([0.1, 0.2, 0.3, 0.4])


def split(pairs):
  losses, weights = (jnp.array(x, jnp.float32) for x in zip(*pairs, strict=True))
  return losses, weights


def context(weights=WEIGHTS, base=BASE, reference=REFERENCE):
  return objectives.Context(weights=weights, base=base, reference=reference)


@few
@given(abilities, st.floats(0.02, 5))
def test_worst_lies_between_the_maximum_and_the_maximum_plus_t_log_n(pairs, temperature):
  losses, weights = split(pairs)
  value = float(objectives.worst(losses, weights, temperature))
  top = float(losses.max())
  assert top - 1e-4 <= value <= top + temperature * np.log(5) + 1e-4


def test_worst_tends_to_the_maximum_and_weighs_no_present_ability():
  assert float(objectives.worst(LOSSES, WEIGHTS, 1e-3)) == pytest.approx(3.0, abs=1e-5)
  assert float(objectives.worst(LOSSES, WEIGHTS, 1.0)) == pytest.approx(float(np.log(np.exp(LOSSES).sum())), rel=1e-6)
  # Equal losses reach the upper bound.
  assert float(objectives.worst(jnp.ones(4), WEIGHTS, 0.5)) == pytest.approx(1 + 0.5 * np.log(4), rel=1e-6)


def rockafellar_uryasev(losses, weights, fraction):
  """The minimum over t, which one of the losses attains."""
  losses, p = np.asarray(losses, np.float64), np.asarray(weights, np.float64) / np.sum(np.asarray(weights, np.float64))
  return min(t + np.sum(p * np.maximum(losses - t, 0)) / fraction for t in losses)


@few
@given(abilities, st.floats(0.02, 1))
def test_cvar_is_the_minimum_of_rockafellar_and_uryasev(pairs, fraction):
  losses, weights = split(pairs)
  value = float(objectives.cvar(losses, weights, fraction))
  assert value == pytest.approx(rockafellar_uryasev(losses, weights, fraction), abs=2e-4)


def test_cvar_closed_forms():
  assert float(objectives.cvar(LOSSES, WEIGHTS, 1.0)) == pytest.approx(
    float(objectives.weighted_mean(LOSSES, WEIGHTS)), rel=1e-6
  )
  assert float(objectives.cvar(LOSSES, WEIGHTS, 1e-6)) == 3.0
  # 0.2 of loss 3 and 0.1 of the 0.3 of loss 2.
  assert float(objectives.cvar(LOSSES, WEIGHTS, 0.3)) == pytest.approx((0.2 * 3 + 0.1 * 2) / 0.3, rel=1e-6)
  np.testing.assert_allclose(
    jax.grad(objectives.cvar)(LOSSES, WEIGHTS, 0.3), np.array([0, 0.2, 0.1, 0]) / 0.3, rtol=1e-5, atol=1e-7
  )


@few
@given(abilities, st.permutations(range(5)), st.sampled_from(sorted(objectives.OBJECTIVES)))
def test_the_order_of_the_abilities_does_not_matter(pairs, order, name):
  losses, weights = split(pairs)
  base, reference, order = jnp.linspace(1, 6, 5), jnp.linspace(0.5, 1, 5), jnp.array(order)
  value = objectives.build(name)(losses, context(weights, base, reference))
  other = objectives.build(name)(losses[order], context(weights[order], base[order], reference[order]))
  assert float(value) == pytest.approx(float(other), rel=1e-4, abs=1e-4)


@few
@given(abilities, st.lists(st.floats(0, 2, width=32), min_size=5, max_size=5))
def test_a_higher_loss_never_lowers_an_objective(pairs, rise):
  losses, weights = split(pairs)
  ctx = context(weights, jnp.linspace(1, 6, 5), jnp.linspace(0.5, 1, 5))
  for name in objectives.OBJECTIVES:
    objective = objectives.build(name)
    before, after = float(objective(losses, ctx)), float(objective(losses + jnp.array(rise), ctx))
    assert after >= before - 1e-4 * (1 + abs(before)), name


@pytest.mark.parametrize("name", sorted(objectives.OBJECTIVES))
@pytest.mark.parametrize("garbage", [0.0, 1e30, jnp.nan, -jnp.inf])
def test_an_absent_ability_has_no_influence(name, garbage):
  objective = objectives.build(name)
  spoilt = lambda x: jnp.insert(x, 2, garbage)
  ctx = context(jnp.insert(WEIGHTS, 2, 0.0), spoilt(BASE), spoilt(REFERENCE))
  want, want_grad = jax.value_and_grad(objective)(LOSSES, context())
  got, got_grad = jax.jit(jax.value_and_grad(objective))(spoilt(LOSSES), ctx)
  assert float(got) == pytest.approx(float(want), rel=1e-6)
  assert float(got_grad[2]) == 0.0
  np.testing.assert_allclose(np.delete(got_grad, 2), want_grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", sorted(objectives.OBJECTIVES))
def test_the_slope_is_the_central_difference(name):
  objective = objectives.build(name)
  direction = jnp.array([0.3, -0.5, 0.8, 0.2])
  along = lambda t: objective(LOSSES + t * direction, context())
  slope = (along(1e-2) - along(-1e-2)) / 2e-2
  assert float(jax.grad(along)(0.0)) == pytest.approx(float(slope), rel=5e-3)


@pytest.mark.parametrize("name", sorted(objectives.OBJECTIVES))
def test_vmap_is_a_loop(name):
  objective = objectives.build(name)
  many = jnp.stack([LOSSES, LOSSES[::-1], LOSSES * 0.3])
  looped = jnp.stack([objective(losses, context()) for losses in many])
  np.testing.assert_allclose(jax.vmap(objective, in_axes=(0, None))(many, context()), looped, rtol=1e-6)


def test_group_dro_is_algorithm_1():
  q = np.full(4, 0.25)
  state = objectives.group_dro_init(4)
  for losses in (LOSSES, LOSSES[::-1], LOSSES * 0.5):
    q = q * np.exp(0.7 * np.asarray(losses))
    q = q / q.sum()
    state = objectives.group_dro_update(state, losses, 0.7)
    assert float(objectives.group_dro(state, losses)) == pytest.approx(float(q @ np.asarray(losses)), rel=1e-5)
  np.testing.assert_allclose(jnp.exp(state.log_weights), q, rtol=1e-5)
  np.testing.assert_allclose(jax.grad(objectives.group_dro, argnums=1)(state, LOSSES), q, rtol=1e-5)


def test_group_dro_goes_to_the_worst_ability_without_overflow():
  state = objectives.group_dro_init(4)
  for _ in range(10):
    state = objectives.group_dro_update(state, LOSSES * 100, 1.0)
  assert float(objectives.group_dro(state, LOSSES)) == pytest.approx(3.0, rel=1e-6)


def test_group_dro_leaves_absent_abilities_out():
  weights = jnp.array([1.0, 0.0, 1.0, 1.0])
  spoilt = LOSSES.at[1].set(jnp.nan)
  state = objectives.group_dro_update(objectives.group_dro_init(4), spoilt, 0.7, weights)
  q = np.exp(0.7 * np.asarray(LOSSES)) * np.asarray(weights)
  value, grad = jax.value_and_grad(objectives.group_dro, argnums=1)(state, spoilt, weights)
  np.testing.assert_allclose(grad, q / q.sum(), rtol=1e-5)
  assert float(value) == pytest.approx(float(q @ np.asarray(LOSSES) / q.sum()), rel=1e-5)
  # Its weight before the division by the sum was 1/4 times exp(0).
  assert float(state.log_weights[1] - state.log_weights[0]) == pytest.approx(-0.7 * 1.0, rel=1e-5)


def test_excess_is_clipped_and_normalised_improvement_has_the_units_of_the_reference():
  np.testing.assert_allclose(objectives.excess_loss(LOSSES, REFERENCE), [0.5, 1.0, 0.0, 0.25])
  np.testing.assert_allclose(objectives.normalised_improvement(BASE, BASE, REFERENCE), 0.0)
  np.testing.assert_allclose(objectives.normalised_improvement(REFERENCE, BASE, REFERENCE), 1.0)
  # Where single-task tuning harms, or does nothing, the unit is `minimum_gain`, and worse is still worse.
  improvement = objectives.normalised_improvement(jnp.array([0.9, 1.1]), jnp.ones(2), jnp.array([1.5, 1.0]), 0.1)
  np.testing.assert_allclose(improvement, [1.0, -1.0], rtol=1e-5)


def test_nash_is_the_geometric_mean_and_goes_on_as_a_tangent():
  x = jnp.array([0.5, 0.8, 1.2, 2.0])
  geometric = np.prod(np.asarray(x, np.float64) ** np.asarray(WEIGHTS))
  assert float(jnp.exp(-objectives.nash(x, WEIGHTS))) == pytest.approx(float(geometric), rel=1e-6)
  one = lambda v: objectives.nash(jnp.array([v]), jnp.ones(1), 0.1)
  for v in (-5.0, 0.0, 0.05):
    assert float(one(v)) == pytest.approx(-(np.log(0.1) + (v - 0.1) / 0.1), rel=1e-5)
    assert float(jax.grad(one)(v)) == pytest.approx(-10.0, rel=1e-5)
  assert float(jax.grad(one)(0.1 + 1e-5)) == pytest.approx(-10.0, rel=1e-3)
  assert float(one(0.1 + 1e-5)) == pytest.approx(float(one(0.1 - 1e-5)), rel=1e-3)


def test_an_equal_split_of_the_gain_is_best_under_nash():
  split_gain = lambda share: objectives.nash(jnp.array([share, 1 - share]), jnp.ones(2))
  shares = jnp.linspace(0.05, 0.95, 19)
  assert float(shares[jnp.argmin(jax.vmap(split_gain)(shares))]) == pytest.approx(0.5)


def solve_constrained(lagrangian_fn, step_size, num_steps):
  """min |x - (2, 2)|^2 / 2 subject to x1 + x2 <= 2 and x2 <= 5.5: x = (1, 1), multipliers (1, 0)."""
  losses = lambda x: jnp.stack([x[0] + x[1], x[1]])
  violation = lambda x: objectives.retention_violation(losses(x), jnp.array([1.5, 5.0]), 0.5)

  def step(carry, _):
    x, multipliers = carry
    grad = jax.grad(lambda x: lagrangian_fn(0.5 * jnp.sum((x - 2) ** 2), violation(x), multipliers))(x)
    x = x - 0.1 * grad
    return (x, objectives.update_multipliers(multipliers, violation(x), step_size)), None

  # The second multiplier starts above 0: the projection has to stop it there.
  return jax.lax.scan(step, (jnp.zeros(2), jnp.array([0.0, 0.7])), length=num_steps)[0]


def test_dual_ascent_ends_at_the_kkt_point():
  for lagrangian_fn in (
    objectives.lagrangian,
    lambda objective, violation, multipliers: objectives.augmented_lagrangian(objective, violation, multipliers, 2.0),
  ):
    x, multipliers = solve_constrained(lagrangian_fn, 0.1, 600)
    np.testing.assert_allclose(x, [1.0, 1.0], atol=1e-3)
    np.testing.assert_allclose(multipliers, [1.0, 0.0], atol=1e-3)
    assert float(multipliers[1]) == 0.0


def test_the_augmented_term_vanishes_at_the_kkt_point_and_damps():
  objective, violation, multipliers = jnp.array(1.0), jnp.array([0.0, -4.0]), jnp.array([1.0, 0.0])
  assert float(objectives.augmented_lagrangian(objective, violation, multipliers, 3.0)) == 1.0
  # As rho goes to 0 it is the Lagrangian.
  violation, multipliers = jnp.array([0.3, -0.2]), jnp.array([1.0, 0.5])
  near = objectives.augmented_lagrangian(objective, violation, multipliers, 1e-2)
  assert float(near) == pytest.approx(float(objectives.lagrangian(objective, violation, multipliers)), abs=1e-3)
  swings = [
    np.linalg.norm(np.asarray(solve_constrained(fn, 1.0, 30)[0]) - 1)
    for fn in (
      objectives.lagrangian,
      lambda o, v, m: objectives.augmented_lagrangian(o, v, m, 4.0),
    )
  ]
  assert swings[1] < 0.1 * swings[0]


def test_retention_ignores_absent_abilities():
  weights = jnp.array([1.0, 0.0, 1.0, 1.0])
  spoilt = lambda x: x.at[1].set(jnp.nan)
  violation_fn = lambda losses: objectives.retention_violation(losses, spoilt(BASE), 0.1, weights)
  violation = violation_fn(spoilt(LOSSES))
  np.testing.assert_allclose(violation, jnp.where(weights > 0, LOSSES - BASE - 0.1, 0.0), rtol=1e-6)
  multipliers = jnp.array([0.5, 0.7, 0.0, 0.2])
  grad = jax.grad(lambda x: objectives.lagrangian(jnp.array(0.0), violation_fn(x), multipliers))(spoilt(LOSSES))
  np.testing.assert_allclose(grad, [0.5, 0.0, 0.0, 0.2])
  assert float(objectives.update_multipliers(multipliers, violation, 0.1)[1]) == pytest.approx(0.7)


def test_build_sets_options_and_names_what_is_wrong():
  assert float(objectives.build("cvar", fraction=0.3)(LOSSES, context())) == pytest.approx(0.8 / 0.3, rel=1e-6)
  assert float(objectives.build("worst", temperature=1e-3)(LOSSES, context())) == pytest.approx(3.0, abs=1e-5)
  assert set(objectives.OPTIONS) == set(objectives.OBJECTIVES)
  with pytest.raises(errors.InputError, match="Did you mean 'worst'"):
    objectives.build("wrost")
  with pytest.raises(errors.InputError, match=r"'temprature'.*Did you mean 'temperature'"):
    objectives.build("worst", temprature=1.0)
  with pytest.raises(errors.InputError, match="no options"):
    objectives.build("mean", temperature=1.0)
  for name, option, value in (
    ("cvar", "fraction", 1.5),
    ("cvar", "fraction", 0.0),
    ("worst", "temperature", -1.0),
    ("nash", "floor", float("nan")),
    ("nash", "minimum_gain", True),
    ("worst", "temperature", "hot"),
  ):
    with pytest.raises(errors.InputError, match=option):
      objectives.build(name, **{option: value})


def test_check_preference():
  np.testing.assert_allclose(objectives.check_preference([0.25, 0.75, 0], 3), [0.25, 0.75, 0])
  objectives.check_preference([1 / 3, 1 / 3, 1 / 3], 3)
  for vector, what in (
    ([0.5, 0.5], "shape"),
    ([[0.5, 0.5, 0.0]], "shape"),
    ([0.5, 0.6, -0.1], "-0.1 at place 2"),
    ([0.5, float("nan"), 0.5], "nan at place 1"),
    ([float("inf"), 0.0, 0.0], "inf at place 0"),
    ([0.5, 0.5, 0.001], "sum 1.001"),
    (["a", "b", "c"], "not a list of numbers"),
    (None, "preference None"),
  ):
    with pytest.raises(errors.InputError, match=what):
      objectives.check_preference(vector, 3)
