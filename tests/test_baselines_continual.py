"""The methods against forgetting: their formulas against numpy, and what they leave as it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mftjax import sft
from mftjax.baselines import continual
from mftjax.baselines.continual import adapters, agem, ewc, l2sp, lwf, memory, merging, olora
from mftjax.loops import sequence
from mftjax.models import lora
from tests.test_loops_sequence import tiny_setting


@pytest.fixture(scope="module")
def setup():
  """LoRA on two projections; its logits are compiled once."""
  setup = tiny_setting().setup("lora")
  return dataclasses.replace(setup, num_tasks=3)


@pytest.fixture(scope="module")
def logits(setup):
  return jax.jit(lambda params, batch: setup.logits((params, setup.held), batch))


def rows(pool=0, count=4):
  return sequence.as_batch({name: values[pool, :count] for name, values in tiny_setting().stream.train.items()})


def moved(params, seed, scale=0.3):
  """Params away from where they are, B of the adapters included."""
  keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params))))
  return jax.tree.map(lambda x: x + scale * jax.random.normal(next(keys), x.shape), params)


def task(number, pool=0):
  return continual.Task(jnp.int32(number), rows(pool))


def assert_equal(found, wanted, **tolerance):
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(one, other, **tolerance)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000))
def test_a_gem_takes_out_what_would_raise_the_past_loss_and_no_more(seed):
  rng = np.random.default_rng(seed)
  grads, past = ({"a": rng.normal(size=(2, 3)), "b": rng.normal(size=4)} for _ in range(2))
  flat = lambda tree: np.concatenate([np.ravel(tree["a"]), np.ravel(tree["b"])])
  found, (g, p) = flat(agem.project(grads, past)), (flat(grads), flat(past))
  if g @ p >= 0:
    np.testing.assert_array_equal(found, g.astype(np.float32))
  else:
    assert abs(found @ p) < 1e-4 * (p @ p)
    across = np.eye(10) - np.outer(p, p) / (p @ p)
    np.testing.assert_allclose(found, across @ g, atol=1e-4)


def test_a_gem_without_a_past_gradient_changes_nothing():
  grads = {"a": jnp.asarray([1.0, -2.0])}
  np.testing.assert_array_equal(agem.project(grads, {"a": jnp.zeros(2)})["a"], grads["a"])


def test_fisher_is_the_mean_squared_gradient_of_single_rows_and_decays_online(setup):
  params = moved(setup.params, 0)
  grad = jax.jit(jax.grad(lambda params, one: sft.row_losses(setup.logits((params, setup.held), one), one)[0].sum()))
  squares = [
    jax.tree.map(
      lambda g: np.square(g, dtype=np.float64), grad(params, jax.tree.map(lambda x, i=i: x[i : i + 1], rows()))
    )
    for i in range(4)
  ]
  wanted = jax.tree.map(lambda *each: np.mean(each, axis=0), *squares)
  carry = {**ewc.init(setup), "fisher": jax.tree.map(jnp.ones_like, params)}
  params_after, carry = jax.jit(lambda params, carry: ewc.end(setup, params, carry, task(0), {"ewc_decay": 0.7}))(
    params, carry
  )
  assert_equal(params_after, params)
  assert_equal(carry["anchor"], params)
  assert max(x.max() for x in jax.tree.leaves(wanted)) > 1e-4
  for found, new in zip(jax.tree.leaves(carry["fisher"]), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(np.asarray(found) - 0.7, new, atol=1e-6 + 1e-3 * new.max())


def test_ewc_pulls_by_strength_times_fisher_times_distance(setup):
  params, anchor = moved(setup.params, 0), setup.params
  weights = jax.tree.map(lambda x: jnp.abs(x) + 0.1, moved(setup.params, 1))
  carry = {"held": setup.held, "fisher": weights, "anchor": anchor}
  values = {"ewc_strength": jnp.float32(7.0)}
  found = jax.grad(lambda params: ewc.penalty(setup, params, carry, None, values))(params)
  assert_equal(found, jax.tree.map(lambda f, p, a: 7.0 * f * (p - a), weights, params, anchor), rtol=1e-5)
  assert float(ewc.penalty(setup, params, ewc.init(setup), None, values)) == 0  # before the first task


def test_l2_sp_in_closed_form(setup):
  params = moved(setup.params, 0)
  squares = [np.sum(np.square(p - a)) for p, a in zip(*map(jax.tree.leaves, (params, setup.params)), strict=True)]
  found = l2sp.penalty(setup, params, {}, None, {"l2sp_strength": 0.3})
  assert found == pytest.approx(0.15 * sum(squares), rel=1e-5)


def test_lwf_is_a_divergence_from_the_model_before_the_task(setup, logits):
  values, batch, params = {"lwf_strength": 0.5}, rows(1), moved(setup.params, 1)
  carry = lwf.begin(setup, moved(setup.params, 2), lwf.init(setup), None, values, None)[1]
  penalty = jax.jit(lambda params: lwf.penalty(setup, params, carry, batch, values))
  assert float(penalty(carry["teacher"])) == pytest.approx(0, abs=1e-7)

  def probabilities(params):
    scores = np.asarray(logits(params, batch), np.float64) / 2
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return scores / scores.sum(axis=-1, keepdims=True)

  teacher, student = probabilities(carry["teacher"]), probabilities(params)
  divergence = np.sum(teacher * np.log(teacher / student), axis=-1)
  wanted = 0.5 * 4 * divergence[np.asarray(batch.segment_ids) > 0].mean()
  assert wanted > 1e-4
  assert float(penalty(params)) == pytest.approx(wanted, rel=1e-3)


def by_weights(setup, tasks, scale=1.0):
  """Logits of the base model whose weights have the sum of the tasks' products added."""
  model = nnx.merge(*tiny_setting().base, copy=True)
  factor = setup.merge((setup.params, setup.held)).layers.lora_scale
  assert factor > 0
  for params in tasks:
    leaves = {lora.names_of(path)[1]: leaf for path, leaf in jax.tree.leaves_with_path(params)}
    for target in ("q_proj", "down_proj"):
      product = np.einsum("lir,lro->lio", leaves[f"{target}_lora_a"], leaves[f"{target}_lora_b"])
      getattr(model.layers, target)[...] += scale * factor * product
  batch = rows()
  return model(batch.tokens, batch.segment_ids, batch.positions)


