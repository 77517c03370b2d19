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
