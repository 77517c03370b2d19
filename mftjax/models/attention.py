"""Causal attention within packed segments, three ways: whole, in memory linear in the length, and fused."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mftjax.types import at_least_f32

# Finite, so that a padding row (nothing to attend to) is not NaN.
MASKED = -1e30

BLOCK = 128  # queries, and keys, whose scores `blockwise_attention` holds at once


def grouped_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
  """Softmax attention where each key/value head serves `num_heads / num_kv_heads` query heads.

  Args:
    q: `[batch, query_length, num_heads, head_dim]`.
    k, v: `[batch, key_length, num_kv_heads, head_dim]`.
    mask: `[batch, query_length, key_length]` bool, True where the query sees the key.

  Returns:
    `[batch, query_length, num_heads * head_dim]`.
  """
  batch, query_length, num_heads, head_dim = q.shape
  kv_heads, group = k.shape[2], num_heads // k.shape[2]
  # Heads beside the batch and the queries of a group as rows of one matrix: plain batched products, the fast ones.
  q = (q * head_dim**-0.5).reshape(batch, query_length, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
  rows = (batch, kv_heads, group * query_length)
  k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
  scores = jnp.einsum("bkqd,bksd->bkqs", q.reshape(*rows, head_dim), k, preferred_element_type=at_least_f32(k.dtype))
  scores = jnp.where(mask[:, None, None], scores.reshape(*rows[:2], group, query_length, -1), MASKED)
  # The softmax does not depend on the shift, so nor do its derivatives, of any order; divided after the product.
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))).reshape(*rows, -1)
  out = jnp.einsum("bkqs,bksd->bkqd", weights.astype(v.dtype), v, preferred_element_type=at_least_f32(v.dtype))
  out = (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
  out = out.reshape(batch, kv_heads, group, query_length, head_dim).transpose(0, 3, 1, 2, 4)
  return out.reshape(batch, query_length, num_heads * head_dim)


def full_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
  """`grouped_attention`, all scores kept; arguments and result as for `blockwise_attention`, but not 0 at padding."""
  index = jnp.arange(segment_ids.shape[1])
  return grouped_attention(q, k, v, _sees(segment_ids, segment_ids, index, index))


def blockwise_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, block: int = BLOCK
) -> jax.Array:
  """Attention in memory linear in the length, as are its gradient and the `jax.jvp` of its gradient.

  Blocks of queries go over the blocks of keys up to their own, and the softmax's maximum and sum are kept up to date
  on the way. For the derivatives the output and the logarithm of each query's sum are kept; the weights of a block are
  computed again from it. Its one rule is for tangents; JAX transposes it for the gradient, so that every mode and
  order of differentiation goes through blocks.

  Args:
    q: `[batch, length, num_heads, head_dim]`.
    k, v: `[batch, length, num_kv_heads, head_dim]`.
    segment_ids: `[batch, length]` int, 0 = padding; a query sees its own segment's keys up to its own place.
    block: queries, and keys, in a block, at most.

  Returns:
    `[batch, length, num_heads * head_dim]`, 0 at padding; statistics and sums over keys are f32 (f64 in f64).

  Source: Rabe and Staats, 2021, "Self-attention does not need O(n^2) memory", Algorithm 1; Dao et al., 2022,
  "FlashAttention", Appendix B, for the derivative from the output and the log-sum-exp.
  """
  batch, length, num_heads, head_dim = q.shape
  kv_heads = k.shape[2]
  num_blocks = -(-length // block)
  size = -(-length // num_blocks)  # blocks of one size, the least padding

  def split(x):  # [batch, length, ...] -> [num_blocks, batch, size, ...]
    x = jnp.pad(x, [(0, 0), (0, num_blocks * size - length), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(batch, num_blocks, size, *x.shape[2:]), 1, 0)

  q = split((q * head_dim**-0.5).reshape(batch, length, kv_heads, -1, head_dim)).transpose(0, 1, 3, 4, 2, 5)
  out, _ = _attend(q, split(k).swapaxes(2, 3), split(v).swapaxes(2, 3), split(segment_ids))
  return out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, num_heads * head_dim)[:, :length]


def fused_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
  """`jax.nn.dot_product_attention`; arguments and result as for `blockwise_attention`, but not 0 at padding.

  On a GPU, in bf16 or f16, it is cuDNN's kernel, for work that takes first-order derivatives alone (fine-tuning,
  evaluation): the kernel has no forward-over-reverse rule, so the meta-gradient's `jax.jvp(jax.grad(loss))` raises.
  Elsewhere it is XLA's, which keeps every score and takes any derivative.

  Raises:
    NotImplementedError, ValueError: cuDNN's own, for a head_dim that it does not know.
  """
  index = jnp.arange(segment_ids.shape[1])
  mask = _sees(segment_ids, segment_ids, index, index)[:, None]
  is_cudnn = jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16)
  out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn" if is_cudnn else "xla")
  return out.reshape(*q.shape[:2], -1)


# By the word in `DecoderConfig.attention`.
ATTENTION: dict[str, Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]] = {
  "full": full_attention,
  "blockwise": blockwise_attention,
  "fused": fused_attention,
}


def _sees(q_segments: jax.Array, k_segments: jax.Array, q_index: Any, k_index: Any) -> jax.Array:
  """`[batch, queries, keys]` bool: the key is of the query's segment, no padding, and in no later place of the row."""
  q_segments = q_segments[:, :, None]
  return (q_segments == k_segments[:, None]) & (q_segments > 0) & (q_index[:, None] >= k_index)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
  return jnp.einsum("bkgqd,bksd->bkgqs", q, k, preferred_element_type=at_least_f32(k.dtype))


