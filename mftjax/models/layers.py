"""The layers of a decoder of Llama's or Qwen2's shape: their parameters, stacked, and what one of them computes."""

import dataclasses
import functools
from collections.abc import Callable
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

  @property
  def context_dim(self) -> int:
    """Width of the context that a layer can give its memory."""
    return self.num_kv_heads * self.head_dim


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


def project(params: dict[str, jax.Array], name: str, x: jax.Array, lora_scale: jax.Array | float) -> jax.Array:
  """`x W + bias + lora_scale (x A) B`, each term where the layer has it.

  Args:
    x: `[..., in]`.
    lora_scale: scalar, or `[..., rank]` of each token and each column of A.
  """
  leading, x = x.shape[:-1], x.reshape(-1, x.shape[-1])  # the gradient of a product over one axis is the faster one
  out = product(x, params[name].astype(x.dtype))
  if f"{name}_bias" in params:
    out += params[f"{name}_bias"].astype(x.dtype)
  if f"{name}_lora_a" in params:
    low = x @ params[f"{name}_lora_a"].astype(x.dtype)
    if isinstance(lora_scale, jax.Array) and lora_scale.ndim:
      low *= lora_scale.reshape(-1, low.shape[-1]).astype(x.dtype)
      out += low @ params[f"{name}_lora_b"].astype(x.dtype)
    else:
      out += lora_scale * (low @ params[f"{name}_lora_b"].astype(x.dtype))
  return out.reshape(*leading, -1)


def layer(
  params: dict[str, jax.Array],
  hidden: jax.Array,
  rope: tuple[jax.Array, jax.Array],
  attend: Attend,
  config: DecoderConfig,
  lora_scale: jax.Array | float,
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
  states, cache = attention_part(params, hidden, rope, attend, config, lora_scale, cache, index, memory)
  return mlp_part(params, states, config, lora_scale, memory, placement), cache


def attention_part(
  params: dict[str, jax.Array],
  hidden: jax.Array,
  rope: tuple[jax.Array, jax.Array],
  attend: Attend,
  config: DecoderConfig,
  lora_scale: jax.Array | float,
  cache: Cache | None = None,
  index: jax.Array | int = 0,
  memory: Memory | None = None,
) -> tuple[jax.Array, Cache | None]:
  """The first half of `layer`: hidden states with the attention's output added, and the new cache.

  Args:
    memory: what the states are for. With a `context_dim` each state has its context behind it, `[..., hidden_size +
      num_kv_heads head_dim]`: the mean of the layer's values over all that the token sees, attention without queries.
  """
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
  states = hidden + proj("o_proj", attend(q, k, v))
  if memory is not None and memory.context_dim:
    mean = attend(jnp.zeros_like(q[:, :, : v.shape[2]]), k, v)
    states = jnp.concatenate([states, mean.reshape(*states.shape[:2], -1)], axis=-1)
  return states, cache


def mlp_part(
  params: dict[str, jax.Array],
  states: jax.Array,
  config: DecoderConfig,
  lora_scale: jax.Array | float,
  memory: Memory | None = None,
  placement: str = "beside",
) -> jax.Array:
  """The second half of `layer`, in which no token sees another: `[..., hidden_size]` new hidden states.

  Args:
    states: of `attention_part`; with the contexts behind them if the memory has a `context_dim`.
  """
  proj = functools.partial(project, params, lora_scale=lora_scale)
  hidden = states[..., : config.hidden_size]
  inputs = mlp_inputs(params, states, config)
  if memory is not None and placement == "instead":
    return hidden + memory.read(inputs)
  normed = inputs[..., : config.hidden_size]
  gated = jax.nn.silu(proj("gate_proj", normed)) * proj("up_proj", normed)
  out = proj("down_proj", gated)
  return hidden + (out if memory is None else out + memory.read(inputs))


def mlp_inputs(params: dict[str, jax.Array], states: jax.Array, config: DecoderConfig) -> jax.Array:
  """The states of `attention_part`, normed for the MLP; what is a context behind them stays as it is."""
  hidden, context = jnp.split(states, [config.hidden_size], axis=-1)
  return jnp.concatenate([rms_norm(hidden, params["mlp_norm"], config.norm_eps), context], axis=-1)
