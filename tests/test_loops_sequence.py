"""The programs of a run over a sequence: against a hand-written loop, cut in parts; what they draw and measure."""

import dataclasses
import functools
from unittest import mock

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import continual as continual_config
from mftjax import sft
from mftjax.baselines import continual as methods_lib
from mftjax.baselines.continual import agem, sequential
from mftjax.data import sequences
from mftjax.loops import continual_setting, sequence


@functools.cache
def tiny_setting() -> continual_setting.Setting:
  """The smallest setting, with a base model that has hardly been trained and product keys; for other files too."""
  config = continual_config.get_config("tiny")
  config.lora.targets = ("q_proj", "down_proj")
  config.checkpoint_every = 2
  config.continual.write_rule = "sparse"
  config.memory.update(num_slots=64, num_heads=2, key_dim=4, temperature=0.5)
  config.memory.update(product_keys=True, qk_norm=False, null_cosine=0.0)
  with mock.patch.object(continual_setting, "_BASE_ROWS", 64):
    return continual_setting.build(config)


def stacked(*runs):
  return {name: jnp.asarray([one[name] for one in runs], jnp.float32) for name in runs[0]}


METHOD = methods_lib.replay.replaying(agem.method(0.2), 0.2)  # every part of a step has something to do
VALUES = (
  {"learning_rate": 0.01, "weight_decay": 0.1, "replayed": 0.5},
  {"learning_rate": 0.03, "weight_decay": 0.0, "replayed": 0.25},
)
ORDER = jnp.asarray([[2, 0, 1], [3, 5, 4]])


@pytest.fixture(scope="module")
def programs():
  setting = tiny_setting()
  return sequence.build(setting.setup("lora"), METHOD, setting.stream, setting.run)


@pytest.fixture(scope="module")
def keys():
  return jax.vmap(jax.random.key)(jnp.arange(2))


def advanced(programs, keys, chunks):
  values, number = stacked(*VALUES), jnp.int32(1)
  state = programs.begin(programs.start(values), values, ORDER, number, keys)
  losses = []
  for steps in chunks:
    state, loss = programs.advance(state, values, ORDER, number, keys, jnp.asarray(steps))
    losses.append(loss)
  return state, jnp.concatenate(losses, axis=1)


@pytest.fixture(scope="module")
def whole(programs, keys):
  """State and losses `[num_runs, 4]` after the second task."""
  return advanced(programs, keys, [range(4)])


def test_a_run_that_is_cut_is_the_run_in_one_piece(programs, keys, whole):
  state, losses = advanced(programs, keys, [range(2), range(2, 4)])
  np.testing.assert_allclose(losses, whole[1], rtol=1e-6)
  for part, one in zip(*map(jax.tree.leaves, (state, whole[0])), strict=True):
    np.testing.assert_allclose(part, one, rtol=1e-6, atol=1e-7)
  assert state.inner.step.tolist() == [4, 4]


@pytest.mark.parametrize("place", [0, 1])
def test_steps_are_those_of_a_hand_written_loop_for_each_run_alone(whole, keys, place):
  """AdamW of `sft.optimizer` on the loss of the step's own batch, its gradient projected by the past batch's."""
  setting = tiny_setting()
  setup, values, order = setting.setup("lora"), VALUES[place], ORDER[place]
  optimizer = sft.optimizer({name: values[name] for name in ("learning_rate", "weight_decay")}, setting.run.num_steps)
  params = setup.params
  opt_state = optimizer.init(params)

  @jax.jit
  def value_and_grad(params, batch):
    return jax.value_and_grad(lambda p: sft.row_losses(setup.logits((p, setup.held), batch), batch)[0].mean())(params)

  task_key = jax.random.fold_in(keys[place], 1)
  for step in range(setting.run.num_steps):
    row_key, past_key, _ = jax.random.split(jax.random.fold_in(task_key, step), 3)
    size = setting.run.batch_size
    batch = sequence.draw(setting.stream, METHOD, order, jnp.int32(1), values, size, row_key)
    past = sequence.draw_past(setting.stream, order, jnp.int32(1), METHOD.stored_fraction, size, past_key)
    loss, grads = value_and_grad(params, batch)
    assert whole[1][place, step] == pytest.approx(float(loss), rel=1e-5)
    updates, opt_state = optimizer.update(agem.project(grads, value_and_grad(params, past)[1]), opt_state, params)
    params = jax.tree.map(jnp.add, params, updates)
  for found, wanted in zip(jax.tree.leaves(whole[0].inner.params), jax.tree.leaves(params), strict=True):
    np.testing.assert_allclose(found[place], wanted, atol=2e-5)


