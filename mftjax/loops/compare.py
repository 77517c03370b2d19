"""Ways of choosing a recipe, compared on unseen tasks at equal tokens of the final run."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import logging

from mftjax import baselines, metrics, spaces
from mftjax.loops import many_tasks, meta_learn
from mftjax.loops import setting as setting_lib

BATCH = 20  # tasks in one program


@dataclasses.dataclass(frozen=True)
class Choice:
  """What a method chose for each of the tasks, and what that took."""

  values: dict[str, np.ndarray]  # name -> [num_tasks] constrained hyperparameters
  weights: np.ndarray  # [num_tasks, max_sources]
  spent: np.ndarray  # [num_tasks] whole runs' worth of tokens, probes, trials and meta-gradients together


@dataclasses.dataclass(frozen=True)
class Tasks:
  """The tasks compared on, each with one seed; a task stands there once for every seed."""

  found: meta_learn.TaskSet  # [num_tasks * num_seeds, ...]
  seeds: np.ndarray  # [num_tasks * num_seeds]
  num_seeds: int

  def keys(self, purpose: int) -> jax.Array:
    """A key for each, another for each purpose."""
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), purpose))(jnp.asarray(self.seeds))


def repeat(found: meta_learn.TaskSet, num_seeds: int) -> Tasks:
  """Every task once for each seed."""
  count = len(found.tasks.budget)
  return Tasks(
    jax.tree.map(lambda x: jnp.repeat(x, num_seeds, axis=0), found), np.tile(np.arange(num_seeds), count), num_seeds
  )


class Judge:
  """Runs recipes on the tasks: validation loss for the methods that search, test losses for the table."""

  def __init__(self, config: ml_collections.ConfigDict, setting: setting_lib.Setting, tasks: Tasks):
    self._setting, self._tasks = setting, tasks
    self._programs: dict[tuple[str, float], Callable] = {}
    self._scale = {
      part: jax.vmap(functools.partial(setting_lib.task_scale, scale))(tasks.found.tasks)
      for part, scale in (("validation", setting.validation), ("test", setting.test))
    }
    self._objective = config.objective.name

  def validation(
    self, values: dict[str, np.ndarray], weights: np.ndarray, purpose: int, fraction: float = 1.0
  ) -> np.ndarray:
    """`[num_tasks]` objective on validation rows, after a run of this fraction of the task's budget."""
    losses = self._losses("validation", values, weights, purpose, fraction)

    def one(losses, scale, weight):
      return setting_lib.build_objective(scale, weight, self._objective)(losses)

    found = jax.vmap(one)(losses, self._scale["validation"], self._tasks.found.tasks.ability_weight)
    return np.asarray(found, np.float64)

  def improvement(self, choice: Choice, purpose: int) -> np.ndarray:
    """`[num_tasks]` mean normalised improvement on test rows, by the abilities' weights."""
    losses = self.test_losses(choice, purpose)
    weight = np.asarray(self._tasks.found.tasks.ability_weight)
    scale = self._scale["test"]
    gain = (np.asarray(scale.base) - losses) / np.maximum(np.asarray(scale.base - scale.reference), 0.05)
    return np.where(weight > 0, weight * gain, 0.0).sum(axis=1)

  def test_losses(self, choice: Choice, purpose: int) -> np.ndarray:
    """`[num_tasks, max_abilities]` test losses after a whole run."""
    return np.asarray(self._losses("test", choice.values, choice.weights, purpose, 1.0))

  def test_base(self) -> np.ndarray:
    """`[num_tasks, max_abilities]` test losses of the base model."""
    return np.asarray(self._scale["test"].base)

  def _losses(self, part: str, values: dict[str, np.ndarray], weights: np.ndarray, purpose: int, fraction: float):
    """A fraction of a run is a program of its own, of so many steps: what is not trained is not computed."""
    setting = self._setting
    if (part, fraction) not in self._programs:
      rows, count = {
        "validation": (setting.pools.validation, setting.run.validation_rows),
        "test": (setting.pools.test, setting.run.test_rows),
      }[part]
      run = dataclasses.replace(setting.run, num_steps=max(1, round(fraction * setting.run.num_steps)))
      outcome = many_tasks.outcome(setting.model, run, setting.fixed, setting.pools, rows, count)
      self._programs[part, fraction] = many_tasks.mapped(outcome, BATCH)
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
    weights = jnp.asarray(weights, jnp.float32)
    return self._programs[part, fraction](arrays, weights, self._tasks.found.tasks, self._tasks.keys(purpose))


def default_values(setting: setting_lib.Setting, count: int) -> dict[str, np.ndarray]:
  """`[count]` of each hyperparameter that is learned, at its default."""
  return {name: np.full(count, setting.fixed[name]) for name in setting.space.spaces}


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


