"""The memory: identity when new, gradients, the best slots exactly, gates, temperatures, writes to open slots."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mftjax.errors import InputError
from mftjax.models import Memory, MemoryParam, MemoryWrite, WrittenSlots
from mftjax.models.memory import fold, weighted_rows

KINDS = [
  {},
  {"top_k": 3},
  {"top_k": 3, "product_keys": True},
  {"top_k": 9, "product_keys": True},
  {"gated": True, "temperature": 0.5},
  {"top_k": 4, "product_keys": True, "gated": True, "temperature": 2.0},
]
LARGE = [{"top_k": k, "product_keys": True} for k in (1, 16, 40)]

add_read = nnx.jit(lambda memory, hidden: memory(hidden))
lookup = nnx.jit(lambda memory, hidden: memory.lookup(hidden))
best_pairs = nnx.jit(lambda memory, query: memory._best_pairs(query, memory.top_k))


def filled(seed=0, num_slots=9, **options):
  """A memory whose parameters, gates and temperatures included, are all away from where they start."""
  memory = Memory(num_slots, 12, 4, 2, rngs=nnx.Rngs(seed), **options)
  rng = np.random.default_rng(seed)
  memory.values[...] = jnp.asarray(rng.normal(size=(num_slots, 12)), jnp.float32)
  memory.log_temperature[...] += jnp.asarray(0.3 * rng.normal(size=2), jnp.float32)
  if memory.gated:
    memory.gate[...] = jnp.asarray(rng.normal(size=(12, 2)), jnp.float32)
  return memory


def opened(written, seed=0, **options):
  """The same with a write that is not zero on these slots."""
  memory = filled(seed, **options)
  memory.open(len(written))
  memory.written[...] = jnp.asarray(written, jnp.int32)
  memory.delta[...] = jax.random.normal(jax.random.key(seed), memory.delta.shape)
  return memory


def states(seed, *shape):
  return np.random.default_rng(seed).normal(size=(*shape, 12)).astype(np.float32)


def reference_scores(memory, hidden):
  """Scores `[tokens, num_heads, num_slots]` of the formula and gates `[tokens, num_heads]`, in numpy."""
  normed = hidden / np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + 1e-6)
  query, keys = np.einsum("td,dhk->thk", normed, memory.query[...]), np.asarray(memory.keys[...])
  if memory.product_keys:
    half, side = memory.key_dim // 2, keys.shape[2]
    pairs = [np.concatenate([keys[0][:, i], keys[1][:, j]], axis=-1) for i in range(side) for j in range(side)]
    assert pairs[0].shape[-1] == 2 * half
    keys = np.stack(pairs, axis=1)
  temperature = np.exp(np.asarray(memory.log_temperature[...]))
  scores = np.einsum("thk,hsk->ths", query, keys) / (np.sqrt(memory.key_dim) * temperature[:, None])
  gates = 2 / (1 + np.exp(-normed @ np.asarray(memory.gate[...]))) if memory.gated else np.ones((len(hidden), 2))
  return scores, gates


def reference(memory, hidden):
  """The formula in numpy, one token and head at a time."""
  values, out = np.asarray(memory.values[...]), hidden.copy()
  scores, gates = reference_scores(memory, hidden)
  for token in range(len(hidden)):
    for head in range(memory.num_heads):
      row = scores[token, head]
      best = np.argsort(-row)[: memory.top_k or len(row)]
      weights = np.exp(row[best] - row[best].max())
      out[token] += gates[token, head] * weights / weights.sum() @ values[best]
  return out


@pytest.mark.parametrize("options", KINDS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_agrees_with_the_formula(options, seed):
  memory, hidden = filled(seed, **options), states(seed, 4)
  np.testing.assert_allclose(add_read(memory, hidden), reference(memory, hidden), atol=3e-5)


@pytest.mark.parametrize("options", [*KINDS, {"num_slots": 256, "top_k": 7}, *({"num_slots": 256} | o for o in LARGE)])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_looks_up_the_best_of_all_slots(options, seed):
  memory, hidden = filled(seed, **options), states(seed, 5)
  slots, weights = lookup(memory, hidden)
  assert slots.dtype == jnp.int32 and weights.dtype == jnp.float32
  scores, gates = reference_scores(memory, hidden)
  count = memory.top_k or memory.num_slots
  assert slots.shape == weights.shape == (5, 2, count)
  assert all(len(set(row)) == count for row in np.asarray(slots).reshape(-1, count))
  found = np.take_along_axis(scores, np.asarray(slots), axis=-1)
  np.testing.assert_allclose(np.sort(found), np.sort(scores)[..., -count:], atol=1e-5)  # slots may tie by rounding
  exponents = np.exp(found - found.max(-1, keepdims=True))
  np.testing.assert_allclose(weights, gates[..., None] * exponents / exponents.sum(-1, keepdims=True), atol=2e-5)


@pytest.mark.parametrize(("side", "top_k"), [(1, 1), (2, 3), (5, 1), (5, 4), (5, 7), (5, 25), (6, 30)])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), levels=st.integers(1, 4))
def test_best_pairs_of_scores_that_tie(side, top_k, seed, levels):
  """Half scores out of a few whole numbers, so that sums are exact and many tie."""
  memory = Memory(side**2, 2, 2, 1, top_k=top_k, product_keys=True, rngs=nnx.Rngs(0))
  halves = np.random.default_rng(seed).integers(0, levels, (2, side)).astype(np.float32)
  memory.keys[...] = jnp.asarray(halves[:, None, :, None])
  scores, slots = best_pairs(memory, jnp.ones((1, 1, 2)))
  everything = (halves[0][:, None] + halves[1][None]).reshape(-1)
  np.testing.assert_array_equal(scores[0, 0], np.sort(everything)[::-1][:top_k])
  np.testing.assert_array_equal(everything[np.asarray(slots[0, 0])], scores[0, 0])
  assert len(set(np.asarray(slots[0, 0]).tolist())) == top_k


def test_dense_slots_that_tie_are_read_first_come():
  memory = Memory(6, 12, 4, 2, top_k=2, rngs=nnx.Rngs(0))
  memory.keys[...] = jnp.ones_like(memory.keys[...])
  slots, weights = memory.lookup(states(0, 3))
  np.testing.assert_array_equal(slots, np.broadcast_to([0, 1], (3, 2, 2)))
  np.testing.assert_array_equal(weights, np.full((3, 2, 2), 0.5, np.float32))


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("num_rows", [0, 4, 9])
def test_new_memory_is_exactly_the_identity_and_learns(options, num_rows):
  memory = Memory(9, 12, 4, 2, rngs=nnx.Rngs(0), **options)
  if num_rows:
    memory.open(num_rows)
  hidden = states(1, 2, 5)
  assert np.asarray(add_read(memory, hidden)).tobytes() == hidden.tobytes()
  graphdef, params, others = nnx.split(memory, nnx.Param, ...)
  gradient = jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p, others)(hidden) ** 2))(params)
  for name in ("values", "delta") if num_rows else ("values",):
    assert np.abs(gradient[name][...]).max() > 1e-3, name


@pytest.mark.parametrize("options", KINDS)
def test_every_parameter_gets_a_gradient_once_the_values_moved(options):
  graphdef, params = nnx.split(filled(**options))
  hidden = states(1, 2, 5)
  gradient = jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(hidden) ** 2))(params)
  for name in ("query", "keys", "values", "log_temperature", *(["gate"] if options.get("gated") else [])):
    assert np.abs(gradient[name][...]).max() > 1e-3, name


@pytest.mark.parametrize("options", KINDS[1:])
def test_weights_carry_the_gradient_of_a_read_written_out(options):
  """`lookup` and a plain gather against `__call__`, whose gradient is written by hand: first and second order."""
  graphdef, params, others = nnx.split(opened([1, 4, 6], **options), nnx.Param, ...)
  hidden = states(1, 7)

  def plain(params):
    memory = nnx.merge(graphdef, params, others)
    slots, weights = memory.lookup(hidden)
    table = fold(memory.values[...], memory.written[...], memory.delta[...])[0]
    return jnp.mean(jnp.sin(hidden + jnp.einsum("ths,thsd->td", weights, table[slots])))

  ours = lambda params: jnp.mean(jnp.sin(nnx.merge(graphdef, params, others)(hidden)))
  keys = iter(jax.random.split(jax.random.key(0), 9))
  tangent = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), params)
  forward_over_reverse = lambda loss: jax.jvp(jax.grad(loss), (params,), (tangent,))
  for a, b in zip(
    *(jax.tree.leaves(jax.jit(forward_over_reverse, static_argnums=0)(loss)) for loss in (ours, plain)), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_weighted_rows_is_the_sum_written_out():
  rng = np.random.default_rng(0)
  for reads in (1, 3, 4, 9):
    table, weights = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6, 5), (2, reads)))
    rows = rng.integers(0, 6, (2, reads))
    want = [sum(weights[t, r] * table[rows[t, r]] for r in range(reads)) for t in range(2)]
    np.testing.assert_allclose(weighted_rows(table, weights, rows), want, atol=1e-5)


def test_parameters_are_of_the_memorys_own_types():
  memory = Memory(9, 12, 4, 2, gated=True, rngs=nnx.Rngs(0))
  _, own, rest = nnx.split(memory, MemoryParam, ...)
  assert set(own) == {"query", "query_bias", "keys", "values", "log_temperature", "gate"} and not jax.tree.leaves(rest)
  memory.open(3)
  _, own, write, slots, rest = nnx.split(memory, MemoryParam, MemoryWrite, WrittenSlots, ...)
  assert len(jax.tree.leaves(own)) == 6 and not jax.tree.leaves(rest)
  assert [x.shape for x in jax.tree.leaves((write, slots))] == [(3, 12), (3,)]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("written", [[0], [2, 3, 8], list(range(9))])
def test_a_write_reads_as_if_it_were_folded(options, written):
  memory, hidden = opened(written, **options), states(3, 6)
  before, without = add_read(memory, hidden), add_read(filled(**options), hidden)
  values = np.asarray(memory.values[...]).copy()
  values[written] += np.asarray(memory.delta[...])
  memory.fold()
  np.testing.assert_allclose(memory.values[...], values, atol=1e-6)
  assert not np.asarray(memory.delta[...]).any()
  np.testing.assert_allclose(add_read(memory, hidden), before, atol=2e-5)
  if len(written) > 1:
    assert np.abs(before - without).max() > 1e-2


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("written", [[2, 3, 8], list(range(9))])
def test_gradient_of_a_write_is_the_rows_of_that_of_the_values(options, written):
  graphdef, params, others = nnx.split(opened(written, **options), nnx.Param, ...)
  hidden = states(3, 6)
  gradient = jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p, others)(hidden))))(params)
  assert np.abs(gradient["delta"][...]).max() > 1e-2
  np.testing.assert_allclose(gradient["delta"][...], gradient["values"][...][np.asarray(written)], atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_k": 3, "product_keys": True}])
def test_many_tasks_write_at_once_each_on_its_own_slots(options):
  graphdef, write, slots, rest = nnx.split(opened([1, 4], **options), MemoryWrite, WrittenSlots, ...)
  hidden = states(3, 6)
  writes = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), write)
  many_slots = jax.tree.map(lambda x: jnp.asarray([[1, 4], [0, 8], [3, 5]], jnp.int32), slots)
  apply = lambda write, slots: nnx.merge(graphdef, write, slots, rest)(hidden)
  together = jax.jit(jax.vmap(apply))(writes, many_slots)
  for task in range(3):
    alone = apply(*jax.tree.map(lambda x, task=task: x[task], (writes, many_slots)))
    np.testing.assert_allclose(together[task], alone, atol=2e-5)
  assert np.abs(together[0] - together[1]).max() > 1e-3


def test_training_a_write_holds_state_for_its_rows_only():
  """And makes nothing of the table's size: the step's temporaries stay below it."""
  memory = Memory(64**2, 12, 4, 2, top_k=4, product_keys=True, rngs=nnx.Rngs(0))
  memory.open(3)
  graphdef, write, rest = nnx.split(memory, MemoryWrite, ...)
  assert {x.shape for x in jax.tree.leaves(optax.adam(1e-3).init(write))} == {(3, 12), ()}
  loss = lambda write, rest, hidden: jnp.sum(nnx.merge(graphdef, write, rest)(hidden) ** 2)
  compiled = jax.jit(jax.grad(loss)).lower(write, rest, states(0, 2)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < memory.values[...].nbytes / 4


def test_opening_again_loses_nothing():
  memory, hidden = opened([2, 5], top_k=3), states(0, 4)
  before = add_read(memory, hidden)
  memory.open(4)
  np.testing.assert_array_equal(memory.written[...], [0, 1, 2, 3])
  np.testing.assert_allclose(add_read(memory, hidden), before, atol=2e-5)


@pytest.mark.parametrize("options", KINDS)
def test_usage_counts_the_reads(options):
  memory, hidden = filled(**options), states(2, 3, 4)
  mask = np.random.default_rng(0).integers(0, 2, (3, 4))
  slots = np.asarray(memory.lookup(hidden)[0])
  for given_mask, chosen in ((None, slots.reshape(-1)), (mask, slots[mask > 0].reshape(-1))):
    usage = memory.usage(hidden, given_mask)
    assert usage.dtype == jnp.float32
    np.testing.assert_array_equal(usage, np.bincount(chosen, minlength=9))


def test_f64_and_bfloat16_keep_their_dtype():
  memory = opened([2, 5], top_k=3)
  hidden = states(0, 4)
  low = memory(jnp.asarray(hidden, jnp.bfloat16))
  assert low.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(low, np.float32), add_read(memory, hidden), atol=0.15)
  with jax.enable_x64(True):
    high = memory(jnp.asarray(hidden, jnp.float64))
    assert high.dtype == jnp.float64
    np.testing.assert_allclose(high, add_read(memory, hidden), atol=2e-5)


@pytest.mark.parametrize(
  ("arguments", "options", "words"),
  [
    ((0, 8, 4, 1), {}, "num_slots = 0"),
    ((4, 8, 4, 1), {"top_k": 5}, "top_k = 5"),
    ((5, 8, 4, 1), {"top_k": 2, "product_keys": True}, "square"),
    ((4, 8, 3, 1), {"top_k": 2, "product_keys": True}, "key_dim = 3"),
    ((4, 8, 4, 1), {"product_keys": True}, "top_k = None"),
    ((4, 8, 4, 1), {"temperature": 0.0}, "temperature = 0.0"),
    ((4, 8, 4, 1), {"temperature": float("nan")}, "temperature = nan"),
  ],
)
def test_bad_sizes_are_named(arguments, options, words):
  with pytest.raises(InputError, match=words):
    Memory(*arguments, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("num_rows", [0, 10])
def test_bad_number_of_rows_is_named(num_rows):
  with pytest.raises(InputError, match=rf"num_rows = {num_rows} must lie in 1 \.\. num_slots = 9"):
    filled().open(num_rows)


def test_the_score_of_shared_slots_says_how_much_nearer_a_task_s_key_has_to_be():
  memory = Memory(6, 8, 4, 2, qk_norm=True, num_shared=2, rngs=nnx.Rngs(0))
  assert not memory.shared_score[...].any()
  hidden = jax.random.normal(jax.random.key(1), (5, 8))
  before = memory.lookup(hidden)[1]
  memory.shared_score[...] = jnp.asarray([0.0, 1.5])
  after = memory.lookup(hidden)[1]
  np.testing.assert_array_equal(after[:, 0], before[:, 0])
  odds = lambda weights: weights[:, 1, 4:].sum(axis=-1) / weights[:, 1, :4].sum(axis=-1)
  np.testing.assert_allclose(odds(after), odds(before) * np.exp(1.5), rtol=1e-4)
  assert not hasattr(Memory(9, 8, 4, 2, top_k=2, product_keys=True, num_shared=2, rngs=nnx.Rngs(0)), "shared_score")


def test_no_parameter_is_weakly_typed():
  """Else a step that is compiled for a new memory compiles a second time for what it returns."""
  memory = Memory(6, 8, 4, 2, gated=True, qk_norm=True, null_cosine=0.3, num_shared=2, rngs=nnx.Rngs(0))
  assert not any(leaf.weak_type for leaf in jax.tree.leaves(nnx.state(memory)))