def shapes_in(jaxpr):
  """The shape of every array that a program reads or computes, those within its loops too."""
  for equation in jaxpr.eqns:
    yield from (variable.aval.shape for variable in (*equation.invars, *equation.outvars))
    for inner in jax.core.jaxprs_in_params(equation.params):
      yield from shapes_in(inner)


@pytest.mark.parametrize("part", ["advance", "measure"])
def test_runs_share_the_frozen_weights(programs, keys, part):
  """No program makes one more copy of a weight of the base model for each run."""
  values = stacked(*VALUES)
  state = programs.start(values)
  args = {
    "advance": (state, values, ORDER, jnp.int32(1), keys, jnp.arange(4)),
    "measure": (state, values, ORDER),
  }[part]
  found = set(shapes_in(jax.make_jaxpr(getattr(programs, part))(*args).jaxpr))
  setup = tiny_setting().setup("lora")
  of_runs = lambda tree: (
    {(2, *x.shape) for x in jax.tree.leaves(tree)} | {(2, *x.shape[1:]) for x in jax.tree.leaves(tree)}
  )
  weights = [x for x in jax.tree.leaves(setup.frozen) if x.ndim > 1]
  assert not of_runs(weights) & found
  assert of_runs(setup.params) & found  # what is trained is each run's own


def told_by_the_model(setup, weights, rows, share):
  """Rows whose targets are, in this share of the segments, what the model itself says."""
  apply = jax.jit(lambda tokens: setup.logits(weights, sequence.as_batch({**rows, "tokens": tokens})))
  tokens = np.array(rows["tokens"])
  is_own = np.random.default_rng(0).random(tokens.shape[0]) < share
  segments = np.asarray(rows["segment_ids"])
  for place in range(1, tokens.shape[1]):
    said = np.argmax(apply(tokens)[:, place - 1], axis=-1)
    is_target = (rows["loss_mask"][:, place] > 0) & (segments[:, place] == segments[:, place - 1]) & is_own
    tokens[:, place] = np.where(is_target, said, tokens[:, place])
  return {**rows, "tokens": jnp.asarray(tokens)}


@pytest.mark.parametrize("rows_at_once", [99, 3])
def test_measured_is_the_evaluation_by_hand(monkeypatch, rows_at_once):
  setting = tiny_setting()
  monkeypatch.setattr(sequence, "_MOST_LOGITS", rows_at_once * 8 * 100)
  setup = setting.setup("lora")
  weights = (setup.params, setup.held)
  flat = {name: values.reshape(-1, values.shape[-1]) for name, values in setting.stream.test.items()}
  own = told_by_the_model(setup, weights, flat, 0.5)
  test = {name: values.reshape(setting.stream.test[name].shape) for name, values in own.items()}
  stream = dataclasses.replace(setting.stream, test=test)
  order = jnp.asarray([4, 0, 5])
  num_targets = sequence.most_targets(stream)
  found = sequence.measured(setup, weights, stream, order, num_targets)

  def by_hand(rows):
    batch = sequence.as_batch(rows)
    log_probs = np.asarray(jax.nn.log_softmax(setup.logits(weights, batch)))
    total, count, right = 0.0, 0, []
    for row in range(len(batch.tokens)):
      segments = np.asarray(batch.segment_ids[row])
      for segment in range(1, segments.max() + 1):
        places = [p for p in np.flatnonzero(segments == segment)[1:] if batch.loss_mask[row, p]]
        total -= sum(log_probs[row, p - 1, batch.tokens[row, p]] for p in places)
        count += len(places)
        right.append(all(log_probs[row, p - 1].argmax() == batch.tokens[row, p] for p in places))
    return np.mean(right), total / count

  wanted = [by_hand({name: values[pool] for name, values in test.items()}) for pool in order]
  np.testing.assert_allclose(found.accuracy, [accuracy for accuracy, _ in wanted], rtol=1e-6)
  np.testing.assert_allclose(found.loss, [loss for _, loss in wanted], rtol=1e-5)
  assert found.base_loss == pytest.approx(by_hand(setting.stream.base)[1], rel=1e-5)
  assert 0 < found.accuracy.mean() < 1


