"""What a meta-training over many tasks stands on: the base model, the pools, and what single-task tuning gains."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from mftjax import config as config_lib
from mftjax import features, metagrad, models, objectives, parallel, spaces, types
from mftjax.data import family_pools, meta_tasks, tokens
from mftjax.loops import base_model as base_model_lib
from mftjax.loops import many_tasks
from mftjax.loops import task as task_lib

PARTS = ("validation", "test")  # what recipes are chosen by, and judged by


@flax.struct.dataclass
class Scale:
  """Losses of held-out pools, or of abilities, between which an improvement is measured."""

  base: jax.Array  # [..., num] f32, nats, of the base model
  reference: jax.Array  # [..., num] f32, nats, after tuning on the ability's own clean data alone


@dataclasses.dataclass(frozen=True)
class Setting:
  """All that tasks have in common, and the programs that run them, each compiled once."""

  model: many_tasks.Model
  run: many_tasks.Run
  pools: meta_tasks.Pools
  space: spaces.Space
  fixed: Mapping[str, float]  # hyperparameters that nothing moves, and the defaults of those that are moved
  probe: features.Probe
  static: jax.Array  # [num_pools, num_static]
  scale: Mapping[str, Scale]  # "validation" and "test", of each held-out pool
  objective: objectives.Objective  # by which recipes are chosen
  estimator: Mapping[str, Any]  # the meta-gradient's method and its options
  clip_norm: float  # of each task's meta-gradient
  at_once: int  # tasks that a program runs at once
  single_uniform_fraction: float  # in place of the run's, in steps on one task's own recipe

  @property
  def defaults(self) -> dict[str, float]:
    """The hyperparameters that are learned, at their defaults."""
    return {name: float(self.fixed[name]) for name in self.space.spaces}

  @property
  def single_run(self) -> many_tasks.Run:
    """The run that steps on one task's own recipe go through: nearer to an ordinary one."""
    return dataclasses.replace(self.run, uniform_fraction=self.single_uniform_fraction)

  def outcome(
    self,
    part: str,
    values: Mapping[str, Any],
    weights: Any,
    tasks: meta_tasks.MetaTask,
    keys: jax.Array,
    fraction: float = 1.0,
    index: np.ndarray | None = None,
  ) -> jax.Array:
    """`[num_tasks, max_abilities]` losses after ordinary runs (`many_tasks.train`) of the values as `whole` has them.

    Args:
      part: "validation" or "test", the rows that are measured.
      fraction: part of the run's steps; a program of its own, so that what is not trained is not computed.
      index: tasks to run, all by default.
    """

    def program(values, weights, tasks, keys):
      return self._measure[part](self._train(fraction)(values, weights, tasks, keys), tasks)

    values = {name: jnp.asarray(value, jnp.float32) for name, value in whole(self.space, values).items()}
    args = values, jnp.asarray(weights, jnp.float32), tasks, keys
    return many_tasks.in_batches(program, args, self.at_once, index)

  @functools.cached_property
  def gradients(self) -> Callable:
    """`(recipes, tasks, keys) -> (objective, gradient, ability losses, is_finite)`, each gradient clipped."""
    return self._gradients(self.run)

  @functools.cached_property
  def single_gradients(self) -> Callable:
    """`gradients` through `single_run`."""
    return self._gradients(self.single_run)

  def _gradients(self, run: many_tasks.Run) -> Callable:
    def build(model):
      differentiate = many_tasks.value_and_grad(model, run, self.space, self.fixed, self.pools, **self.estimator)

      def one(recipe, task, key):
        objective = build_objective(task_scale(self.scale["validation"], task), task.ability_weight, self.objective)
        loss, grad, losses, is_finite = differentiate(recipe, task, objective, key)
        return loss, many_tasks.clipped(grad, self.clip_norm), losses, is_finite

      return one

    return self.model.over_tasks(build)

  @functools.cached_property
  def probing(self) -> Callable:
    """`(tasks, keys) -> features`."""
    return self.model.over_tasks(lambda model: functools.partial(_probe, self, model))

  @functools.cached_property
  def _train(self) -> Callable:
    @functools.cache
    def of_fraction(fraction):
      run = dataclasses.replace(self.run, num_steps=max(1, round(fraction * self.run.num_steps)))
      return self.model.over_tasks(lambda model: many_tasks.train(model, run, self.fixed, self.pools))

    return of_fraction

  @functools.cached_property
  def _measure(self) -> dict[str, Callable]:
    measure = lambda part: self.model.over_tasks(lambda model: _measures(model, self.run, self.pools)[part])
    return {part: measure(part) for part in PARTS}


def build(config: ml_collections.ConfigDict) -> Setting:
  """Makes or trains the base model, and measures what single-task tuning gains on each suite.

  All of it is made anew from the config's seed, in about a minute with the small models that it trains itself.
  """
  decoder, tokenizer = task_lib.load_model(config)
  pools = _pools(config, tokenizer)
  if not config.model.path and not config.tasks.folders:
    base_model(config, nnx.clone(decoder))  # what does not fit the devices is refused before anything is trained
    graphdef, params = nnx.split(decoder)
    decoder = nnx.merge(graphdef, _train_base(many_tasks.Model(graphdef, params), pools, config))
  setting = assemble(config, base_model(config, decoder), pools, {})
  return dataclasses.replace(setting, scale=_references(config, setting))


