"""Whether `worst` and `retention` do what they say, on unseen tasks, against the plain mean.

python -m benchmarks.objectives [--tasks=20] [--split=unseen] [--steps=16] [--runs=1] [--seeds=8]
  [--learning_rate=5e-3] [--uniform_fraction=0.1] [--ordinary] [--json=FILE]

The setting is that of configs/compare.py:small. With `--learning_rate` the hyperparameters are held, with this learning
rate, and recipes differ in their mixture alone: that tells apart what the objective and what an unstable run does. Each
task has a recipe of its own, learned from equal weights by `--steps` steps of Adam along the meta-gradients of `--runs`
whole runs each; recipes that are compared have the same start, steps, rate and keys. Then `--seeds` ordinary runs
follow each, with keys of their own, and their test losses are averaged.

Worst: unseen tasks of two or three abilities. Judged by the worst ability's test loss (of each run, then the mean),
under `worst` and under `mean`. A task counts as won only where it is lower by more than 1e-3 nats; less is a tie.

Retention: unseen tasks of two abilities that weigh alike, a third of weight 0 that the base model knows, and its clean
rows among the sources. Judged by how far that ability's test loss is above the base model's; `--tolerance` nats are
allowed. `retention` itself is given a tolerance of 0: at its optimum the constraint is just met, so judged by the very
same number half of the tasks would miss it by noise.

All recipes of both parts are learned in one program.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from configs import compare as compare_config
from mftjax import config as config_lib
from mftjax import files, metrics, objectives
from mftjax.data import meta_tasks
from mftjax.loops import compare, many_tasks, outer_objective, refine
from mftjax.loops import setting as setting_lib

KINDS = ("mean", "worst", "retention")
TEMPERATURE = 0.1  # nats, of `worst`: small beside what abilities differ by, large beside the noise of one run's loss
TIE = 1e-3  # nats
GUARDED = 2  # place of the ability that is to be kept


@dataclasses.dataclass(frozen=True)
class Outer:
  """How the recipes are learned."""

  num_steps: int
  num_runs: int = 1  # whole runs with keys of their own, whose clipped gradients are averaged in a step
  is_held: bool = False  # whether the hyperparameters stay as they are
  is_ordinary: bool = False  # whether multipliers follow an ordinary run's losses, not those of the differentiated ones


@flax.struct.dataclass
class Case:
  """A task and what its recipe is learned for; or with a leading axis many."""

  task: meta_tasks.MetaTask
  kind: jax.Array  # int32, place in KINDS
  objective: outer_objective.ObjectiveState  # of `retention`


def get_config(
  variant: str = "small", learning_rate: float | None = None, uniform_fraction: float | None = None
) -> ml_collections.ConfigDict:
  """The setting, and `retention` for two abilities and a third that is to be kept."""
  config = compare_config.get_config(variant)
  if learning_rate is not None:
    config.hyperparameters.learning_rate.value = learning_rate
  if uniform_fraction is not None:
    config.compare.uniform_fraction = uniform_fraction
  config.objective.name = "retention"
  config.objective.penalty, config.objective.step_size = 20.0, 5.0
  config.abilities = ml_collections.ConfigDict({"a": {"weight": 0.5}, "b": {"weight": 0.5}, "kept": {"weight": 0.0}})
  return config


def build_setting(config: ml_collections.ConfigDict) -> setting_lib.Setting:
  """The base model, and pools that the abilities it knows can be measured on too."""
  plain = config.copy_and_resolve_references()
  plain.objective = config_lib.default().objective
  setting = setting_lib.build(plain)
  pools = meta_tasks.build_pools(config.length, config.tasks.pool_rows, config.seed, also_held_out=meta_tasks.BASE)
  return setting_lib.assemble(plain, setting.model, pools, {})


def sample(
  pools: meta_tasks.Pools, num_tasks: int, seed: int, shape: meta_tasks.Shape, split: str
) -> meta_tasks.MetaTask:
  """The first `num_tasks` tasks of the split with two abilities or more."""
  found = meta_tasks.sample(pools, split, 4 * num_tasks, seed, shape)
  places = np.flatnonzero(np.asarray((found.ability_weight > 0).sum(axis=1)) >= 2)[:num_tasks]
  return jax.tree.map(lambda x: x[places], found)


def guarded(pools: meta_tasks.Pools, num_tasks: int, seed: int, split: str) -> meta_tasks.MetaTask:
  """Tasks of two abilities that weigh alike, with a known one of weight 0, `GUARDED`, and a source of it."""
  tasks = sample(pools, num_tasks, seed, meta_tasks.Shape(max_sources=5, max_abilities=2), split)
  suites = np.random.default_rng(seed).choice(meta_tasks.BASE, num_tasks)
  column = lambda values: jnp.asarray(values)[:, None]
  join = lambda array, values: jnp.concatenate([array, column(values).astype(array.dtype)], axis=1)
  nothing = np.zeros(num_tasks)
  return tasks.replace(
    source=join(tasks.source, [pools.names.index(f"{suite}/clean") for suite in suites]),
    source_mask=join(tasks.source_mask, nothing + 1),
    ability=join(tasks.ability, np.eye(len(pools.ability_names))[[pools.ability_names.index(s) for s in suites]]),
    ability_weight=jnp.tile(jnp.asarray([0.5, 0.5, 0.0]), (num_tasks, 1)),
    is_corrupted=join(tasks.is_corrupted, nothing),
    planted=join(tasks.planted, nothing),
  )


def base_losses(setting: setting_lib.Setting, part: str, tasks: meta_tasks.MetaTask) -> jax.Array:
  """`[num_tasks, max_abilities]` of the model before any run."""
  rows = {"validation": setting.run.validation_rows, "test": setting.run.test_rows}[part]
  measure = many_tasks.measure(setting.model, getattr(setting.pools, part), rows)
  return jax.jit(jax.vmap(measure, in_axes=(None, 0)))(setting.model.params, tasks)


def build_cases(
  config: ml_collections.ConfigDict, setting: setting_lib.Setting, tasks: meta_tasks.MetaTask, kind: str
) -> Case:
  """Those tasks, with recipes to be learned for this objective."""
  count = len(tasks.budget)
  state = jax.vmap(lambda base: outer_objective.init(config, base))(base_losses(setting, "validation", tasks))
  return Case(tasks, jnp.full(count, KINDS.index(kind)), state)


def objective(config: ml_collections.ConfigDict, case: Case) -> Callable:
  """`[max_abilities]` losses -> what the case's recipe lowers."""
  weights = case.task.ability_weight
  branches: tuple[Callable, ...] = (
    lambda losses: objectives.weighted_mean(losses, weights),
    lambda losses: objectives.worst(losses, weights, TEMPERATURE),
    lambda losses: outer_objective.loss(config, case.objective, losses),
  )
  return lambda losses: jax.lax.switch(case.kind, branches, losses)


