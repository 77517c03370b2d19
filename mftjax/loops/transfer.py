"""A meta-learner's recipes for base models of other widths and for a longer run, against the best rates there."""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from mftjax import config as config_lib
from mftjax import engine, errors, features, files, metrics, objectives, run_folder
from mftjax import transfer as transfer_lib
from mftjax.loops import compare, learnt, meta_learn
from mftjax.loops import setting as setting_lib

FILE, BUDGET = "transfer.json", "budget"
RATIO = 1.5  # between two learning rates of a grid
ONE_RATE, WIDTH_RULE = "one rate", "width rule"  # how a learning rate is taken at another width
_LONGER = 2  # times the largest budget, for which the law over the budget is checked
_MOVED = 5  # features that are named


class Recipes(NamedTuple):
  """One recipe for each of the tasks, repeated as they are."""

  values: dict[str, np.ndarray]  # name -> [num_tasks * num_seeds] constrained
  weights: np.ndarray  # [num_tasks * num_seeds, max_sources]

  def at(self, rates: Any) -> "Recipes":
    """The same with other learning rates."""
    return Recipes({**self.values, "learning_rate": np.broadcast_to(rates, len(self.weights))}, self.weights)


class Grid(NamedTuple):
  """What learning rates do, the recipes being otherwise the same."""

  rates: np.ndarray  # [num_rates], ascending
  gains: np.ndarray  # [num_rates, num_tasks] improvement on validation rows, mean over seeds

  @property
  def best(self) -> np.ndarray:
    """`[num_tasks]` each task's best rate: the top of the parabola through its best of the grid and the two beside it.

    It is at most half a step from the grid's, in logarithms; the grid's own where that is an end.
    """
    place = self.gains.argmax(axis=0)
    inner = np.clip(place, 1, len(self.rates) - 2)
    below, here, above = (np.take_along_axis(self.gains, (inner + step)[None], axis=0)[0] for step in (-1, 0, 1))
    bend = below - 2 * here + above
    is_top = (place == inner) & (bend < 0)
    offset = np.where(is_top, (below - above) / np.where(is_top, 2 * bend, 1.0), 0.0)
    return self.rates[place] * RATIO**offset


@dataclasses.dataclass(frozen=True)
class Run:
  """What all widths and budgets have in common."""

  kept: learnt.Kept
  num_seeds: int
  num_rates: int

  def predict(self, setting: setting_lib.Setting, tasks: compare.Tasks) -> Recipes:
    """The meta-learner's, for tasks as their features show them, with all multipliers of the learning rate.

    They are named where they are 1 too, so that every width runs one program.
    """
    recipe = meta_learn.predict(self.kept.graphdef, self.kept.state, tasks.found.features).recipe
    values, weights = jax.tree.map(np.asarray, setting_lib.constrained(setting, recipe, tasks.found.tasks))
    ones = {name: np.ones(len(weights)) for name in transfer_lib.width_multipliers(1, 1)}
    fixed = {name: setting.fixed[name] * one for name, one in ones.items()}
    return Recipes({**fixed, **values}, weights)

  def by_task(self, values: np.ndarray) -> np.ndarray:
    """`[..., num_tasks * num_seeds]` -> `[..., num_tasks]`, mean over seeds."""
    return values.reshape(*values.shape[:-1], -1, self.num_seeds).mean(axis=-1)


