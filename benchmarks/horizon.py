"""Learning rate and batch size that meta-gradients through whole runs lead to, beside the best of a grid.

python -m benchmarks.horizon [--parts=rate,size] [--num_tasks=10] [--num_seeds=4] [--num_runs=1] [--json=FILE]

Unseen tasks of `configs/compare.py:small` with equal weights of their sources, corrupted ones too: what a user has who
knows nothing of them. The direct learner starts at the defaults and takes some steps of Adam on each task's own
hyperparameters, unconstrained, each along the gradient of a whole run with a fresh seed; the mixture stays. Learned and
grid values are judged alike: ordinary runs, the mean over seeds that the learner did not see of the validation
objective (normalised improvement, negated: 0 is the base model, -1 what tuning on the abilities' own clean data gains).

1. Learning rate, batches of 8, grid of ratio 1.15; of each task, and one for all tasks by the mean of their gradients.
2. Batch size between 2 and 16 rows at equal tokens, half of the budget of 1, grid 2, 4, 8, 16: with the learning rate
   at the grid's best for all tasks with 8 rows, and with both learned, beside the best of a grid of ratio 1.5 at each
   size. A differentiated run draws 16 rows for as many steps as 2 rows need: 8 times the tokens that count.

`ratio` is learned / best, `repeat` the best by one half of the seeds / that by the other, which no learner can be held
to beat. `regret` is the objective at the learned value above the grid's least.
"""

import argparse
import dataclasses
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import compare as compare_config
from mftjax import files, spaces
from mftjax.data import meta_tasks
from mftjax.loops import compare, refine
from mftjax.loops import setting as setting_lib

RATES = 1.5e-3 * 1.15 ** np.arange(22)  # up to 2.8e-2
COARSE_RATES = 2e-3 * 1.5 ** np.arange(6)  # up to 1.5e-2
SIZES = (2, 4, 8, 16)
RATE_SPACE, SIZE_SPACE = spaces.Log(5e-4, 6e-2), spaces.Log(SIZES[0], SIZES[-1])


@dataclasses.dataclass(frozen=True)
class Outer:
  """How the direct learner steps."""

  num_steps: int
  rate: float  # of Adam, at the first step
  num_runs: int  # whole runs with seeds of their own, whose clipped gradients are averaged in a step


def restricted(setting: setting_lib.Setting, is_shared: bool) -> Any:
  """What `refine.descend` asks of a setting, with a gradient in the hyperparameters alone.

  Args:
    is_shared: all tasks are moved by the mean of their gradients.
  """

  def gradients(recipes, tasks, keys):
    loss, grad, losses, is_finite = setting.single_gradients(recipes, tasks, keys)
    found = grad["hyperparameters"]
    if is_shared:
      found = jax.tree.map(lambda g: jnp.broadcast_to(g.mean(axis=0), g.shape), found)
    return loss, {**grad, "hyperparameters": found, "mixture_logits": 0 * grad["mixture_logits"]}, losses, is_finite

  return types.SimpleNamespace(single_gradients=gradients)


def learn(
  setting: setting_lib.Setting,
  tasks: meta_tasks.MetaTask,
  start: Mapping[str, float],
  outer: Outer,
  is_shared: bool = False,
) -> dict[str, np.ndarray]:
  """`[num_tasks]` constrained hyperparameters of the setting's space after the outer steps."""
  count = len(tasks.budget)
  one = {"hyperparameters": setting.space.init(start), "mixture_logits": jnp.zeros(tasks.source.shape[1])}
  recipes = jax.tree.map(lambda x: jnp.repeat(x[None], count, axis=0), one)
  keys = lambda step: jax.random.split(jax.random.fold_in(jax.random.key(1), step), count)
  part = restricted(setting, is_shared)
  steps = outer.num_steps, outer.rate, outer.num_runs
  found, losses = refine.descend(part, tasks, keys, recipes, *steps, batch_size=count)
  if not np.isfinite(losses).all():
    print(f"not finite: {(~np.isfinite(losses)).any(axis=-1).sum()} of {losses.shape[0] * count} runs")
  return setting_lib.whole(setting.space, jax.vmap(setting.space.constrain)(found["hyperparameters"]))


