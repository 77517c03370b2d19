"""The decoder: Llama and Qwen2 shapes, its layers stacked and run under one `jax.lax.scan`."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mftjax.errors import InputError, unknown_name
from mftjax.models.attention import ATTENTION
from mftjax.models.memory import Memory
from mftjax.types import at_least_f32

FAMILIES = ("llama", "qwen2")

PLACEMENTS = ("after", "beside", "instead")  # of a memory: on the layer's output, beside its MLP or in its place

LONGEST_SUM = 640  # terms that a product on a CPU adds up in one go

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # queries, keys, values -> output, heads side by side
Cache = tuple[jax.Array, jax.Array]  # keys, values: each [num_layers, batch, cache_length, num_kv_heads, head_dim]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """The shape of a decoder; sizes count features, `max_length` counts tokens.

  Raises:
    InputError: a family or an attention that does not exist, or sizes that do not divide.
  """

  family: str  # "llama" or "qwen2"
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 10000.0
  norm_eps: float = 1e-6
  tie_embeddings: bool = False
  attention_bias: bool = False  # on q, k, v; for llama on the output projection too
  max_length: int = 2048
  remat: bool = False  # keep only each layer's input for the gradient, not the results of its projections too
  attention: str = "full"  # a word of `attention.ATTENTION`; generation with its cache always takes the full one
  dtype: Any = jnp.float32  # of the computation; parameters are stored as they were given (f32 when new)

  def __post_init__(self):
    if self.family not in FAMILIES:
      raise unknown_name("decoder family", self.family, FAMILIES)
    if self.attention not in ATTENTION:
      raise unknown_name("attention", self.attention, ATTENTION)
    if self.num_heads % self.num_kv_heads:
      raise InputError(f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}.")
    if self.head_dim % 2:
      raise InputError(f"head_dim = {self.head_dim} must be even: rotary embedding turns pairs of features.")


def layer_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
  """Name and shape of each parameter of one layer; matrices are `(in, out)`."""
  hidden, inner = config.hidden_size, config.intermediate_size
  heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  shapes: dict[str, tuple[int, ...]] = {
    "attention_norm": (hidden,),
    "q_proj": (hidden, heads),
    "k_proj": (hidden, kv_heads),
    "v_proj": (hidden, kv_heads),
    "o_proj": (heads, hidden),
    "mlp_norm": (hidden,),
    "gate_proj": (hidden, inner),
    "up_proj": (hidden, inner),
    "down_proj": (inner, hidden),
  }
  if config.attention_bias:
    shapes |= {"q_proj_bias": (heads,), "k_proj_bias": (kv_heads,), "v_proj_bias": (kv_heads,)}
    if config.family == "llama":
      shapes["o_proj_bias"] = (hidden,)
  return shapes


class Layers(nnx.Module):
  """All layers' parameters, each stacked to `[num_layers, ...]` (see `layer_shapes`)."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    self.lora_scale = 0.0  # alpha / rank, once `lora.add` has put adapters here
    for name, shape in layer_shapes(config).items():
      stacked = (config.num_layers, *shape)
      if name.endswith("norm"):
        value = jnp.ones(stacked, jnp.float32)
      elif name.endswith("bias"):
        value = jnp.zeros(stacked, jnp.float32)
      else:
        value = 0.02 * jax.random.normal(rngs.params(), stacked, jnp.float32)
      setattr(self, name, nnx.Param(value))

  def arrays(self) -> dict[str, jax.Array]:
    """Name -> `[num_layers, ...]` array, adapters included: what the scan goes over."""
    return {name: value[...] for name, value in vars(self).items() if isinstance(value, nnx.Variable)}


