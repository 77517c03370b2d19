"""The outer step of `experiments.meta_train`, compiled for a model of some shape on some devices without its arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mftjax import config as config_lib
from mftjax import models, parallel, types
from mftjax.loops import meta_train
from mftjax.loops import task as task_lib

NUM_SOURCES, NUM_ABILITIES = 4, 2


def base_config(shape: models.DecoderConfig, length: int, rows: int, unroll_length: int) -> ml_collections.ConfigDict:
  """A run of 1,000 steps of full fine-tuning, whose outer batch has as many rows as an inner one.

  The method is `mixed`; which learning rate, weight decay, b1 and mixture of four sources it learns for two abilities
  is nothing that a program depends on.
  """
  config = config_lib.default()
  config.length, config.batch_size = length, rows
  config.budget_tokens = 1000 * rows * length
  config.meta.unroll_length = unroll_length
  config.meta.ability_rows = rows // NUM_ABILITIES
  config.model.dtype = jnp.dtype(shape.dtype).name
  named = lambda number: ml_collections.ConfigDict({str(i): {"path": "-"} for i in range(number)})
  config.sources, config.abilities = named(NUM_SOURCES), named(NUM_ABILITIES)
  return config


def lower(
  config: ml_collections.ConfigDict, shape: models.DecoderConfig, layout: parallel.Layout
) -> jax.stages.Lowered:
  """The program that `meta_train` runs each step, from a model of this shape; nothing of that size is made.

  Raises:
    InputError: what does not fit or divide.
  """
  config_lib.check(config)
  layout.check_rows("The rows of a batch", config.batch_size // config.micro_batches)
  made: list[task_lib.Network] = []

  def make():
    network = task_lib.take_apart(config, models.Decoder(shape, rngs=nnx.Rngs(0)), layout)
    made.append(network)
    return network.frozen, network.params, meta_train.init_state(config, network)

  # What is traced has no places, so they are put on again.
  trees = jax.eval_shape(make)
  frozen, params, state = (_on(tree, layout.shardings(tree)) for tree in trees)
  network = dataclasses.replace(made[0], frozen=frozen, params=params)
  everywhere = NamedSharding(layout.mesh, PartitionSpec())
  is_fresh, key = _on(jax.eval_shape(lambda: (jnp.zeros((), bool), jax.random.key(0))), (everywhere, everywhere))
  inner = _batch(layout, (config.meta.unroll_length, config.batch_size), config.length)
  outer = _batch(layout, (NUM_ABILITIES * config.meta.ability_rows,), config.length)
  return meta_train.build_outer_step(config, network).lower(frozen, state, params, is_fresh, inner, outer, key)


def _batch(layout: parallel.Layout, rows: tuple[int, ...], length: int) -> types.Batch:
  sharding = layout.row_sharding(axis=len(rows) - 1)
  array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
  integers, numbers = (array((*rows, length), dtype) for dtype in (jnp.int32, jnp.float32))
  return types.Batch(integers, numbers, integers, integers, array(rows, jnp.int32), array(rows, jnp.float32))


def _on(tree: Any, shardings: Any) -> Any:
  put = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  return jax.tree.map(put, tree, shardings)