def transfer(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  widths: Sequence[int],
  num_tasks: int = 6,
  num_seeds: int = 2,
  num_rates: int = 8,
) -> dict[str, Any]:
  """Predicts for unseen tasks with base models of several widths, runs that, and writes `transfer.json`.

  Each width has a base model of its own, trained by the same recipe; the meta-training's own width is always among
  them, with the very model that was kept. The tasks are the first of those that `experiments.compare` compares on.
  Beside the predictions runs a grid of learning rates, of which the best are chosen by validation rows. All are judged
  by test rows, after runs with other batches than the grid's. What a width came to is kept in `transfer/`.

  Args:
    config: of the meta-training that the workdir holds.
    widths: hidden sizes; the size of a head stays, so they are multiples of it.
    num_tasks: at most `config.compare.num_tasks`.
    num_seeds: final runs of each.
    num_rates: of a grid, at least 3; as many again are added while the best lies at its end.

  Returns:
    `{"base_width", "num_tasks", "num_seeds", "widths": [...], "budget": {...}}`. An entry of a width: `width`,
    `num_heads`, `num_parameters`, `feature_shift`, `moved`, `grids` and `rows`. A row: `name`, `way` (`ONE_RATE` or
    `WIDTH_RULE`), `rate` and `hidden_rate` (that of the hidden matrices), geometric means over tasks, `ratio` to the
    best of the grid of the same way, `improvement`, normalised, and `minus_best`, its difference from that of the best;
    each with its 95 % bootstrap interval over tasks. `budget` holds the law, and the rows of the longer run at the
    base width.

  Raises:
    InputError: nothing to read in the workdir, or an argument or the config does not fit; before anything is compiled.
  """
  base_width, head_size = config.model.hidden_size, config.model.hidden_size // config.model.num_heads
  _check(config, widths, head_size, num_tasks, num_seeds, num_rates)
  engine.check(config)
  run_folder.check(config, workdir)
  run = Run(learnt.load(config, workdir), num_seeds, num_rates)
  base = sized(config, run, base_width, num_tasks)
  asked = config, tuple(sorted({base_width, *widths})), num_tasks, run.predict(*base)
  folder = workdir / "transfer" / f"{num_tasks}_tasks_{num_seeds}_seeds_{num_rates}_rates"
  makers = entries(run, base, *asked)
  paths = {name: folder / f"{files.named(name)}.json" for name in makers}
  engine.run(config, _entry, paths, makers, _build, workdir, num_seeds, num_rates, *asked)
  found = {name: json.loads(path.read_text()) for name, path in paths.items()}
  result = {"base_width": base_width, "num_tasks": num_tasks, "num_seeds": num_seeds}
  result |= {"budget": found.pop(BUDGET), "widths": list(found.values())}
  files.write_json(workdir / FILE, result)
  return result


def sized(
  config: ml_collections.ConfigDict, run: Run, width: int, num_tasks: int
) -> tuple[setting_lib.Setting, compare.Tasks]:
  """The setting of a width, and the tasks that are compared, once for each seed."""
  logging.warning("transfer: base model of width %d", width)
  if width == config.model.hidden_size:
    setting = setting_lib.build(run.kept.config)  # with the model that was kept
  else:
    other = config.copy_and_resolve_references()
    other.model.hidden_size, other.model.num_heads = width, _num_heads(config, width)
    setting = setting_lib.build(other)
  found = jax.tree.map(lambda x: x[:num_tasks], compare.unseen(config, setting))
  return setting, compare.repeat(found, run.num_seeds)


def entries(
  run: Run,
  base: tuple[setting_lib.Setting, compare.Tasks] | None,
  config: ml_collections.ConfigDict,
  widths: Sequence[int],
  num_tasks: int,
  at_base: Recipes,
) -> dict[str, Callable[[], dict[str, Any]]]:
  """For each width, and for the longer run, what makes its part of the result.

  Args:
    base: `sized` at the base width; None where that is still to be made.
    at_base: what is predicted there.
  """
  base_width, known = config.model.hidden_size, run.kept.known
  at_base_width = functools.cache(lambda: base or sized(config, run, base_width, num_tasks))

  def of_one(width):
    setting, tasks = at_base_width() if width == base_width else sized(config, run, width, num_tasks)
    about = {
      "width": width,
      "num_heads": _num_heads(config, width),
      "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(setting.model.params)),
      **feature_shift(known.features, tasks.found.features),
    }
    return about | of_width(run, setting, tasks, width, base_width, at_base)

  def of_longer():
    logging.warning("transfer: a run of %d times the largest budget", _LONGER)
    law = transfer_lib.fit_budget_law(known.hyperparameters["learning_rate"], budgets(known.features))
    return of_budget(run, *at_base_width(), law)

  return {f"width {width}": functools.partial(of_one, width) for width in widths} | {BUDGET: of_longer}