def test_adapters_side_by_side_change_the_weights_by_the_sum_of_their_products(setup, logits):
  tasks = [moved(setup.params, seed) for seed in range(3)]
  stack = adapters.empty(setup.params, 3)
  for number, params in enumerate(tasks):
    stack = adapters.stored(stack, params, number)
  found = logits(adapters.side_by_side(stack, 0.7), rows())
  assert np.abs(found - logits(setup.params, rows())).max() > 0.05
  np.testing.assert_allclose(found, by_weights(setup, tasks, 0.7), atol=2e-4)
  # Room that is not taken yet changes nothing.
  one = adapters.stored(adapters.empty(setup.params, 3), tasks[0], 1)
  np.testing.assert_allclose(logits(adapters.side_by_side(one), rows()), logits(tasks[0], rows()), atol=1e-5)


def test_fresh_adapters_change_nothing_and_differ_by_their_key(setup, logits):
  found = [adapters.fresh(moved(setup.params, 0), jax.random.key(seed)) for seed in (0, 1)]
  base = logits(setup.params, rows())
  for params in found:
    np.testing.assert_array_equal(logits(params, rows()), base)
  for (path, one), other in zip(jax.tree.leaves_with_path(found[0]), jax.tree.leaves(found[1]), strict=True):
    if not lora.is_b(path):
      assert np.abs(one).max() <= one.shape[-2] ** -0.5 and np.abs(one - other).max() > 0.1 * one.shape[-2] ** -0.5