@flax.struct.dataclass
class Marked:
  """A stream each of whose rows says which it is: pool * 100 + row."""

  train: dict


@pytest.fixture(scope="module")
def marked():
  tokens = (jnp.arange(4)[:, None, None] * 100 + jnp.arange(20)[None, :, None]) * jnp.ones((1, 1, 2), jnp.int32)
  return Marked({name: tokens for name in ("tokens", "loss_mask", "segment_ids", "positions")})


def drawn(marked, method, number, replayed=0.0, num_batches=50):
  """Pools and rows `[num_batches, 8]` of batches for the task at this place of the order 3, 1, 0, 2."""
  draw = lambda key: sequence.draw(
    marked, method, jnp.asarray([3, 1, 0, 2]), jnp.int32(number), {"replayed": replayed}, 8, key
  )
  batch = jax.vmap(draw)(jax.random.split(jax.random.key(number), num_batches))
  for name in marked.train:  # all fields are of the same row
    np.testing.assert_array_equal(getattr(batch, name), batch.tokens)
  return np.divmod(np.asarray(batch.tokens[..., 0]), 100)


@pytest.mark.parametrize(("replayed", "counts"), [(0.5, {4}), (0.3, {2, 3}), (0.0, {0})])
def test_replay_draws_its_share_from_stored_rows_of_earlier_tasks(marked, replayed, counts):
  method = methods_lib.replay.replaying(sequential.LORA, 0.2)  # 4 of 20 rows
  pools, rows = drawn(marked, method, 2, replayed)
  is_past = pools != 0
  assert set(is_past.sum(axis=1)) == counts
  assert is_past.sum(axis=1).mean() == pytest.approx(8 * replayed, abs=0.2)
  assert set(pools[is_past]) == ({3, 1} if replayed else set())
  assert rows[is_past].max(initial=0) <= 3 and rows[~is_past].max() > 3


def test_the_first_task_is_learnt_without_replay(marked):
  pools, rows = drawn(marked, methods_lib.replay.replaying(sequential.LORA, 0.2), 0, 0.5)
  assert set(pools.flat) == {3} and rows.max() > 3


def test_without_replay_a_batch_is_of_its_task_and_joint_training_draws_all(marked):
  pools, rows = drawn(marked, sequential.LORA, 3)
  assert set(pools.flat) == {2} and set(rows.flat) == set(range(20))
  pools, _ = drawn(marked, methods_lib.METHODS["joint"], 0)
  counts = np.bincount(pools.reshape(-1), minlength=4) / pools.size
  np.testing.assert_allclose(counts, 0.25, atol=0.08)


def test_past_rows_are_stored_ones_of_all_earlier_tasks(marked):
  order = jnp.asarray([3, 1, 0, 2])
  draw = lambda key: sequence.draw_past(marked, order, jnp.int32(2), 0.1, 8, key).tokens[:, 0]
  pools, rows = np.divmod(np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), 40))), 100)
  assert set(pools.flat) == {3, 1} and set(rows.flat) == {0, 1}


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.001, 1), (0.05, 2), (0.5, 20)])
def test_stored_rows(fraction, count):
  assert sequence.stored_rows(fraction, 40) == count


def test_a_stream_knows_its_tasks():
  stream = tiny_setting().stream
  assert stream.num_tasks == 3 and stream.order.shape == (2, 3)
  assert isinstance(stream, sequences.Stream) and len(stream.names) == 9  # with those of validation
