"""Bounded hyperparameters as unconstrained arrays that an outer optimiser can move freely."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mftjax import errors

# A value on its bound would be infinitely far out: it is placed this far inside, in units of the interval.
_MARGIN = 1e-8

_SMALLEST_WEIGHT = 1e-8  # a weight of 0 would be infinitely far out: it counts as this

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


@dataclasses.dataclass(frozen=True)
class Ordered:
  """Some ascending positive values, such as 4, 8, 16, relaxed to all between the first and the last, as in `Log`."""

  values: tuple[float, ...]

  def __post_init__(self):
    values = tuple(float(value) for value in self.values)
    object.__setattr__(self, "values", values)
    is_right = len(values) > 1 and values[0] > 0 and math.isfinite(values[-1])
    if not is_right or any(a >= b for a, b in itertools.pairwise(values)):
      raise errors.InputError(f"An ordered space needs two or more ascending positive values, got {values}.")

  @property
  def low(self) -> float:
    return self.values[0]

  @property
  def high(self) -> float:
    return self.values[-1]

  def to_unit(self, value: float) -> float:
    return Log(self.low, self.high).to_unit(value)

  def constrain(self, x: jax.Array) -> jax.Array:
    return Log(self.low, self.high).constrain(x)

  def rounded(self, value: float) -> float:
    """The allowed value whose logarithm is nearest; the smaller of two that are as near."""
    return min(self.values, key=lambda allowed: abs(math.log(allowed / float(value))))


@dataclasses.dataclass(frozen=True)
class Simplex:
  """`size` positive weights of sum 1: `softmax(x)` of `[size]` logits."""

  size: int

  def __post_init__(self):
    if self.size < 1:
      raise errors.InputError(f"A simplex needs size >= 1, got size={self.size}.")

  def init(self, weights: Sequence[float] | np.ndarray) -> jax.Array:
    """`[size]` f32 logits that `constrain` maps back to `weights`, to 1e-6 relative; weights of 0 become 1e-8.

    Raises:
      InputError: not `size` finite weights of at least 0 and sum 1 (to 1e-4).
    """
    found = np.asarray(weights, np.float64)
    is_right = found.shape == (self.size,) and bool(np.all(np.isfinite(found) & (found >= 0)))
    if not is_right or abs(found.sum() - 1) > 1e-4:
      raise errors.InputError(f"A simplex needs {self.size} weights of at least 0 and sum 1, got {found.tolist()}.")
    logits = np.log(np.maximum(found, _SMALLEST_WEIGHT))
    return jnp.asarray(logits - logits.max(), jnp.float32)  # near 0, where f32 is fine, for the weights that count

  def constrain(self, x: jax.Array) -> jax.Array:
    return jax.nn.softmax(x)


# What a config calls the spaces of single numbers.
SCALES = {"linear": Interval, "log": Log, "ordered": Ordered}


@dataclasses.dataclass(frozen=True)
class Space:
  """Named hyperparameters, each with its own bounds.

  Args:
    spaces: name -> `Interval`, `Log`, `Ordered` or `Simplex`.
  """

  spaces: Mapping[str, Interval | Ordered | Simplex]

  def init(self, values: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Unconstrained f32 arrays that `constrain` maps back to `values`, to 1e-6 relative; scalars but for a `Simplex`.

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
      if isinstance(space, Simplex):
        unconstrained[name] = space.init(values[name])
        continue
      unit = space.to_unit(float(values[name]))
      if not -1e-9 <= unit <= 1 + 1e-9:
        raise errors.InputError(f"{name} = {values[name]} is out of its range [{space.low}, {space.high}].")
      unit = min(max(unit, _MARGIN), 1 - _MARGIN)
      unconstrained[name] = jnp.asarray(np.log(unit / (1 - unit)), jnp.float32)
    return unconstrained

  def constrain(self, unconstrained: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The values within their bounds; differentiable."""
    return {name: space.constrain(unconstrained[name]) for name, space in self.spaces.items()}

  def rounded(self, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with those of `Ordered` spaces at the nearest allowed one, as a float; outside `jax.jit` only."""
    spaces = self.spaces
    return {
      name: space.rounded(value) if isinstance(space := spaces.get(name), Ordered) else value
      for name, value in values.items()
    }