def test_o_lora_keeps_earlier_tasks_and_reads_all(setup, logits):
  carry, params, trained, values = olora.init(setup), setup.params, [], {}
  for number in range(3):
    params, carry = olora.begin(setup, params, carry, task(number), values, jax.random.key(number))
    params = moved(params, number)  # as if trained
    trained.append(params)
    during = logits(olora.read(params, carry)[0], rows())
    params, carry = olora.METHOD.end(setup, params, carry, task(number), values)
    after = logits(olora.final(params, carry, values)[0], rows())
    np.testing.assert_allclose(during, after, atol=1e-6)
    np.testing.assert_allclose(after, by_weights(setup, trained), atol=2e-4)
    for place, one in enumerate(trained):
      assert_equal(jax.tree.map(lambda x, p=place: x[p], carry["stack"]), one, rtol=0)


def test_the_penalty_of_o_lora_is_the_overlap_of_first_matrices(setup):
  values = {"olora_strength": 0.1}
  tasks, own = [moved(setup.params, seed) for seed in range(2)], moved(setup.params, 5)
  stack = adapters.empty(setup.params, 3)
  for number, params in enumerate(tasks):
    stack = adapters.stored(stack, params, number)
  total = 0.0
  for params in tasks:
    for (path, a), b in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(own), strict=True):
      if not lora.is_b(path):
        total += sum(np.abs(x.T @ y).sum() for x, y in zip(np.asarray(a), np.asarray(b), strict=True))
  found = olora.penalty(setup, own, {"stack": stack}, None, values)
  assert float(found) == pytest.approx(0.1 * total, rel=1e-5)

  # Directions of other features are orthogonal.
  halves = lambda params, is_first: jax.tree.map_with_path(
    lambda path, x: x if lora.is_b(path) else x * ((jnp.arange(x.shape[-2]) < 5) == is_first)[:, None], params
  )
  apart = adapters.stored(adapters.empty(own, 3), halves(tasks[0], True), 0)
  assert float(olora.penalty(setup, halves(own, False), {"stack": apart}, None, values)) == 0


@pytest.mark.parametrize(("num_tasks", "scale"), [(1, 1.0), (2, 0.4)])
def test_merging_adds_the_scaled_sum_of_what_each_task_changed(setup, logits, num_tasks, scale):
  own = dataclasses.replace(setup, num_tasks=num_tasks)
  carry, params, trained, values = merging.init(own), own.params, [], {"merge_scale": scale}
  for number in range(num_tasks):
    params, carry = merging.begin(own, params, carry, task(number), values, jax.random.key(number))
    # Each task starts from the base model.
    assert all(not np.any(x) for path, x in jax.tree.leaves_with_path(params) if lora.is_b(path))
    params = moved(params, number)
    trained.append(params)
    params, carry = merging.METHOD.end(own, params, carry, task(number), values)
  found = logits(merging.final(params, carry, values)[0], rows())
  np.testing.assert_allclose(found, by_weights(own, trained, scale), atol=2e-4)
  if num_tasks == 1:
    np.testing.assert_allclose(found, logits(trained[0], rows()), atol=1e-5)


@pytest.fixture(scope="module")
def with_memory():
  """A setup whose memory holds something, and the carry of a run."""
  setup = tiny_setting().setup("memory")
  values = jax.random.normal(jax.random.key(0), (64, 16))
  held = jax.tree.map_with_path(lambda path, x: values * 0.1 if "values" in lora.names_of(path) else x, setup.held)
  return dataclasses.replace(setup, held=held)


def leaf(tree, name):
  (found,) = [np.asarray(x) for path, x in jax.tree.leaves_with_path(tree) if name in lora.names_of(path)]
  return found


def reads(setup, batch, mask):
  """`[num_rows, num_slots]` reads of each row by the tokens of a mask, counted by numpy from each token's slots."""

  @jax.jit
  def slots_of(batch):
    model = setup.merge((setup.params, setup.held))
    (inputs,) = model.memory_inputs(batch.tokens, batch.segment_ids, batch.positions)
    return model.memories()[0].lookup(inputs)[0]

  found, mask = np.asarray(slots_of(batch)), np.asarray(mask) > 0
  return np.stack([np.bincount(row[own].reshape(-1), minlength=64) for row, own in zip(found, mask, strict=True)])