def base_model(config: ml_collections.ConfigDict, decoder: models.Decoder) -> many_tasks.Model:
  """The decoder with the config's LoRA, taken apart, on the config's devices."""
  return many_tasks.Model.of(decoder, config.lora, config.seed + 2, parallel.build(config))


def _pools(config: ml_collections.ConfigDict, tokenizer: Any) -> meta_tasks.Pools:
  """Of real data if the config names folders, of procedural suites else."""
  asked = config.tasks
  if not asked.folders:
    return meta_tasks.build_pools(config.length, asked.pool_rows, config.seed)
  number = asked.validation_families, asked.unseen_families
  return family_pools.build(
    asked.folders, tokenizer, config.length, asked.pool_rows, config.seed, *number, config.truncate_side
  )


def assemble(
  config: ml_collections.ConfigDict,
  model: many_tasks.Model,
  pools: meta_tasks.Pools,
  scale: Mapping[str, Scale],
) -> Setting:
  """The setting of these parts, by the config."""
  space, fixed = config_lib.space(config), config_lib.default_hyperparameters(config)
  run = many_tasks.Run(
    num_steps=config_lib.num_steps(config),
    batch_size=config.batch_size,
    validation_rows=config.tasks.validation_rows,
    test_rows=config.tasks.test_rows,
    uniform_fraction=config.meta.uniform_fraction,
    smallest_batch=_smallest_batch(space, fixed),
  )
  probe = features.Probe(**config.probe)
  objective = objectives.build(config.objective.name, **config_lib.objective_options(config))
  outer = (
    objective,
    _estimator(config, model.layout.num_task_groups),
    config.meta.clip_norm,
    config.tasks.at_once,
    config.compare.uniform_fraction,
  )
  return Setting(model, run, pools, space, fixed, probe, _static(pools), scale, *outer)


