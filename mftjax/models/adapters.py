"""Low-rank adapters that stand in the slots of a memory: a token's reads say how much of each its layers use."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mftjax.errors import InputError
from mftjax.models import lora
from mftjax.models.layers import Layers
from mftjax.models.memory import MemoryParam, MemoryWrite, WrittenSlots

NO_BLOCK = -1


class StoredAdapters(nnx.Variable):
  """What earlier tasks have written: `[num_blocks, num_layers, ...]` f32."""


class Adapters(nnx.Module):
  """`W x + alpha / rank * sum over blocks b of g_b B_b A_b x` in place of `W x`, in every layer.

  A block is a run of `block_size` slots of a memory, and `g_b` the part of a token's reads that fall on it, so that a
  token whose queries are near no key of a block is computed as if that block were not there. The block that is open is
  trained: it starts as `start` says, the same for all blocks, and `change` is added to that.

  Args:
    layers: of the model, for the shapes.
    num_blocks, block_size: at least 1.
    rank, alpha, targets: as of `lora.add`, of each block.
    rngs: its `params` stream draws where A starts; B starts at zero.

  Raises:
    InputError: sizes or targets out of range.

  Source: LoRA (Hu et al., 2021), Section 4.1; adapters in a pool that a query on the frozen model chooses from:
  Learning to Prompt for Continual Learning (Wang et al., 2022), Section 4.2, there of prompts.
  """

  def __init__(
    self,
    layers: Layers,
    num_blocks: int,
    block_size: int,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    *,
    rngs: nnx.Rngs,
  ):
    if num_blocks < 1 or block_size < 1:
      raise InputError(f"Adapters need a block of slots or more: num_blocks = {num_blocks}, block_size = {block_size}.")
    lora.check(rank, targets)
    self.num_blocks, self.block_size, self.rank, self.scale = num_blocks, block_size, rank, alpha / rank
    self.start: Any = nnx.Dict()  # by names as of `lora.add`
    self.change: Any = nnx.Dict()
    self.stored: Any = nnx.Dict()
    for target in dict.fromkeys(targets):
      num_layers, size_in, size_out = getattr(layers, target).shape
      a, b = lora.draw_a(rngs.params(), (num_layers, size_in, rank)), jnp.zeros((num_layers, rank, size_out))
      for name, value in {f"{target}_lora_a": a, f"{target}_lora_b": b}.items():
        self.start[name], self.change[name] = MemoryParam(value), MemoryWrite(jnp.zeros_like(value))
        self.stored[name] = StoredAdapters(jnp.zeros((num_blocks, *value.shape), value.dtype))
    self.block = WrittenSlots(jnp.int32(NO_BLOCK))  # that is open

  def settings(self) -> dict[str, Any]:
    """What others of the same shapes are made of, beside layers and rngs."""
    targets = [name.removesuffix("_lora_a") for name in self.start if lora.is_a(name)]
    sizes = {"num_blocks": self.num_blocks, "block_size": self.block_size, "rank": self.rank}
    return {**sizes, "alpha": self.scale * self.rank, "targets": targets}

  def open(self, block: jax.Array | int) -> None:
    """Opens a block, in place, with what it held before left out; the last one must be folded."""
    self.block[...] = jnp.int32(block)

  def fold(self) -> None:
    """Stores what was written into the open block, in place, and opens none."""
    for name, stored in self.stored.items():
      stored[...] = self._blocks(name)
      self.change[name][...] = jnp.zeros_like(self.change[name][...])
    self.block[...] = jnp.int32(NO_BLOCK)

  def hold(self, last: jax.Array | int) -> None:
    """Stores what each of the first blocks was written, in place, when `change` is `[n, num_layers, ...]` of theirs.

    Args:
      last: the blocks behind this one hold nothing yet.
    """
    for name, stored in self.stored.items():
      own = self.start[name][...] + self.change[name][...]
      is_there = jnp.arange(len(own)) <= last
      stored[...] = stored[...].at[: len(own)].set(jnp.where(is_there.reshape(-1, 1, 1, 1), own, 0.0))
      self.change[name] = MemoryWrite(jnp.zeros_like(self.start[name][...]))  # of one block again
    self.block[...] = jnp.int32(NO_BLOCK)

  def arrays(self) -> dict[str, jax.Array]:
    """The adapters as layers read them: `<target>_lora_a` `[num_layers, in, num_blocks * rank]`, and `_lora_b`."""
    found = {}
    for name in self.stored:
      axis = 2 if lora.is_a(name) else 1  # the rank's, without the blocks
      found[name] = jax.lax.collapse(jnp.moveaxis(self._blocks(name), 0, axis), axis, axis + 2)
    return found

  def scales(self, block_weights: jax.Array) -> jax.Array:
    """`[..., num_blocks * rank]` what each token's adapters are multiplied by, of its `Memory.block_weights`."""
    return jnp.repeat(self.scale * block_weights, self.rank, axis=-1)

  def _blocks(self, name: str) -> jax.Array:
    """`[num_blocks, num_layers, ...]` of what is stored, and of the open block as it is trained."""
    is_open = (jnp.arange(self.num_blocks) == self.block[...]).reshape(-1, 1, 1, 1)
    return jnp.where(is_open, self.start[name][...] + self.change[name][...], self.stored[name][...])