def test_sparse_writes_what_tf_idf_ranks_first_and_leaves_the_rest(with_memory):
  # Rows of eight tokens: whole ones read nearly all slots, and what the rest scores would hang on rounding.
  short = jax.tree.map(lambda x: x[:, :8] if x.ndim > 1 else x, with_memory.background)
  setup = dataclasses.replace(with_memory, background=short)
  method, now = memory.method("sparse"), task(0, 1)
  carry = {"held": setup.held}
  params, carry = jax.jit(lambda params, carry: method.begin(setup, params, carry, now, {}, None))(setup.params, carry)
  opened = leaf(carry["held"], "written")

  # By hand: reads where an answer is predicted, against in how many of the other rows a slot is read at all.
  segments, mask = np.asarray(now.rows.segment_ids), np.asarray(now.rows.loss_mask)
  answering = np.zeros(segments.shape)
  answering[:, :-1] = mask[:, 1:] * (segments[:, 1:] == segments[:, :-1]) * (segments[:, 1:] > 0)
  counts = reads(setup, now.rows, answering).sum(axis=0)
  assert len(setup.background.tokens) == 32
  num_reading = (reads(setup, setup.background, setup.background.segment_ids > 0) > 0).sum(axis=0)
  scores = counts / counts.sum() * np.log(33 / (num_reading + 1))
  assert opened.tolist() == sorted(set(opened.tolist())) and len(opened) == 8
  rest = np.setdiff1d(np.arange(64), opened)
  assert scores[opened].min() >= scores[rest].max() - 1e-7
  assert scores[opened].max() > scores[rest].max() > 0

  # Two steps on the task's rows, then what was written is folded in.
  grad = jax.jit(jax.grad(lambda p: method.loss(setup, p, carry, now.rows, {})))
  for _ in range(2):
    params = jax.tree.map(lambda p, g: p - 10.0 * g, params, grad(params))
  logits = jax.jit(lambda params, held: setup.logits((params, held), now.rows))
  before = logits(params, carry["held"])
  assert np.abs(before - logits(setup.params, carry["held"])).max() > 1e-3
  folded, after = method.end(setup, params, carry, now, {})
  np.testing.assert_allclose(logits(folded, after["held"]), before, atol=1e-5)
  assert not leaf(folded, "delta").any()
  old, new = leaf(setup.held, "values"), leaf(after["held"], "values")
  np.testing.assert_array_equal(new[rest], old[rest])
  assert np.any(new[opened] != old[opened], axis=1).sum() >= 4
  for name in ("keys", "query", "log_temperature"):
    np.testing.assert_array_equal(leaf(after["held"], name), leaf(setup.held, name))


def test_the_rule_all_opens_nothing_anew(with_memory):
  before = with_memory.params
  params, carry = memory.method("all").begin(with_memory, before, {"held": with_memory.held}, None, {}, None)
  np.testing.assert_array_equal(leaf(carry["held"], "written"), np.arange(8))
  assert_equal(params, before)


def test_usages_are_counted_in_as_many_parts_as_asked_for(with_memory):
  weights, others = (with_memory.params, with_memory.held), with_memory.background
  mask = others.segment_ids > 0
  (found,) = memory.usages(with_memory, weights, others, mask, num_parts=4)
  np.testing.assert_array_equal(found, reads(with_memory, others, mask).reshape(4, 8, 64).sum(axis=1))


def test_the_training_loss_is_the_mean_over_rows_of_their_token_means(setup):
  batch = rows()
  logits = setup.logits((setup.params, setup.held), batch)
  found = continual.sft_loss(setup, (setup.params, setup.held), batch, {"learning_rate": 1.0, "lwf_strength": 3.0})
  assert float(found) == pytest.approx(float(sft.row_losses(logits, batch)[0].mean()), rel=1e-6)


def test_what_each_method_trains_and_stores():
  kinds = {name: method.trained for name, method in continual.METHODS.items()}
  assert kinds.pop("sequential full") == "full" and set(kinds.values()) == {"lora"}
  stored = {name: method.stored_fraction for name, method in continual.METHODS.items() if method.stored_fraction}
  assert stored == {"replay 1 %": 0.01, "replay 5 %": 0.05, "A-GEM": 0.05}
  assert [name for name, method in continual.METHODS.items() if method.is_replaying] == ["replay 1 %", "replay 5 %"]
