"""Attention: the three ways agree with one another, in every derivative that is taken; the memory they need."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_config import get_config

from mftjax import config as config_lib
from mftjax import models
from mftjax.errors import InputError
from mftjax.loops import task
from mftjax.models import attention


def draw(seed, batch, length, kv_heads, group, head_dim, dtype):
  """Queries, keys, values; a direction for each; a cotangent that is 0 at padding; segment ids."""
  rng = np.random.default_rng(seed)
  shapes = [(batch, length, heads, head_dim) for heads in (kv_heads * group, kv_heads, kv_heads)]
  inputs, direction = (tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes) for _ in range(2))
  ends = np.sort(rng.integers(0, length + 1, (batch, 3)), axis=1)
  segments = 1 + (np.arange(length)[:, None] >= ends[:, None, :2]).sum(axis=2)
  segments = np.where(np.arange(length) < ends[:, 2:], segments, 0)  # two or three segments, then padding
  cotangent = rng.normal(size=(batch, length, kv_heads * group * head_dim)) * (segments > 0)[..., None]
  return inputs, direction, jnp.asarray(cotangent, dtype), jnp.asarray(segments)


@functools.partial(jax.jit, static_argnums=0)
def derivatives(attend, inputs, direction, cotangent, segments):
  """The output where it means something, its gradient and the directional derivative of that."""
  visible = (segments > 0)[..., None]
  # Squared, so that the second derivative has the part of the cotangent too.
  loss = lambda inputs: jnp.sum(cotangent * jnp.where(visible, attend(*inputs, segments), 0) ** 2)
  gradient, product = jax.jvp(jax.grad(loss), (inputs,), (direction,))
  return jnp.where(visible, attend(*inputs, segments), 0), gradient, product


def assert_close(found, expected, tolerance):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.abs(b).max()))


@settings(deadline=None, max_examples=8)
@given(
  seed=st.integers(0, 1000),
  batch=st.integers(1, 2),
  length=st.integers(1, 23),
  block=st.integers(1, 25),
  kv_heads=st.integers(1, 2),
  group=st.integers(1, 3),
  dtype=st.sampled_from(["float64", "float32"]),
)
def test_blockwise_equals_full(seed, batch, length, block, kv_heads, group, dtype):
  with jax.enable_x64(dtype == "float64"):
    arguments = draw(seed, batch, length, kv_heads, group, 4, dtype)
    blockwise = functools.partial(attention.blockwise_attention, block=block)
    found, expected = (derivatives(attend, *arguments) for attend in (blockwise, attention.full_attention))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(found))
    assert_close(found, expected, {"float64": 1e-10, "float32": 1e-5}[dtype])


@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 1000), length=st.integers(1, 20), group=st.integers(1, 3))
@example(seed=449, length=1, group=3)  # second derivatives of 0, of which f32 leaves rounding alone
def test_fused_equals_full(seed, length, group):
  """In f64, where the reference is exact; the kernel's own sums stay f32."""
  with jax.enable_x64():
    arguments = draw(seed, 2, length, 2, group, 4, "float64")
    found = derivatives(attention.fused_attention, *arguments)
    assert_close(found, derivatives(attention.full_attention, *arguments), 1e-5)


@pytest.mark.parametrize("length", [7, 20])
def test_fused_equals_full_in_f32(length):
  arguments = draw(0, 2, length, 2, 3, 4, "float32")
  found, expected = (
    derivatives(attend, *arguments) for attend in (attention.fused_attention, attention.full_attention)
  )
  assert_close(found, expected, 1e-5)


def test_every_mode_of_differentiation_goes_through_blocks():
  with jax.enable_x64():
    inputs, direction, cotangent, segments = draw(0, 2, 11, 1, 2, 4, "float64")

    @functools.partial(jax.jit, static_argnums=0)
    def modes(attend):
      loss = lambda inputs: jnp.sum(cotangent * attend(*inputs, segments) ** 2)
      along = lambda inputs: sum(jnp.vdot(g, d) for g, d in zip(jax.grad(loss)(inputs), direction, strict=True))
      product = lambda inputs: jax.jvp(jax.grad(loss), (inputs,), (direction,))[1]
      return {
        "forward": jax.jvp(loss, (inputs,), (direction,))[1],
        "reverse over reverse": jax.grad(along)(inputs),
        "third order": jax.jvp(product, (inputs,), (direction,))[1],
        "mapped": jax.vmap(product)(jax.tree.map(lambda x: jnp.stack([x, 2 * x]), inputs)),
      }

    found, expected = (
      modes(f) for f in (lambda *a: attention.blockwise_attention(*a, block=4), attention.full_attention)
    )
    assert_close(found, expected, 1e-10)


