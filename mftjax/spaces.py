"""Bounded hyperparameters as unconstrained arrays that an outer optimiser can move freely."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mftjax import errors

# A value on its bound would be infinitely far out: it is placed this far inside, in units of the interval.
_MARGIN = 1e-8

_CENTRE = 0.8  # |x| below which a logarithmic space counts from its centre


@dataclasses.dataclass(frozen=True)
class Interval:
  """Values between `low` and `high`: `low + (high - low) * sigmoid(x)`."""

  low: float
  high: float

  def __post_init__(self):
    if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
      raise errors.InputError(f"A space needs finite low < high, got low={self.low}, high={self.high}.")

  def to_unit(self, value: float) -> float:
    return (value - self.low) / (self.high - self.low)

  def constrain(self, x: jax.Array) -> jax.Array:
    return self.low + (self.high - self.low) * jax.nn.sigmoid(x)


@dataclasses.dataclass(frozen=True)
class Log(Interval):
  """Positive values, uniform in their logarithm: `exp(log low + log(high / low) * sigmoid(x))`."""

  def __post_init__(self):
    super().__post_init__()
    if self.low <= 0:
      raise errors.InputError(f"A logarithmic space needs low > 0, got low={self.low}.")

  def to_unit(self, value: float) -> float:
    return math.log(value / self.low) / math.log(self.high / self.low) if value > 0 else -1.0

  def constrain(self, x: jax.Array) -> jax.Array:
    # An exponent carries its rounding, in proportion to its size, into the value: it counts from the nearest of low,
    # centre and high. Counted from low alone, f32 misses by up to 2e-6.
    width = math.log(self.high / self.low)
    inner = math.sqrt(self.low * self.high) * jnp.exp(width / 2 * jnp.tanh(x / 2))
    outer = jnp.where(x < 0, self.low, self.high) * jnp.exp(-jnp.sign(x) * width * jax.nn.sigmoid(-jnp.abs(x)))
    return jnp.where(jnp.abs(x) < _CENTRE, inner, outer)


SCALES = {"linear": Interval, "log": Log}


@dataclasses.dataclass(frozen=True)
class Space:
  """Named hyperparameters, each with its own bounds.

  Args:
    spaces: name -> `Interval` or `Log`.
  """

  spaces: Mapping[str, Interval]

  def init(self, values: Mapping[str, float]) -> dict[str, jax.Array]:
    """Unconstrained f32 scalars that `constrain` maps back to `values`, to 1e-6 relative.

    Raises:
      InputError: a value is missing, unknown or out of its range.
    """
    for name in values:
      if name not in self.spaces:
        raise errors.unknown_name("hyperparameter", name, self.spaces)
    unconstrained = {}
    for name, space in self.spaces.items():
      if name not in values:
        raise errors.InputError(f"No value for hyperparameter {name!r}.")
      unit = space.to_unit(float(values[name]))
      if not -1e-9 <= unit <= 1 + 1e-9:
        raise errors.InputError(f"{name} = {values[name]} is out of its range [{space.low}, {space.high}].")
      unit = min(max(unit, _MARGIN), 1 - _MARGIN)
      unconstrained[name] = jnp.asarray(np.log(unit / (1 - unit)), jnp.float32)
    return unconstrained

  def constrain(self, unconstrained: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The values within their bounds; differentiable."""
    return {name: space.constrain(unconstrained[name]) for name, space in self.spaces.items()}
