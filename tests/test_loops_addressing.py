"""Queries that learn to find a task's slots: what they find before and after, and what else stays as it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mftjax import models
from mftjax.baselines import continual as methods_lib
from mftjax.errors import InputError
from mftjax.loops import addressing, answering, continual_setting, episode, sequence
from tests.test_loops_sequence import tiny_setting

SIZE = 8  # slots of a task


@pytest.fixture(scope="module")
def config():
  config = tiny_setting().config.copy_and_resolve_references()
  config.memory.update(product_keys=False, qk_norm=True, placement="adapters", context=True, top_k=3, temperature=0.3)
  config.memory.update(num_slots=3 * SIZE + 40, num_shared=40, num_heads=1, key_dim=16)
  config.continual.update(write_rule="new", written_rows=SIZE)
  config.retention.update(matching_steps=60, matching_learning_rate=0.02, matching_base_weight=1.0)
  return config


@pytest.fixture(scope="module")
def own_setting(config):
  return dataclasses.replace(tiny_setting(), config=config)


@pytest.fixture(scope="module")
def setup(own_setting):
  return own_setting.setup("memory", episode.num_open(own_setting.config))


@pytest.fixture(scope="module")
def learned(config, setup, own_setting):
  return addressing.learned(config, setup, answering.prepared(config, setup, own_setting.training))


def surprise(setup, memory_state, stream):
  """Mean -log of what answering tokens of three unseen tasks read of their own blocks, and base data of none."""
  model = setup.merge((setup.params, episode.held(setup, memory_state)))
  memory, order = model.memories()[0], np.asarray(stream.order[0])
  for number, pool in enumerate(order):
    rows = methods_lib.memory.block(memory, SIZE, number)
    methods_lib.memory.place(model, 0, rows, sequence.task_rows(stream, pool))

  def weights(rows):
    inputs, mask, _ = methods_lib.memory.read_with(model, 0, sequence.as_batch(rows))
    return np.asarray(memory.block_weights(inputs, SIZE, 3))[np.asarray(mask) > 0]

  own = [weights({name: x[pool] for name, x in stream.test.items()})[:, i] for i, pool in enumerate(order)]
  none = 1 - weights(stream.base).sum(axis=-1)
  return [-float(np.log(np.maximum(part, 1e-4)).mean()) for part in (np.concatenate(own), none)]


def test_unseen_tasks_find_their_slots_and_other_data_finds_none(setup, learned, own_setting):
  drawn, _ = nnx.split_state(setup.held, models.MemoryParam, ...)
  before, after = (np.asarray(surprise(setup, state, own_setting.stream)) for state in (drawn, learned))
  assert (after < 0.8 * before).all()


def test_only_how_the_memory_is_addressed_is_learnt(setup, learned):
  before = setup.merge((setup.params, setup.held))
  after = setup.merge((setup.params, episode.held(setup, learned)))
  is_same = lambda a, b: bool(np.array_equal(a[...], b[...]))
  for name, start in before.adapters.start.items():
    assert is_same(start, after.adapters.start[name])
  for name in ("query", "query_bias", "log_temperature"):
    assert not is_same(getattr(before.memory, name), getattr(after.memory, name))
  blocks, shared = np.split(np.asarray(after.memory.keys[0]), [3 * SIZE])
  assert not blocks.any()  # tasks have none yet
  inputs, *masks = methods_lib.memory.read_with(after, 0, setup.background)
  queries = np.asarray(after.memory.queries(inputs))[0]
  for keys, mask in zip(np.split(shared, [30]), masks, strict=True):  # three quarters of tokens that answer
    own = queries[np.asarray(mask).reshape(-1)]
    assert max(np.abs(own - key).max(axis=1).min() for key in keys) < 1e-4
  assert len(np.unique(shared.round(4), axis=0)) == 40


def test_the_same_seed_learns_the_same(config, setup, learned, own_setting):
  config = config.copy_and_resolve_references()
  config.retention.matching_steps = 2
  training = answering.prepared(config, setup, own_setting.training)
  first, second = (addressing.learned(config, setup, training) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, first, second)
  difference = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), first, learned)
  assert max(jax.tree.leaves(difference)) > 1e-3


def test_slots_that_are_no_task_s_cannot_be_told_apart(config):
  config = config.copy_and_resolve_references()
  config.continual.write_rule = "all"
  config.memory.placement = "beside"
  with pytest.raises(InputError, match=r"matching_steps = 60 .* take 'new', or 0"):
    continual_setting.build(config)