def search(judge: Judge, setting: setting_lib.Setting, tasks: Tasks, build: Callable) -> Choice:
  """All tasks' searches in step: one program evaluates what each of them asks.

  Args:
    build: `(space, seed, default) -> baselines.Method`.
  """
  masks = np.asarray(tasks.found.tasks.source_mask)
  defaults = {name: float(setting.fixed[name]) for name in setting.space.spaces}
  methods = []
  for index, mask in enumerate(masks):
    default = baselines.Candidate(defaults, baselines.uniform(mask))
    methods.append(build(search_space(setting, mask), 1000 * int(tasks.seeds[index]) + index, default))
  rounds = 0
  while True:
    asked = [method.ask() for method in methods]
    if not any(asked):
      break
    shown = [candidate or method.best() for candidate, method in zip(asked, methods, strict=True)]
    for fraction in sorted({candidate.budget_fraction for candidate in asked if candidate}):
      losses = judge.validation(*_stacked(shown), purpose=10 + rounds, fraction=fraction)
      for method, candidate, loss in zip(methods, asked, losses, strict=True):
        if candidate and candidate.budget_fraction == fraction:
          method.tell(candidate, float(loss))
    rounds += 1
  return Choice(*_stacked([method.best() for method in methods]), np.asarray([method.spent() for method in methods]))


def _stacked(candidates: list[baselines.Candidate]) -> tuple[dict[str, np.ndarray], np.ndarray]:
  names = candidates[0].hyperparameters
  values = {name: np.asarray([candidate.hyperparameters[name] for candidate in candidates]) for name in names}
  return values, np.stack([candidate.mixture for candidate in candidates])


def descend(
  config: ml_collections.ConfigDict, setting: setting_lib.Setting, tasks: Tasks, start: Any, num_steps: int, rate: float
) -> Any:
  """`num_steps` of Adam on each task's own recipe, along its meta-gradient; `start` and the result are recipes."""
  gradients = meta_learn.recipe_gradients(config, setting)
  optimizer = optax.adam(optax.cosine_decay_schedule(rate, num_steps, alpha=0.1), b1=0.8, b2=0.95)

  def step(carry, task, key):
    recipe, opt_state = carry
    _, grad, _ = gradients(*jax.tree.map(lambda x: x[None], (recipe, task)), key[None])
    updates, opt_state = optimizer.update(jax.tree.map(lambda g: g[0], grad), opt_state, recipe)
    return optax.apply_updates(recipe, updates), opt_state

  run = many_tasks.mapped(step, BATCH)
  carry = (start, jax.vmap(optimizer.init)(start))
  for number in range(num_steps):
    carry = run(carry, tasks.found.tasks, tasks.keys(1000 + number))
  return carry[0]


def as_choice(setting: setting_lib.Setting, tasks: Tasks, recipe: Any, spent: np.ndarray) -> Choice:
  """Constrained values and weights of recipes."""
  values = {k: np.asarray(v) for k, v in jax.vmap(setting.space.constrain)(recipe["hyperparameters"]).items()}
  weights = jax.vmap(many_tasks.mixture)(recipe["mixture_logits"], tasks.found.tasks.source_mask)
  return Choice(values, np.asarray(weights), spent)