def rms_norm(hidden: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """`scale * hidden / sqrt(mean(hidden^2) + eps)` over the last axis, the statistics in f32 or better."""
  wide = hidden.astype(at_least_f32(hidden.dtype))
  normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
  return scale.astype(hidden.dtype) * normed.astype(hidden.dtype)


def rope_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines `[batch, length, 1, head_dim]` f32 of the rotary embedding, for `[batch, length]` positions."""
  frequencies = (theta ** -(np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
  angles = positions[..., None].astype(jnp.float32) * frequencies
  angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotary embedding of `[batch, length, heads, head_dim]`; feature i turns with feature i + head_dim / 2."""
  cos, sin = (table.astype(x.dtype) for table in rope)
  first, second = jnp.split(x, 2, axis=-1)
  return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
  """`x weight` of `[rows, in]` and `[in, out]`.

  On a CPU long sums are split: XLA adds their terms one after the other, and in layers whose activations are huge
  (22,000 in SmolLM2-135M) the rounding of 1,536 terms alone moves the logits by 1e-4.
  """
  length = x.shape[1]
  if jax.default_backend() != "cpu" or length <= LONGEST_SUM:
    return x @ weight
  size = -(-length // -(-length // LONGEST_SUM))  # parts of one size, but for the last
  parts = [slice(start, start + size) for start in range(0, length, size)]
  return functools.reduce(jnp.add, (x[:, part] @ weight[part] for part in parts))


def project(params: dict[str, jax.Array], name: str, x: jax.Array, lora_scale: float) -> jax.Array:
  """`x W + bias + lora_scale (x A) B`, each term where the layer has it."""
  leading, x = x.shape[:-1], x.reshape(-1, x.shape[-1])  # the gradient of a product over one axis is the faster one
  out = product(x, params[name].astype(x.dtype))
  if f"{name}_bias" in params:
    out += params[f"{name}_bias"].astype(x.dtype)
  if f"{name}_lora_a" in params:
    low = x @ params[f"{name}_lora_a"].astype(x.dtype)
    out += lora_scale * (low @ params[f"{name}_lora_b"].astype(x.dtype))
  return out.reshape(*leading, -1)


def layer(
  params: dict[str, jax.Array],
  hidden: jax.Array,
  rope: tuple[jax.Array, jax.Array],
  attend: Attend,
  config: DecoderConfig,
  lora_scale: float,
  cache: Cache | None = None,
  index: jax.Array | int = 0,
  memory: Memory | None = None,
  placement: str = "beside",
) -> tuple[jax.Array, Cache | None]:
  """One layer, for training (no cache) and for decoding (keys and values written into the cache at `index`).

  Args:
    params: one layer's slice of `Layers.arrays()`.
    hidden: `[batch, length, hidden_size]`.
    rope: tables of `rope_tables` for these positions.
    attend: attention of the queries `[batch, length, num_heads, head_dim]` to keys and values
      `[batch, key_length, num_kv_heads, head_dim]`, which are the whole cache when there is one.
    cache: keys and values, each `[batch, cache_length, num_kv_heads, head_dim]`.
    index: where in the cache the first of these tokens goes.
    memory: read within the layer, None when none is.
    placement: whether it is read "beside" the MLP or "instead" of it.

  Returns:
    The new hidden states and the new cache.
  """
  hidden, cache = attention_part(params, hidden, rope, attend, config, lora_scale, cache, index)
  return mlp_part(params, hidden, config, lora_scale, memory, placement), cache


def attention_part(
  params: dict[str, jax.Array],
  hidden: jax.Array,
  rope: tuple[jax.Array, jax.Array],
  attend: Attend,
  config: DecoderConfig,
  lora_scale: float,
  cache: Cache | None = None,
  index: jax.Array | int = 0,
) -> tuple[jax.Array, Cache | None]:
  """The first half of `layer`: hidden states with the attention's output added, and the new cache."""
  proj = functools.partial(project, params, lora_scale=lora_scale)
  heads = (*hidden.shape[:2], -1, config.head_dim)
  normed = rms_norm(hidden, params["attention_norm"], config.norm_eps)
  q = rotate(proj("q_proj", normed).reshape(heads), rope)
  k = rotate(proj("k_proj", normed).reshape(heads), rope)
  v = proj("v_proj", normed).reshape(heads)
  if cache is not None:
    k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, index, axis=1)
    v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, index, axis=1)
    cache = (k, v)
  return hidden + proj("o_proj", attend(q, k, v)), cache


