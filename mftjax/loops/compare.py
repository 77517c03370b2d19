"""Ways of choosing a recipe, compared on unseen tasks at equal tokens of the final run."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from mftjax import baselines, files, metalearner, metrics, objectives, spaces
from mftjax.loops import meta_learn, refine
from mftjax.loops import setting as setting_lib


@dataclasses.dataclass(frozen=True)
class Choice:
  """What a method chose for each of the tasks, and what that took."""

  values: dict[str, np.ndarray]  # name -> [num_tasks] constrained hyperparameters
  weights: np.ndarray  # [num_tasks, max_sources]
  spent: np.ndarray  # [num_tasks] whole runs' worth of tokens, probes, trials and meta-gradients together


@flax.struct.dataclass
class Tasks:
  """The tasks compared on, each with one seed; a task stands there once for every seed."""

  found: meta_learn.TaskSet  # [num_tasks * num_seeds, ...]
  seeds: jax.Array  # [num_tasks * num_seeds] int32

  def keys(self, purpose: int) -> jax.Array:
    """A key for each, another for each purpose."""
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), purpose))(self.seeds)


def repeat(found: meta_learn.TaskSet, num_seeds: int) -> Tasks:
  """Every task once for each seed."""
  seeds = jnp.tile(jnp.arange(num_seeds), len(found.tasks.budget))
  return Tasks(jax.tree.map(lambda x: jnp.repeat(x, num_seeds, axis=0), found), seeds)


def judged(
  setting: setting_lib.Setting, tasks: Tasks, part: str, losses: Any, objective: objectives.Objective
) -> np.ndarray:
  """`[num_tasks]` f64 of the objective at `[num_tasks, max_abilities]` losses on the part's rows."""
  scale = setting_lib.task_scale(setting.scale[part], tasks.found.tasks)
  one = lambda losses, scale, weight: setting_lib.build_objective(scale, weight, objective)(losses)
  return np.asarray(jax.vmap(one)(losses, scale, tasks.found.tasks.ability_weight), np.float64)


def validation(
  setting: setting_lib.Setting,
  tasks: Tasks,
  values: dict[str, np.ndarray],
  weights: np.ndarray,
  purpose: int,
  fraction: float = 1.0,
  index: np.ndarray | None = None,
) -> np.ndarray:
  """`[num_tasks]` the config's objective on validation rows, after a run of this fraction of the task's budget.

  Args:
    index: tasks to run, all by default; the others' objective is NaN.
  """
  found = setting.outcome("validation", values, weights, tasks.found.tasks, tasks.keys(purpose), fraction, index)
  losses = np.full(tasks.found.tasks.ability_weight.shape, np.nan, np.float32)
  losses[slice(None) if index is None else index] = found
  return judged(setting, tasks, "validation", losses, setting.objective)


def repeated(values: Mapping[str, float], count: int) -> dict[str, np.ndarray]:
  """`[count]` of each value."""
  return {name: np.full(count, value) for name, value in values.items()}


def equal_weights(tasks: Tasks) -> np.ndarray:
  """`[num_tasks, max_sources]` equal parts of the sources that are there."""
  return np.stack([baselines.uniform(mask) for mask in np.asarray(tasks.found.tasks.source_mask)])


def proportional_weights(setting: setting_lib.Setting, tasks: Tasks) -> np.ndarray:
  """Weights by the number of distinct rows."""
  rows, duplicates = np.exp(np.asarray(setting.static[:, 0])), np.asarray(setting.static[:, 2])
  sizes = (rows * (1 - duplicates))[np.asarray(tasks.found.tasks.source)]
  masks = np.asarray(tasks.found.tasks.source_mask)
  return np.stack([baselines.proportional(*pair) for pair in zip(sizes, masks, strict=True)])


def search_space(setting: setting_lib.Setting, mask: np.ndarray) -> baselines.SearchSpace:
  """The setting's own space, for a search on one task."""

  def scale(space: Any) -> tuple[str, tuple[float, ...]]:
    if isinstance(space, spaces.Ordered):
      return "ordered", tuple(space.values)
    return ("log" if isinstance(space, spaces.Log) else "linear"), (space.low, space.high)

  return baselines.SearchSpace({name: scale(s) for name, s in setting.space.spaces.items()}, int(mask.sum()), mask)


