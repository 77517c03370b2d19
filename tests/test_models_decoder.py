"""The decoder: packing, positions, remat, memory layers, bad configs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mftjax import models
from mftjax.errors import InputError
from mftjax.loops import task
from mftjax.models import decoder, layers
from tests import tiny_config

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


def noisy_memory(seed, **options):
  memory = models.Memory(9, 32, 4, 2, rngs=nnx.Rngs(seed), **options)
  memory.values[...] = jax.random.normal(jax.random.key(seed), (9, 32))
  return memory


apply = nnx.jit(lambda model, row: model(row))


@functools.partial(nnx.jit, static_argnums=3)
def by_hand(model, row, memories, placement):
  """Logits of `[1, length]` tokens, one layer after the other in the words of the docstrings."""
  config, arrays = model.config, model.layers.arrays()
  rope = layers.rope_tables(jnp.arange(row.shape[1])[None], config.head_dim, config.rope_theta)
  attend = lambda q, k, v: decoder.ATTENTION["full"](q, k, v, jnp.ones(row.shape, jnp.int32))
  hidden = model.embed(row)
  for number in range(config.num_layers):
    params = {name: value[number] for name, value in arrays.items()}
    if number not in memories:
      hidden, _ = layers.layer(params, hidden, rope, attend, config, 0.0)
      continue
    # The attention is the layer without an MLP.
    hidden, _ = layers.layer(
      params | {"down_proj": jnp.zeros_like(params["down_proj"])}, hidden, rope, attend, config, 0.0
    )
    normed = layers.rms_norm(hidden, params["mlp_norm"], config.norm_eps)
    mlp = (jax.nn.silu(normed @ params["gate_proj"]) * (normed @ params["up_proj"])) @ params["down_proj"]
    memory = memories[number]
    if placement == "after":
      hidden = memory(hidden + mlp)
    else:
      read = memory(normed) - normed
      hidden = hidden + read + (mlp if placement == "beside" else 0.0)
  return model.logits(hidden)


@pytest.mark.parametrize("placement", decoder.READS)
@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)])
def test_placements_against_the_layers_by_hand(placement, layers):
  model, memory, row = make(), noisy_memory(1, top_k=3, product_keys=True), tokens(7, 1, 6)
  plain = apply(model, row)
  expected = by_hand(model, row, dict.fromkeys(layers, memory), placement)
  model.attach_memory(memory, layers, placement)
  np.testing.assert_allclose(apply(model, row), expected, atol=2e-5)
  assert np.abs(expected - plain).max() > 1e-3


@pytest.mark.parametrize("placement", decoder.READS)
def test_each_layer_reads_its_own_memory(placement):
  model, memories, row = make(), [noisy_memory(seed) for seed in (1, 2)], tokens(7, 1, 6)
  expected = by_hand(model, row, {2: memories[0], 0: memories[1]}, placement)
  model.attach_memory(memories, [2, 0], placement)
  assert model.memory_layers == (0, 2) and model.memory_of(2) is memories[0] and model.memory_of(1) is None
  np.testing.assert_allclose(apply(model, row), expected, atol=2e-5)
  _, own, rest = nnx.split(model, models.MemoryParam, ...)
  assert len(jax.tree.leaves(own)) == 10 and len(jax.tree.leaves(rest)) == 12


@pytest.mark.parametrize("placement", decoder.READS)
def test_the_last_mlp_on_some_of_the_states_gives_their_hidden_states(placement):
  model, inputs = make(num_layers=3), tokens(1, 2, 8)
  model.attach_memory(noisy_memory(2), (2,), placement)
  segments = jnp.ones_like(inputs)
  positions = decoder.segment_positions(segments)
  states = model.before_last_mlp(inputs, segments, positions)
  found = model.from_last_mlp(states[:, 3:6])
  np.testing.assert_allclose(found, model.hidden(inputs)[:, 3:6], atol=2e-6)
  np.testing.assert_allclose(model.last_memory_input(states), model.memory_inputs(inputs)[0], atol=2e-6)


def test_states_before_the_last_mlp_need_the_memory_in_the_last_layer_alone():
  model, inputs = make(num_layers=3), tokens(1, 2, 8)
  model.attach_memory(noisy_memory(2), (1, 2))
  with pytest.raises(InputError, match=r"\(1, 2\) is not in the last layer alone"):
    model.before_last_mlp(inputs, jnp.ones_like(inputs), jnp.zeros_like(inputs))


@pytest.mark.parametrize("placement", ["after", "beside"])
def test_new_memories_leave_the_logits_as_they_were(placement):
  model, row = make(), tokens(7, 2, 6)
  before = model(row)
  model.attach_memory([models.Memory(5, 32, 4, 2, rngs=nnx.Rngs(seed)) for seed in (1, 2)], [0, 1], placement)
  np.testing.assert_allclose(model(row), before, atol=1e-6)


def test_a_memory_instead_of_the_mlp_is_without_it():
  model, row = make(), tokens(7, 2, 6)
  model.attach_memory(noisy_memory(1), [1], "instead")
  before = model(row)
  for name in ("gate_proj", "up_proj", "down_proj"):
    getattr(model.layers, name)[...] = getattr(model.layers, name)[...].at[1].set(7.0)
  np.testing.assert_array_equal(model(row), before)


@pytest.mark.parametrize("placement", decoder.READS)
@pytest.mark.parametrize("is_shared", [True, False])
def test_generation_with_its_cache_reads_the_memory_too(placement, is_shared):
  model = make()
  memory = noisy_memory(1, top_k=3) if is_shared else [noisy_memory(1, top_k=3), noisy_memory(2)]
  model.attach_memory(memory, [0, 2], placement)
  prompt = tokens(1, 5)
  new = models.generate(model, [prompt], 6, eos_id=None, pad_id=0)[0]
  whole = np.concatenate([prompt, new])[None]
  np.testing.assert_array_equal(np.argmax(apply(model, whole)[0, 4:-1], axis=-1), new)


@pytest.mark.parametrize("placement", decoder.READS)
def test_remat_gives_the_same_gradient_with_a_memory(placement):
  row = tokens(5, 1, 9)

  def gradient(remat):
    model = make(remat=remat)
    model.attach_memory(noisy_memory(1, top_k=3), [1], placement)
    graphdef, params = nnx.split(model)
    return jax.jit(jax.grad(lambda p: jnp.mean(nnx.merge(graphdef, p)(row) ** 2)))(params)

  plain, again = (gradient(remat) for remat in (False, True))
  assert np.abs(plain["memory"]["values"][...]).max() > 1e-6
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def config_of_memory(**options):
  config = tiny_config.get_config("memory")
  config.model.num_layers = 2
  config.memory.update(options)
  return config


def test_the_config_says_what_memory_there_is():
  options = {"num_slots": 16, "top_k": 3, "product_keys": True, "gated": True, "temperature": 0.5}
  model, _ = task.load_model(config_of_memory())
  row = tokens(0, 1, 5)
  before = model(row)
  task.attach_memory(model, config_of_memory(**options, placement="beside", shared=False, layers=(0, 1)))
  first, second = model.memory
  assert (first.num_slots, first.top_k, first.product_keys, first.gated) == (16, 3, True, True)
  np.testing.assert_allclose(np.exp(first.log_temperature[...]), 0.5, rtol=1e-6)
  assert np.abs(first.keys[...] - second.keys[...]).max() > 0.1
  assert (model.memory_placement, model.memory_layers) == ("beside", (0, 1))
  np.testing.assert_allclose(model(row), before, atol=1e-6)


def test_the_configs_own_defaults_are_one_plain_memory_after_its_layer():
  model, _ = task.load_model(config_of_memory())
  task.attach_memory(model, config_of_memory())
  memory = model.memory
  assert isinstance(memory, models.Memory)
  assert (memory.top_k, memory.product_keys, memory.gated, model.memory_placement) == (None, False, False, "after")
  assert not np.asarray(memory.log_temperature[...]).any()


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"top_k": 5}, r"top_k = 5 must lie in 1 \.\. num_slots = 4"),
    ({"num_slots": 5, "top_k": 2, "product_keys": True}, "square num_slots"),
    ({"key_dim": 3, "top_k": 2, "product_keys": True}, "key_dim = 3"),
    ({"product_keys": True}, "top_k = None"),
    ({"temperature": 0.0}, "temperature = 0.0"),
    ({"placement": "besides"}, "Did you mean 'beside'"),
    ({"layers": (7,)}, r"Memory layers \[7\]"),
    ({"layers": (0, 0), "shared": False}, "none of them twice"),
  ],
)
def test_a_config_whose_memory_cannot_be_is_named(options, words):
  with pytest.raises(InputError, match=words):
    task.build_network(config_of_memory(**options))


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
    (lambda: make().attach_memory(noisy_memory(1), [1], "besides"), "Did you mean 'beside'"),
    (lambda: make().attach_memory([noisy_memory(1)], [0, 1]), "1 memories need as many layers"),
  ],
)
def test_bad_input_is_named(act, words):
  with pytest.raises(InputError, match=words):
    act()
