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

from mftjax import baselines, engine, errors, features, files, metalearner, metrics, objectives, spaces
from mftjax import config as config_lib
from mftjax.data import meta_tasks
from mftjax.loops import learnt as learnt_lib
from mftjax.loops import meta_learn, refine
from mftjax.loops import setting as setting_lib

METHODS = (
  *("uniform, default", "proportional, default", "best constant", "nearest meta-task"),
  *("random search", "TPE", "ASHA"),
  *("predicted", "predicted, refined", "direct"),
)
DIVERGED = 10.0  # nats that an ability counts after a final run that is not finite


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
  setting: setting_lib.Setting, tasks: meta_tasks.MetaTask, part: str, losses: Any, objective: objectives.Objective
) -> np.ndarray:
  """`[num_tasks]` f64 of the objective at `[num_tasks, max_abilities]` losses on the part's rows."""
  scale = setting_lib.task_scale(setting.scale[part], tasks)
  one = lambda losses, scale, weight: setting_lib.build_objective(scale, weight, objective)(losses)
  return np.asarray(jax.vmap(one)(losses, scale, tasks.ability_weight), np.float64)


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
  return judged(setting, tasks.found.tasks, "validation", losses, setting.objective)


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
    default = baselines.Candidate(setting.space.rounded(setting.defaults), baselines.uniform(mask))
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


def default_recipes(config: ml_collections.ConfigDict, setting: setting_lib.Setting, count: int) -> dict[str, Any]:
  """`[count]` recipes of the default hyperparameters and equal weights."""
  initial = setting.space.init(config_lib.initial_hyperparameters(config))
  return {
    "hyperparameters": {name: jnp.repeat(value[None], count, axis=0) for name, value in initial.items()},
    "mixture_logits": jnp.zeros((count, config.tasks.max_sources)),
  }


def as_choice(setting: setting_lib.Setting, tasks: Tasks, recipe: Any, spent: np.ndarray) -> Choice:
  """Constrained values and weights of recipes."""
  values, weights = jax.tree.map(np.asarray, setting_lib.constrained(setting, recipe, tasks.found.tasks))
  return Choice(values, weights, spent)


