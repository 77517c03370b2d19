"""Spaces: round trips, bounds, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mftjax import errors, spaces


@settings(deadline=None)  # the first example compiles
@given(st.floats(1e-6, 1e-2), st.floats(0.5, 0.999))
def test_round_trip(learning_rate, b1):
  space = spaces.Space({"learning_rate": spaces.Log(1e-6, 1e-2), "b1": spaces.Interval(0.5, 0.999)})
  values = space.constrain(space.init({"learning_rate": learning_rate, "b1": b1}))
  assert float(values["learning_rate"]) == pytest.approx(learning_rate, rel=1e-6)
  assert float(values["b1"]) == pytest.approx(b1, rel=1e-6)


@pytest.mark.parametrize(("low", "high"), [(1e-6, 1e-2), (1e-6, 1e-1), (1e-4, 1.0)])
def test_round_trip_everywhere(low, high):
  space = spaces.Space({"value": spaces.Log(low, high)})
  values = np.geomspace(low, high, 4000)
  x = jnp.stack([space.init({"value": value})["value"] for value in values])
  back = np.asarray(space.constrain({"value": x})["value"], np.float64)
  np.testing.assert_allclose(back, values, rtol=1e-6)


def test_the_slope_of_a_logarithmic_space():
  x = np.linspace(-20, 20, 401)
  value, slope = jax.vmap(jax.value_and_grad(spaces.Log(1e-6, 1e-2).constrain))(jnp.asarray(x, jnp.float32))
  unit = 1 / (1 + np.exp(-x))
  np.testing.assert_allclose(slope, np.log(1e4) * value * unit * (1 - unit), rtol=1e-5)


@settings(deadline=None)  # the first example compiles
@given(st.floats(-50, 50))
def test_values_stay_within_bounds(x):
  space = spaces.Space({"learning_rate": spaces.Log(1e-6, 1e-2)})
  value = float(space.constrain({"learning_rate": jnp.float32(x)})["learning_rate"])
  assert 1e-6 * (1 - 1e-5) <= value <= 1e-2 * (1 + 1e-5)


def test_errors_name_the_hyperparameter():
  space = spaces.Space({"learning_rate": spaces.Log(1e-6, 1e-2)})
  with pytest.raises(errors.InputError, match=r"learning_rate = 1.0 is out of its range \[1e-06, 0.01\]"):
    space.init({"learning_rate": 1.0})
  with pytest.raises(errors.InputError, match="Did you mean 'learning_rate'"):
    space.init({"learning_rte": 1e-3})
  with pytest.raises(errors.InputError, match="low < high"):
    spaces.Interval(1.0, 0.0)
  with pytest.raises(errors.InputError, match="low > 0"):
    spaces.Log(0.0, 1.0)
  with pytest.raises(errors.InputError, match="ascending"):
    spaces.Ordered((8, 4))
  with pytest.raises(errors.InputError, match="2 weights of at least 0 and sum 1"):
    spaces.Simplex(2).init([0.5, 0.6])
  with pytest.raises(errors.InputError, match=r"rank = 64 is out of its range \[4.0, 16.0\]"):
    spaces.Space({"rank": spaces.Ordered((4, 8, 16))}).init({"rank": 64})


@settings(deadline=None)  # the first example compiles
@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=5))
def test_simplex_round_trip(parts):
  weights = np.asarray(parts) / np.sum(parts)
  simplex = spaces.Simplex(len(parts))
  np.testing.assert_allclose(simplex.constrain(simplex.init(weights)), weights, rtol=2e-6)


def test_a_weight_of_zero_is_finite():
  space = spaces.Space({"mixture": spaces.Simplex(3)})
  x = space.init({"mixture": [0.0, 1.0, 0.0]})
  assert np.all(np.isfinite(x["mixture"]))
  np.testing.assert_allclose(space.constrain(x)["mixture"], [0.0, 1.0, 0.0], atol=1e-7)


@settings(deadline=None)  # the first example compiles
@given(st.floats(4.0, 64.0))
def test_ordered_round_trip_and_rounding(value):
  allowed = (4, 8, 16, 64)
  space = spaces.Space({"batch_size": spaces.Ordered(allowed), "b1": spaces.Interval(0.0, 1.0)})
  values = space.constrain(space.init({"batch_size": value, "b1": 0.3}))
  assert float(values["batch_size"]) == pytest.approx(value, rel=1e-6)
  rounded = space.rounded({"batch_size": value, "b1": 0.3, "other": 7})
  nearest = allowed[np.argmin(np.abs(np.log(np.asarray(allowed) / value)))]
  assert rounded == {"batch_size": nearest, "b1": 0.3, "other": 7}
