"""The task-agnostic key-value memory: slots that any layer may read, learned through the meta-gradient."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mftjax.errors import InputError
from mftjax.types import at_least_f32

NORM_EPS = 1e-6
READS_AT_ONCE = 4  # rows that a step of `weighted_rows` adds up


class MemoryParam(nnx.Param):
  """A parameter of the memory: a meta-parameter, which the inner steps leave alone."""


class MemoryWrite(nnx.Param):
  """What a task adds to the values of the slots that are open to it: `[num_rows, dim]` f32."""


class WrittenSlots(nnx.Variable):
  """The slots that are open to writes: `[num_rows]` int32, ascending, none twice."""


class InputStatistics(nnx.Variable):
  """Mean `[dim + context_dim]` and root of the inverse covariance, square, of what a whitened memory is read with."""


class Memory(nnx.Module):
  """`hidden + sum over heads of gate_h softmax(q_h keys_h / (sqrt(key_dim) temperature_h)) values`.

  Here q = x W + b, with b = 0 when new, and gate = 2 sigmoid(x G), or 1 when not `gated`; x is rms_norm(hidden), and,
  with a `context_dim`, rms_norm(context) behind it: what came before a token tells its task better than it does. It may
  be whitened (`slots.whiten`).
  The values start at zero, so a new memory is exactly the identity; all else gets a gradient once they have moved.

  Args:
    num_slots: slots in all, at least 1; with `product_keys` a square number.
    dim: width of the hidden states, and of each value: nothing is split over the heads.
    key_dim: width of a key; even with `product_keys`.
    num_heads: reads for each token, each with its own queries and keys; the values are shared.
    top_k: the softmax goes over the k best slots only, of those that tie the first; None = all.
    product_keys: a slot's key is a pair of half keys out of two lists of sqrt(num_slots), so a read costs
      sqrt(num_slots) and not num_slots; needs `top_k`.
    gated: whether each head has a gate that the token sets, between 0 and 2, at 1 when new.
    temperature: where the learnable temperature of each head starts; above 0.
    qk_norm: whether queries and keys are scaled to root mean square 1, so that scores are sqrt(key_dim) times a cosine.
    null_cosine: with a value above 0 what a head reads is multiplied by sigmoid((s - n) / t) for the score s of its
      best slot: a query that no key is near reads nothing. The score n is that of this cosine when new, and t is
      `temperature`; each head learns its own two.
    context_dim: width of the context that a read is given behind the hidden state; 0 = none.
    num_shared: the last so many slots are no task's own: only the outer loop writes them. Their scores get a number
      that is 0 when new, one for each head, by which it learns how much nearer the key of a task has to be; not with
      product keys.
    has_values: without, the memory is only addressed, as `Adapters` do: it has no `values`, and nothing to `read`.
    rngs: its `params` stream draws keys and queries.

  Raises:
    InputError: sizes out of range.

  Source: Large Memory Layers with Product Keys (Lample et al., 2019), Section 3; a gate that the token sets: Memory
  Layers at Scale (Berges et al., 2024), Section 3, there one for each feature.
  """

  def __init__(
    self,
    num_slots: int,
    dim: int,
    key_dim: int,
    num_heads: int,
    top_k: int | None = None,
    product_keys: bool = False,
    gated: bool = False,
    temperature: float = 1.0,
    qk_norm: bool = False,
    null_cosine: float = 0.0,
    context_dim: int = 0,
    num_shared: int = 0,
    has_values: bool = True,
    *,
    rngs: nnx.Rngs,
  ):
    for name, value in {"num_slots": num_slots, "dim": dim, "key_dim": key_dim, "num_heads": num_heads}.items():
      if value < 1:
        raise InputError(f"Memory {name} = {value} must be at least 1.")
    if top_k is not None and not 1 <= top_k <= num_slots:
      raise InputError(f"Memory top_k = {top_k} must lie in 1 .. num_slots = {num_slots}.")
    if not 0 <= num_shared <= num_slots:
      raise InputError(f"Memory num_shared = {num_shared} must lie in 0 .. num_slots = {num_slots}.")
    if context_dim < 0:
      raise InputError(f"Memory context_dim = {context_dim} must be at least 0.")
    if not 0 < temperature < math.inf:
      raise InputError(f"Memory temperature = {temperature} must be above 0 and finite.")
    if not 0 <= null_cosine < 1 or (null_cosine and not qk_norm):
      raise InputError(f"Memory null_cosine = {null_cosine} must lie in 0 .. 1, and needs qk_norm above 0.")
    if qk_norm and product_keys:
      raise InputError("Memory qk_norm needs whole keys: not with product_keys.")
    self.num_slots, self.dim, self.key_dim, self.num_heads = num_slots, dim, key_dim, num_heads
    self.top_k, self.product_keys, self.gated, self.qk_norm = top_k, product_keys, gated, qk_norm
    self.null_cosine, self.context_dim = null_cosine, context_dim
    self.num_shared, self.has_values = num_shared, has_values
    input_dim = dim + context_dim
    key_shape: tuple[int, ...] = (num_heads, num_slots, key_dim)
    if product_keys:
      side = math.isqrt(num_slots)
      if side**2 != num_slots or key_dim % 2 or top_k is None:
        raise InputError(
          "Memory with product_keys needs a square num_slots, an even key_dim and a top_k; "
          f"given num_slots = {num_slots}, key_dim = {key_dim}, top_k = {top_k}."
        )
      key_shape = (2, num_heads, side, key_dim // 2)
    query = jax.random.normal(rngs.params(), (input_dim, num_heads, key_dim)) * input_dim**-0.5
    self.query = MemoryParam(query)
    self.query_bias = MemoryParam(jnp.zeros((num_heads, key_dim)))
    self.keys = MemoryParam(jax.random.normal(rngs.params(), key_shape))
    if has_values:
      self.values = MemoryParam(jnp.zeros((num_slots, dim)))
    self.log_temperature = MemoryParam(jnp.full(num_heads, math.log(temperature), jnp.float32))
    if null_cosine:
      self.null_score = MemoryParam(jnp.full(num_heads, null_cosine * key_dim**0.5, jnp.float32))
      self.log_null_temperature = MemoryParam(jnp.full(num_heads, math.log(temperature), jnp.float32))
    if num_shared and not product_keys:
      self.shared_score = MemoryParam(jnp.zeros(num_heads))
    if gated:
      self.gate = MemoryParam(jnp.zeros((input_dim, num_heads)))
    self.delta: MemoryWrite | None = nnx.data(None)
    self.written: WrittenSlots | None = nnx.data(None)
    self.input_mean: InputStatistics | None = nnx.data(None)  # see `slots.whiten`
    self.input_root: InputStatistics | None = nnx.data(None)

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """`[..., dim]` hidden states with what the memory holds for them added; scores are computed in f32 or better."""
    return inputs[..., : self.dim] + self.read(inputs)

  def read(self, inputs: jax.Array) -> jax.Array:
    """`[..., dim]` what the memory holds for its inputs: the sum over heads and slots.

    Args:
      inputs: `[..., dim + context_dim]` hidden states, each with its context behind it; so below.
    """
    slots, weights = self._lookup(inputs)
    rows = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)  # [tokens, heads * k]
    read = self._read_all(jnp.sum(weights, axis=0)) if slots is None else self._read_rows(rows(weights), rows(slots))
    return read.astype(inputs.dtype).reshape(*inputs.shape[:-1], self.dim)

  def lookup(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The slots that each token reads, and how much of each.

    Args:
      inputs: as of `read`.

    Returns:
      slots `[..., num_heads, k]` int32, best first, and their weights `[..., num_heads, k]` f32 (f64 in f64), gate
      included; k is `top_k`. Without `top_k` it is every slot in its own order. The read is the sum of weights *
      values[slots].
    """
    slots, weights = self._lookup(inputs)
    if slots is None:
      slots = jnp.broadcast_to(jnp.arange(self.num_slots, dtype=jnp.int32), weights.shape)
    shaped = lambda x: jnp.moveaxis(x, 0, 1).reshape(*inputs.shape[:-1], self.num_heads, -1)
    return shaped(slots), shaped(weights)

  def queries(self, inputs: jax.Array) -> jax.Array:
    """`[num_heads, tokens, key_dim]` queries of the inputs, before they are scaled."""
    return jnp.einsum("nd,dhk->hnk", self.normed(inputs), self.query[...]) + self.query_bias[...][:, None]

  def usage(self, inputs: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """How often each slot is read.

    Args:
      inputs: as of `read`.
      mask: `[...]` tokens that count; all when left out.

    Returns:
      `[num_slots]` f32 number of reads, over tokens and heads. Without `top_k` each read is of every slot.
    """
    slots, _ = self._lookup(inputs)
    tokens = jnp.ones(inputs.shape[:-1]) if mask is None else jnp.asarray(mask)
    tokens = tokens.reshape(-1).astype(jnp.float32)
    if slots is None:
      return jnp.full(self.num_slots, self.num_heads * jnp.sum(tokens))
    return jnp.zeros(self.num_slots).at[slots].add(tokens[None, :, None])

  def block_weights(self, inputs: jax.Array, size: int, num_blocks: int) -> jax.Array:
    """`[..., num_blocks]` part of what each token reads that falls on the first so many blocks of `size` slots.

    The mean over the heads, f32 (f64 in f64).
    """
    slots, weights = self._lookup(inputs)
    if slots is None:
      blocks = weights[..., : size * num_blocks].reshape(*weights.shape[:2], num_blocks, size).sum(axis=(0, 3))
    else:
      token = jnp.arange(weights.shape[1])[None, :, None]
      blocks = jnp.zeros((weights.shape[1], num_blocks), weights.dtype)
      blocks = blocks.at[token, slots // size].add(weights, mode="drop")  # slots behind the last block are in none
    return (blocks / self.num_heads).reshape(*inputs.shape[:-1], num_blocks)

  def num_blocks(self, size: int) -> int:
    """Whole blocks of `size` slots that there are before those that are no task's own."""
    return (self.num_slots - self.num_shared) // size

  def open(self, num_rows: int) -> None:
    """Makes the first slots writable: from now on a read of slot `written[i]` gives `values + delta[i]`.

    `delta` `[num_rows, dim]` starts at zero and is all that a task trains. Other slots are opened by assigning
    `written[...]` (see `slots.most_specific`). What an earlier opening wrote is folded into the values.

    Raises:
      InputError: `num_rows` is not in 1 .. num_slots.
    """
    if not 1 <= num_rows <= self.num_slots:
      raise InputError(f"Memory num_rows = {num_rows} must lie in 1 .. num_slots = {self.num_slots}.")
    self.fold()
    if self.has_values:
      self.delta = MemoryWrite(jnp.zeros((num_rows, self.dim)))
    self.written = WrittenSlots(jnp.arange(num_rows, dtype=jnp.int32))

  def fold(self) -> None:
    """Adds what was written to the values, and starts the next write at zero; nothing when no slot is open."""
    if self.delta is not None and self.written is not None:
      self.values[...], self.delta[...] = fold(self.values[...], self.written[...], self.delta[...])

  def normed(self, inputs: jax.Array) -> jax.Array:
    """`[tokens, dim + context_dim]` what queries and gates see of inputs, in f32 or better.

    State and context each have a root mean square of 1; then they are whitened, if `slots.whiten` has said how.
    """
    flat = inputs.astype(at_least_f32(inputs.dtype)).reshape(-1, self.dim + self.context_dim)
    parts = [flat[:, : self.dim], flat[:, self.dim :]] if self.context_dim else [flat]
    normed = jnp.concatenate([rms_normed(part) for part in parts], axis=-1)
    if self.input_mean is None or self.input_root is None:
      return normed
    return (normed - self.input_mean[...]) @ self.input_root[...]

  def _lookup(self, inputs: jax.Array) -> tuple[jax.Array | None, jax.Array]:
    """Slots (None = all of them) and weights, each `[num_heads, tokens, k]`: heads first is what products like."""
    query = self.queries(inputs)
    query = (rms_normed(query) if self.qk_norm else query) * self.key_dim**-0.5
    slots = None
    of_head = lambda x: x[...][:, None, None]
    if self.product_keys and self.top_k:
      scores, slots = self._best_pairs(query, self.top_k)
    else:
      keys = rms_normed(self.keys[...]) if self.qk_norm else self.keys[...]
      scores = jnp.einsum("hnk,hsk->hns", query, keys)
      if self.num_shared:
        is_shared = jnp.arange(self.num_slots) >= self.num_slots - self.num_shared
        scores += jnp.where(is_shared, of_head(self.shared_score), 0.0)
      if self.top_k is not None:
        scores, slots = jax.lax.top_k(scores, self.top_k)
    weights = jax.nn.softmax(scores * jnp.exp(-of_head(self.log_temperature)), axis=-1)
    if self.null_cosine:
      above = jnp.max(scores, axis=-1, keepdims=True) - of_head(self.null_score)
      weights *= jax.nn.sigmoid(above * jnp.exp(-of_head(self.log_null_temperature)))
    if self.gated:
      weights *= 2 * jax.nn.sigmoid(self.normed(inputs) @ self.gate[...]).T[:, :, None]
    return slots, weights

  def _best_pairs(self, query: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """Scores and slots `[num_heads, tokens, top_k]` of the best sums of two half keys' scores."""
    side = self.keys.shape[2]
    num_best = min(top_k, side)
    halves = zip(jnp.split(query, 2, axis=-1), self.keys[...], strict=True)
    best = [jax.lax.top_k(jnp.einsum("hnk,hsk->hns", half, keys), num_best) for half, keys in halves]
    (first_scores, first), (second_scores, second) = best
    # The pair of the i-th and the j-th best is no better than the (i + 1)(j + 1) - 1 pairs of those before them.
    rank = np.arange(1, num_best + 1)
    i, j = np.nonzero(np.outer(rank, rank) <= top_k)
    scores, place = jax.lax.top_k(first_scores[..., i] + second_scores[..., j], top_k)
    return scores, jnp.take_along_axis(first[..., i] * side + second[..., j], place, axis=-1)

  def _read_all(self, weights: jax.Array) -> jax.Array:
    """`[tokens, dim]` read with a weight for each slot, `[tokens, num_slots]`."""
    read = weights @ self.values[...]
    if self.delta is None or self.written is None:
      return read
    is_all = len(self.delta) == self.num_slots
    return read + (weights if is_all else weights[:, self.written[...]]) @ self.delta[...]

  def _read_rows(self, weights: jax.Array, slots: jax.Array) -> jax.Array:
    """`[tokens, dim]` read of the slots `[tokens, reads]` with their weights."""
    read = weighted_rows(self.values[...], weights, slots)
    if self.delta is None or self.written is None:
      return read
    if len(self.delta) == self.num_slots:  # then slot and row are the same
      return read + weighted_rows(self.delta[...], weights, slots)
    written = self.written[...]
    rows = jnp.minimum(jnp.searchsorted(written, slots), len(written) - 1)
    return read + weighted_rows(self.delta[...], jnp.where(written[rows] == slots, weights, 0.0), rows)


def rms_normed(x: jax.Array) -> jax.Array:
  """`[..., n]` scaled to a root mean square of 1 over the last axis; zeros stay zeros."""
  return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + NORM_EPS)


def fold(values: jax.Array, written: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The values `[num_slots, dim]` with `delta` `[num_rows, dim]` added at the slots `written`, and the next delta, 0.

  Pure, for states that are carried; `Memory.fold` does it in place.
  """
  return values.at[written].add(delta), jnp.zeros_like(delta)


@jax.custom_jvp
def weighted_rows(table: jax.Array, weights: jax.Array, rows: jax.Array) -> jax.Array:
  """`sum over r of weights[:, r] table[rows[:, r]]`, `[tokens, dim]`, from a table too large to be gone through.

  In a loop over a few reads at a time: all rows at once, `[tokens, reads, dim]`, take 15 times as long on a CPU.

  Args:
    table: `[num_rows, dim]`.
    weights: `[tokens, reads]`.
    rows: `[tokens, reads]` int, within the table.
  """
  padding = ((0, 0), (0, -weights.shape[1] % READS_AT_ONCE))
  groups = [jnp.pad(x, padding).T.reshape(-1, READS_AT_ONCE, len(x)) for x in (weights, rows)]

  @functools.partial(jax.checkpoint, prevent_cse=False)  # else the gradient keeps every row that was read
  def add_group(total, group):
    for weight, row in zip(*group, strict=True):
      total += weight[:, None] * table.at[row].get(mode="promise_in_bounds")
    return total, None

  dtype = jnp.result_type(table, weights)
  return jax.lax.scan(add_group, jnp.zeros((len(weights), table.shape[1]), dtype), groups)[0]


@functools.partial(weighted_rows.defjvp, symbolic_zeros=True)
def _weighted_rows_jvp(primals, tangents):
  table, weights, rows = primals
  table_dot, weights_dot, _ = tangents
  out = weighted_rows(table, weights, rows)
  out_dot = jnp.zeros_like(out)
  if not isinstance(weights_dot, jax.custom_derivatives.SymbolicZero):
    out_dot += weighted_rows(table, weights_dot, rows)
  if not isinstance(table_dot, jax.custom_derivatives.SymbolicZero):
    # The loop's transpose would add a whole table for each of its steps; this one's is a single scatter.
    out_dot += jnp.einsum("nr,nrd->nd", weights, table_dot.at[rows].get(mode="promise_in_bounds"))
  return out, out_dot
