"""Bounded hyperparameters as unconstrained arrays that an outer optimiser can move freely."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mftjax import errors

# A value on its bound would be infinitely far out: it is placed this far inside, in units of the interval.
_MARGIN = 1e-7


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

  def from_unit(self, unit: jax.Array) -> jax.Array:
    return self.low + (self.high - self.low) * unit


@dataclasses.dataclass(frozen=True)
class Log(Interval):
  """Positive values, uniform in their logarithm: `exp(log low + log(high / low) * sigmoid(x))`."""

  def __post_init__(self):
    super().__post_init__()
    if self.low <= 0:
      raise errors.InputError(f"A logarithmic space needs low > 0, got low={self.low}.")

  def to_unit(self, value: float) -> float:
    return math.log(value / self.low) / math.log(self.high / self.low) if value > 0 else -1.0

  def from_unit(self, unit: jax.Array) -> jax.Array:
    return self.low * jnp.exp(math.log(self.high / self.low) * unit)


SCALES = {"linear": Interval, "log": Log}


@dataclasses.dataclass(frozen=True)
class Space:
  """Named hyperparameters, each with its own bounds.

  Args:
    spaces: name -> `Interval` or `Log`.
  """

  spaces: Mapping[str, Interval]

  def init(self, values: Mapping[str, float]) -> dict[str, jax.Array]:
    """Unconstrained f32 scalars that `constrained` maps back to `values`, to 1e-6 relative.

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

  def constrained(self, unconstrained: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The values within their bounds; differentiable."""
    return {name: space.from_unit(jax.nn.sigmoid(unconstrained[name])) for name, space in self.spaces.items()}