def _build(workdir: pathlib.Path, num_seeds: int, num_rates: int, config: ml_collections.ConfigDict, *asked: Any):
  """`entries` as `transfer` has them, in another process."""
  return entries(Run(learnt.load(config, workdir), num_seeds, num_rates), None, config, *asked)


def _entry(makers: Mapping[str, Callable[[], dict[str, Any]]], name: str, path: pathlib.Path) -> None:
  files.write_json(path, makers[name]())


def _num_heads(config: ml_collections.ConfigDict, width: int) -> int:
  return width * config.model.num_heads // config.model.hidden_size


def _check(config, widths, head_size: int, num_tasks: int, num_seeds: int, num_rates: int) -> None:
  """Refuses what can be seen before anything is read."""
  if config.learner.kind != "meta":
    raise errors.InputError(
      "Transfer needs a meta-learner: a config with learner.kind = 'meta', as configs/compare.py."
    )
  if config.model.path or config.tasks.folders or config.lora.rank:
    raise errors.InputError(
      "Transfer over widths trains base models of its own, whole: config.model.path and config.tasks.folders must be "
      "empty and config.lora.rank = 0."
    )
  if "learning_rate" not in config_lib.space(config).spaces:
    raise errors.InputError("config.hyperparameters.learning_rate is not learned: there is no rate to carry.")
  if not widths:
    raise errors.InputError("widths is empty: name at least one hidden size.")
  for width in widths:
    if width < 1 or width % head_size:
      raise errors.InputError(f"width = {width} must be a multiple of {head_size}, the size of a head.")
  if not 1 <= num_tasks <= config.compare.num_tasks:
    raise errors.InputError(
      f"num_tasks = {num_tasks} must be 1 to config.compare.num_tasks = {config.compare.num_tasks}."
    )
  for name, value, least in (("num_seeds", num_seeds, 1), ("num_rates", num_rates, 3)):
    if value < least:
      raise errors.InputError(f"{name} = {value} must be at least {least}.")


def of_width(
  run: Run, setting: setting_lib.Setting, tasks: compare.Tasks, width: int, base_width: int, at_base: Recipes
) -> dict[str, Any]:
  """`grids` and `rows` of one width; at the base width, where they are the same, of one way only.

  Args:
    at_base: what is predicted from probes of the base width's model.
  """
  here, grids, choices = run.predict(setting, tasks), {}, []
  is_base = width == base_width
  for way in (ONE_RATE,) if is_base else (ONE_RATE, WIDTH_RULE):
    target = base_width if way == ONE_RATE else width
    taken = lambda found, to=target: Recipes(transfer_lib.to_width(found.values, to, base_width), found.weights)
    grids[way] = scan(run, setting, tasks, taken(here))
    choices.append(("predicted", way, taken(here)))
    if not is_base:
      choices.append(("predicted at the base width", way, taken(at_base)))
    choices.append(("best of the grid", way, taken(here).at(np.repeat(grids[way].best, run.num_seeds))))
  hidden = {ONE_RATE: 1.0, WIDTH_RULE: base_width / width}
  return {"grids": {way: _shown(grid) for way, grid in grids.items()}} | {
    "rows": judge(run, setting, tasks, choices, grids, hidden)
  }