def descend(
  config: ml_collections.ConfigDict,
  setting: setting_lib.Setting,
  cases: Case,
  seeds: jax.Array,
  outer: Outer,
) -> tuple[Any, np.ndarray]:
  """`refine.descend` for cases, whose multipliers are updated after every step by the losses that `outer` says.

  Args:
    seeds: `[num_cases]` int32; cases with the same one see the same data.

  Returns:
    The recipes, and `[num_steps, num_cases, max_abilities]` these losses, on validation rows.
  """

  def differentiated(model):
    differentiate = many_tasks.value_and_grad(
      model, setting.single_run, setting.space, setting.fixed, setting.pools, **setting.estimator
    )

    def one(recipe, case, seed, number):
      def of_key(key):
        _, grad, losses, _ = differentiate(recipe, case.task, objective(config, case), key)
        return many_tasks.clipped(grad, setting.clip_norm), losses

      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), number), seed)
      found = jax.vmap(of_key)(jax.random.split(key, outer.num_runs))
      return jax.tree.map(lambda x: x.mean(axis=0), found)

    return one

  @jax.jit
  @jax.vmap
  def update(case, losses):
    updated = outer_objective.update(config, case.objective, losses)
    return jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(losses).all(), new, old), updated, case.objective)

  step = setting.model.over_tasks(differentiated)
  optimizer = refine.optimizer(outer.num_steps, config.compare.learning_rate)
  recipe = compare.default_recipes(config, setting, len(seeds))
  opt_state, seen = optimizer.init(recipe), []
  for number in range(outer.num_steps):
    args = recipe, cases, seeds, jnp.full(len(seeds), number)
    grad, losses = many_tasks.in_batches(step, args, setting.at_once)
    if outer.is_held:
      grad = {**grad, "hyperparameters": jax.tree.map(jnp.zeros_like, grad["hyperparameters"])}
    if outer.is_ordinary:
      losses = outcomes(setting, "validation", cases.task, recipe, seeds, [2000 + number])[0]
    updates, opt_state = optimizer.update(grad, opt_state)
    recipe, cases = optax.apply_updates(recipe, updates), cases.replace(objective=update(cases, jnp.asarray(losses)))
    seen.append(np.asarray(losses))
  return recipe, np.asarray(seen)


