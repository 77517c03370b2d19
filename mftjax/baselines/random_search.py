"""Random search."""

import numpy as np

from mftjax.baselines.search import Candidate, SearchSpace, Trials
from mftjax.errors import InputError


class RandomSearch:
  """Independent draws from the space, each a whole run (`search.Method`).

  Args:
    space: where the draws come from.
    num_trials: runs in all, the default's among them.
    seed: of the draws.
    default: the first trial, if given.

  Raises:
    InputError: `num_trials` < 1, or the default is outside of the space.

  Source: Bergstra and Bengio, 2012, "Random Search for Hyper-Parameter Optimization".
  """

  def __init__(self, space: SearchSpace, num_trials: int, seed: int, default: Candidate | None = None):
    if num_trials < 1:
      raise InputError(f"num_trials must be at least 1, got {num_trials}.")
    self._space = space
    self._num_trials = num_trials
    self._rng = np.random.default_rng(seed)
    self._default = None if default is None else space.check(default)
    self._trials = Trials()

  def ask(self) -> Candidate | None:
    if self._trials.num_started == self._num_trials:
      return None
    if self._default is not None and self._trials.num_started == 0:
      return self._trials.start(self._default)
    return self._trials.start(self._space.sample(self._rng))

  def tell(self, candidate: Candidate, loss: float) -> None:
    self._trials.finish(candidate, loss)

  def best(self) -> Candidate:
    return self._trials.best()

  def spent(self) -> float:
    return self._trials.spent()