def search(setting: setting_lib.Setting, tasks: Tasks, build: Callable) -> Choice:
  """All tasks' searches in step: one program evaluates what each of them asks.

  Args:
    build: `(space, seed, default) -> baselines.Method`.
  """
  masks = np.asarray(tasks.found.tasks.source_mask)
  methods: list[Any] = []
  for index, mask in enumerate(masks):
    default = baselines.Candidate(setting.defaults, baselines.uniform(mask))
    methods.append(build(search_space(setting, mask), 1000 * int(tasks.seeds[index]) + index, default))
  rounds = 0
  while True:
    asked = [method.ask() for method in methods]
    if not any(asked):
      break
    shown = [candidate or method.best() for candidate, method in zip(asked, methods, strict=True)]
    for fraction in sorted({candidate.budget_fraction for candidate in asked if candidate}):
      places = [i for i, candidate in enumerate(asked) if candidate and candidate.budget_fraction == fraction]
      losses = validation(setting, tasks, *_stacked(shown), 10 + rounds, fraction, np.asarray(places))
      for i in places:
        methods[i].tell(shown[i], float(losses[i]))
    rounds += 1
  return Choice(*_stacked([method.best() for method in methods]), np.asarray([method.spent() for method in methods]))


def _stacked(candidates: list[baselines.Candidate]) -> tuple[dict[str, np.ndarray], np.ndarray]:
  names = candidates[0].hyperparameters
  values = {name: np.asarray([candidate.hyperparameters[name] for candidate in candidates]) for name in names}
  return values, np.stack([candidate.mixture for candidate in candidates])


def as_choice(setting: setting_lib.Setting, tasks: Tasks, recipe: Any, spent: np.ndarray) -> Choice:
  """Constrained values and weights of recipes."""
  values, weights = jax.tree.map(np.asarray, setting_lib.constrained(setting, recipe, tasks.found.tasks))
  return Choice(values, weights, spent)


