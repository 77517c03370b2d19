"""Search spaces, candidates, and the three methods that search."""

import collections
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mftjax import baselines, errors
from mftjax.baselines import tpe

SPACE = baselines.SearchSpace(
  {
    "learning_rate": ("log", (1e-6, 1e-2)),
    "weight_decay": ("linear", (0.0, 0.2)),
    "num_steps": ("ordered", (50, 100, 200, 400)),
  },
  num_sources=3,
)
DEFAULT = baselines.Candidate({"learning_rate": 1e-3, "weight_decay": 0.1, "num_steps": 100}, np.full(3, 1 / 3))
METHODS = {
  "random": lambda seed, **options: baselines.RandomSearch(SPACE, num_trials=30, seed=seed, **options),
  "tpe": lambda seed, **options: baselines.TPE(SPACE, num_trials=30, seed=seed, **options),
  "asha": lambda seed, **options: baselines.Asha(SPACE, total_budget=10, seed=seed, **options),
}


def quadratic(candidate, target=(0.6, 0.3, 0.1)):
  """(log10 learning rate + 4)^2 plus the squared distance of the mixture."""
  distance = math.log10(candidate.hyperparameters["learning_rate"]) + 4
  return distance**2 + float(np.sum((candidate.mixture - np.array(target)) ** 2))


def search(method, loss_fn=quadratic):
  """All candidates with their losses, in the order in which they were asked."""
  history = []
  while (candidate := method.ask()) is not None:
    history.append((candidate, loss_fn(candidate)))
    method.tell(*history[-1])
  return history


def settings_of(candidate):
  return (*candidate.hyperparameters.items(), *candidate.mixture, candidate.budget_fraction)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_samples_lie_in_the_space(seed):
  space = baselines.SearchSpace(SPACE.hyperparameters, 2, source_mask=(True, False, True))
  candidate = space.sample(np.random.default_rng(seed))
  assert space.check(candidate) is candidate
  assert candidate.mixture[1] == 0
  assert candidate.mixture.sum() == pytest.approx(1)


def test_samples_follow_their_scales():
  rng = np.random.default_rng(0)
  samples = [SPACE.sample(rng) for _ in range(4000)]
  column = lambda name: np.array([sample.hyperparameters[name] for sample in samples])
  # Medians of the uniform laws: the geometric mean, the mean; standard error of each 0.8% of the range.
  assert np.median(np.log10(column("learning_rate"))) == pytest.approx(-4, abs=0.15)
  assert np.median(column("weight_decay")) == pytest.approx(0.1, abs=0.01)
  assert min(collections.Counter(column("num_steps")).values()) > 900
  # Dirichlet(1, 1, 1): mean 1/3, variance (1/3)(2/3)/4 = 1/18.
  mixtures = np.stack([sample.mixture for sample in samples])
  np.testing.assert_allclose(mixtures.mean(0), 1 / 3, atol=0.015)
  np.testing.assert_allclose(mixtures.var(0), 1 / 18, atol=0.005)


@pytest.mark.parametrize(
  "hyperparameters, num_sources, mask",
  [
    ({"b1": ("logg", (0.1, 1.0))}, 1, None),
    ({"b1": ("log", (0.0, 1.0))}, 1, None),
    ({"b1": ("linear", (1.0, 1.0))}, 1, None),
    ({"b1": ("ordered", ())}, 1, None),
    ({"b1": ("ordered", (2, 1))}, 1, None),
    ({}, 0, None),
    ({}, 2, (True, False)),
  ],
)
def test_a_wrong_space_raises(hyperparameters, num_sources, mask):
  with pytest.raises(errors.InputError):
    baselines.SearchSpace(hyperparameters, num_sources, mask)


@pytest.mark.parametrize(
  "mixture, fraction", [([0.5, 0.4], 1.0), ([1.5, -0.5], 1.0), ([np.nan, 1.0], 1.0), ([1.0], 0.0)]
)
def test_a_wrong_candidate_raises(mixture, fraction):
  with pytest.raises(errors.InputError):
    baselines.Candidate({}, np.array(mixture), fraction)


