"""The tree-structured Parzen estimator, by Optuna."""

import numpy as np
import optuna

from mftjax.baselines.search import Candidate, SearchSpace, Trials
from mftjax.errors import InputError

LOWEST_LOG_WEIGHT = -6.0  # exp(-6) = 0.0025: the smallest share relative to the largest one


class TPE:
  """Optuna's `TPESampler` on hyperparameters and mixture together, each trial a whole run (`search.Method`).

  The mixture is the softmax of one log-weight per present source, each uniform in [-6, 0] before TPE learns better;
  that is not `SearchSpace.sample`'s Dirichlet(1), which is uniform in the shares. An ordered hyperparameter is searched
  by its index, which keeps the order that Optuna's categorical parameters lose. All else is Optuna's default: 10
  random trials first, 24 draws per trial, the constant liar for candidates that are out. With 8 parameters its own work
  is 3 ms a trial on one core, over 50 trials (6.6 ms if not multivariate).

  Args:
    space: what to search.
    num_trials: runs in all, the default's among them.
    seed: of the sampler; the same seed and losses give the same candidates.
    default: the first trial, if given. It is asked as it is; TPE sees its log-weights clipped to [-6, 0].
    multivariate: one joint density over all parameters; otherwise one for each, independently.

  Raises:
    InputError: `num_trials` < 1, or the default is outside of the space.

  Source: Bergstra et al., 2011, "Algorithms for Hyper-Parameter Optimization", Section 4; the multivariate density:
  Falkner et al., 2018, "BOHB", Section 3.2; Optuna 5.0, `optuna.samplers.TPESampler`.
  """

  def __init__(
    self,
    space: SearchSpace,
    num_trials: int = 50,
    seed: int = 0,
    default: Candidate | None = None,
    multivariate: bool = True,
  ):
    if num_trials < 1:
      raise InputError(f"num_trials must be at least 1, got {num_trials}.")
    # Optuna reports each new study and trial otherwise; its level is one for the whole process.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    self._space = space
    self._num_trials = num_trials
    self._default = None if default is None else space.check(default)
    self._trials = Trials()
    self._distributions = _distributions(space)
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=multivariate)
    self._study = optuna.create_study(storage=optuna.storages.InMemoryStorage(), sampler=sampler)
    if self._default is not None:
      self._study.enqueue_trial(_to_params(space, self._default))

  def ask(self) -> Candidate | None:
    if self._trials.num_started == self._num_trials:
      return None
    trial = self._study.ask(self._distributions)
    if self._default is not None and self._trials.num_started == 0:
      return self._trials.start(self._default, trial)
    return self._trials.start(_from_params(self._space, trial.params), trial)

  def tell(self, candidate: Candidate, loss: float) -> None:
    trial, loss = self._trials.finish(candidate, loss)
    self._study.tell(trial, loss)  # Optuna would drop a NaN trial, but ranks an infinite one last

  def best(self) -> Candidate:
    return self._trials.best()

  def spent(self) -> float:
    return self._trials.spent()


# Optuna's parameter names; the prefix keeps a hyperparameter's name apart from a log-weight's.
def _name(hyperparameter: str) -> str:
  return f"hyperparameters/{hyperparameter}"


def _weight_names(space: SearchSpace) -> list[str]:
  return [f"log_weights/{i}" for i in range(space.num_sources)] if space.num_sources > 1 else []


def _distributions(space: SearchSpace) -> dict[str, optuna.distributions.BaseDistribution]:
  distributions: dict[str, optuna.distributions.BaseDistribution] = {}
  for name, (scale, values) in space.hyperparameters.items():
    if scale == "ordered":
      distributions[_name(name)] = optuna.distributions.IntDistribution(0, len(values) - 1)
    else:
      distributions[_name(name)] = optuna.distributions.FloatDistribution(values[0], values[1], log=scale == "log")
  for name in _weight_names(space):
    distributions[name] = optuna.distributions.FloatDistribution(LOWEST_LOG_WEIGHT, 0.0)
  return distributions


def _to_params(space: SearchSpace, candidate: Candidate) -> dict[str, float]:
  params = {}
  for name, (scale, values) in space.hyperparameters.items():
    value = candidate.hyperparameters[name]
    params[_name(name)] = values.index(value) if scale == "ordered" else value
  weights = candidate.mixture[space.mask()]
  lowest = np.exp(LOWEST_LOG_WEIGHT)
  log_weights = np.maximum(np.log(np.maximum(weights / weights.max(), lowest)), LOWEST_LOG_WEIGHT)
  return params | dict(zip(_weight_names(space), log_weights.tolist(), strict=False))


def _from_params(space: SearchSpace, params: dict[str, float]) -> Candidate:
  hyperparameters = {}
  for name, (scale, values) in space.hyperparameters.items():
    value = params[_name(name)]
    hyperparameters[name] = values[int(value)] if scale == "ordered" else value
  weights = np.exp([params[name] for name in _weight_names(space)] or [0.0])
  return Candidate(hyperparameters, space.place(weights / weights.sum()))
