"""Adapters that a memory weighs, and the context that its queries see: against LoRA, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

from mftjax import models
from mftjax.errors import InputError
from mftjax.models import layers, slots
from tests.test_models_decoder import apply, make, tokens

TARGETS = ("q_proj", "v_proj", "down_proj")
ROW = tokens(1, 2, 9)


def attached(num_blocks=2, layer=2, model=None, **options):
  """A model whose adapters stand in blocks of two slots, before one slot that is no task's."""
  model = model or make()
  memory = models.Memory(
    num_blocks * 2 + 1,
    32,
    24,
    2,
    **{"qk_norm": True, "temperature": 0.05, "context_dim": 16, "num_shared": 1, "has_values": False, **options},
    rngs=nnx.Rngs(1),
  )
  adapters = models.Adapters(model.layers, num_blocks, 2, 3, 6.0, TARGETS, rngs=nnx.Rngs(2))
  model.attach_memory(memory, [layer], "adapters", adapters)
  return model


def write(model, block, seed):
  """Opens a block and changes all of it."""
  model.adapters.open(block)
  keys = iter(jax.random.split(jax.random.key(seed), 16))
  for name, change in model.adapters.change.items():
    change[...] = 0.3 * jax.random.normal(next(keys), model.adapters.start[name].shape)


def key_at(model, slot, row, place):
  """Moves a slot's key to the query of the token at `place` of each of the rows."""
  (inputs,) = model.memory_inputs(row)
  slots.place(model.memory, jnp.array([slot]), inputs[:1], jnp.arange(row.shape[1])[None] == place)


@pytest.fixture(scope="module")
def plain():
  return np.asarray(apply(make(), ROW))


def test_new_adapters_change_nothing(plain):
  model = attached()
  np.testing.assert_allclose(apply(model, ROW), plain, atol=1e-6)
  model.adapters.open(1)
  np.testing.assert_allclose(apply(model, ROW), plain, atol=1e-6)


def test_a_block_that_is_all_that_is_read_is_a_lora(plain):
  model = make()
  memory = models.Memory(2, 32, 4, 1, has_values=False, rngs=nnx.Rngs(1))  # both slots are in the block: weights of 1
  adapters = models.Adapters(model.layers, 1, 2, 3, 6.0, TARGETS, rngs=nnx.Rngs(2))
  model.attach_memory(memory, [0], "adapters", adapters)
  write(model, 0, 3)
  wanted = make()
  models.lora.add(wanted, 3, 6.0, TARGETS, rngs=nnx.Rngs(0))
  for name, change in adapters.change.items():
    getattr(wanted.layers, name)[...] = adapters.start[name][...] + change[...]
  assert np.abs(apply(wanted, ROW) - plain).max() > 0.1
  np.testing.assert_allclose(apply(model, ROW), apply(wanted, ROW), atol=2e-5)