def compare(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Chooses recipes for unseen tasks by every method, runs them, and writes `compare.json`.

  Trains the meta-learner first if the workdir has none. The final runs of all methods take the same tokens; what a
  method spends before them is counted in whole runs.

  Returns:
    `{"num_tasks", "num_seeds", "rows": [{"name", "improvement", "low", "high", "runs", "corrupted", "planted_tv"}],
    "coverage", "meta_training_runs", "unseen_tasks"}`: mean normalised improvement with its 95 % bootstrap interval
    over tasks, runs spent before the final one, mean weight on corrupted sources, total variation distance to the
    planted mixture, part of outcomes within the 90 % intervals.
  """
  learnt = meta_learn.meta_learn(config, workdir)
  setting, limits = learnt.setting, config.compare
  unseen = meta_learn.sample_tasks(config, setting, "unseen", limits.num_tasks, config.seed + 2)
  tasks = repeat(unseen, limits.num_seeds)
  judge = Judge(config, setting, tasks)
  choices = choose(config, learnt, tasks, judge)
  table = []
  for name, choice in choices.items():
    gain = judge.improvement(choice, purpose=1).reshape(limits.num_tasks, limits.num_seeds).mean(axis=1)
    low, high = metrics.bootstrap_interval(gain)
    table.append(
      {"name": name, "improvement": float(gain.mean()), "low": low, "high": high, "runs": float(choice.spent.mean())}
      | _mixture_figures(choice, tasks)
    )
  result = {
    "num_tasks": limits.num_tasks,
    "num_seeds": limits.num_seeds,
    "rows": table,
    "coverage": coverage(learnt, tasks, judge, choices["predicted"]),
    # A meta-gradient counts as the steps that it goes through, as a trial counts its own.
    "meta_training_runs": config.meta.outer_steps * config.learner.tasks_per_step,
  }
  part_file = workdir / "compare.json.part"
  part_file.write_text(json.dumps(result, indent=2) + "\n")
  os.replace(part_file, workdir / "compare.json")
  return result


def choose(
  config: ml_collections.ConfigDict, learnt: meta_learn.Learnt, tasks: Tasks, judge: Judge
) -> dict[str, Choice]:
  """What every method chooses, by its name."""
  setting, limits, count = learnt.setting, config.compare, len(tasks.seeds)
  values, nothing, equal = default_values(setting, count), np.zeros(count), equal_weights(tasks)
  choices = {
    "uniform, default": Choice(values, equal, nothing),
    "proportional, default": Choice(values, proportional_weights(setting, tasks), nothing),
    "best constant": Choice(best_constant(config, setting, count), equal, nothing),
  }
  trials, budget = limits.num_trials, float(limits.num_trials)
  searches: dict[str, Callable] = {
    "random search": lambda space, seed, default: baselines.RandomSearch(space, trials, seed, default),
    "TPE": lambda space, seed, default: baselines.TPE(space, trials, seed, default),
    "ASHA": lambda space, seed, default: baselines.Asha(space, budget / 3, seed, default),
  }
  for name, build in searches.items():
    logging.warning("compare: %s", name)
    choices[name] = search(judge, setting, tasks, build)
  probe = np.asarray(tasks.found.features.tokens) / (setting.run.num_steps * setting.run.batch_size * config.length)
  probe = probe / np.asarray(tasks.found.tasks.budget)
  recipe = meta_learn.recipes(learnt.predict(tasks.found.features))
  choices["predicted"] = as_choice(setting, tasks, recipe, probe)
  logging.warning("compare: refined and direct")
  refined = descend(config, setting, tasks, recipe, limits.refine_steps, limits.learning_rate / 2)
  choices["predicted, refined"] = as_choice(setting, tasks, refined, probe + limits.refine_steps)
  start = meta_learn.default_recipes(config, setting, count)
  direct = descend(config, setting, tasks, start, limits.direct_steps, limits.learning_rate)
  choices["direct"] = as_choice(setting, tasks, direct, nothing + limits.direct_steps)
  return choices


def best_constant(config: ml_collections.ConfigDict, setting: setting_lib.Setting, count: int) -> dict[str, np.ndarray]:
  """`[count]` of the hyperparameters that do best, with equal weights, over training tasks."""
  limits = config.compare
  found = meta_learn.sample_tasks(config, setting, "train", limits.constant_tasks, config.seed + 3)
  tasks, rng = repeat(found, 1), np.random.default_rng(config.seed)
  judge, equal = Judge(config, setting, tasks), equal_weights(tasks)
  space = search_space(setting, np.ones(2))
  candidates = [{name: float(setting.fixed[name]) for name in setting.space.spaces}]
  candidates += [dict(space.sample(rng).hyperparameters) for _ in range(limits.num_trials - 1)]
  losses = []
  for candidate in candidates:
    values = {name: np.full(limits.constant_tasks, value) for name, value in candidate.items()}
    losses.append(judge.validation(values, equal, purpose=2))
  # The objective is minus an improvement: 1 - improvement is a loss above 0 nearly always.
  positive = 1.0 + np.asarray(losses)
  best = candidates[int(np.argmin(np.where(np.isfinite(positive), positive, np.inf).mean(axis=1)))]
  return {name: np.full(count, value) for name, value in best.items()}


def coverage(learnt: meta_learn.Learnt, tasks: Tasks, judge: Judge, choice: Choice) -> float:
  """Part of the outcomes of the predicted recipes that lie within their 90 % intervals."""
  prediction = learnt.predict(tasks.found.features)
  observed = np.log(np.maximum(judge.test_losses(choice, purpose=1), 1e-6) / np.maximum(judge.test_base(), 1e-6))
  half = learnt.spread_factor * np.exp(np.asarray(prediction.log_spread))
  is_within = np.abs(observed - np.asarray(prediction.loss_ratio)) <= half
  return float(is_within[np.asarray(tasks.found.tasks.ability_weight) > 0].mean())


def _mixture_figures(choice: Choice, tasks: Tasks) -> dict[str, float | None]:
  """Mean weight on corrupted sources where there are any, and distance to the planted mixture where there is one."""
  corrupted, planted = np.asarray(tasks.found.tasks.is_corrupted), np.asarray(tasks.found.tasks.planted)
  has_corrupted, is_planted = corrupted.sum(axis=1) > 0, planted.sum(axis=1) > 0
  on_corrupted = (choice.weights * corrupted).sum(axis=1)[has_corrupted]
  distance = 0.5 * np.abs(choice.weights - planted).sum(axis=1)[is_planted]
  mean = lambda values: float(values.mean()) if len(values) else None
  return {"corrupted": mean(on_corrupted), "planted_tv": mean(distance)}
