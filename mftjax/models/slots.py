"""The slots of a memory: which are read and which to write, reviving dead ones, storing them."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mftjax.errors import InputError, unknown_name
from mftjax.models.memory import InputStatistics, Memory, rms_normed

STATISTICS = {"input_mean", "input_root"}  # that only a whitened memory has


def tf_idf(counts: jax.Array, background: jax.Array) -> jax.Array:
  """How much each slot belongs to a task: high for slots that it reads often and that other data seldom read.

  Args:
    counts: `[num_slots]` reads on the task's data (`Memory.usage`).
    background: `[num_background, num_slots]` the same for each batch of other data; no batch at all ranks every
      slot the same, by log 1 = 0.

  Returns:
    `[num_slots]` f32: counts / sum(counts) * log((B + 1) / (batches of the background that read the slot + 1)), with
    B = num_background.

  Source: Continual Learning via Sparse Memory Finetuning (Lin et al., 2025), Section 3.
  """
  num_reading = jnp.sum(background > 0, axis=0)
  frequency = counts / jnp.maximum(jnp.sum(counts), 1.0)
  return frequency * jnp.log((len(background) + 1) / (num_reading + 1))


def most_specific(scores: jax.Array, num_rows: int) -> jax.Array:
  """The `num_rows` slots of the highest scores, `[num_rows]` int32 ascending: what `Memory.written` takes.

  Raises:
    InputError: `num_rows` is not in 1 .. num_slots.
  """
  if not 1 <= num_rows <= len(scores):
    raise InputError(f"num_rows = {num_rows} must lie in 1 .. num_slots = {len(scores)}.")
  return jnp.sort(jax.lax.top_k(scores, num_rows)[1]).astype(jnp.int32)


def num_open(memory: Memory) -> int:
  """Slots that the memory is open to.

  Raises:
    InputError: none.
  """
  if memory.written is None:
    raise InputError("The memory is open to no slot: call its `open(num_rows)` first.")
  return len(memory.written)


def open_at(memory: Memory, rows: jax.Array) -> None:
  """Opens a memory, in place, to these slots, `[num_open(memory)]` int32 ascending; `delta` must be zero."""
  if memory.written is not None:
    memory.written[...] = rows


def open_most_specific(memory: Memory, counts: jax.Array, background: jax.Array) -> None:
  """Opens a memory to as many slots as before, now those of the highest `tf_idf`, in place; `delta` must be zero.

  Args:
    memory: that is open to some slots (`Memory.open`), and folded.
    counts, background: as of `tf_idf`.

  Raises:
    InputError: the memory is open to none.
  """
  open_at(memory, most_specific(tf_idf(counts, background), num_open(memory)))


def place(memory: Memory, rows: jax.Array, hidden: jax.Array, mask: jax.Array) -> None:
  """Moves the keys of some slots, in place, to queries of the given states that lie far from one another.

  The first is any, each next one that whose nearest chosen query is the farthest away. States that are equal are chosen
  once only while there are others.

  Args:
    memory: without product keys.
    rows: `[n]` int32 slots.
    hidden: `[..., dim]` states that were seen.
    mask: `[...]` states that may be chosen; one at least.

  Raises:
    InputError: a memory with product keys, whose keys come in pairs.

  Source: the greedy k-centre algorithm (Gonzalez, 1985).
  """
  if memory.product_keys:
    raise InputError("Slots with product keys cannot be placed one by one: take a memory without product_keys.")
  queries = jnp.moveaxis(memory.queries(hidden), 0, 1)  # [tokens, num_heads, key_dim]
  flat = jax.lax.stop_gradient(rms_normed(queries) if memory.qk_norm else queries).reshape(len(queries), -1)
  squared = jnp.sum(flat**2, axis=-1)
  is_there = mask.reshape(-1) > 0

  def choose(distance, _):
    index = jnp.argmax(jnp.where(is_there, distance, -jnp.inf))
    return jnp.minimum(distance, squared + squared[index] - 2 * (flat @ flat[index])), index

  _, chosen = jax.lax.scan(choose, jnp.full(len(flat), jnp.inf), length=len(rows))
  memory.keys[...] = memory.keys[...].at[:, rows].set(jnp.moveaxis(queries[chosen], 0, 1))


def whiten(memory: Memory, hidden: jax.Array, mask: jax.Array | None = None) -> None:
  """Has a memory see its inputs, from now on, with mean 0 and uncorrelated entries of variance 1 over the given states.

  States of a model have a large common part, and a few directions that vary much more than the others; without this,
  most of them read the same slots. Queries get columns of unit length, and no bias. The statistics are no
  parameters: an outer loop moves the queries from where all directions count alike.

  Args:
    memory: changed in place.
    hidden: `[..., dim]` states that were seen, more than dim of them.
    mask: `[...]` states that count; all when left out.

  Source: the batch norm on queries of Lample et al. (2019), Section 3 and Table 2, with the statistics fixed, and of
  all directions together.
  """
  memory.input_mean = memory.input_root = nnx.data(None)
  states = memory.normed(hidden)
  weights = jnp.ones(len(states)) if mask is None else jnp.asarray(mask).reshape(-1).astype(states.dtype)
  weights = weights / jnp.sum(weights)
  mean = weights @ states
  values, vectors = jnp.linalg.eigh((states - mean).T @ ((states - mean) * weights[:, None]))
  kept = values > 1e-6 * jnp.max(values)  # a direction without variance tells nothing
  memory.input_mean = InputStatistics(mean)
  memory.input_root = InputStatistics((vectors * jnp.where(kept, values, 1.0) ** -0.5 * kept) @ vectors.T)
  memory.query[...] /= jnp.linalg.norm(memory.query[...], axis=0)
  memory.query_bias[...] = jnp.zeros_like(memory.query_bias[...])


def revive(memory: Memory, counts: jax.Array, hidden: jax.Array, *, rngs: nnx.Rngs) -> None:
  """Gives slots that are never read keys at which they are: the queries of hidden states that were seen, in place.

  A dead slot is one with count 0; with product keys, a half key none of whose slots was read. Each gets the direction
  of a random state's query, at the length of the longest living key of its head, so that this state scores it at
  least as high as any living one. Its value had no meaning and becomes zero: it adds nothing until it has learned.

  Args:
    memory: changed in place.
    counts: `[num_slots]` reads (`Memory.usage`).
    hidden: `[..., dim]` states that were seen, at least one; no state is drawn twice while there are enough.
    rngs: its `params` stream draws the states.

  Raises:
    InputError: counts of another size than num_slots.

  Source: random restarts of a codebook, Jukebox (Dhariwal et al., 2020), Section 3.1; there a usage below a threshold.
  """
  if counts.shape != (memory.num_slots,):
    raise InputError(f"counts {counts.shape} must be one for each slot: ({memory.num_slots},).")
  queries = memory.queries(hidden)
  if not memory.product_keys:
    dead = counts == 0
    memory.keys[...] = _revived_keys(memory.keys[...], dead, queries, rngs)
  else:
    side = math.isqrt(memory.num_slots)
    table = counts.reshape(side, side)
    dead_halves = [jnp.sum(table, axis=axis) == 0 for axis in (1, 0)]
    parts = zip(memory.keys[...], dead_halves, jnp.split(queries, 2, axis=-1), strict=True)
    memory.keys[...] = jnp.stack([_revived_keys(*part, rngs) for part in parts])
    dead = (dead_halves[0][:, None] | dead_halves[1][None, :]).reshape(-1)
  memory.values[...] = jnp.where(dead[:, None], 0.0, memory.values[...])
  if memory.delta is not None and memory.written is not None:
    memory.delta[...] = jnp.where(dead[memory.written[...]][:, None], 0.0, memory.delta[...])


def _revived_keys(keys: jax.Array, dead: jax.Array, queries: jax.Array, rngs: nnx.Rngs) -> jax.Array:
  """Keys `[num_heads, n, width]` whose `dead` `[n]` ones are at random queries out of `[num_heads, tokens, width]`."""
  order = jax.random.permutation(rngs.params(), queries.shape[1])
  drawn = queries[:, order[(jnp.cumsum(dead) - 1) % len(order)]]
  norm = lambda x: jnp.linalg.norm(x, axis=-1, keepdims=True)
  longest = jnp.max(jnp.where(dead[None, :, None], 0.0, norm(keys)), axis=1, keepdims=True)
  longest = jnp.where(jnp.all(dead), math.sqrt(keys.shape[-1]), longest)  # that of a new key
  return jnp.where(dead[None, :, None], drawn / jnp.maximum(norm(drawn), 1e-30) * longest, keys)


def state(memory: Memory) -> dict[str, np.ndarray]:
  """Name -> array of each parameter of the memory, written slots included: what `load` takes."""
  return {name: np.asarray(variable[...]) for name, variable in _variables(memory).items()}


def load(memory: Memory, arrays: Mapping[str, Any]) -> None:
  """Puts the arrays that `state` gave into a memory of the same shape, in place.

  Raises:
    InputError: a parameter that is missing or that the memory does not have, or one of another shape; nothing has
      changed then.
  """
  variables, width = _variables(memory), memory.dim + memory.context_dim
  if arrays.keys() >= STATISTICS:
    variables["input_mean"] = InputStatistics(jnp.zeros(width))
    variables["input_root"] = InputStatistics(jnp.zeros((width, width)))
  for name in arrays:
    if name not in variables:
      raise unknown_name("parameter of the memory", name, variables)
  for name, variable in variables.items():
    if name not in arrays:
      raise InputError(f"The memory's parameter {name} {variable.shape} is missing; given: {', '.join(arrays)}.")
    if np.shape(arrays[name]) != variable.shape:
      raise InputError(f"The memory's parameter {name} is {variable.shape}, but the one to load {arrays[name].shape}.")
  for name, variable in variables.items():
    variable[...] = jnp.asarray(arrays[name], variable.dtype)
    setattr(memory, name, variable)


def _variables(memory: Memory) -> dict[str, nnx.Variable]:
  return {name: value for name, value in vars(memory).items() if isinstance(value, nnx.Variable)}
