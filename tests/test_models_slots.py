"""The slots of a memory: ranking, reviving, in and out as arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mftjax.errors import InputError
from mftjax.models import Memory, slots
from tests.test_models_memory import add_read, filled, opened, states

usage = nnx.jit(lambda memory, hidden: memory.usage(hidden))


def test_tf_idf_by_hand():
  counts = np.asarray([6.0, 2.0, 0.0, 2.0])
  background = np.asarray([[5, 0, 1, 0], [1, 3, 0, 0], [9, 0, 0, 0]])
  want = [0.6 * np.log(4 / 4), 0.2 * np.log(4 / 2), 0.0, 0.2 * np.log(4 / 1)]
  np.testing.assert_allclose(slots.tf_idf(counts, background), want, atol=1e-6)


def test_slots_that_only_the_task_reads_are_the_most_specific():
  memory = Memory(64, 12, 4, 2, top_k=3, rngs=nnx.Rngs(0))
  task, other = states(0, 6), [states(seed, 4) for seed in (1, 2)]
  counts, background = np.asarray(usage(memory, task)), np.stack([usage(memory, x) for x in other])
  own = np.flatnonzero((counts > 0) & (background.sum(0) == 0))
  assert len(own) >= 2
  found = slots.most_specific(slots.tf_idf(counts, background), len(own))
  assert found.dtype == jnp.int32
  want = np.log(3 / (1 + (background > 0).sum(0))) * counts / counts.sum()
  np.testing.assert_array_equal(found, np.sort(np.argsort(-want, kind="stable")[: len(own)]))
  np.testing.assert_array_equal(slots.most_specific(jnp.zeros(4), 4), np.arange(4))


def test_counts_of_nothing_rank_nothing():
  assert not np.asarray(slots.tf_idf(np.zeros(4), np.ones((2, 4)))).any()


@pytest.mark.parametrize("num_heads", [1, 3])
def test_revived_slots_are_read(num_heads):
  """Half of the keys are made too short to be read; each state has a slot of its own after that."""
  memory = Memory(12, 12, 4, num_heads, top_k=2, rngs=nnx.Rngs(0))
  memory.values[...] = jnp.ones((12, 12))
  memory.keys[...] = memory.keys[...].at[:, ::2].set(0.0).at[:, 1::2].add(1.0)
  hidden = states(0, 40)
  counts = np.asarray(usage(memory, hidden)).copy()
  dead = counts == 0
  dead[0], counts[0] = True, 0  # one slot at least
  before = jax.tree.map(np.asarray, slots.state(memory))
  slots.revive(memory, jnp.asarray(counts), hidden, rngs=nnx.Rngs(1))
  assert (np.asarray(usage(memory, hidden))[dead] > 0).all()
  np.testing.assert_array_equal(memory.keys[...][:, ~dead], before["keys"][:, ~dead])
  np.testing.assert_array_equal(memory.values[...], np.where(dead[:, None], 0.0, before["values"]))


def test_revived_half_keys_are_read():
  memory = Memory(36, 12, 8, 2, top_k=3, product_keys=True, rngs=nnx.Rngs(0))
  memory.values[...] = jnp.ones((36, 12))
  memory.keys[...] = memory.keys[...].at[0, :, 1].set(-30.0).at[1, :, 4].set(-30.0)
  memory.query[...] = jnp.abs(memory.query[...])
  hidden = np.abs(states(0, 30))  # queries are positive, so those halves are never the best
  table = lambda: np.asarray(usage(memory, hidden)).reshape(6, 6)
  counts = table()
  dead = [counts.sum(1) == 0, counts.sum(0) == 0]
  assert dead[0][1] and dead[1][4]
  before = np.asarray(memory.keys[...])
  slots.revive(memory, jnp.asarray(counts.reshape(-1)), hidden, rngs=nnx.Rngs(1))
  after = table()
  assert (after.sum(1)[dead[0]] > 0).all() and (after.sum(0)[dead[1]] > 0).all()
  np.testing.assert_array_equal(memory.keys[0][:, ~dead[0]], before[0][:, ~dead[0]])
  np.testing.assert_array_equal(memory.keys[1][:, ~dead[1]], before[1][:, ~dead[1]])
  is_dead = (dead[0][:, None] | dead[1][None]).reshape(-1)
  np.testing.assert_array_equal(memory.values[...][:, 0], np.where(is_dead, 0.0, 1.0))


def test_reviving_forgets_what_was_written_on_a_dead_slot():
  memory = opened([2, 5], top_k=3)
  written = np.asarray(memory.delta[...])
  slots.revive(memory, jnp.ones(9).at[5].set(0.0), states(0, 4), rngs=nnx.Rngs(1))
  np.testing.assert_array_equal(memory.delta[...], written * [[1], [0]])


def test_a_memory_with_no_living_slot_is_revived_whole():
  memory = filled(top_k=3)
  slots.revive(memory, jnp.zeros(9), states(0, 20), rngs=nnx.Rngs(1))
  np.testing.assert_allclose(np.linalg.norm(memory.keys[...], axis=-1), 2.0, atol=1e-5)  # sqrt(key_dim)


@pytest.mark.parametrize("options", [{}, {"top_k": 4, "product_keys": True, "gated": True}])
def test_arrays_go_out_and_in_again(options):
  memory, other = opened([2, 5], **options), opened([0, 1], seed=1, **options)
  slots.load(other, slots.state(memory))
  np.testing.assert_array_equal(add_read(other, states(0, 4)), add_read(memory, states(0, 4)))
  assert set(slots.state(memory)) >= {"query", "keys", "values", "log_temperature", "delta", "written"}


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda arrays: arrays | {"values": np.zeros((8, 12))}, r"values is \(9, 12\), but the one to load \(8, 12\)"),
    (lambda arrays: arrays | {"delta": np.zeros((3, 12))}, r"delta is \(2, 12\), but the one to load \(3, 12\)"),
    (lambda arrays: arrays | {"value": np.zeros(3)}, "Did you mean 'values'"),
    (lambda arrays: {name: x for name, x in arrays.items() if name != "keys"}, r"keys \(2, 9, 4\) is missing"),
  ],
)
def test_arrays_of_another_memory_are_named_and_change_nothing(change, words):
  memory, other = opened([2, 5]), opened([2, 5], seed=1)
  with pytest.raises(InputError, match=words):
    slots.load(memory, change(slots.state(other)))
  np.testing.assert_array_equal(memory.query[...], filled().query[...])


@pytest.mark.parametrize(
  ("act", "words"),
  [
    (lambda: slots.most_specific(jnp.zeros(4), 5), r"num_rows = 5 must lie in 1 \.\. num_slots = 4"),
    (lambda: slots.revive(filled(), jnp.zeros(8), states(0, 4), rngs=nnx.Rngs(0)), r"\(8,\).*\(9,\)"),
  ],
)
def test_bad_input_is_named(act, words):
  with pytest.raises(InputError, match=words):
    act()


def skewed(seed, count, dim=12):
  """Hidden states with a large common part, most of whose variance is in two directions."""
  rng = np.random.default_rng(seed)
  scale = np.where(np.arange(dim) < 2, 3.0, 0.1)
  return jnp.asarray(5.0 + rng.normal(size=(count, dim)) * scale, jnp.float32)


def test_whitened_queries_have_no_mean_and_are_uncorrelated():
  memory = Memory(9, 12, 11, 1, rngs=nnx.Rngs(0))
  hidden = skewed(0, 400)
  mask = jnp.arange(400) < 300  # the rest does not count
  slots.whiten(memory, hidden, mask)
  queries = np.asarray(memory.queries(hidden)[0][:300], np.float64)
  np.testing.assert_allclose(queries.mean(axis=0), 0.0, atol=1e-3)
  covariance = queries.T @ queries / 300
  # 11 columns of unit length, seen from states that are white.
  direction = np.asarray(memory.query[...][:, 0], np.float64)
  states_covariance = np.cov(np.asarray(memory.normed(hidden[:300]), np.float64).T, bias=True)
  np.testing.assert_allclose(covariance, direction.T @ states_covariance @ direction, atol=1e-3)
  np.testing.assert_allclose(np.linalg.eigvalsh(states_covariance), 1.0, atol=1e-3)
  np.testing.assert_allclose(np.linalg.norm(memory.query[...], axis=0), 1.0, atol=1e-6)
  assert np.all(np.diag(covariance) < 1.01) and np.diag(covariance).mean() > 0.8


def test_a_whitened_memory_is_whitened_once_and_goes_out_and_in_again():
  make = lambda: Memory(9, 12, 4, 2, qk_norm=True, rngs=nnx.Rngs(0))
  memory = make()
  slots.whiten(memory, skewed(0, 400))
  queries = memory.queries(skewed(2, 5))
  assert np.abs(queries - make().queries(skewed(2, 5))).max() > 0.1
  other = make()
  slots.load(other, slots.state(memory))
  np.testing.assert_allclose(other.queries(skewed(2, 5)), queries, atol=1e-5)
  slots.whiten(memory, skewed(0, 400))
  np.testing.assert_allclose(memory.queries(skewed(2, 5)), queries, atol=1e-4)


def test_placed_keys_are_distinct_queries_of_the_states_that_count():
  memory = Memory(9, 12, 4, 2, top_k=2, qk_norm=True, rngs=nnx.Rngs(0))
  hidden = jnp.repeat(skewed(1, 5), 3, axis=0)  # each state three times
  mask = jnp.arange(15) < 12  # the last state is left out
  before = np.asarray(memory.keys[...])
  rows = jnp.asarray([2, 4, 5, 8])
  slots.place(memory, rows, hidden, mask)
  queries = np.asarray(memory.queries(hidden))[:, ::3]
  found = np.asarray(memory.keys[...])
  chosen = [int(np.argmin(np.abs(queries - found[:, row, None]).sum(axis=(0, 2)))) for row in rows]
  assert sorted(chosen) == [0, 1, 2, 3]
  for row, state in zip(rows, chosen, strict=True):
    np.testing.assert_allclose(found[:, row], queries[:, state], atol=1e-6)
  others = np.setdiff1d(np.arange(9), rows)
  np.testing.assert_array_equal(found[:, others], before[:, others])
  with pytest.raises(InputError, match="product keys"):
    slots.place(Memory(9, 12, 4, 1, top_k=2, product_keys=True, rngs=nnx.Rngs(0)), rows, hidden, mask)


def test_what_is_near_no_key_reads_nothing_of_a_memory_with_a_null_cosine():
  memory = Memory(4, 12, 8, 1, top_k=2, qk_norm=True, null_cosine=0.9, temperature=0.02, rngs=nnx.Rngs(0))
  hidden = jnp.asarray(np.random.default_rng(2).normal(size=(2, 12)), jnp.float32)
  memory.keys[...] = jnp.zeros_like(memory.keys[...])
  memory.values[...] = jnp.ones_like(memory.values[...])
  np.testing.assert_allclose(memory.read(hidden), 0.0, atol=1e-6)
  slots.place(memory, jnp.asarray([1]), hidden[:1], jnp.ones(1))
  cosine = np.asarray(memory.queries(hidden)[0])
  cosine = cosine[0] @ cosine[1] / np.linalg.norm(cosine[0]) / np.linalg.norm(cosine[1])
  wanted = 1 / (1 + np.exp(8**0.5 * (0.9 - np.asarray([1.0, cosine])) / 0.02))
  np.testing.assert_allclose(np.asarray(memory.read(hidden))[:, 0], wanted, atol=1e-4)
  assert wanted[0] > 0.99 > 0.01 > wanted[1]


def test_only_an_open_memory_can_be_opened_elsewhere():
  memory = Memory(9, 12, 4, 2, rngs=nnx.Rngs(0))
  with pytest.raises(InputError, match=r"open\(num_rows\)"):
    slots.num_open(memory)
  memory.open(2)
  slots.open_at(memory, jnp.asarray([3, 7]))
  np.testing.assert_array_equal(memory.written[...], [3, 7])


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"null_cosine": 0.5}, "qk_norm"),
    ({"null_cosine": 1.0, "qk_norm": True}, "null_cosine = 1.0"),
    ({"qk_norm": True, "product_keys": True, "top_k": 2}, "product_keys"),
  ],
)
def test_options_that_do_not_go_together_are_named(options, words):
  with pytest.raises(InputError, match=words):
    Memory(9, 12, 4, 2, rngs=nnx.Rngs(0), **options)