def outcomes(
  setting: setting_lib.Setting, part: str, tasks: meta_tasks.MetaTask, recipe: Any, seeds: Any, runs: Iterable[int]
) -> np.ndarray:
  """`[num_runs, num_tasks, max_abilities]` losses after ordinary runs; NaN for absent abilities of padding."""
  values, weights = setting_lib.constrained(setting, recipe, tasks)
  keys = lambda run: jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(run), seed))(seeds)
  return np.stack([np.asarray(setting.outcome(part, values, weights, tasks, keys(run))) for run in runs])


def difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
  """How `[num_tasks]` losses compare; lower is better."""
  found = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
  low, high = metrics.bootstrap_interval(found)
  return {
    "lower": float(np.mean(found < -TIE)),
    "tied": float(np.mean(np.abs(found) <= TIE)),
    "difference": float(found.mean()),
    "low": low,
    "high": high,
  }


def worst_loss(losses: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """`[num_tasks]` mean over runs of the largest loss of an ability that is there, of `[num_runs, num_tasks, ...]`."""
  return np.where(weights > 0, losses, -np.inf).max(axis=-1).mean(axis=0)


def worst_against_mean(losses: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, float]:
  """Figures of the first part, of `[num_runs, num_tasks, max_abilities]` test losses under both."""
  worst, mean = (worst_loss(losses[kind], weights) for kind in ("worst", "mean"))
  return {"worst": float(worst.mean()), "mean": float(mean.mean()), **difference(worst, mean)}


def retention_figures(losses: np.ndarray, base: np.ndarray, tolerance: float) -> dict[str, float]:
  """Figures of the second part, of `[num_runs, num_tasks, max_abilities]` test losses, and the base model's."""
  excess = np.asarray(losses[..., GUARDED].mean(axis=0) - base[:, GUARDED], np.float64)
  low, high = metrics.bootstrap_interval(excess)
  return {
    "within": float(np.mean(excess <= tolerance)),
    "excess": float(excess.mean()),
    "low": low,
    "high": high,
    "others": float(np.delete(losses, GUARDED, axis=-1).mean()),
  }


def run(
  config: ml_collections.ConfigDict,
  setting: setting_lib.Setting,
  num_tasks: int,
  num_seeds: int,
  tolerance: float,
  outer: Outer,
  split: str,
) -> dict[str, Any]:
  """Both parts; the figures, and the test losses of each task that they come from."""
  shape = setting_lib.task_shape(config)
  ordinary = sample(setting.pools, num_tasks, config.seed, shape, split)
  kept = guarded(setting.pools, num_tasks, config.seed, split)
  groups = [(ordinary, "mean"), (ordinary, "worst"), (kept, "mean"), (kept, "retention")]
  cases = jax.tree.map(lambda *x: jnp.concatenate(x), *(build_cases(config, setting, *group) for group in groups))
  seeds = jnp.tile(jnp.arange(num_tasks), len(groups))
  recipe, seen = descend(config, setting, cases, seeds, outer)
  runs = range(1000, 1000 + num_seeds)
  losses = np.split(outcomes(setting, "test", cases.task, recipe, seeds, runs), len(groups), axis=1)
  base = np.asarray(base_losses(setting, "test", kept))
  first = worst_against_mean({"mean": losses[0], "worst": losses[1]}, np.asarray(ordinary.ability_weight))
  second = {
    kind: retention_figures(found, base, tolerance) for (_, kind), found in zip(groups[2:], losses[2:], strict=True)
  }
  return {
    "num_tasks": num_tasks,
    "outer": dataclasses.asdict(outer),
    "num_seeds": num_seeds,
    "not_finite": int((~np.isfinite(seen)).any(axis=-1).sum()),
    "worst": first,
    "retention": second,
    "weights": np.asarray(ordinary.ability_weight).tolist(),
    "base": base.tolist(),
    "mixtures": np.asarray(jax.vmap(many_tasks.mixture)(recipe["mixture_logits"], cases.task.source_mask)).tolist(),
    "validation": seen.tolist(),  # that multipliers followed, [num_steps, num_groups * num_tasks, ...]
    "losses": [found.tolist() for found in losses],  # of the groups, [num_seeds, num_tasks, max_abilities]
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tasks", type=int, default=20, help="tasks of each part")
  parser.add_argument("--split", default="unseen", help="of the families that they are made of")
  parser.add_argument("--steps", type=int, default=16, help="meta-gradient steps on each recipe")
  parser.add_argument("--runs", type=int, default=1, help="runs whose gradients are averaged in such a step")
  parser.add_argument("--seeds", type=int, default=8, help="runs that each recipe is judged by")
  parser.add_argument("--tolerance", type=float, default=0.05, help="nats that a kept ability may lose")
  parser.add_argument("--learning_rate", type=float, help="hold the hyperparameters, with this learning rate")
  parser.add_argument("--uniform_fraction", type=float, help="as compare.uniform_fraction, the default")
  parser.add_argument("--ordinary", action="store_true", help="multipliers follow the losses of ordinary runs")
  parser.add_argument("--json", help="file to write the figures to")
  arguments = parser.parse_args()
  start = time.perf_counter()
  held = arguments.learning_rate
  config = get_config(learning_rate=held, uniform_fraction=arguments.uniform_fraction)
  outer = Outer(arguments.steps, arguments.runs, held is not None, arguments.ordinary)
  jax.config.update("jax_num_cpu_devices", config.cpu_devices)
  setting = build_setting(config)
  found = run(config, setting, arguments.tasks, arguments.seeds, arguments.tolerance, outer, arguments.split)
  row = found["worst"]
  interval = lambda row: f"({row['low']:.3f} to {row['high']:.3f})"
  print(f"worst ability's test loss: under worst {row['worst']:.3f}, under mean {row['mean']:.3f}")
  print(f"  difference {row['difference']:.3f} {interval(row)}; lower on {row['lower']:.0%}, tied on {row['tied']:.0%}")
  print(
    f"{'objective':10s} {'kept ability above base':>30s} {'within ' + str(arguments.tolerance):>12s} {'others':>8s}"
  )
  for kind, row in found["retention"].items():
    print(f"{kind:10s} {row['excess']:9.3f} {interval(row):>20s} {row['within']:12.0%} {row['others']:8.3f}")
  print(f"{arguments.tasks} tasks, {arguments.seeds} seeds, {time.perf_counter() - start:.0f} s")
  if arguments.json:
    files.write_json(arguments.json, found)


if __name__ == "__main__":
  main()