def mlp_part(
  params: dict[str, jax.Array],
  hidden: jax.Array,
  config: DecoderConfig,
  lora_scale: float,
  memory: Memory | None = None,
  placement: str = "beside",
) -> jax.Array:
  """The second half of `layer`, in which no token sees another: `[..., hidden_size]` new hidden states."""
  proj = functools.partial(project, params, lora_scale=lora_scale)
  normed = rms_norm(hidden, params["mlp_norm"], config.norm_eps)
  if memory is not None and placement == "instead":
    return hidden + memory.read(normed)
  gated = jax.nn.silu(proj("gate_proj", normed)) * proj("up_proj", normed)
  out = proj("down_proj", gated)
  return hidden + (out if memory is None else out + memory.read(normed))


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

  def attach_memory(self, memory: Memory | Sequence[Memory], layers: Sequence[int], placement: str = "after") -> None:
    """Has these layers read a memory; a new one leaves the logits as they were, unless it stands for an MLP.

    Args:
      memory: one that all the layers share, or one for each of them, in their order.
      layers: numbers of the layers, 0 = the first.
      placement: "after": `hidden + read(hidden)` of the layer's output; "beside": the read of the MLP's normed input
        is added to the MLP's output; "instead": it takes the place of the MLP's output.

    Raises:
      InputError: a layer that does not exist, no layer, another width, another number of memories than of layers, an
        unknown placement, or a memory that is attached already.
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
    if isinstance(memory, Memory):
      self.memory, self.memory_layers = memory, tuple(sorted(set(layers)))
    else:
      if len(memories) != len(layers) or len(set(layers)) != len(layers):
        raise InputError(f"{len(memories)} memories need as many layers, none of them twice; given {list(layers)}.")
      order = sorted(range(len(layers)), key=lambda place: layers[place])
      self.memory = nnx.List([memories[place] for place in order])
      self.memory_layers = tuple(layers[place] for place in order)
    self.memory_placement = placement

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
    self, tokens: jax.Array, segment_ids: jax.Array | None = None, positions: jax.Array | None = None
  ) -> jax.Array:
    """`[batch, length, hidden_size]` last hidden states, of which `logits` says what comes next; arguments as above."""
    return self.run_layers(*self._inputs(tokens, segment_ids, positions))[0]

  def before_last_mlp(self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """`[batch, length, hidden_size]` hidden states behind the last layer's attention, whatever a memory in it holds.

    From here on no token sees another: `from_last_mlp` of some of the states gives the last hidden states of these.

    Raises:
      InputError: a memory in an earlier layer, or more tokens than `config.max_length`.
    """
    config, arrays, lora_scale = self.config, self.layers.arrays(), self.layers.lora_scale
    if not set(self.memory_layers) <= {config.num_layers - 1}:
      raise InputError(f"The memory in layers {self.memory_layers} is not in the last layer alone.")
    hidden, positions, attend = self._inputs(tokens, segment_ids, positions)
    rope = rope_tables(positions, config.head_dim, config.rope_theta)
    body = lambda hidden, params: layer(params, hidden, rope, attend, config, lora_scale)
    hidden, _ = jax.lax.scan(body, hidden, jax.tree.map(lambda x: x[:-1], arrays))
    return attention_part(self._last_layer(), hidden, rope, attend, config, lora_scale)[0]

  def from_last_mlp(self, states: jax.Array) -> jax.Array:
    """`[..., hidden_size]` last hidden states of states of `before_last_mlp`, the last layer's memory included."""
    memory, placement = self.memory_of(self.config.num_layers - 1), self.memory_placement
    own = memory if placement != "after" else None
    hidden = mlp_part(self._last_layer(), states, self.config, self.layers.lora_scale, own, placement)
    return memory(hidden) if memory is not None and own is None else hidden

  def last_memory_input(self, states: jax.Array) -> jax.Array:
    """`[..., hidden_size]` what the last layer's memory is read with, of states of `before_last_mlp`."""
    params = self._last_layer()
    if self.memory_placement == "after":
      return mlp_part(params, states, self.config, self.layers.lora_scale)
    return rms_norm(states, params["mlp_norm"], self.config.norm_eps)

  def _last_layer(self) -> dict[str, jax.Array]:
    return jax.tree.map(lambda x: x[-1], self.layers.arrays())

  def memory_inputs(
    self, tokens: jax.Array, segment_ids: jax.Array | None = None, positions: jax.Array | None = None
  ) -> list[jax.Array]:
    """`[batch, length, hidden_size]` hidden states that each memory layer's memory is read with; arguments as above."""
    inputs: list[jax.Array] = []
    self.run_layers(*self._inputs(tokens, segment_ids, positions), memory_inputs=inputs)
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
    return jnp.take(self.embedding[...], tokens, axis=0).astype(self.config.dtype)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """`[..., vocab_size]` f32 logits of `[..., hidden_size]` last hidden states."""
    normed = rms_norm(hidden, self.final_norm[...], self.config.norm_eps)
    head = self.embedding[...].T if self.config.tie_embeddings else self.head[...]
    flat = normed.reshape(-1, normed.shape[-1])  # as in `project`
    out = jnp.matmul(flat, head.astype(normed.dtype), preferred_element_type=at_least_f32(normed.dtype))
    return out.reshape(*hidden.shape[:-1], -1)

  def run_layers(
    self,
    hidden: jax.Array,
    positions: jax.Array,
    attend: Attend,
    cache: Cache | None = None,
    index: jax.Array | int = 0,
    memory_inputs: list[jax.Array] | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """All layers, in one scan for each stretch between two memory layers; arguments as for `layer`.

    Args:
      memory_inputs: a list that gets what each memory layer's memory is read with.
    """
    config, lora_scale = self.config, self.layers.lora_scale
    rope = rope_tables(positions, config.head_dim, config.rope_theta)

    is_inside = self.memory_placement != "after"

    def body(hidden, inputs, memory=None):
      params, layer_cache = inputs
      return layer(params, hidden, rope, attend, config, lora_scale, layer_cache, index, memory, self.memory_placement)

    arrays = self.layers.arrays()
    caches = []
    cuts = {0, config.num_layers} | {number + 1 for number in self.memory_layers}
    cuts |= set(self.memory_layers) if is_inside else set()  # then the layer is a stretch of its own
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
      if memory is not None and is_inside and memory_inputs is not None:
        params, layer_cache = jax.tree.map(lambda x: x[0], stretch)
        middle, _ = attention_part(params, hidden, rope, attend, config, lora_scale, layer_cache, index)
        memory_inputs.append(rms_norm(middle, params["mlp_norm"], config.norm_eps))
      hidden, new_cache = jax.lax.scan(run_layer, hidden, stretch)
      if memory is not None and not is_inside:
        if memory_inputs is not None:
          memory_inputs.append(hidden)
        hidden = memory(hidden)
      caches.append(new_cache)
    return hidden, jax.tree.map(lambda *parts: jnp.concatenate(parts), *caches)