def _estimator(config: ml_collections.ConfigDict, num_groups: int) -> dict[str, Any]:
  """The config's method and options, the memory that an unroll may keep shared by the tasks of a group of devices."""
  found = {"method": config.meta.method, **config_lib.method_options(config)}
  if "memory_bytes" in metagrad.method_options(config.meta.method):
    tasks = -(-config.tasks.at_once // num_groups)
    budget = found.get("memory_bytes", metagrad.recovery.device_budget())
    found["memory_bytes"] = -(-budget // tasks)  # never 0, which is no budget
  return found


def task_shape(config: ml_collections.ConfigDict) -> meta_tasks.Shape:
  """What the config's meta-tasks have in common."""
  return meta_tasks.Shape(config.tasks.max_sources, config.tasks.max_abilities, config.tasks.min_budget)


def _smallest_batch(space: spaces.Space, fixed: Mapping[str, float]) -> float | None:
  """The least rows of a batch, of those that are learned and of those that are rounded."""
  learned = space.spaces.get("batch_size")
  if not isinstance(learned, spaces.Interval | spaces.Ordered):
    return fixed.get("batch_size")
  return min(learned.low, round(learned.low))


def _train_base(model: many_tasks.Model, pools: meta_tasks.Pools, config: ml_collections.ConfigDict) -> Any:
  """Params after `tasks.base_steps` steps on the base family and on wrong answers of all other suites.

  So it knows what a code is and the form of every answer, and no code that a task is about.
  """
  is_known = lambda name: name.startswith("planted/") or name.removesuffix("/clean") in meta_tasks.BASE
  known = [i for i, name in enumerate(pools.names) if is_known(name)]
  wrong = [i for i, name in enumerate(pools.names) if name.endswith("/corrupted")]
  shown = jnp.asarray(4 * known + wrong)
  key = jax.random.key(config.seed)
  return base_model_lib.train(model.apply, model.params, pools.train, shown, config.tasks.base_steps, 32, key)


def _references(config: ml_collections.ConfigDict, setting: Setting) -> dict[str, Scale]:
  """Losses of each held-out pool: of the base model, and after its own data at the best of `tasks.reference_rates`."""
  run, pools, num_seeds = setting.run, setting.pools, config.tasks.reference_seeds
  names = pools.ability_names
  own = [pools.names.index(name if name in pools.names else f"{name}/clean") for name in names]
  count = len(names)
  tasks = meta_tasks.MetaTask(
    source=jnp.asarray(own, jnp.int32)[:, None],
    source_mask=jnp.ones((count, 1)),
    ability=jnp.eye(count)[:, None],
    ability_weight=jnp.ones((count, 1)),
    budget=jnp.ones(count),
    is_corrupted=jnp.zeros((count, 1)),
    planted=jnp.zeros((count, 1)),
  )
  run = dataclasses.replace(run, smallest_batch=setting.fixed.get("batch_size"))
  grid = [(rate, seed) for rate in config.tasks.reference_rates for seed in range(num_seeds)]
  rates, keys = jnp.asarray([rate for rate, _ in grid]), jax.vmap(jax.random.key)(jnp.asarray([s for _, s in grid]))

  def build(model):
    train, measures = many_tasks.train(model, run, setting.fixed, pools), _measures(model, run, pools)

    def of_pool(task):
      def tune(rate, key):
        params = train({"learning_rate": rate}, jnp.ones(1), task, key)
        return {part: fn(params, task)[0] for part, fn in measures.items()}

      at_once = min(setting.at_once, len(grid))
      tuned = jax.lax.map(lambda pair: tune(*pair), (rates, keys), batch_size=at_once)
      tuned = {part: losses.reshape(-1, num_seeds).mean(axis=1) for part, losses in tuned.items()}
      best = jnp.argmin(tuned["validation"])  # for both
      return {part: Scale(fn(model.params, task)[0], tuned[part][best]) for part, fn in measures.items()}

    return lambda tasks: jax.lax.map(of_pool, tasks)

  return setting.model.compile(build)(tasks)


def _measures(model: many_tasks.Model, run: many_tasks.Run, pools: meta_tasks.Pools) -> dict[str, Callable]:
  return {
    "validation": many_tasks.measure(model, pools.validation, run.validation_rows),
    "test": many_tasks.measure(model, pools.test, run.test_rows),
  }


def _static(pools: meta_tasks.Pools) -> jax.Array:
  fields = [{name: np.asarray(array[i]) for name, array in pools.train.items()} for i in range(len(pools.names))]
  return jnp.asarray(np.stack([features.static_features(tokens.Rows(**field, truncated=0)) for field in fields]))


def task_scale(scale: Scale, task: meta_tasks.MetaTask) -> Scale:
  """Of held-out pools -> of the task's abilities, `[max_abilities]`, or of many tasks.

  An ability that mixes planted answers cannot be known better than the entropy of the mixture lets it be.
  """
  mixed = task.ability
  # Half of a planted row's targets are answers, the other half ends of text.
  entropy = -jnp.sum(jnp.where(mixed > 0, mixed * jnp.log(jnp.maximum(mixed, 1e-9)), 0.0), axis=-1) / 2
  return Scale(mixed @ scale.base, mixed @ scale.reference + entropy)


def build_objective(scale: Scale, weights: jax.Array, objective: objectives.Objective) -> Callable:
  """`[max_abilities]` losses -> scalar, the objective on one task."""
  context = objectives.Context(weights=weights, base=scale.base, reference=scale.reference)
  return lambda losses: objective(losses, context)


def whole(space: spaces.Space, values: Mapping[str, Any]) -> dict[str, Any]:
  """The values, of one task or many, with ordered ones at the nearest allowed and batches of whole rows.

  Outside `jax.jit` only.
  """
  found = dict(values)
  for name, value in values.items():
    if isinstance(ordered := space.spaces.get(name), spaces.Ordered):
      found[name] = np.vectorize(ordered.rounded, otypes=[float])(value)
    if name == "batch_size":
      found[name] = np.round(np.asarray(found[name], np.float64))
  return found


def constrained(setting: Setting, recipe: Any, tasks: meta_tasks.MetaTask) -> tuple[dict[str, jax.Array], jax.Array]:
  """The hyperparameters' values, as `whole` has them, and the weights `[num_tasks, max_sources]` of recipes."""
  values = whole(setting.space, jax.vmap(setting.space.constrain)(recipe["hyperparameters"]))
  return values, jax.vmap(many_tasks.mixture)(recipe["mixture_logits"], tasks.source_mask)


def probe_tasks(setting: Setting, tasks: meta_tasks.MetaTask, seed: int) -> features.Features:
  """Features of `[num_tasks, ...]` tasks."""
  keys = jax.random.split(jax.random.key(seed), len(tasks.budget))
  return many_tasks.in_batches(setting.probing, (tasks, keys), setting.at_once)


def _probe(setting: Setting, model: many_tasks.Model, task: meta_tasks.MetaTask, key: jax.Array) -> features.Features:
  rows = setting.probe.rows
  row_key, sketch_key = jax.random.split(key)
  number = jax.random.randint(row_key, (len(task.source), rows), 0, setting.pools.train["tokens"].shape[1])
  fields = {name: array[task.source[:, None], number] for name, array in setting.pools.train.items()}
  source_rows = types.Batch(**fields, source=jnp.zeros_like(number), proposal=jnp.ones(number.shape))
  num_held_out = setting.run.validation_rows
  flat = many_tasks.held_out(setting.pools.validation, task, num_held_out)
  # They stand in the order of an ability's pools: mixed, the first ones are like the others.
  order = jax.random.permutation(row_key, num_held_out)
  ability_rows = jax.tree.map(lambda x: x.reshape(-1, num_held_out, *x.shape[1:])[:, order], flat)
  return features.probe(
    model.apply,
    model.embed,
    model.params,
    source_rows,
    ability_rows,
    setting.static[task.source],
    task.source_mask,
    task.ability_weight,
    sketch_key,
    setting.probe,
    task.budget * setting.run.num_steps * setting.run.batch_size * source_rows.tokens.shape[-1],
  )