def test_what_each_token_uses_is_what_its_reads_say_layer_by_layer():
  """A second implementation: one pass for the weights, and one with W + sum of weighted adapters for each token."""
  model = attached()
  for block, seed in ((0, 3), (1, 4)):
    write(model, block, seed)
    model.adapters.fold()
  inputs = np.asarray(model.memory_inputs(ROW)[0])
  found, weight = (np.asarray(x) for x in model.memory.lookup(jnp.asarray(inputs)))
  by_block = np.stack([(weight * (found // 2 == block)).sum(axis=(2, 3)) / 2 for block in (0, 1)], axis=-1)
  np.testing.assert_allclose(model.memory.block_weights(inputs, 2, 2), by_block, atol=1e-6)
  assert by_block.std() > 0.05 and (by_block.sum(axis=-1) < 1).any()

  params = {name: x[0] for name, x in (model.layers.arrays() | model.adapters.arrays()).items()}
  hidden = np.random.default_rng(0).normal(size=(2, 9, 32)).astype(np.float32)
  got = layers.project(params, "v_proj", jnp.asarray(hidden), model.adapters.scales(model.block_weights(inputs)))
  wanted = hidden @ np.asarray(params["v_proj"])
  for block in (0, 1):
    a = np.asarray(params["v_proj_lora_a"])[:, 3 * block : 3 * block + 3]
    b = np.asarray(params["v_proj_lora_b"])[3 * block : 3 * block + 3]
    wanted += 2.0 * by_block[..., block, None] * (hidden @ a @ b)
  np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_a_token_that_no_key_of_a_block_is_near_is_as_without_it(plain):
  model = attached(temperature=0.01)
  model.memory.keys[...] = jnp.zeros_like(model.memory.keys[...])
  write(model, 0, 3)
  for place in range(9):
    key_at(model, 4, ROW, place)
    key_at(model, 0, ROW, 8 - place)
    weights = model.memory.block_weights(model.memory_inputs(ROW)[0], 2, 2)[0]
    assert weights[place].sum() < 1e-3 or place == 4
    if place != 4:
      assert weights[8 - place, 0] > 0.99


def test_blocks_stay_what_they_were_when_the_next_is_written():
  model = attached()
  write(model, 0, 3)
  before = apply(model, ROW)
  model.adapters.fold()
  np.testing.assert_allclose(apply(model, ROW), before, atol=1e-6)
  stored = {name: np.asarray(x[...]) for name, x in model.adapters.stored.items()}
  write(model, 1, 4)
  assert np.abs(apply(model, ROW) - before).max() > 1e-3
  model.adapters.fold()
  for name, x in model.adapters.stored.items():
    np.testing.assert_array_equal(x[...][0], stored[name][0])
    assert not np.array_equal(x[...], stored[name])


def test_only_the_open_block_has_a_gradient():
  model = attached()
  write(model, 0, 3)
  model.adapters.fold()
  model.adapters.open(1)
  graphdef, written, rest = nnx.split(model, models.MemoryWrite, ...)
  grad = jax.jit(jax.grad(lambda w: jnp.mean(nnx.merge(graphdef, w, rest)(ROW) ** 2)))(written)
  assert len(jax.tree.leaves(grad)) == 2 * len(TARGETS)
  assert sum(x.size for x in jax.tree.leaves(written)) == sum(
    model.layers.arrays()[target].shape[0] * 3 * sum(model.layers.arrays()[target].shape[1:]) for target in TARGETS
  )
  for target in TARGETS:
    assert np.abs(grad["adapters"]["change"][f"{target}_lora_b"][...]).max() > 1e-8


@pytest.mark.parametrize("layer", [0, 2])
def test_the_context_is_the_mean_of_the_values_so_far(layer):
  model = attached(layer=layer)
  segments = jnp.asarray([[1] * 5 + [2] * 4, [1] * 7 + [0] * 2])
  found = np.asarray(model.memory_inputs(ROW, segments)[0])
  alone = attached(layer=layer)
  np.testing.assert_allclose(found[:1, 5:], alone.memory_inputs(ROW[:1, 5:])[0], atol=1e-5)
  if layer == 0:
    arrays = {name: x[0] for name, x in model.layers.arrays().items()}
    normed = layers.rms_norm(model.embed(ROW), arrays["attention_norm"], model.config.norm_eps)
    values = np.asarray(normed @ arrays["v_proj"])
    for place in range(5):
      np.testing.assert_allclose(found[0, place, 32:], values[0, : place + 1].mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_generation_with_its_cache_uses_the_adapters_too(layer):
  model = attached(layer=layer)
  write(model, 0, 3)
  model.adapters.fold()
  write(model, 1, 4)
  prompt = tokens(1, 5)
  new = models.generate(model, [prompt], 6, eos_id=None, pad_id=0)[0]
  whole = np.concatenate([prompt, new])[None]
  np.testing.assert_array_equal(np.argmax(apply(model, whole)[0, 4:-1], axis=-1), new)


def test_what_does_not_go_together_is_refused():
  adapters = lambda model: models.Adapters(model.layers, 1, 2, 3, 6.0, TARGETS, rngs=nnx.Rngs(2))
  memory = lambda **options: models.Memory(2, 32, 4, 1, **options, rngs=nnx.Rngs(1))
  model = make()
  with pytest.raises(InputError, match="adapters go with"):
    model.attach_memory(memory(), [0], "adapters")
  model = make()
  with pytest.raises(InputError, match="adapters go with"):
    model.attach_memory(memory(), [0], "beside", adapters(model))
  model = make()
  with pytest.raises(InputError, match="one layer"):
    model.attach_memory(memory(), [0, 1], "adapters", adapters(model))
  model = make()
  models.lora.add(model, 3, 6.0, TARGETS, rngs=nnx.Rngs(0))
  with pytest.raises(InputError, match="another LoRA"):
    model.attach_memory(memory(), [0], "adapters", adapters(model))
  with pytest.raises(InputError, match="context_dim 5"):
    make().attach_memory(memory(context_dim=5), [0], "beside")
  with pytest.raises(InputError, match="context_dim 16"):
    make().attach_memory(memory(context_dim=16), [0], "after")
  with pytest.raises(InputError, match="num_blocks = 0"):
    models.Adapters(make().layers, 0, 2, 3, 6.0, TARGETS, rngs=nnx.Rngs(2))
  with pytest.raises(InputError, match="q_porj"):
    models.Adapters(make().layers, 1, 2, 3, 6.0, ("q_porj",), rngs=nnx.Rngs(2))
  with pytest.raises(InputError, match="num_shared = 3"):
    memory(num_shared=3)
  with pytest.raises(InputError, match="context_dim = -1"):
    memory(context_dim=-1)
  with pytest.raises(InputError, match="before the last MLP"):
    attached().before_last_mlp(ROW, jnp.ones_like(ROW), jnp.zeros_like(ROW))


def test_a_saved_model_keeps_what_its_tasks_wrote(tmp_path):
  model = attached()
  write(model, 0, 3)
  model.adapters.fold()
  write(model, 1, 4)  # still open
  models.save(model, None, tmp_path / "saved")
  found, _ = models.load(tmp_path / "saved")
  np.testing.assert_allclose(apply(found, ROW), apply(model, ROW), atol=1e-6)
  assert np.abs(apply(found, ROW) - apply(make(), ROW)).max() > 1e-3
  assert int(model.adapters.block[...]) == 1  # the saved model itself stays as it was
  write(found, 0, 5)  # and learns the next task
  assert np.abs(apply(found, ROW) - apply(model, ROW)).max() > 1e-3
  file = tmp_path / "saved" / "memory.safetensors"
  with safetensors.safe_open(file, framework="numpy") as opened:
    metadata, kept = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
  del kept["adapters.stored.q_proj_lora_a"]
  safetensors.numpy.save_file(kept, file, metadata=metadata)
  with pytest.raises(InputError, match=r"memory.safetensors: tensor adapters.stored.q_proj_lora_a is missing"):
    models.load(tmp_path / "saved")
