"""The task-agnostic key-value memory: slots that any layer may read, learned through the meta-gradient."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from mftjax.errors import InputError
from mftjax.types import at_least_f32

NORM_EPS = 1e-6


class MemoryParam(nnx.Param):
  """A parameter of the memory: a meta-parameter, which the inner steps leave alone."""


class Memory(nnx.Module):
  """`hidden + sum over heads of softmax(q_h keys_h / sqrt(key_dim)) values`, with q = rms_norm(hidden) W.

  The values start at zero, so a new memory is exactly the identity; keys and queries get a gradient once the
  values have moved.

  Args:
    num_slots: slots in all, at least 1; with `product_keys` a square number.
    dim: width of the hidden states.
    key_dim: width of a key; even with `product_keys`.
    num_heads: reads for each token, each with its own queries and keys; the values are shared.
    top_k: the softmax goes over the k best slots only (all that tie with the k-th too); None = all.
    product_keys: a slot's key is a pair of half keys out of two lists of sqrt(num_slots), so a read costs
      sqrt(num_slots) and not num_slots; needs `top_k`.
    rngs: its `params` stream draws keys and queries.

  Raises:
    InputError: sizes out of range.

  Source: Large Memory Layers with Product Keys (Lample et al., 2019), Section 3.
  """

  def __init__(
    self,
    num_slots: int,
    dim: int,
    key_dim: int,
    num_heads: int,
    top_k: int | None = None,
    product_keys: bool = False,
    *,
    rngs: nnx.Rngs,
  ):
    for name, value in {"num_slots": num_slots, "dim": dim, "key_dim": key_dim, "num_heads": num_heads}.items():
      if value < 1:
        raise InputError(f"Memory {name} = {value} must be at least 1.")
    if top_k is not None and not 1 <= top_k <= num_slots:
      raise InputError(f"Memory top_k = {top_k} must lie in 1 .. num_slots = {num_slots}.")
    self.num_slots, self.dim, self.key_dim, self.num_heads = num_slots, dim, key_dim, num_heads
    self.top_k, self.product_keys = top_k, product_keys
    key_shape: tuple[int, ...] = (num_heads, num_slots, key_dim)
    if product_keys:
      side = math.isqrt(num_slots)
      if side**2 != num_slots or key_dim % 2 or top_k is None:
        raise InputError(
          "Memory with product_keys needs a square num_slots, an even key_dim and a top_k; "
          f"given num_slots = {num_slots}, key_dim = {key_dim}, top_k = {top_k}."
        )
      key_shape = (2, num_heads, side, key_dim // 2)
    query = jax.random.normal(rngs.params(), (dim, num_heads, key_dim)) * dim**-0.5
    self.query = MemoryParam(query)
    self.keys = MemoryParam(jax.random.normal(rngs.params(), key_shape))
    self.values = MemoryParam(jnp.zeros((num_slots, dim)))

  def __call__(self, hidden: jax.Array) -> jax.Array:
    """`[..., dim]` hidden states with what the memory holds for them added; scores are computed in f32 or better."""
    wide = hidden.astype(at_least_f32(hidden.dtype))
    normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + NORM_EPS)
    query = jnp.einsum("...d,dhk->...hk", normed, self.query[...]) * self.key_dim**-0.5
    read = self._read_product(query, self.top_k) if self.product_keys and self.top_k else self._read_dense(query)
    return hidden + read.astype(hidden.dtype)

  def _read_dense(self, query: jax.Array) -> jax.Array:
    """`[..., dim]` read for `[..., num_heads, key_dim]` queries, with a score for every slot."""
    scores = jnp.einsum("...hk,hsk->...hs", query, self.keys[...])
    if self.top_k is not None:
      threshold = jax.lax.top_k(scores, self.top_k)[0][..., -1:]
      scores = jnp.where(scores >= threshold, scores, -jnp.inf)
    return jnp.einsum("...hs,sd->...d", jax.nn.softmax(scores, axis=-1), self.values[...])

  def _read_product(self, query: jax.Array, top_k: int) -> jax.Array:
    """The same for product keys: the k best of a sum are among the k best of each half."""
    side = self.keys.shape[2]
    num_best = min(top_k, side)
    first, second = jnp.split(query, 2, axis=-1)
    first_scores, first_index = jax.lax.top_k(jnp.einsum("...hk,hsk->...hs", first, self.keys[0]), num_best)
    second_scores, second_index = jax.lax.top_k(jnp.einsum("...hk,hsk->...hs", second, self.keys[1]), num_best)
    pairs = (*query.shape[:-1], num_best**2)
    scores = (first_scores[..., :, None] + second_scores[..., None, :]).reshape(pairs)
    slots = (first_index[..., :, None] * side + second_index[..., None, :]).reshape(pairs)
    best_scores, best = jax.lax.top_k(scores, top_k)
    best_slots = jnp.take_along_axis(slots, best, axis=-1)
    return jnp.einsum("...hs,...hsd->...d", jax.nn.softmax(best_scores, axis=-1), self.values[...][best_slots])