def of_budget(
  run: Run, setting: setting_lib.Setting, tasks: compare.Tasks, law: transfer_lib.BudgetLaw
) -> dict[str, Any]:
  """The law, and what it is worth on the tasks at `_LONGER` times the largest budget.

  `observed_exponent` is that between the best rates of the grids at the largest budget and at the longer one.
  """
  most = setting.run.num_steps * setting.run.batch_size * setting.pools.train["tokens"].shape[-1]
  longest = _LONGER * most
  longer = dataclasses.replace(setting, run=dataclasses.replace(setting.run, num_steps=_LONGER * setting.run.num_steps))
  # To both settings a budget of 1 is all of their run.
  whole = dataclasses.replace(tasks.found.tasks, budget=jnp.ones_like(tasks.found.tasks.budget))
  told = lambda tokens: dataclasses.replace(
    tasks, found=meta_learn.TaskSet(whole, with_budget(tasks.found.features, tokens))
  )
  at_most, at_longest = run.predict(setting, told(most)), run.predict(setting, told(longest))
  before = scan(run, setting, told(most), at_most)
  after = scan(run, longer, told(longest), at_most)
  carried = transfer_lib.to_budget(law, at_most.values["learning_rate"], most, longest)
  choices = [
    ("predicted at the largest budget", ONE_RATE, at_most),
    ("carried by the law", ONE_RATE, at_most.at(carried)),
    ("the law alone", ONE_RATE, at_most.at(transfer_lib.rate_at(law, longest))),
    ("predicted at the longer budget", ONE_RATE, at_longest),
    ("best of the grid", ONE_RATE, at_most.at(np.repeat(after.best, run.num_seeds))),
  ]
  observed = np.log(after.best / before.best) / math.log(_LONGER)
  return {
    **{name: value if math.isfinite(value) else None for name, value in dataclasses.asdict(law).items()},
    "checked_tokens": longest,
    "observed_exponent": float(observed.mean()),
    "observed_interval": metrics.bootstrap_interval(observed),
    "grids": {"largest budget": _shown(before), "longer budget": _shown(after)},
    "rows": judge(run, longer, told(longest), choices, {ONE_RATE: after}, {ONE_RATE: 1.0}),
  }


def scan(run: Run, setting: setting_lib.Setting, tasks: compare.Tasks, recipes: Recipes) -> Grid:
  """The recipes at `num_rates` learning rates about their geometric mean, and further ones where the best is an end."""
  middle = np.exp(np.log(recipes.values["learning_rate"]).mean())
  measured = lambda rates: improvements(run, setting, "validation", tasks, [recipes.at(rate) for rate in rates])
  rates = middle * RATIO ** (np.arange(run.num_rates) - (run.num_rates - 1) / 2)
  gains = measured(rates)
  while len(rates) < 2 * run.num_rates:
    place = gains.mean(axis=1).argmax()
    if place == 0:
      rates = np.concatenate([rates[:1] / RATIO, rates])
      gains = np.concatenate([measured(rates[:1]), gains])
    elif place == len(rates) - 1:
      rates = np.concatenate([rates, rates[-1:] * RATIO])
      gains = np.concatenate([gains, measured(rates[-1:])])
    else:
      break
  return Grid(rates, gains)


def improvements(
  run: Run, setting: setting_lib.Setting, part: str, tasks: compare.Tasks, candidates: Sequence[Recipes]
) -> np.ndarray:
  """`[num_candidates, num_tasks]` normalised improvement on the part's rows, mean over seeds, all on equal batches."""
  stacked: Recipes = jax.tree.map(lambda *arrays: np.concatenate(arrays), *candidates)
  repeated = jax.tree.map(lambda x: jnp.concatenate([x] * len(candidates)), tasks)
  purpose = {"test": 1, "validation": 2}[part]
  losses = setting.outcome(part, stacked.values, stacked.weights, repeated.found.tasks, repeated.keys(purpose))
  losses = jnp.where(jnp.isfinite(losses), losses, compare.DIVERGED)
  normalised = objectives.OBJECTIVES["normalised"]
  gain = -compare.judged(setting, repeated.found.tasks, part, losses, normalised)
  return run.by_task(gain.reshape(len(candidates), -1))


