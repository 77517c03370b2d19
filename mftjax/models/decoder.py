"""The decoder: Llama and Qwen2 shapes, its layers stacked and run under one `jax.lax.scan`."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mftjax.errors import InputError, unknown_name
from mftjax.models import lora
from mftjax.models.adapters import Adapters
from mftjax.models.attention import ATTENTION
from mftjax.models.layers import (
  Attend,
  Cache,
  DecoderConfig,
  Layers,
  attention_part,
  layer,
  mlp_inputs,
  mlp_part,
  rms_norm,
  rope_tables,
)
from mftjax.models.memory import Memory
from mftjax.models.spread import Spread
from mftjax.types import at_least_f32

# Where a memory's read goes: on the layer's output, beside its MLP or in its place.
READS = ("after", "beside", "instead")
PLACEMENTS = (*READS, "adapters")  # or it says how much of each of its adapters all layers use


def segment_positions(segment_ids: jax.Array) -> jax.Array:
  """`[batch, length]` position of each token within its segment, from `[batch, length]` segment ids."""
  index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
  is_start = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
  return index - jax.lax.cummax(jnp.where(is_start, index, 0), axis=1)


class Decoder(nnx.Module):
  """A decoder-only language model.

  Args:
    config: its shape.
    rngs: its `params` stream draws the initial weights (normal, 0.02; norms 1; biases 0).
  """

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size)))
    self.layers = Layers(config, rngs=rngs)
    self.final_norm = nnx.Param(jnp.ones(config.hidden_size))
    if not config.tie_embeddings:
      self.head = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.hidden_size, config.vocab_size)))
    self.memory: Any = nnx.data(None)  # a `Memory`, or an `nnx.List` with one for each memory layer
    self.memory_layers: tuple[int, ...] = ()
    self.memory_placement = "after"
    self.adapters: Any = nnx.data(None)  # `Adapters` that the memory weighs
    self.spread: Spread | None = None  # how it lies on many devices, if it is split over them

  def attach_memory(
    self,
    memory: Memory | Sequence[Memory],
    layers: Sequence[int],
    placement: str = "after",
    adapters: Adapters | None = None,
  ) -> None:
    """Has these layers read a memory; a new one leaves the logits as they were, unless it stands for an MLP.

    Args:
      memory: one that all the layers share, or one for each of them, in their order.
      layers: numbers of the layers, 0 = the first.
      placement: "after": `hidden + read(hidden)` of the layer's output; "beside": the read of the MLP's normed input
        is added to the MLP's output; "instead": it takes the place of the MLP's output; "adapters": the layer of the
        model without adapters says which slots a token reads, and these how much of each of the adapters counts in all
        layers of a second pass.
      adapters: for the placement "adapters", and only for that.

    Raises:
      InputError: a layer that does not exist, no layer, another width, another number of memories than of layers, an
        unknown placement, a memory that is attached already, or adapters that go with none of it.
    """
    if self.memory is not None:
      raise InputError("The decoder has a memory already; attach one memory, to all of its layers at once.")
    if not layers or not all(0 <= number < self.config.num_layers for number in layers):
      raise InputError(f"Memory layers {list(layers)} must be some of 0 .. {self.config.num_layers - 1}.")
    if placement not in PLACEMENTS:
      raise unknown_name("placement of the memory", placement, PLACEMENTS)
    memories = [memory] if isinstance(memory, Memory) else list(memory)
    for one in memories:
      if one.dim != self.config.hidden_size:
        raise InputError(f"Memory of dim {one.dim} does not fit a decoder of hidden_size {self.config.hidden_size}.")
      if one.context_dim and (placement == "after" or one.context_dim != self.config.context_dim):
        raise InputError(
          f"Memory of context_dim {one.context_dim}, placed {placement!r}: a decoder gives contexts of "
          f"{self.config.context_dim} to a memory that is not placed after its layer."
        )
    if (placement == "adapters") != (adapters is not None):
      raise InputError(f"Memory placed {placement!r}: adapters go with the placement 'adapters' alone.")
    if adapters is not None and (len(set(layers)) > 1 or lora.adapted(self)):
      raise InputError("A memory with adapters is read in one layer, of a model without another LoRA.")
    if isinstance(memory, Memory):
      self.memory, self.memory_layers = memory, tuple(sorted(set(layers)))
    else:
      if len(memories) != len(layers) or len(set(layers)) != len(layers):
        raise InputError(f"{len(memories)} memories need as many layers, none of them twice; given {list(layers)}.")
      order = sorted(range(len(layers)), key=lambda place: layers[place])
      self.memory = nnx.List([memories[place] for place in order])
      self.memory_layers = tuple(layers[place] for place in order)
    self.memory_placement, self.adapters = placement, nnx.data(adapters)

  def memories(self) -> list[Memory]:
    """The memories there are, in the order of the layers; one only where the layers share it."""
    if self.memory is None:
      return []
    return [self.memory] if isinstance(self.memory, Memory) else list(self.memory)

  def memory_of(self, number: int) -> Memory | None:
    """The memory that the layer reads, None when it reads none."""
    if number not in self.memory_layers:
      return None
    return self.memory if isinstance(self.memory, Memory) else self.memory[self.memory_layers.index(number)]

  def __call__(
    self, tokens: jax.Array, segment_ids: jax.Array | None = None, positions: jax.Array | None = None
  ) -> jax.Array:
    """Next-token logits.

    Args:
      tokens: `[batch, length]` int.
      segment_ids: `[batch, length]` int, 0 = padding; a token sees the earlier ones of its own segment. All one
        segment when left out.
      positions: `[batch, length]` int; restart with each segment when left out.

    Returns:
      `[batch, length, vocab_size]` f32 (f64 in f64); those at padding mean nothing (but are finite).

    Raises:
      InputError: more tokens than `config.max_length`.
    """
    return self.logits(self.hidden(tokens, segment_ids, positions))

  def hidden(
    self,
    tokens: jax.Array,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    block_weights: jax.Array | None = None,
  ) -> jax.Array:
    """`[batch, length, hidden_size]` last hidden states, of which `logits` says what comes next; arguments as above.

    Args:
      block_weights: those of the tokens' memory inputs, where they are known of a model with adapters: it saves the
        first of the two passes.
    """
    inputs = self._inputs(tokens, segment_ids, positions)
    if block_weights is not None:
      return self._run_layers(*inputs, block_weights=block_weights)[0]
    return self.run_layers(*inputs)[0]

  def before_last_mlp(self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """`[batch, length, hidden_size]` hidden states behind the last layer's attention, whatever a memory in it holds.

    If a memory there has a `context_dim`, each state has its context behind it. From here on no token sees another:
    `from_last_mlp` of some of the states gives the last hidden states of these.

    Raises:
      InputError: a memory in an earlier layer, or more tokens than `config.max_length`.
    """
    config, arrays, lora_scale = self.config, self.layers.arrays(), self.layers.lora_scale
    if self.adapters is not None:
      raise InputError("Adapters change all layers: there are no states that stay the same before the last MLP.")
    if not set(self.memory_layers) <= {config.num_layers - 1}:
      raise InputError(f"The memory in layers {self.memory_layers} is not in the last layer alone.")
    hidden, positions, attend = self._inputs(tokens, segment_ids, positions)
    rope = rope_tables(positions, config.head_dim, config.rope_theta)
    body = lambda hidden, params: layer(params, hidden, rope, attend, config, lora_scale)
    hidden, _ = jax.lax.scan(body, hidden, jax.tree.map(lambda x: x[:-1], arrays))
    memory = self.memory_of(config.num_layers - 1)
    return attention_part(self._last_layer(), hidden, rope, attend, config, lora_scale, memory=memory)[0]

  def from_last_mlp(self, states: jax.Array) -> jax.Array:
    """`[..., hidden_size]` last hidden states of states of `before_last_mlp`, the last layer's memory included."""
    memory, placement = self.memory_of(self.config.num_layers - 1), self.memory_placement
    own = memory if placement != "after" else None
    hidden = mlp_part(self._last_layer(), states, self.config, self.layers.lora_scale, own, placement)
    return memory(hidden) if memory is not None and own is None else hidden

  def last_memory_input(self, states: jax.Array) -> jax.Array:
    """`[..., dim + context_dim]` what the last layer's memory is read with, of states of `before_last_mlp`."""
    if self.memory_placement == "after":
      return mlp_part(self._last_layer(), states, self.config, self.layers.lora_scale)
    return mlp_inputs(self._last_layer(), states, self.config)

  def _last_layer(self) -> dict[str, jax.Array]:
    return jax.tree.map(lambda x: x[-1], self.layers.arrays())

  def memory_inputs(
    self, tokens: jax.Array, segment_ids: jax.Array | None = None, positions: jax.Array | None = None
  ) -> list[jax.Array]:
    """`[batch, length, dim + context_dim]` what each memory layer's memory is read with; arguments as above."""
    inputs: list[jax.Array] = []
    self._run_layers(*self._inputs(tokens, segment_ids, positions), memory_inputs=inputs)
    return inputs

  def memory_usage(
    self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array, mask: jax.Array
  ) -> list[jax.Array]:
    """`[num_slots]` number of reads of each of `memories()`, by the tokens whose mask `[batch, length]` is not 0."""
    inputs = self.memory_inputs(tokens, segment_ids, positions)
    if isinstance(self.memory, Memory):
      return [self.memory.usage(jnp.stack(inputs), jnp.stack([mask] * len(inputs)))]
    return [memory.usage(x, mask) for memory, x in zip(self.memories(), inputs, strict=True)]

  def _inputs(
    self, tokens: jax.Array, segment_ids: jax.Array | None, positions: jax.Array | None
  ) -> tuple[jax.Array, jax.Array, Attend]:
    """What `run_layers` takes for these tokens."""
    length = tokens.shape[1]
    if length > self.config.max_length:
      raise InputError(f"{length} tokens are more than the decoder's max_length = {self.config.max_length}.")
    segment_ids = jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else jnp.asarray(segment_ids)
    positions = segment_positions(segment_ids) if positions is None else positions
    attend = lambda q, k, v: ATTENTION[self.config.attention](q, k, v, segment_ids)
    return self.embed(tokens), jnp.asarray(positions), attend

  def embed(self, tokens: jax.Array) -> jax.Array:
    """`[batch, length, hidden_size]` embeddings, in the compute dtype."""
    return self._rows(jnp.take(self._used("embedding", self.embedding[...]), tokens, axis=0).astype(self.config.dtype))

  def logits(self, hidden: jax.Array) -> jax.Array:
    """`[..., vocab_size]` f32 logits of `[..., hidden_size]` last hidden states."""
    normed = rms_norm(hidden, self.final_norm[...], self.config.norm_eps)
    head = (
      self._used("embedding", self.embedding[...]).T
      if self.config.tie_embeddings
      else self._used("head", self.head[...])
    )
    flat = normed.reshape(-1, normed.shape[-1])  # as in `project`
    out = jnp.matmul(flat, head.astype(normed.dtype), preferred_element_type=at_least_f32(normed.dtype))
    return out.reshape(*hidden.shape[:-1], -1)

  def _used(self, name: str, value: jax.Array) -> jax.Array:
    return value if self.spread is None else self.spread.used(name, value)

  def _rows(self, hidden: jax.Array) -> jax.Array:
    return hidden if self.spread is None else self.spread.rows(hidden)

  @property
  def cache_layers(self) -> int:
    """The first axis of the cache that `run_layers` takes."""
    return self.config.num_layers * (1 if self.adapters is None else 2)

  def run_layers(
    self,
    hidden: jax.Array,
    positions: jax.Array,
    attend: Attend,
    cache: Cache | None = None,
    index: jax.Array | int = 0,
  ) -> tuple[jax.Array, Cache | None]:
    """All layers; arguments as for `layer`, the cache of `cache_layers` layers."""
    run = lambda cache, **more: self._run_layers(hidden, positions, attend, cache, index, **more)
    if self.adapters is None:
      return run(cache)
    inputs: list[jax.Array] = []
    parts = [jax.tree.map(lambda x: jnp.split(x, 2)[i], cache) for i in (0, 1)]  # noqa: B023 (used at once)
    _, plain_cache = run(parts[0], memory_inputs=inputs)
    out, own_cache = run(parts[1], block_weights=self.block_weights(inputs[0]))
    return out, jax.tree.map(lambda *halves: jnp.concatenate(halves), plain_cache, own_cache)

  def block_weights(self, memory_inputs: jax.Array) -> jax.Array:
    """`[..., num_blocks]` part of each token's reads that falls on the block of each of the adapters."""
    return self.memories()[0].block_weights(memory_inputs, self.adapters.block_size, self.adapters.num_blocks)

  def _run_layers(
    self,
    hidden: jax.Array,
    positions: jax.Array,
    attend: Attend,
    cache: Cache | None = None,
    index: jax.Array | int = 0,
    memory_inputs: list[jax.Array] | None = None,
    block_weights: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """One pass, in one scan for each stretch between two memory layers.

    Args:
      memory_inputs: a list that gets what each memory layer's memory is read with.
      block_weights: how much of the adapters each token uses; without, the pass is one of the model without them.
    """
    config, placement = self.config, self.memory_placement
    arrays: dict[str, jax.Array] = self.layers.arrays()
    lora_scale: jax.Array | float = self.layers.lora_scale
    if block_weights is not None:
      arrays, lora_scale = arrays | self.adapters.arrays(), self.adapters.scales(block_weights)
    rope = rope_tables(positions, config.head_dim, config.rope_theta)
    is_inside = placement in ("beside", "instead")
    is_alone = placement != "after"  # a memory layer is a stretch of its own

    def body(hidden, inputs, memory=None):
      params, layer_cache = inputs
      params = {name: self._used(name, value) for name, value in params.items()}
      out, layer_cache = layer(params, hidden, rope, attend, config, lora_scale, layer_cache, index, memory, placement)
      return self._rows(out), layer_cache

    caches = []
    cuts = {0, config.num_layers} | {number + 1 for number in self.memory_layers}
    cuts |= set(self.memory_layers) if is_alone else set()
    for start, stop in itertools.pairwise(sorted(cuts)):
      memory = self.memory_of(stop - 1)
      run_layer = functools.partial(body, memory=memory if is_inside else None)
      if cache is None:
        # Stacking a scan's residuals costs more than computing the cheap ones again: keep the projections, or nothing.
        # prevent_cse: inside a scan nothing can be merged over steps anyway.
        policies = jax.checkpoint_policies
        keep = policies.nothing_saveable if config.remat else policies.dots_with_no_batch_dims_saveable
        run_layer = jax.checkpoint(run_layer, policy=keep, prevent_cse=False)
      stretch = jax.tree.map(lambda x: x[start:stop], (arrays, cache))  # noqa: B023 (used at once)
      if memory is not None and is_alone and memory_inputs is not None:
        params, layer_cache = jax.tree.map(lambda x: x[0], stretch)
        middle, _ = attention_part(params, hidden, rope, attend, config, lora_scale, layer_cache, index, memory)
        memory_inputs.append(mlp_inputs(params, middle, config))
      hidden, new_cache = jax.lax.scan(run_layer, hidden, stretch)
      if memory is not None and placement == "after":
        if memory_inputs is not None:
          memory_inputs.append(hidden)
        hidden = memory(hidden)
      caches.append(new_cache)
    return hidden, jax.tree.map(lambda *parts: jnp.concatenate(parts), *caches)