def compare(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Chooses recipes for unseen tasks by every method, runs them, and writes `compare.json`.

  Trains the meta-learner first if the workdir has none. The final runs of all methods take the same tokens; what a
  method spends before them is counted in whole runs.

  Returns:
    `{"num_tasks", "num_seeds", "rows": [{"name", "improvement", "low", "high", "runs", "corrupted", "planted_tv"}],
    "coverage", "meta_training_runs"}`: mean normalised improvement with its 95 % bootstrap interval
    over tasks, runs spent before the final one, mean weight on corrupted sources, total variation distance to the
    planted mixture, part of outcomes within the 90 % intervals.
  """
  learnt = meta_learn.meta_learn(config, workdir)
  setting, limits = learnt.setting, config.compare
  unseen = meta_learn.sample_tasks(config, setting, "unseen", limits.num_tasks, config.seed + 2)
  tasks = repeat(unseen, limits.num_seeds)
  choices = choose(config, learnt, tasks)
  table, losses = [], {}
  for name, choice in choices.items():
    losses[name] = setting.outcome("test", choice.values, choice.weights, tasks.found.tasks, tasks.keys(1))
    gain = -judged(setting, tasks, "test", losses[name], objectives.OBJECTIVES["normalised"])
    gain = gain.reshape(limits.num_tasks, limits.num_seeds).mean(axis=1)
    low, high = metrics.bootstrap_interval(gain)
    table.append(
      {"name": name, "improvement": float(gain.mean()), "low": low, "high": high, "runs": float(choice.spent.mean())}
      | _mixture_figures(choice, tasks)
    )
  result = {
    "num_tasks": limits.num_tasks,
    "num_seeds": limits.num_seeds,
    "rows": table,
    "coverage": coverage(learnt, tasks, losses["predicted"]),
    # A meta-gradient counts as the steps that it goes through, as a trial counts its own.
    "meta_training_runs": config.meta.outer_steps * config.learner.tasks_per_step,
  }
  files.write_json(workdir / "compare.json", result)
  return result


def choose(config: ml_collections.ConfigDict, learnt: meta_learn.Learnt, tasks: Tasks) -> dict[str, Choice]:
  """What every method chooses, by its name."""
  setting, limits, count = learnt.setting, config.compare, len(tasks.seeds)
  values, nothing, equal = repeated(setting.defaults, count), np.zeros(count), equal_weights(tasks)
  choices = {
    "uniform, default": Choice(values, equal, nothing),
    "proportional, default": Choice(values, proportional_weights(setting, tasks), nothing),
    "best constant": Choice(repeated(best_constant(config, setting), count), equal, nothing),
  }
  trials = limits.num_trials
  searches: dict[str, Callable] = {
    "random search": lambda space, seed, default: baselines.RandomSearch(space, trials, seed, default),
    "TPE": lambda space, seed, default: baselines.TPE(space, trials, seed, default),
    "ASHA": lambda space, seed, default: baselines.Asha(space, trials, seed, default),
  }
  for name, build in searches.items():
    logging.warning("compare: %s", name)
    choices[name] = search(setting, tasks, build)
  probe = np.asarray(tasks.found.features.tokens) / (setting.run.num_steps * setting.run.batch_size * config.length)
  probe = probe / np.asarray(tasks.found.tasks.budget)
  recipe = meta_learn.recipes(learnt.predict(tasks.found.features))
  choices["predicted"] = as_choice(setting, tasks, recipe, probe)
  logging.warning("compare: refined and direct")
  descend = functools.partial(refine.descend, setting, tasks.found.tasks, lambda step: tasks.keys(1000 + step))
  refined, _ = descend(recipe, limits.refine_steps, limits.learning_rate / 2)
  choices["predicted, refined"] = as_choice(setting, tasks, refined, probe + limits.refine_steps)
  start = meta_learn.default_recipes(config, setting, count)
  direct, _ = descend(start, limits.direct_steps, limits.learning_rate)
  choices["direct"] = as_choice(setting, tasks, direct, nothing + limits.direct_steps)
  return choices


def best_constant(config: ml_collections.ConfigDict, setting: setting_lib.Setting) -> Mapping[str, float]:
  """The hyperparameters that do best, with equal weights, over training tasks."""
  count, rng = config.compare.constant_tasks, np.random.default_rng(config.seed)
  tasks = repeat(meta_learn.sample_tasks(config, setting, "train", count, config.seed + 3), 1)
  space, equal = search_space(setting, np.ones(2)), equal_weights(tasks)
  candidates = [setting.defaults, *(space.sample(rng).hyperparameters for _ in range(config.compare.num_trials - 1))]
  losses = [validation(setting, tasks, repeated(candidate, count), equal, purpose=2) for candidate in candidates]
  # The objective's units are alike on all tasks already, and it may be below 0: no default loss divides it.
  return candidates[baselines.best_constant(np.stack(losses), np.ones(count))]


def coverage(learnt: meta_learn.Learnt, tasks: Tasks, losses: jax.Array) -> float:
  """Part of the test losses after the predicted recipes' runs that lie within their 90 % intervals."""
  prediction = learnt.predict(tasks.found.features)
  base = setting_lib.task_scale(learnt.setting.scale["test"], tasks.found.tasks).base
  half = learnt.spread_factor * jnp.exp(prediction.log_spread)
  is_within = jnp.abs(metalearner.log_ratio(losses, base) - prediction.loss_ratio) <= half
  return float(is_within[tasks.found.tasks.ability_weight > 0].mean())


def _mixture_figures(choice: Choice, tasks: Tasks) -> dict[str, float | None]:
  """Mean weight on corrupted sources where there are any, and distance to the planted mixture where there is one."""
  corrupted, planted = np.asarray(tasks.found.tasks.is_corrupted), np.asarray(tasks.found.tasks.planted)
  has_corrupted, is_planted = corrupted.sum(axis=1) > 0, planted.sum(axis=1) > 0
  on_corrupted = (choice.weights * corrupted).sum(axis=1)[has_corrupted]
  distance = 0.5 * np.abs(choice.weights - planted).sum(axis=1)[is_planted]
  mean = lambda values: float(values.mean()) if len(values) else None
  return {"corrupted": mean(on_corrupted), "planted_tv": mean(distance)}