def judge(
  setting: setting_lib.Setting, tasks: meta_tasks.MetaTask, values: Mapping[str, Any], num_seeds: int
) -> np.ndarray:
  """`[num_values, num_tasks, num_seeds]` validation objectives of `[num_values, num_tasks]` values; inf: not finite."""
  shape = (*np.shape(next(iter(values.values()))), num_seeds)
  spread = lambda x: np.broadcast_to(np.asarray(x)[..., None], shape).reshape(-1)
  task, seed = (np.broadcast_to(x, shape).reshape(-1) for x in (np.arange(shape[1])[:, None], np.arange(num_seeds)))
  many = jax.tree.map(lambda x: x[task], tasks)
  weights = many.source_mask / many.source_mask.sum(axis=1, keepdims=True)
  keys = jax.vmap(lambda s: jax.random.fold_in(jax.random.key(2), s))(jnp.asarray(seed))
  losses = setting.outcome("validation", {n: spread(x) for n, x in values.items()}, weights, many, keys)
  found = compare.judged(setting, many, "validation", losses, setting.objective).reshape(shape)
  return np.where(np.isfinite(found), found, np.inf)


def figures(learned: np.ndarray, at_learned: np.ndarray, grid: np.ndarray, at_grid: np.ndarray) -> list[dict[str, Any]]:
  """Of each task: learned and best value, their ratio, that of the seeds' halves, and the regret.

  Args:
    learned, at_learned: `[num_tasks]`, and the objectives `[num_tasks, num_seeds]` there.
    grid, at_grid: `[num_values]`, and `[num_values, num_tasks, num_seeds]`.
  """
  mean = at_grid.mean(axis=2)
  best = grid[mean.argmin(axis=0)]
  halves = [grid[at_grid[:, :, half::2].mean(axis=2).argmin(axis=0)] for half in (0, 1)]
  columns = {
    "learned": learned,
    "best": best,
    "ratio": learned / best,
    "repeat": halves[0] / halves[1],
    "objective": at_learned.mean(axis=1),
    "least": mean.min(axis=0),
    "regret": at_learned.mean(axis=1) - mean.min(axis=0),
  }
  return [{name: float(values[i]) for name, values in columns.items()} for i in range(len(learned))]


def share_within(rows: Sequence[Mapping[str, float]], name: str, factor: float) -> float:
  """Part of the rows whose ratio is within this factor, either way."""
  return float(np.mean([abs(np.log(row[name])) <= np.log(factor) + 1e-6 for row in rows]))


def show(title: str, rows: Sequence[Mapping[str, float]], factor: float) -> dict[str, Any]:
  """Prints the rows with their summary, and returns both."""
  print(f"\n{title}\n{'task':>4s}" + "".join(f"{name:>11s}" for name in rows[0]))
  for number, row in enumerate(rows):
    print(f"{number:4d}" + "".join(f"{value:11.4g}" for value in row.values()))
  regret = [row["regret"] for row in rows]
  summary = {
    "factor": factor,
    "share": share_within(rows, "ratio", factor),
    "share_of_repeat": share_within(rows, "repeat", factor),
    "mean_regret": float(np.mean(regret)),
    "median_regret": float(np.median(regret)),
    "largest_regret": float(np.max(regret)),
  }
  print(", ".join(f"{name} {value:.3g}" for name, value in summary.items()), flush=True)
  return {"rows": list(rows), **summary}


def learning_rate(
  setting: setting_lib.Setting, tasks: meta_tasks.MetaTask, outer: Outer, num_seeds: int
) -> dict[str, Any]:
  """Part 1, and the grid's best rate for all tasks together."""
  setting = dataclasses.replace(setting, space=spaces.Space({"learning_rate": RATE_SPACE}))
  count, factor = len(tasks.budget), 1.3
  grid = judge(setting, tasks, {"learning_rate": np.repeat(RATES[:, None], count, axis=1)}, num_seeds)
  start, result = setting.defaults, {}
  at = lambda values: judge(setting, tasks, {name: np.asarray(x)[None] for name, x in values.items()}, num_seeds)[0]
  mean, at_start = grid.mean(axis=2), at({name: np.full(count, x) for name, x in start.items()}).mean(axis=1)
  result["at_default"] = float(at_start.mean())
  flat = [RATES[mean[:, i] <= mean[:, i].min() + 0.02] for i in range(count)]
  result["flat"] = [float(rates.max() / rates.min()) for rates in flat]
  found = learn(setting, tasks, start, outer)
  rows = figures(found["learning_rate"], at(found), RATES, grid)
  result["each"] = show("learning rate, each task's own", rows, factor)
  print(f"objective at the default {result['at_default']:.3f}; rates within 0.02 of the least span a factor of "
        f"{np.median(result['flat']):.2f} (median)")  # fmt: skip
  found = learn(setting, tasks, start, outer, is_shared=True)
  shared = lambda values: values.mean(axis=-2)[..., None, :]  # one task: the mean of them
  rows = figures(found["learning_rate"][:1], shared(at(found)), RATES, shared(grid))
  result["shared"] = show("learning rate, one for all tasks", rows, factor)
  return result