@pytest.mark.parametrize("name", METHODS)
def test_the_seed_decides_what_is_asked(name):
  first, again, other = (search(METHODS[name](seed)) for seed in (1, 1, 2))
  assert [settings_of(c) for c, _ in first] == [settings_of(c) for c, _ in again]
  assert [settings_of(c) for c, _ in first] != [settings_of(c) for c, _ in other]


@pytest.mark.parametrize("name", METHODS)
def test_candidates_lie_in_the_space_and_budgets_count(name):
  method = METHODS[name](0)
  assert method.spent() == 0
  history = search(method)
  for candidate, _ in history:
    SPACE.check(baselines.Candidate(candidate.hyperparameters, candidate.mixture))
  assert method.spent() == pytest.approx(sum(candidate.budget_fraction for candidate, _ in history))
  if name != "asha":
    assert method.spent() == len(history) == 30
  assert method.ask() is None


@pytest.mark.parametrize("name", METHODS)
def test_the_default_comes_first(name):
  method = METHODS[name](0, default=DEFAULT)
  history = search(method)
  assert history[0][0].hyperparameters == DEFAULT.hyperparameters
  np.testing.assert_array_equal(history[0][0].mixture, DEFAULT.mixture)


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_that_is_not_finite_is_never_best(name):
  diverging = lambda c: quadratic(c) if c.hyperparameters["learning_rate"] < 1e-4 else DIVERGED[c.mixture[0] > 0.3]
  method = METHODS[name](3)
  history = search(method, diverging)
  assert any(not math.isfinite(loss) for _, loss in history)
  whole = [(loss, i) for i, (c, loss) in enumerate(history) if c.budget_fraction == 1 and math.isfinite(loss)]
  assert method.best() is history[min(whole)[1]][0]


# -inf is a broken loss as well, not a record.
DIVERGED = {True: math.nan, False: -math.inf}


@pytest.mark.parametrize("name", METHODS)
def test_tell_takes_only_what_was_asked(name):
  method = METHODS[name](0)
  with pytest.raises(errors.InputError, match="No whole run"):
    method.best()
  with pytest.raises(errors.InputError, match="ask"):
    method.tell(DEFAULT, 1.0)
  candidate = method.ask()
  method.tell(candidate, 1.0)
  with pytest.raises(errors.InputError, match="ask"):
    method.tell(candidate, 0.0)


@pytest.mark.parametrize("name", METHODS)
def test_several_candidates_may_be_out(name):
  method = METHODS[name](0)
  out = [method.ask() for _ in range(9)]
  assert len({settings_of(candidate) for candidate in out}) == 9
  for candidate in reversed(out):
    method.tell(candidate, quadratic(candidate))
  assert method.ask() is not None


def test_a_default_outside_of_the_space_raises():
  too_high = baselines.Candidate({**DEFAULT.hyperparameters, "learning_rate": 1.0}, DEFAULT.mixture)
  misspelt = baselines.Candidate({**DEFAULT.hyperparameters, "learning_rat": 1e-3}, DEFAULT.mixture)
  for make in METHODS.values():
    with pytest.raises(errors.InputError, match=r"learning_rate = 1\.0"):
      make(0, default=too_high)
    with pytest.raises(errors.InputError, match="Did you mean 'learning_rate'"):
      make(0, default=misspelt)


def test_tpe_beats_random_search():
  lowest = lambda method: min(loss for _, loss in search(method))
  random = [lowest(baselines.RandomSearch(SPACE, num_trials=50, seed=seed)) for seed in range(10)]
  found = [lowest(baselines.TPE(SPACE, num_trials=50, seed=seed)) for seed in range(10)]
  assert np.mean(found) < 0.7 * np.mean(random)


def test_tpe_learns_from_the_default_through_its_params():
  candidate = baselines.Candidate(DEFAULT.hyperparameters, np.array([0.7, 0.3, 0.0]))
  params = tpe._to_params(SPACE, candidate)
  back = tpe._from_params(SPACE, params)
  assert back.hyperparameters == candidate.hyperparameters
  # The absent share comes back as the smallest one: exp(-6) of the largest.
  np.testing.assert_allclose(back.mixture, np.array([0.7, 0.3, 0.7 * math.exp(-6)]) / (1 + 0.7 * math.exp(-6)))
  distributions = tpe._distributions(SPACE)
  assert all(distributions[name]._contains(value) for name, value in params.items())


