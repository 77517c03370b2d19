"""Baselines that do not search: fixed mixtures, the nearest known task, the best constant."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mftjax import baselines, errors


def test_mixtures():
  mask = np.array([True, False, True, True])
  np.testing.assert_allclose(baselines.uniform(mask), [1 / 3, 0, 1 / 3, 1 / 3])
  np.testing.assert_allclose(baselines.proportional(np.array([10, np.nan, 0, 30]), mask), [0.25, 0, 0, 0.75])


@pytest.mark.parametrize(
  "sizes, mask", [([1, 2], [False, False]), ([0, 2], [True, False]), ([-1, 2], [True, True]), ([1, 2, 3], [True, True])]
)
def test_a_mixture_of_nothing_raises(sizes, mask):
  with pytest.raises(errors.InputError):
    baselines.proportional(np.array(sizes), np.array(mask))


def known_tasks(rng, num_tasks=6, num_sources=4):
  # Column scales differ by 1e6: without z-scores the first would decide alone.
  features = rng.normal(size=(num_tasks, 3)) * np.array([1e3, 1.0, 1e-3]) + 5
  source_features = rng.normal(size=(num_tasks, num_sources, 2)) * np.array([1e3, 1e-3])
  mask = np.ones((num_tasks, num_sources), bool)
  mask[::2, -1] = False
  mixtures = mask * rng.dirichlet(np.ones(num_sources), size=num_tasks)
  mixtures /= mixtures.sum(axis=1, keepdims=True)
  candidates = [baselines.Candidate({"learning_rate": 10.0**-i}, mixture) for i, mixture in enumerate(mixtures)]
  return features, candidates, source_features, mask


@given(seed=st.integers(0, 2**32 - 1), index=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_nearest_finds_the_planted_neighbour_with_permuted_sources(seed, index):
  rng = np.random.default_rng(seed)
  features, candidates, source_features, mask = known_tasks(rng)
  method = baselines.NearestTask(features, candidates, source_features, mask)
  order = rng.permutation(4)
  close = features[index] + 1e-6 * features.std(0)
  new_sources = source_features[index][order] * (1 + 1e-9)
  new_sources[~mask[index][order]] = np.nan  # an absent source's features are never read
  assert method.nearest(close) == index
  found = method.predict(close, new_sources, mask[index][order])
  assert found.hyperparameters == candidates[index].hyperparameters
  np.testing.assert_allclose(found.mixture, candidates[index].mixture[order])


def test_nearest_weighs_features_by_their_spread():
  # Raw distances choose task 1 (2 against 90); in deviations of the columns task 0 is nearer.
  features = np.array([[0.0, 0.0], [100.0, 2.0], [1000.0, 0.0], [-900.0, 0.0]])
  candidates = [baselines.Candidate({"id": float(i)}, np.ones(1)) for i in range(4)]
  method = baselines.NearestTask(features, candidates, np.zeros((4, 1, 1)), np.ones((4, 1), bool))
  assert method.nearest(np.array([90.0, 0.0])) == 0
  expected = np.linalg.norm((features - np.array([90.0, 0.0])) / features.std(axis=0), axis=1)
  np.testing.assert_allclose(method.distances(np.array([90.0, 0.0])), expected)
  # A column that never varies does not count, however far the new task is in it.
  constant = baselines.NearestTask(
    np.insert(features, 0, 7.0, axis=1), candidates, np.zeros((4, 1, 1)), np.ones((4, 1), bool)
  )
  assert constant.nearest(np.array([1e9, 90.0, 0.0])) == 0


def test_nearest_maps_sources_of_another_number():
  source_features = np.array([[[0.0], [10.0], [20.0]]])
  candidate = baselines.Candidate({}, np.array([0.6, 0.3, 0.1]))
  method = baselines.NearestTask(np.zeros((1, 1)), [candidate], source_features, np.ones((1, 3), bool))
  # Fewer: those matched to 20 and 0 keep the ratio 0.1 : 0.6.
  fewer = method.predict(np.zeros(1), np.array([[19.0], [1.0]]), np.ones(2, bool))
  np.testing.assert_allclose(fewer.mixture, [1 / 7, 6 / 7])
  # More: the one at 100 has no partner and gets the mean share, 1 / 3.
  more = method.predict(np.zeros(1), np.array([[100.0], [20.0], [10.0], [0.0]]), np.ones(4, bool))
  np.testing.assert_allclose(more.mixture, np.array([1 / 3, 0.1, 0.3, 0.6]) / (4 / 3))
  # All of the weight on a source without a counterpart: uniform.
  lost = baselines.NearestTask(
    np.zeros((1, 1)), [baselines.Candidate({}, np.array([0.0, 0.0, 1.0]))], source_features, np.ones((1, 3), bool)
  )
  np.testing.assert_allclose(lost.predict(np.zeros(1), source_features[0, :2], np.ones(2, bool)).mixture, 0.5)


def test_nearest_refuses_what_it_cannot_compare():
  features, candidates, source_features, mask = known_tasks(np.random.default_rng(0))
  with pytest.raises(errors.InputError):
    baselines.NearestTask(features[:-1], candidates, source_features, mask)
  with pytest.raises(errors.InputError):
    baselines.NearestTask(features, candidates, source_features[:, :3], mask)
  method = baselines.NearestTask(features, candidates, source_features, mask)
  with pytest.raises(errors.InputError):
    method.predict(features[0] * np.nan, source_features[0], mask[0])
  with pytest.raises(errors.InputError):
    method.predict(features[0], source_features[0, :, :1], mask[0])
  with pytest.raises(errors.InputError):
    method.predict(features[0], source_features[0], np.zeros(4, bool))


def test_best_constant_weighs_tasks_by_their_default():
  # Means of the losses: 5.0, 5.5; of the ratios: 1.045, 0.8.
  losses = np.array([[9.9, 0.11], [11.0, 0.05]])
  assert losses.mean(axis=1).argmin() == 0
  assert baselines.best_constant(losses, np.array([10.0, 0.1])) == 1


def test_a_constant_that_diverges_once_loses():
  for diverged in (math.nan, math.inf, -math.inf):
    assert baselines.best_constant(np.array([[diverged, 0.1], [2.0, 2.0], [3.0, 3.0]]), np.ones(2)) == 1
  with pytest.raises(errors.InputError):
    baselines.best_constant(np.full((2, 2), np.nan), np.ones(2))
  with pytest.raises(errors.InputError):
    baselines.best_constant(np.ones((2, 2)), np.array([1.0, 0.0]))
  with pytest.raises(errors.InputError):
    baselines.best_constant(np.ones((2, 2)), np.ones(3))
