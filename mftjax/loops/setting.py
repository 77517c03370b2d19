"""What a meta-training over many tasks stands on: the base model, the pools, and what single-task tuning gains."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from mftjax import config as config_lib
from mftjax import errors, features, metagrad, objectives, sft, spaces, types
from mftjax.data import meta_tasks, tokens
from mftjax.loops import many_tasks
from mftjax.loops import task as task_lib

REFERENCE_RATES = (1e-3, 3e-3, 6e-3, 1e-2, 2e-2)  # learning rates that single-task tuning tries


@flax.struct.dataclass
class Scale:
  """Losses of held-out pools, or of abilities, between which an improvement is measured."""

  base: jax.Array  # [..., num] f32, nats, of the base model
  reference: jax.Array  # [..., num] f32, nats, after tuning on the ability's own clean data alone


@dataclasses.dataclass(frozen=True)
class Setting:
  """All that tasks have in common."""

  model: many_tasks.Model
  run: many_tasks.Run
  pools: meta_tasks.Pools
  space: spaces.Space
  fixed: Mapping[str, float]  # hyperparameters that nothing moves, and the defaults of those that are moved
  probe: features.Probe
  static: jax.Array  # [num_pools, num_static]
  validation: Scale  # of each held-out pool
  test: Scale


def build(config: ml_collections.ConfigDict) -> Setting:
  """Trains the base model on a little of every suite, and measures what single-task tuning gains on each.

  All of it is made anew from the config's seed, in about a minute with models of the size it is for.

  Raises:
    InputError: hyperparameters that runs of equal length for all tasks cannot learn.
  """
  for name in ("batch_size", "stop_fraction", "lora_rank", "lora_scale"):
    if name in config_lib.space(config).spaces:
      raise errors.InputError(f"config.hyperparameters.{name} cannot be learned with config.learner.kind = 'meta' yet.")
  pools = meta_tasks.build_pools(config.length, config.tasks.pool_rows, config.seed)
  decoder, _ = task_lib.load_model(config)
  model = many_tasks.Model(*nnx.split(decoder))
  if not config.model.path:
    model = dataclasses.replace(model, params=_train_base(model, pools, config))
  num_steps = config_lib.num_steps(config)
  run = many_tasks.Run(
    num_steps, config.batch_size, config.tasks.validation_rows, config.tasks.test_rows, config.meta.uniform_fraction
  )
  fixed = config_lib.default_hyperparameters(config)
  probe = features.Probe(rows=config.probe.rows, num_steps=config.probe.num_steps, batch_size=config.probe.batch_size)
  found = _references(model, run, fixed, pools)
  return Setting(model, run, pools, config_lib.space(config), fixed, probe, _static(pools), *found)


def _train_base(model: many_tasks.Model, pools: meta_tasks.Pools, config: ml_collections.ConfigDict) -> Any:
  """Params after `tasks.base_steps` steps on equal parts of all clean pools."""
  clean = np.asarray([i for i, name in enumerate(pools.names) if not name.endswith(("/redundant", "/corrupted"))])
  steps, size, apply = config.tasks.base_steps, 32, lambda params, memory, batch: model.apply(params, batch)
  uniform = {"mixture_logits": jnp.zeros(1), "memory": None}
  values = {"learning_rate": jnp.float32(3e-3)}
  loss = lambda params, _, batch, rng: sft.inner_loss(apply, params, uniform, batch)
  problem = metagrad.Problem(loss, loss, lambda _: sft.optimizer(values, steps))

  @jax.jit
  def train(params, key):
    def draw(key):
      pool_key, row_key = jax.random.split(key)
      pool = jnp.asarray(clean)[jax.random.randint(pool_key, (size,), 0, len(clean))]
      row = jax.random.randint(row_key, (size,), 0, pools.train["tokens"].shape[1])
      fields = {name: array[pool, row] for name, array in pools.train.items()}
      return types.Batch(**fields, source=jnp.zeros(size, jnp.int32), proposal=jnp.ones(size))

    keys = jax.random.split(key, steps)
    state = metagrad.init(problem, None, params)
    return metagrad.run(problem, None, state, jax.vmap(draw)(keys), keys)[0].params

  return train(model.params, jax.random.key(config.seed))


def _references(
  model: many_tasks.Model, run: many_tasks.Run, fixed: Mapping[str, float], pools: meta_tasks.Pools, num_seeds: int = 3
) -> tuple[Scale, Scale]:
  """Validation and test losses of each held-out pool: base model, and the best of `REFERENCE_RATES` on its own data."""
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
  grid = [(rate, seed) for rate in REFERENCE_RATES for seed in range(num_seeds)]
  rates, keys = jnp.asarray([rate for rate, _ in grid]), jax.vmap(jax.random.key)(jnp.asarray([s for _, s in grid]))
  parts = ((pools.validation, run.validation_rows), (pools.test, run.test_rows))

  @jax.jit
  def of_pool(task):
    tuned, base = [], []
    for rows, num_rows in parts:
      trained = many_tasks.outcome(model, run, fixed, pools, rows, num_rows)
      losses = jax.vmap(lambda rate, key: trained({"learning_rate": rate}, jnp.ones(1), task, key)[0])(rates, keys)  # noqa: B023 (used at once)
      tuned.append(losses.reshape(len(REFERENCE_RATES), num_seeds).mean(axis=1))
      base.append(many_tasks.ability_losses(model, model.params, many_tasks.held_out(rows, task, num_rows), 1)[0])
    best = jnp.argmin(tuned[0])  # chosen on validation rows, for both
    return tuple(Scale(*pair) for pair in zip(base, (losses[best] for losses in tuned), strict=True))

  return jax.lax.map(of_pool, tasks)


def _static(pools: meta_tasks.Pools) -> jax.Array:
  fields = [{name: np.asarray(array[i]) for name, array in pools.train.items()} for i in range(len(pools.names))]
  return jnp.asarray(np.stack([features.static_features(tokens.Rows(**field, truncated=0)) for field in fields]))


def task_scale(scale: Scale, task: meta_tasks.MetaTask) -> Scale:
  """Of held-out pools -> of the task's abilities, `[max_abilities]`.

  An ability that mixes planted answers cannot be known better than the entropy of the mixture lets it be.
  """
  mixed = task.ability
  # Half of a planted row's targets are answers, the other half ends of text.
  entropy = -jnp.sum(jnp.where(mixed > 0, mixed * jnp.log(jnp.maximum(mixed, 1e-9)), 0.0), axis=-1) / 2
  return Scale(mixed @ scale.base, mixed @ scale.reference + entropy)


def build_objective(scale: Scale, weights: jax.Array, name: str = "normalised", **options: Any):
  """`[max_abilities]` losses -> scalar, the config's objective on one task."""
  context = objectives.Context(weights=weights, base=scale.base, reference=scale.reference)
  built = objectives.build(name, **options)
  return lambda losses: built(losses, context)


def probe_tasks(setting: Setting, tasks: meta_tasks.MetaTask, seed: int, batch_size: int = 16) -> features.Features:
  """Features of `[num_tasks, ...]` tasks."""
  rows = setting.probe.rows

  def one(task, key):
    row_key, sketch_key = jax.random.split(key)
    number = jax.random.randint(row_key, (len(task.source), rows), 0, setting.pools.train["tokens"].shape[1])
    fields = {name: array[task.source[:, None], number] for name, array in setting.pools.train.items()}
    source_rows = types.Batch(**fields, source=jnp.zeros_like(number), proposal=jnp.ones(number.shape))
    flat = many_tasks.held_out(setting.pools.validation, task, rows)
    ability_rows = jax.tree.map(lambda x: x.reshape(len(task.ability_weight), rows, *x.shape[1:]), flat)
    return features.probe(
      setting.model.apply,
      setting.model.embed,
      setting.model.params,
      source_rows,
      ability_rows,
      setting.static[task.source],
      task.source_mask,
      task.ability_weight,
      sketch_key,
      setting.probe,
    )

  return many_tasks.mapped(one, batch_size)(tasks, jax.random.split(jax.random.key(seed), len(tasks.budget)))