def batch_size(
  setting: setting_lib.Setting, tasks: meta_tasks.MetaTask, outer: Outer, num_seeds: int
) -> dict[str, Any]:
  """Part 2."""
  count, num_rows = len(tasks.budget), setting.run.num_steps * setting.run.batch_size // 2
  of_size = lambda size: dataclasses.replace(setting.run, num_steps=num_rows // size, batch_size=size)
  values = {"learning_rate": np.repeat(COARSE_RATES[:, None], count, axis=1)}
  # Programs of their own: no row is computed in vain.
  cells = [judge(dataclasses.replace(setting, run=of_size(size)), tasks, values, num_seeds) for size in SIZES]
  grid = np.stack(cells)  # [num_sizes, num_rates, num_tasks, num_seeds]
  shared = grid[SIZES.index(8)].mean(axis=(1, 2)).argmin()
  own = grid.mean(axis=3).argmin(axis=1)  # [num_sizes, num_tasks]
  at_own = np.take_along_axis(grid, own[:, None, :, None], axis=1)[:, 0]
  start = {"batch_size": 8.0, "learning_rate": float(COARSE_RATES[shared])}
  run = dataclasses.replace(of_size(SIZES[-1]), smallest_batch=SIZES[0])
  all_spaces = {"batch_size": SIZE_SPACE, "learning_rate": RATE_SPACE}
  result: dict[str, Any] = {"fixed_rate": start["learning_rate"]}
  for title, names, at_grid in (
    ("size", ("batch_size",), grid[:, shared]),
    ("size_and_rate", ("batch_size", "learning_rate"), at_own),
  ):
    space = spaces.Space({name: all_spaces[name] for name in names})
    part = dataclasses.replace(setting, run=run, space=space, fixed={**setting.fixed, **start})
    found = learn(part, tasks, {name: start[name] for name in names}, outer)
    at_found = judge(part, tasks, {name: np.asarray(x)[None] for name, x in found.items()}, num_seeds)[0]
    rows = figures(np.asarray(found["batch_size"]), at_found, np.asarray(SIZES, float), at_grid)
    if "learning_rate" in found:
      rows = [row | {"rate": float(rate)} for row, rate in zip(rows, found["learning_rate"], strict=True)]
    by_size = at_grid.mean(axis=(1, 2)).tolist()
    result[title] = show(f"batch size ({', '.join(names)} learned)", rows, factor=2.0) | {"by_size": by_size}
    print("mean objective: " + ", ".join(f"{size} rows {x:.3f}" for size, x in zip(SIZES, by_size, strict=True)))
  return result


PARTS = {"rate": learning_rate, "size": batch_size}


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--variant", default="small", help="of configs/compare.py")
  parser.add_argument("--num_tasks", type=int, default=10, help="unseen tasks")
  parser.add_argument("--num_seeds", type=int, default=4, help="runs of each value on each task, at least 2")
  parser.add_argument("--parts", default="rate,size", help="which of the two, separated by commas")
  parser.add_argument("--outer_steps", type=int, default=24, help="of the direct learner on each task")
  parser.add_argument("--outer_rate", type=float, default=0.3, help="of its Adam")
  parser.add_argument("--num_runs", type=int, default=1, help="runs whose gradients are averaged in such a step")
  parser.add_argument("--seed", type=int, default=0, help="of tasks, data and base model")
  parser.add_argument("--json", help="file to write the figures to")
  arguments = parser.parse_args()
  began = time.perf_counter()
  config = compare_config.get_config(arguments.variant)
  config.seed = arguments.seed
  setting = setting_lib.build(config)
  shape = setting_lib.task_shape(config)
  tasks = meta_tasks.sample(
    setting.pools, "unseen", arguments.num_tasks, config.seed + 2, shape, config.tasks.planted_fraction
  )
  print(f"built after {time.perf_counter() - began:.0f} s", flush=True)
  outer = Outer(arguments.outer_steps, arguments.outer_rate, arguments.num_runs)
  result: dict[str, Any] = vars(arguments)
  for name in arguments.parts.split(","):
    result[name] = PARTS[name](setting, tasks, outer, arguments.num_seeds)
    print(f"after {time.perf_counter() - began:.0f} s", flush=True)
    if arguments.json:
      files.write_json(arguments.json, result)


if __name__ == "__main__":
  main()
