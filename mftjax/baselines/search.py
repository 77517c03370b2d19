"""What every search method shares: candidates, the space they come from, the record of what was asked and told."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mftjax.errors import InputError, unknown_name

SCALES = ("linear", "log", "ordered")
_SUM_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
  """One run to evaluate. Compared by identity: two runs of equal settings are two candidates.

  Args:
    hyperparameters: name -> value.
    mixture: `[num_slots]` float64 share of each source, sums to 1; absent sources have 0.
    budget_fraction: how long the run is, in whole runs, in (0, 1].

  Raises:
    InputError: the mixture is no distribution, or the fraction is out of range.
  """

  hyperparameters: Mapping[str, float]
  mixture: np.ndarray
  budget_fraction: float = 1.0

  def __post_init__(self):
    mixture = np.array(self.mixture, np.float64)
    is_distribution = mixture.ndim == 1 and np.all(mixture >= 0) and abs(mixture.sum() - 1) <= _SUM_TOLERANCE
    if not is_distribution:
      raise InputError(f"A candidate's mixture must be one axis of shares >= 0 that sum to 1, got {mixture}.")
    if not 0 < self.budget_fraction <= 1:
      raise InputError(f"budget_fraction must be in (0, 1], got {self.budget_fraction}.")
    mixture.setflags(write=False)
    object.__setattr__(self, "mixture", mixture)


@dataclasses.dataclass(frozen=True)
class SearchSpace:
  """Hyperparameters with their scales, and the sources to mix.

  Args:
    hyperparameters: name -> `("log", (low, high))`, `("linear", (low, high))` or `("ordered", (value, ...))`.
    num_sources: how many sources are present.
    source_mask: `[num_slots]` which slots hold a present source; None: all `num_sources` slots do.

  Raises:
    InputError: an unknown scale, bounds that bound nothing, or a mask that disagrees with `num_sources`.
  """

  hyperparameters: Mapping[str, tuple[str, tuple]]
  num_sources: int
  source_mask: Sequence[bool] | np.ndarray | None = None

  def __post_init__(self):
    for name, (scale, values) in self.hyperparameters.items():
      if scale not in SCALES:
        raise unknown_name(f"scale of hyperparameter {name!r}", scale, SCALES)
      if scale == "ordered":
        if not values or list(values) != sorted(set(values)):
          raise InputError(f"{name}: an ordered scale needs increasing values, got {values}.")
      elif len(values) != 2 or not all(map(math.isfinite, values)) or not values[0] < values[1]:
        raise InputError(f"{name}: a {scale} scale needs finite (low, high) with low < high, got {values}.")
      elif scale == "log" and values[0] <= 0:
        raise InputError(f"{name}: a log scale needs low > 0, got {values}.")
    if self.num_sources < 1:
      raise InputError(f"num_sources must be at least 1, got {self.num_sources}.")
    if self.source_mask is not None and int(np.sum(self.source_mask)) != self.num_sources:
      raise InputError(f"source_mask {self.source_mask} does not mark num_sources={self.num_sources} sources.")

  @property
  def num_slots(self) -> int:
    return self.num_sources if self.source_mask is None else len(self.source_mask)

  def mask(self) -> np.ndarray:
    """`[num_slots]` bool, true where a source is present."""
    return np.ones(self.num_sources, bool) if self.source_mask is None else np.asarray(self.source_mask, bool)

  def place(self, weights: np.ndarray) -> np.ndarray:
    """The mixture `[num_slots]` of the present sources' weights `[num_sources]`; absent slots get 0."""
    mixture = np.zeros(self.num_slots)
    mixture[self.mask()] = weights
    return mixture

  def sample(self, rng: np.random.Generator) -> Candidate:
    """A random candidate: hyperparameters uniform on their scales, the mixture from Dirichlet(1, ..., 1)."""
    hyperparameters = {}
    for name, (scale, values) in self.hyperparameters.items():
      if scale == "ordered":
        hyperparameters[name] = values[rng.integers(len(values))]
      elif scale == "log":
        value = math.exp(rng.uniform(math.log(values[0]), math.log(values[1])))
        hyperparameters[name] = min(max(value, values[0]), values[1])  # exp(log(low)) may fall below low
      else:
        hyperparameters[name] = rng.uniform(*values)
    return Candidate(hyperparameters, self.place(rng.dirichlet(np.ones(self.num_sources))))

  def check(self, candidate: Candidate) -> Candidate:
    """The candidate itself.

    Raises:
      InputError: it lies outside of this space, or is no whole run.
    """
    if candidate.budget_fraction != 1:
      raise InputError(f"A default candidate must be a whole run, got budget_fraction={candidate.budget_fraction}.")
    for name in candidate.hyperparameters:
      if name not in self.hyperparameters:
        raise unknown_name("hyperparameter of the candidate", name, self.hyperparameters)
    for name, (scale, values) in self.hyperparameters.items():
      if name not in candidate.hyperparameters:
        raise InputError(f"The candidate has no value for hyperparameter {name!r}.")
      value = candidate.hyperparameters[name]
      if not (value in values if scale == "ordered" else values[0] <= value <= values[1]):
        raise InputError(f"The candidate's {name} = {value} is not within {scale} {values}.")
    if candidate.mixture.shape != (self.num_slots,):
      raise InputError(f"The candidate mixes {candidate.mixture.size} slots, the space has {self.num_slots}.")
    if np.any(candidate.mixture[~self.mask()] > 0):
      raise InputError(f"The candidate's mixture {candidate.mixture} gives a share to an absent source.")
    return candidate


class Method(Protocol):
  """What every search method does. Several candidates may be asked before the first is told."""

  def ask(self) -> Candidate | None:
    """The next candidate to evaluate, or None when the method has finished."""

  def tell(self, candidate: Candidate, loss: float) -> None:
    """Reports the loss of a candidate that `ask` returned; a loss that is not finite counts as the worst.

    Raises:
      InputError: the candidate was not asked, or was told already.
    """

  def best(self) -> Candidate:
    """The candidate of lowest loss among whole runs; the first one told among equals.

    Raises:
      InputError: no whole run was told yet.
    """

  def spent(self) -> float:
    """Budget of all candidates asked so far, in whole runs."""


class Trials:
  """The record behind a method: which candidates are out, which came back, and the best of the whole runs."""

  def __init__(self) -> None:
    self._out: dict[Candidate, Any] = {}
    self._best: tuple[float, Candidate] | None = None
    self._fractions: list[float] = []

  def start(self, candidate: Candidate, handle: Any = None) -> Candidate:
    """Records that the candidate is asked; `handle` is what `finish` gives back."""
    self._out[candidate] = handle
    self._fractions.append(candidate.budget_fraction)
    return candidate

  def finish(self, candidate: Candidate, loss: float) -> tuple[Any, float]:
    """Records the loss; returns the handle and the loss, infinite if it was not finite.

    Raises:
      InputError: the candidate is not out.
    """
    if candidate not in self._out:
      raise InputError(f"tell() needs a candidate that ask() returned and that was not told yet, got {candidate}.")
    loss = float(loss)
    loss = loss if math.isfinite(loss) else math.inf
    if candidate.budget_fraction == 1 and (self._best is None or loss < self._best[0]):
      self._best = (loss, candidate)
    return self._out.pop(candidate), loss

  def best(self) -> Candidate:
    if self._best is None:
      raise InputError("No whole run was told yet: there is no best candidate.")
    return self._best[1]

  def spent(self) -> float:
    return math.fsum(self._fractions)

  @property
  def num_started(self) -> int:
    return len(self._fractions)