def compare(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Chooses recipes for unseen tasks by every method of `compare.methods`, runs them, and writes `compare.json`.

  Trains the meta-learner first if the workdir has none. The final runs of all methods take the same tokens; what a
  method spends before them is counted in whole runs. What a method chose is kept in `choices/`, and not chosen again.

  Returns:
    `{"num_tasks", "num_seeds", "rows": [{"name", "improvement", "low", "high", "by_task", "over_tpe",
    "over_tpe_interval", "runs", "corrupted", "planted_tv"}], "coverage", "meta_training_runs"}`: mean normalised
    improvement with its 95 % bootstrap interval over tasks, that of each task, the difference from TPE's on the same
    tasks, runs spent before the final one, mean weight on corrupted sources, total variation distance to the planted
    mixture, part of outcomes within the 90 % intervals. What a method that is left out would be needed
    for is None.

  Raises:
    InputError: no such method, or no such engine; before anything else.
  """
  for name in config.compare.methods:
    if name not in METHODS:
      raise errors.unknown_name("method in config.compare.methods", str(name), METHODS)
  engine.check(config)
  learnt = meta_learn.meta_learn(config, workdir)
  setting, limits = learnt.setting, config.compare
  tasks = repeat(unseen(config, setting), limits.num_seeds)
  paths = {name: workdir / "choices" / f"{files.named(name)}.npz" for name in limits.methods or METHODS}
  engine.run(config, _choose, paths, choosers(config, learnt, tasks), _build, config, workdir)
  choices = {name: _read_choice(path) for name, path in paths.items()}
  table, gains = [], {}
  for name, choice in choices.items():
    losses = final_losses(setting, tasks, choice)
    gain = -judged(setting, tasks.found.tasks, "test", losses, objectives.OBJECTIVES["normalised"])
    gains[name] = gain.reshape(limits.num_tasks, limits.num_seeds).mean(axis=1)
  for name, choice in choices.items():
    low, high = metrics.bootstrap_interval(gains[name])
    over_tpe = gains[name] - gains["TPE"] if "TPE" in gains else None
    table.append(
      {"name": name, "improvement": float(gains[name].mean()), "low": low, "high": high}
      | {"by_task": gains[name].tolist()}
      | {"over_tpe": None if over_tpe is None else float(over_tpe.mean())}
      | {"over_tpe_interval": None if over_tpe is None else metrics.bootstrap_interval(over_tpe)}
      | {"runs": float(choice.spent.mean())}
      | _mixture_figures(choice, tasks)
    )
  result = {
    "num_tasks": limits.num_tasks,
    "num_seeds": limits.num_seeds,
    "rows": table,
    "coverage": coverage(config, learnt, tasks) if "predicted" in gains else None,
    # A meta-gradient counts as the steps that it goes through, as a trial counts its own.
    "meta_training_runs": config.meta.outer_steps * config.learner.tasks_per_step,
  }
  files.write_json(workdir / "compare.json", result)
  return result


def final_losses(setting: setting_lib.Setting, tasks: Tasks, choice: Choice) -> jax.Array:
  """`[num_tasks, max_abilities]` test losses after the final runs."""
  found = setting.outcome("test", choice.values, choice.weights, tasks.found.tasks, tasks.keys(1))
  return jnp.where(jnp.isfinite(found), found, DIVERGED)


def unseen(config: ml_collections.ConfigDict, setting: setting_lib.Setting) -> meta_learn.TaskSet:
  """The tasks compared on."""
  return meta_learn.sample_tasks(config, setting, "unseen", config.compare.num_tasks, config.seed + 2)


def _build(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Callable[[], Choice]]:
  """`choosers` as `compare` has them, in another process: of what meta-training has left."""
  kept = learnt_lib.load(config, workdir)
  setting = setting_lib.build(kept.config)  # with the model that was kept
  learnt = meta_learn.Learnt(setting, kept.graphdef, kept.state, kept.spread_factor)
  return choosers(config, learnt, repeat(unseen(config, setting), config.compare.num_seeds))


def _choose(methods: Mapping[str, Callable[[], Choice]], name: str, path: pathlib.Path) -> None:
  """Has a method choose, and writes what it chose."""
  logging.warning("compare: %s", name)
  choice = methods[name]()
  values = {f"values/{key}": value for key, value in choice.values.items()}
  files.write_npz(path, {"weights": choice.weights, "spent": choice.spent, **values})


def _read_choice(path: pathlib.Path) -> Choice:
  with np.load(path) as arrays:
    values = {key.removeprefix("values/"): arrays[key] for key in arrays if key.startswith("values/")}
    return Choice(values, arrays["weights"], arrays["spent"])


def choosers(
  config: ml_collections.ConfigDict, learnt: meta_learn.Learnt, tasks: Tasks
) -> dict[str, Callable[[], Choice]]:
  """For each of `METHODS` what has it choose."""
  setting, limits, count = learnt.setting, config.compare, len(tasks.seeds)
  values, nothing, equal = repeated(setting.defaults, count), np.zeros(count), equal_weights(tasks)
  sample_known = lambda: meta_learn.sample_tasks(config, setting, "train", limits.constant_tasks, config.seed + 3)
  known = functools.cache(lambda: repeat(sample_known(), 1))
  probe = np.asarray(tasks.found.features.tokens) / (setting.run.num_steps * setting.run.batch_size * config.length)
  probe = probe / np.asarray(tasks.found.tasks.budget)
  recipe, default = learnt.predict(tasks.found.features).recipe, default_recipes(config, setting, count)
  by_search = lambda method: (
    lambda: search(setting, tasks, lambda space, seed, default: method(space, limits.num_trials, seed, default))
  )

  def by_descent(start, steps, rate, before):
    return as_choice(setting, tasks, descend(setting, tasks, start, steps, rate), before + steps)

  return {
    "uniform, default": lambda: Choice(values, equal, nothing),
    "proportional, default": lambda: Choice(values, proportional_weights(setting, tasks), nothing),
    "best constant": lambda: Choice(repeated(best_constant(config, setting, known()), count), equal, nothing),
    "nearest meta-task": lambda: nearest(config, setting, known(), tasks, probe),
    "random search": by_search(baselines.RandomSearch),
    "TPE": by_search(baselines.TPE),
    "ASHA": by_search(baselines.Asha),
    "predicted": lambda: as_choice(setting, tasks, recipe, probe),
    "predicted, refined": lambda: by_descent(recipe, limits.refine_steps, limits.refine_learning_rate, probe),
    "direct": lambda: by_descent(default, limits.direct_steps, limits.learning_rate, nothing),
  }


def descend(setting: setting_lib.Setting, tasks: Tasks, start: Any, num_steps: int, rate: float) -> Any:
  """Recipes after meta-gradient steps on each task by itself, see `refine.descend`."""
  return refine.descend(setting, tasks.found.tasks, lambda step: tasks.keys(1000 + step), start, num_steps, rate)[0]


def best_constant(config: ml_collections.ConfigDict, setting: setting_lib.Setting, tasks: Tasks) -> Mapping[str, float]:
  """The hyperparameters that do best, with equal weights, over training tasks."""
  count, rng = config.compare.constant_tasks, np.random.default_rng(config.seed)
  space, equal = search_space(setting, np.ones(2)), equal_weights(tasks)
  candidates = [setting.defaults, *(space.sample(rng).hyperparameters for _ in range(config.compare.num_trials - 1))]
  losses = [validation(setting, tasks, repeated(candidate, count), equal, purpose=2) for candidate in candidates]
  # The objective's units are alike on all tasks already, and it may be below 0: no default loss divides it.
  return candidates[baselines.best_constant(np.stack(losses), np.ones(count))]


def nearest(
  config: ml_collections.ConfigDict, setting: setting_lib.Setting, known: Tasks, tasks: Tasks, probe: np.ndarray
) -> Choice:
  """What the direct learner came to on the nearest of the known tasks."""
  limits, count = config.compare, len(known.seeds)
  start = default_recipes(config, setting, count)
  tuned = descend(setting, known, start, limits.direct_steps, limits.learning_rate)
  values, weights = jax.tree.map(np.asarray, setting_lib.constrained(setting, tuned, known.found.tasks))
  best = [baselines.Candidate({n: float(v[i]) for n, v in values.items()}, weights[i]) for i in range(count)]
  of = lambda found: (np.asarray(found.features.source), np.asarray(found.features.source_mask) > 0)
  method = baselines.NearestTask(features.summaries(known.found.features), best, *of(known.found))
  summaries, arrays = features.summaries(tasks.found.features), zip(*of(tasks.found), strict=True)
  found = [method.predict(summary, *each) for summary, each in zip(summaries, arrays, strict=True)]
  return Choice(*_stacked(found), probe)


def coverage(config: ml_collections.ConfigDict, learnt: meta_learn.Learnt, compared: Tasks) -> float:
  """Part of the test losses after the predicted recipes' runs that lie within their 90 % intervals.

  Seeds of one task come out much alike, so more tasks tell more: `compare.coverage_tasks` of one seed each.
  """
  setting, tasks, count = learnt.setting, compared, config.compare.coverage_tasks
  if count:
    tasks = repeat(meta_learn.sample_tasks(config, setting, "unseen", count, config.seed + 4), 1)
  prediction = learnt.predict(tasks.found.features)
  choice = as_choice(setting, tasks, prediction.recipe, np.zeros(len(tasks.seeds)))
  base = setting_lib.task_scale(setting.scale["test"], tasks.found.tasks).base
  half = learnt.spread_factor * jnp.exp(prediction.log_spread)
  is_within = jnp.abs(metalearner.log_ratio(final_losses(setting, tasks, choice), base) - prediction.loss_ratio) <= half
  return float(is_within[tasks.found.tasks.ability_weight > 0].mean())


def _mixture_figures(choice: Choice, tasks: Tasks) -> dict[str, float | None]:
  """Mean weight on corrupted sources where there are any, and distance to the planted mixture where there is one."""
  corrupted, planted = np.asarray(tasks.found.tasks.is_corrupted), np.asarray(tasks.found.tasks.planted)
  has_corrupted, is_planted = corrupted.sum(axis=1) > 0, planted.sum(axis=1) > 0
  on_corrupted = (choice.weights * corrupted).sum(axis=1)[has_corrupted]
  distance = 0.5 * np.abs(choice.weights - planted).sum(axis=1)[is_planted]
  mean = lambda values: float(values.mean()) if len(values) else None
  return {"corrupted": mean(on_corrupted), "planted_tv": mean(distance)}