def judge(
  run: Run,
  setting: setting_lib.Setting,
  tasks: compare.Tasks,
  choices: Sequence[tuple[str, str, Recipes]],
  grids: Mapping[str, Grid],
  hidden: Mapping[str, float],
) -> list[dict[str, Any]]:
  """A row of figures for each choice, after final runs.

  Args:
    choices: `(name, way, recipes)`, among them a "best of the grid" of each way.
    hidden: way -> multiplier of the hidden matrices' learning rate.
  """
  gains = improvements(run, setting, "test", tasks, [recipes for _, _, recipes in choices])
  best = {way: gain for (name, way, _), gain in zip(choices, gains, strict=True) if name == "best of the grid"}
  rows = []
  for (name, way, recipes), gain in zip(choices, gains, strict=True):
    log_rate = run.by_task(np.log(np.asarray(recipes.values["learning_rate"], np.float64)))
    log_ratio = log_rate - np.log(grids[way].best)
    low, high = metrics.bootstrap_interval(gain)
    rows.append(
      {"name": name, "way": way, "rate": math.exp(log_rate.mean()), "rate_interval": _exp_interval(log_rate)}
      | {"hidden_rate": hidden[way] * math.exp(log_rate.mean())}
      | {"hidden_rate_interval": [hidden[way] * end for end in _exp_interval(log_rate)]}
      | {"ratio": math.exp(log_ratio.mean()), "ratio_interval": _exp_interval(log_ratio)}
      | {"improvement": float(gain.mean()), "low": low, "high": high}
      | {"minus_best": float((gain - best[way]).mean())}
      | {"minus_best_interval": list(metrics.bootstrap_interval(gain - best[way]))}
    )
  return rows


def budgets(found: features.Features) -> np.ndarray:
  """`[num_tasks]` tokens of the runs that `[num_tasks, ...]` tasks were probed for."""
  log_budget = np.asarray(found.ability)[..., features.ABILITY_FEATURES.index("task_log_budget")]
  some = np.asarray(found.ability_weight).argmax(axis=1)  # one that is there
  return np.exp(np.take_along_axis(log_budget.astype(np.float64), some[:, None], axis=1)[:, 0])


def with_budget(found: features.Features, tokens: float) -> features.Features:
  """The features of the same tasks with runs of other tokens."""
  place = features.ABILITY_FEATURES.index("task_log_budget")
  return dataclasses.replace(
    found, ability=found.ability.at[..., place].set(math.log(tokens) * (found.ability_weight > 0))
  )


def feature_shift(known: features.Features, found: features.Features) -> dict[str, Any]:
  """How far the tasks' mean features lie from those that the meta-learner was trained on, in their spreads.

  Returns:
    `feature_shift`, the mean over features of the absolute distance, and `moved`, `[name, distance]` of the farthest.
  """
  seen, here = features.summaries(known), features.summaries(found)
  spread = seen.std(axis=0)
  distance = (here.mean(axis=0) - seen.mean(axis=0)) / np.where(spread > 1e-6, spread, 1.0)
  names = [f"{part} {name}" for part, parts in features.NAMES.items() for name in parts]
  farthest = np.argsort(-np.abs(distance))[:_MOVED]
  return {
    "feature_shift": float(np.abs(distance).mean()),
    "moved": [[names[i], float(distance[i])] for i in farthest],
  }


def _exp_interval(values: np.ndarray) -> list[float]:
  return [math.exp(end) for end in metrics.bootstrap_interval(values)]


def _shown(grid: Grid) -> dict[str, Any]:
  """As the file has it."""
  place = grid.gains.argmax(axis=0)
  return {
    "rates": grid.rates.tolist(),
    "improvement": grid.gains.mean(axis=1).tolist(),
    "at_the_end": float(np.isin(place, (0, len(grid.rates) - 1)).mean()),
  }
