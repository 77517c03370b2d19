"""Meta-tasks side by side on eight devices, with `pmap`, on a mesh and with a split model, against one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import compare as compare_config
from mftjax.data import meta_tasks
from mftjax.loops import setting as setting_lib
from mftjax.loops import task as task_lib

NUM_TASKS = 5  # which do not divide by groups of devices


@functools.cache
def data():
  config = compare_config.get_config("tiny")
  pools = meta_tasks.build_pools(config.length, config.tasks.pool_rows, config.seed)
  return pools, meta_tasks.sample(pools, "unseen", NUM_TASKS, seed=5)


def setting(rank, **parallel):
  config = compare_config.get_config("tiny")
  config.model.dtype, config.model.num_heads, config.lora.rank = "float64", 4, rank
  config.budget_tokens = config.meta.unroll_length * config.batch_size * config.length
  config.parallel.update(parallel)
  decoder, _ = task_lib.load_model(config)
  found = setting_lib.assemble(config, setting_lib.base_model(config, decoder), data()[0], {})
  in_f64 = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
  model = dataclasses.replace(found.model, params=in_f64(found.model.params), frozen=in_f64(found.model.frozen))
  zeros = jnp.zeros(len(found.pools.ability_names))
  return dataclasses.replace(found, model=model, scale={"validation": setting_lib.Scale(zeros, zeros - 1)})


def results(found):
  """Meta-gradients, and losses after plain runs."""
  tasks = data()[1]
  keys = jax.random.split(jax.random.key(0), NUM_TASKS)
  many = lambda x: jnp.stack([jnp.asarray(x, jnp.float64)] * NUM_TASKS)
  recipes = jax.tree.map(many, found.space.init(found.defaults))
  weights = tasks.source_mask / tasks.source_mask.sum(axis=1, keepdims=True)
  recipes = {"hyperparameters": recipes, "mixture_logits": many(jnp.zeros(weights.shape[1]))}
  values = {name: np.full(NUM_TASKS, value) for name, value in found.defaults.items()}
  return found.gradients(recipes, tasks, keys), found.outcome("test", values, weights, tasks, keys)


@functools.cache
def on_one_device(rank):
  return jax.tree.map(np.asarray, results(setting(rank, task=1)))


@pytest.mark.parametrize(
  ("rank", "parallel"),
  [
    (0, {"strategy": "pmap"}),
    (0, {}),
    (0, {"task": 2, "data": 2, "tensor": 2}),
    (2, {"task": 2, "fsdp": 4}),
    (2, {"strategy": "pmap", "task": 3}),
  ],
)
def test_tasks_over_devices_equal_one_device(rank, parallel):
  found, want = results(setting(rank, **parallel)), on_one_device(rank)
  assert {device for leaf in jax.tree.leaves(found) for device in leaf.devices()} == {jax.devices()[0]}
  assert min(float(np.abs(x).max()) for x in jax.tree.leaves(want)) > 0
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9), found, want)