def test_tpe_takes_a_single_source_and_no_hyperparameters():
  method = baselines.TPE(baselines.SearchSpace({}, 1), num_trials=3)
  assert [candidate.mixture.tolist() for candidate, _ in search(method, lambda _: 1.0)] == [[1.0]] * 3


@given(
  reduction_factor=st.integers(2, 4),
  power=st.integers(0, 3),
  extra=st.floats(0, 8),
  seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_asha_keeps_to_its_budget(reduction_factor, power, extra, seed):
  budget = power + 1 + extra
  options = {"reduction_factor": reduction_factor, "minimum_fraction": reduction_factor**-power}
  method = baselines.Asha(SPACE, budget, seed, **options)
  history = search(method)
  spent = math.fsum(candidate.budget_fraction for candidate, _ in history)
  assert budget - 1 < spent <= budget + 1e-9
  assert method.spent() == pytest.approx(spent)
  assert method.fractions == pytest.approx([reduction_factor ** (k - power) for k in range(power + 1)])
  assert method.best().budget_fraction == 1  # a whole run was reached, even with the smallest budget


@pytest.mark.parametrize("reduction_factor", [3, 4])
def test_asha_promotes_the_best_of_each_rung(reduction_factor):
  method = baselines.Asha(SPACE, 40, 0, reduction_factor=reduction_factor, minimum_fraction=reduction_factor**-2)
  rungs = collections.defaultdict(dict)
  key = lambda candidate: tuple(candidate.mixture)
  while (candidate := method.ask()) is not None:
    rung = method.fractions.index(candidate.budget_fraction)
    # Algorithm 2, restated: every rung from the asked one up has promoted all of its top already, and the candidate is
    # new in its rung and among the top of the one below.
    for lower in range(rung, 2):
      top = sorted(rungs[lower], key=rungs[lower].get)[: len(rungs[lower]) // reduction_factor]
      assert set(top) <= set(rungs[lower + 1])
    if rung > 0:
      top = sorted(rungs[rung - 1], key=rungs[rung - 1].get)[: len(rungs[rung - 1]) // reduction_factor]
      assert key(candidate) in top and key(candidate) not in rungs[rung]
    rungs[rung][key(candidate)] = quadratic(candidate)
    method.tell(candidate, quadratic(candidate))
  assert len(rungs[0]) > len(rungs[1]) > len(rungs[2]) >= 4


def test_asha_promotes_from_the_highest_rung_first():
  # Told one by one, at most one promotion is due at a time; after many at once, several rungs have some.
  method = baselines.Asha(SPACE, 20, 0)
  out = [method.ask() for _ in range(27)]
  for candidate in out:
    method.tell(candidate, quadratic(candidate))
  promoted = [method.ask() for _ in range(3)]
  best = sorted(out, key=quadratic)
  assert [settings_of(c)[:-1] for c in promoted] == [settings_of(c)[:-1] for c in best[:3]]
  for candidate in promoted:
    method.tell(candidate, quadratic(candidate))
  following = [method.ask() for _ in range(8)]
  assert [c.budget_fraction for c in following] == pytest.approx([1] + [1 / 3] * 6 + [1 / 9])
  assert settings_of(following[0])[:-1] == settings_of(best[0])[:-1]


def test_asha_never_promotes_what_diverged():
  method = baselines.Asha(SPACE, 10, 0)
  assert all(candidate.budget_fraction < 0.2 for candidate, _ in search(method, lambda _: math.nan))
  with pytest.raises(errors.InputError, match="No whole run"):
    method.best()


@pytest.mark.parametrize(
  "options",
  [{"total_budget": 2.9}, {"total_budget": math.inf}, {"reduction_factor": 1}, {"minimum_fraction": 0.0}],
)
def test_a_wrong_asha_raises(options):
  with pytest.raises(errors.InputError):
    baselines.Asha(SPACE, **{"total_budget": 10, "seed": 0, **options})