def _weighted_sum(weights: jax.Array, v: jax.Array) -> jax.Array:
  return jnp.einsum("bkgqs,bksd->bkgqd", weights.astype(v.dtype), v, preferred_element_type=at_least_f32(v.dtype))


def _sweep(fold: Callable, start: Any, queries: Any, keys: Any, segments: jax.Array) -> Any:
  """For each block of queries, `fold(carry, query_block, key_block, mask)` over the blocks of keys up to its own.

  Args:
    fold: its mask is `[batch, 1, 1, size, size]` bool, True where the query sees the key.
    start: the first carry of each block of queries.
    queries, keys: pytrees with leading axis `[num_blocks, ...]`.
    segments: `[num_blocks, batch, size]` segment ids.

  Returns:
    The last carries, with leading axis `[num_blocks, ...]`.
  """
  num_blocks, _, size = segments.shape
  index = np.arange(num_blocks * size).reshape(num_blocks, size)

  # Both loops compute again for the derivative: neither the scores of a block nor a copy of its keys for each block of
  # queries is kept.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def over_keys(query):
    q_index, q_segments, query = query

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(carry, key):
      k_index, k_segments, key = key
      mask = _sees(q_segments, k_segments, q_index, k_index)[:, None, None]
      is_later = k_index[0] > q_index[0]  # none of its keys is seen
      return jax.lax.cond(is_later, lambda: carry, lambda: fold(carry, query, key, mask)), None

    return jax.lax.scan(body, start, (index, segments, keys))[0]

  return jax.lax.map(over_keys, (index, segments, queries))


@jax.custom_jvp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Attention over blocks, the softmax's maximum and sum kept up to date as the blocks of keys come.

  Args:
    q: `[num_blocks, batch, num_kv_heads, group, size, head_dim]`, scaled.
    k, v: `[num_blocks, batch, num_kv_heads, size, head_dim]`.
    segments: `[num_blocks, batch, size]` segment ids.

  Returns:
    The output, like `q`, and the logarithm of each query's sum of exp(scores), `[..., size, 1]` f32 or better.
  """

  def fold(carry, q, key, mask):
    top, total, out = carry
    scores = jnp.where(mask, _scores(q, key[0]), MASKED)
    new_top = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
    shrink = jnp.exp(top - new_top)
    weights = jnp.where(mask, jnp.exp(scores - new_top), 0)
    return new_top, shrink * total + weights.sum(axis=-1, keepdims=True), shrink * out + _weighted_sum(weights, key[1])

  out = jnp.zeros(q.shape[1:], at_least_f32(q.dtype))
  start = (jnp.full_like(out[..., :1], MASKED), jnp.zeros_like(out[..., :1]), out)
  top, total, out = _sweep(fold, start, q, (k, v), segments)
  total = jnp.where(total > 0, total, 1)  # padding sees nothing
  return (out / total).astype(v.dtype), top + jnp.log(total)


@_attend.defjvp
def _attend_jvp(primals, tangents):
  """`d_log_sum = sum(w d_scores)`, `d_out = sum(w d_v) + sum(w d_scores v) - out d_log_sum`, w = exp(scores - log_sum).

  Linear in the tangents, block by block; transposed it is FlashAttention's backward pass.
  """
  q, k, v, segments = primals
  # Wide, because the gradients of q, k and v are summed over blocks in the dtype that their tangents have here.
  d_q, d_k, d_v = (x.astype(at_least_f32(x.dtype)) for x in tangents[:3])
  out, log_sum = _attend(q, k, v, segments)

  def fold(carry, query, key, mask):
    (q, log_sum, d_q), (k, v, d_k, d_v) = query, key
    d_q, d_k, d_v = (x.astype(q.dtype) for x in (d_q, d_k, d_v))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, _scores(q, k), MASKED) - log_sum), 0)
    moved = weights * (_scores(d_q, k) + _scores(q, d_k))
    return carry[0] + moved.sum(axis=-1, keepdims=True), carry[1] + _weighted_sum(moved, v) + _weighted_sum(
      weights, d_v
    )

  start = (jnp.zeros_like(log_sum[0]), jnp.zeros(q.shape[1:], at_least_f32(q.dtype)))
  d_log_sum, d_out = _sweep(fold, start, (q, log_sum, d_q), (k, v, d_k, d_v), segments)
  return (out, log_sum), ((d_out - out * d_log_sum).astype(out.dtype), d_log_sum)