def test_padding_is_zero_and_has_no_derivative():
  inputs, direction, _, _ = draw(0, 1, 12, 1, 2, 4, "float32")
  segments = jnp.array([[0] * 6 + [1] * 3 + [0] * 3])
  attend = lambda *inputs: attention.blockwise_attention(*inputs, segments, block=5)
  out, moved = jax.jvp(attend, inputs, direction)
  is_padding = segments[0] == 0
  np.testing.assert_array_equal(out[0, is_padding], 0)
  np.testing.assert_array_equal(moved[0, is_padding], 0)
  assert np.abs(out[0, ~is_padding]).min() > 0


def test_large_scores_stay_finite():
  inputs, *rest = draw(3, 1, 16, 1, 1, 4, "float32")
  inputs = (300 * inputs[0], inputs[1], inputs[2])
  found, expected = (
    derivatives(f, inputs, *rest)
    for f in (functools.partial(attention.blockwise_attention, block=4), attention.full_attention)
  )
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
  np.testing.assert_allclose(found[0], expected[0], atol=1e-4)


def test_bfloat16_sums_over_blocks_are_wide():
  # One query block in bf16 sums the key's gradient over 64 queries in f32; 64 blocks of one query must be as good.
  inputs, _, cotangent, segments = draw(1, 1, 64, 1, 1, 8, "float32")
  segments = jnp.ones_like(segments)
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs)

  @functools.partial(jax.jit, static_argnums=1)
  def gradient(inputs, block):
    attend = lambda inputs: attention.blockwise_attention(*inputs, segments, block=block)
    return jax.grad(lambda inputs: jnp.sum(attend(inputs).astype(jnp.float32) * (1 + cotangent)))(inputs)[2]

  exact = gradient(jax.tree.map(lambda x: x.astype(jnp.float32), narrow), 64)
  error = lambda block: np.abs(gradient(narrow, block).astype(np.float32) - exact).mean()
  assert error(1) < 1.5 * error(64)


def temporaries(attend, length):
  """Bytes that the compiled Hessian-vector product holds beside its arguments and results."""
  inputs, direction, cotangent, segments = draw(0, 1, length, 1, 2, 8, "float32")
  loss = lambda inputs: jnp.vdot(attend(*inputs, segments), cotangent)
  product = jax.jit(lambda inputs, direction: jax.jvp(jax.grad(loss), (inputs,), (direction,))[1])
  return product.lower(inputs, direction).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_the_second_derivative_is_linear_in_the_length():
  growth = {
    name: temporaries(attention.ATTENTION[name], 2048) / temporaries(attention.ATTENTION[name], 512)
    for name in ("full", "blockwise")
  }
  assert growth["blockwise"] < 4.8
  assert growth["full"] > 8


CONFIG = models.DecoderConfig(
  family="llama",
  vocab_size=30,
  hidden_size=16,
  intermediate_size=24,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
)


@pytest.mark.parametrize(("word", "remat"), [("blockwise", False), ("blockwise", True), ("fused", False)])
def test_the_decoder_is_the_same_with_each(word, remat, monkeypatch):
  monkeypatch.setitem(
    attention.ATTENTION, "blockwise", functools.partial(attention.blockwise_attention, block=5)
  )  # several blocks
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, CONFIG.vocab_size, (2, 13))
  segments = np.array([[1] * 6 + [2] * 7, [1] * 4 + [2] * 5 + [0] * 4])
  targets = (rng.normal(size=(2, 13, CONFIG.vocab_size)) * (segments > 0)[..., None]).astype(np.float32)

  def results(**changes):
    model = models.Decoder(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))
    memory = models.Memory(3, CONFIG.hidden_size, 4, 2, rngs=nnx.Rngs(1))
    memory.values = models.MemoryParam(jnp.ones((3, CONFIG.hidden_size)))
    model.attach_memory(memory, [0])
    graphdef, params = nnx.split(model)
    logits = lambda params: nnx.merge(graphdef, params)(tokens, segments)
    loss = lambda params: jnp.mean(targets * logits(params) ** 2)
    direction = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    both = jax.jit(lambda params: (logits(params), jax.jvp(jax.grad(loss), (params,), (direction,))))
    found, derived = both(params)
    return np.where((segments > 0)[..., None], found, 0), derived

  assert_close(results(attention=word, remat=remat), results(), 2e-5)


def test_an_unknown_word_is_refused():
  with pytest.raises(InputError, match="Did you mean 'blockwise'"):
    dataclasses.replace(CONFIG, attention="blockwize")


def test_the_config_chooses():
  config = get_config()
  config.model.attention = "blockwise"
  config_lib.check(config)
  assert task.load_model(config)[0].config.attention == "blockwise"
  config.model.attention = "dense"
  with pytest.raises(InputError, match="one of full, blockwise, fused"):
    config_lib.check(config)
