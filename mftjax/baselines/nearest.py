"""The best candidate of the most similar task seen before."""

from collections.abc import Sequence

import numpy as np
import scipy.optimize

from mftjax.baselines.search import Candidate
from mftjax.errors import InputError


class NearestTask:
  """Predicts, for a new task, the best candidate of the nearest known one.

  Features are z-scored over the known tasks (a source's: over all their present sources) and compared by Euclidean
  distance; a feature that never varies does not count. The neighbour's shares go to the new task's sources along the
  one-to-one matching of least summed distance, then are rescaled to sum to 1. Where the numbers of sources differ, the
  neighbour's unmatched shares are dropped, and a new source without a partner gets the neighbour's mean share.

  Args:
    features: `[num_tasks, dim]` finite.
    candidates: `num_tasks` best candidates, their mixtures `[num_sources]`.
    source_features: `[num_tasks, num_sources, source_dim]`, finite where a source is present.
    source_mask: `[num_tasks, num_sources]` bool, true where a source is present.

  Raises:
    InputError: shapes disagree, a feature is not finite, or a task has no source.

  Source: of the warm start, Feurer et al., 2015, "Initializing Bayesian Hyperparameter Optimization via
  Meta-Learning", with one neighbour; of the matching, `scipy.optimize.linear_sum_assignment`.
  """

  def __init__(
    self,
    features: np.ndarray,
    candidates: Sequence[Candidate],
    source_features: np.ndarray,
    source_mask: np.ndarray,
  ):
    features = np.asarray(features, np.float64)
    source_features = np.asarray(source_features, np.float64)
    source_mask = np.asarray(source_mask, bool)
    num_tasks = len(candidates)
    if features.ndim != 2 or len(features) != num_tasks or num_tasks == 0:
      raise InputError(f"features must be [num_tasks={num_tasks}, dim] of at least one task, got {features.shape}.")
    if source_features.ndim != 3 or source_features.shape[:2] != source_mask.shape or len(source_mask) != num_tasks:
      raise InputError(
        f"source_features must be [num_tasks={num_tasks}, num_sources, source_dim] and source_mask its first two axes, "
        f"got {source_features.shape} and {source_mask.shape}."
      )
    for i, candidate in enumerate(candidates):
      if candidate.mixture.shape != source_mask[i].shape:
        raise InputError(f"Candidate {i} mixes {candidate.mixture.size} sources, its mask has {source_mask[i].size}.")
    _check_features(features, source_features[source_mask], source_mask)
    self._candidates = list(candidates)
    self._mask = source_mask
    self._source_features = source_features
    self._scale = _scale(features)
    self._source_scale = _scale(source_features[source_mask])
    self._features = _standardise(features, self._scale)

  def distances(self, features: np.ndarray) -> np.ndarray:
    """`[num_tasks]` distance of each known task to `features` `[dim]`, in standard deviations of the known ones.

    Raises:
      InputError: the shape differs from the known tasks', or a feature is not finite.
    """
    features = np.asarray(features, np.float64)
    if features.shape != self._features.shape[1:] or not np.all(np.isfinite(features)):
      raise InputError(f"features must be {self._features.shape[1:]} finite numbers, got {features}.")
    return np.linalg.norm(self._features - _standardise(features, self._scale), axis=-1)

  def nearest(self, features: np.ndarray) -> int:
    """Index of the known task nearest to `features` `[dim]`, as of `distances`; the first among equals."""
    return int(np.argmin(self.distances(features)))

  def predict(self, features: np.ndarray, source_features: np.ndarray, source_mask: np.ndarray) -> Candidate:
    """The nearest task's candidate, a whole run, with its mixture carried over to the new task's sources.

    Args:
      features: `[dim]` of the new task, finite.
      source_features: `[num_sources, source_dim]`, finite where a source is present; `num_sources` may differ from the
        known tasks'.
      source_mask: `[num_sources]` bool, true where a source is present.

    Returns:
      The candidate, its mixture `[num_sources]`; uniform if the neighbour gave all its weight to unmatched sources.

    Raises:
      InputError: shapes disagree, a feature is not finite, or no source is present.
    """
    index = self.nearest(features)
    source_features = np.asarray(source_features, np.float64)
    source_mask = np.asarray(source_mask, bool)
    source_dim = self._source_features.shape[-1]
    if source_features.shape != (*source_mask.shape, source_dim) or source_mask.ndim != 1:
      raise InputError(
        f"source_features must be [num_sources, {source_dim}] and source_mask [num_sources], "
        f"got {source_features.shape} and {source_mask.shape}."
      )
    _check_features(np.asarray(features), source_features[source_mask], source_mask)

    known_mask = self._mask[index]
    known = _standardise(self._source_features[index][known_mask], self._source_scale)
    new = _standardise(source_features[source_mask], self._source_scale)
    rows, columns = scipy.optimize.linear_sum_assignment(np.linalg.norm(new[:, None] - known[None], axis=-1))
    weights = np.full(len(new), 1 / len(known))
    weights[rows] = self._candidates[index].mixture[known_mask][columns]
    if weights.sum() == 0:
      weights[:] = 1.0
    mixture = np.zeros(source_mask.shape)
    mixture[source_mask] = weights / weights.sum()
    return Candidate(dict(self._candidates[index].hyperparameters), mixture)


def _check_features(features: np.ndarray, source_features: np.ndarray, source_mask: np.ndarray) -> None:
  if not np.all(np.isfinite(features)) or not np.all(np.isfinite(source_features)):
    raise InputError("Features of tasks and of present sources must be finite.")
  if not np.all(source_mask.any(axis=-1)):
    raise InputError("Each task needs at least one present source.")


def _scale(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation of each column `[dim]`; an infinite deviation takes a constant column out of distances."""
  deviation = rows.std(axis=0)
  is_constant = deviation <= 1e-12 * np.abs(rows).max(axis=0)
  return rows.mean(axis=0), np.where(is_constant, np.inf, deviation)


def _standardise(rows: np.ndarray, scale: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
  mean, deviation = scale
  return (rows - mean) / deviation
