"""The decoder: packing, positions, remat, memory layers, bad configs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mftjax import models
from mftjax.errors import InputError
from mftjax.models import decoder

CONFIG = models.DecoderConfig(
  family="llama",
  vocab_size=50,
  hidden_size=32,
  intermediate_size=48,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  max_length=64,
)


def make(seed=0, **changes):
  return models.Decoder(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(seed))


def tokens(seed, *shape):
  return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape).astype(np.int32)


def test_packed_rows_equal_separate_rows():
  model = make()
  first, second = tokens(1, 7), tokens(2, 5)
  packed = np.concatenate([first, second, [0, 0]])[None]
  segments = np.array([[1] * 7 + [2] * 5 + [0] * 2])
  positions = np.array([[*range(7), *range(5), 0, 0]])
  logits = model(packed, segments, positions)
  np.testing.assert_allclose(logits[0, :7], model(first[None])[0], atol=1e-5)
  np.testing.assert_allclose(logits[0, 7:12], model(second[None])[0], atol=1e-5)
  np.testing.assert_allclose(logits[0, :12], model(packed, segments)[0, :12], atol=1e-6)  # positions found out
  assert np.isfinite(logits).all()


def test_no_token_sees_a_later_one():
  model = make()
  row = tokens(3, 1, 10)
  changed = row.copy()
  changed[0, 6] = (changed[0, 6] + 1) % CONFIG.vocab_size
  before, after = model(row), model(changed)
  np.testing.assert_array_equal(before[0, :6], after[0, :6])
  assert np.abs(before[0, 6:] - after[0, 6:]).max() > 1e-4


def test_positions_shift_does_not_matter_but_order_does():
  model = make()
  row = tokens(4, 1, 8)
  index = np.arange(8)[None]
  np.testing.assert_allclose(model(row, None, index), model(row, None, index + 17), atol=1e-5)
  assert np.abs(model(row, None, index) - model(row, None, index * 3)).max() > 1e-4


def test_segment_positions():
  ids = jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 3, 3, 3, 3, 3]])
  expected = [[0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 1, 2, 3, 4]]
  np.testing.assert_array_equal(decoder.segment_positions(ids), expected)


@pytest.mark.parametrize("changes", [{}, {"family": "qwen2", "attention_bias": True, "tie_embeddings": True}])
def test_remat_gives_the_same_gradient(changes):
  row = tokens(5, 2, 9)

  def gradient(remat):
    graphdef, params = nnx.split(make(remat=remat, **changes))
    return jax.grad(lambda p: jnp.mean(nnx.merge(graphdef, p)(row) ** 2))(params)

  plain, again = (jax.tree.leaves(gradient(remat)) for remat in (False, True))
  assert len(plain) == len(again) > 10
  for a, b in zip(plain, again, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8)


def test_gradient_agrees_with_finite_difference():
  graphdef, params = nnx.split(make())
  row = tokens(6, 2, 9)
  loss = lambda p: jnp.mean(nnx.merge(graphdef, p)(row) ** 2)
  keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(params)))
  leaves, treedef = jax.tree.flatten(params)
  direction = treedef.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])
  along = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (jax.grad(loss)(params), direction)), strict=True))
  moved = [loss(jax.tree.map(lambda p, d, e=e: p + e * d, params, direction)) for e in (1e-3, -1e-3)]
  np.testing.assert_allclose((moved[0] - moved[1]) / 2e-3, along, rtol=2e-2)


def test_memory_layers_split_the_scan_without_changing_logits():
  model, row = make(), tokens(7, 2, 6)
  before = model(row)
  model.attach_memory(models.Memory(5, 32, 4, 2, rngs=nnx.Rngs(1)), layers=[0, 2])
  np.testing.assert_allclose(model(row), before, atol=1e-6)
  model.memory.values = models.MemoryParam(jnp.ones((5, 32)))
  assert np.abs(model(row) - before).max() > 1e-3


def test_bfloat16_compute_is_near_f32():
  row = tokens(8, 1, 8)
  logits = make(dtype=jnp.bfloat16)(row)
  assert logits.dtype == jnp.float32
  assert 0 < np.abs(logits - make()(row)).max() < 0.02


@pytest.mark.parametrize(
  ("act", "words"),
  [
    (lambda: make(family="lama"), "llama"),
    (lambda: make(num_heads=3), "num_kv_heads"),
    (lambda: make(head_dim=7), "even"),
    (lambda: make()(np.zeros((1, 65), np.int32)), "max_length = 64"),
    (lambda: make().attach_memory(models.Memory(2, 32, 4, 1, rngs=nnx.Rngs(0)), [3]), r"0 \.\. 2"),
    (lambda: make().attach_memory(models.Memory(2, 16, 4, 1, rngs=nnx.Rngs(0)), [1]), "hidden_size 32"),
  ],
)
def test_bad_input_is_named(act, words):
  with pytest.raises(InputError, match=words):
    act()
