"""Asynchronous successive halving (ASHA)."""

import dataclasses
import math

import numpy as np

from mftjax.baselines.search import Candidate, SearchSpace, Trials
from mftjax.errors import InputError


class Asha:
  """Asynchronous successive halving over random candidates (`search.Method`).

  Rung k holds runs of `reduction_factor ** (k - top)` of a whole run. `ask` promotes, from the highest rung down, a
  candidate among the best 1 / `reduction_factor` of its rung that was not promoted yet; where there is none, it draws a
  new one for the lowest rung. A promoted candidate is run anew at its longer fraction, since its schedule depends on
  the run's length, so that each of its runs counts in full. A candidate whose loss is not finite is never promoted.
  The search ends at the first run that the rest of the budget cannot pay for: less than one whole run is left over.
  Told after each ask, it reaches a whole run within as many whole runs as there are rungs; asked many times in advance,
  it can only fill its lowest rung.

  Args:
    space: where the candidates come from.
    total_budget: whole runs to spend, at least the number of rungs.
    seed: of the draws.
    default: the first candidate of the lowest rung, if given.
    reduction_factor: eta, the one in how many that is promoted; at least 2, usually 3 or 4.
    minimum_fraction: the shortest run allowed, in whole runs; the lowest rung is the shortest
      `reduction_factor ** -n` that is no shorter.

  Raises:
    InputError: an argument is out of its range, or the default is outside of the space.

  Source: Li et al., 2020, "A System for Massively Parallel Hyperparameter Tuning", Algorithm 2, with s = 0.
  """

  def __init__(
    self,
    space: SearchSpace,
    total_budget: float,
    seed: int,
    default: Candidate | None = None,
    reduction_factor: int = 3,
    minimum_fraction: float = 1 / 9,
  ):
    if reduction_factor < 2 or reduction_factor != int(reduction_factor):
      raise InputError(f"reduction_factor must be a whole number >= 2, got {reduction_factor}.")
    if not 0 < minimum_fraction <= 1:
      raise InputError(f"minimum_fraction must be in (0, 1], got {minimum_fraction}.")
    self._reduction_factor = int(reduction_factor)
    # 1e-9: 1 / 9 as a float may be a little more than one ninth.
    self._top = math.floor(math.log(1 / minimum_fraction) / math.log(reduction_factor) + 1e-9)
    if total_budget < self._top + 1 or not math.isfinite(total_budget):
      raise InputError(f"total_budget must be finite and >= {self._top + 1}, one per rung, got {total_budget}.")
    self._space = space
    self._default = None if default is None else space.check(default)
    self._rng = np.random.default_rng(seed)
    self._trials = Trials()
    # Budgets count in runs of the lowest rung: whole numbers, since sums of thirds would round past the budget.
    self._units_per_run = self._reduction_factor**self._top
    self._total_units = math.floor(total_budget * self._units_per_run + 1e-9)
    self._spent_units = 0
    # Per rung: (loss, order of arrival, candidate), and which candidates of it were promoted.
    self._rungs: list[list[tuple[float, int, Candidate]]] = [[] for _ in range(self._top + 1)]
    self._promoted: list[set[Candidate]] = [set() for _ in range(self._top + 1)]

  @property
  def fractions(self) -> tuple[float, ...]:
    """Length of a run on each rung, lowest first, in whole runs."""
    return tuple(self._reduction_factor**rung / self._units_per_run for rung in range(self._top + 1))

  def ask(self) -> Candidate | None:
    promotable, rung = self._promotable()
    units = self._reduction_factor**rung
    if self._spent_units + units > self._total_units:
      return None
    if promotable is not None:
      self._promoted[rung - 1].add(promotable)
      source = promotable
    elif self._default is not None and self._spent_units == 0:
      source = self._default
    else:
      source = self._space.sample(self._rng)
    self._spent_units += units
    return self._trials.start(dataclasses.replace(source, budget_fraction=self.fractions[rung]), rung)

  def tell(self, candidate: Candidate, loss: float) -> None:
    rung, loss = self._trials.finish(candidate, loss)
    self._rungs[rung].append((loss, len(self._rungs[rung]), candidate))

  def best(self) -> Candidate:
    return self._trials.best()

  def spent(self) -> float:
    return self._spent_units / self._units_per_run

  def _promotable(self) -> tuple[Candidate | None, int]:
    """The candidate to promote and the rung it goes to; None and the lowest rung if there is none."""
    for rung in range(self._top - 1, -1, -1):
      # By (loss, arrival): arrivals differ, so that candidates themselves are never compared.
      ranked = sorted(self._rungs[rung])[: len(self._rungs[rung]) // self._reduction_factor]
      for loss, _, candidate in ranked:
        if math.isfinite(loss) and candidate not in self._promoted[rung]:
          return candidate, rung + 1
    return None, 0
