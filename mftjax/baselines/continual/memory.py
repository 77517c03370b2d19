"""Writing into the slots of a memory: into all of them, or into those that a task uses much more than other data.

Before a task its slots are chosen, by the reads of the tokens that predict its answers; after it, what was written is
folded into the values. The rule `sparse` is that of sparse memory fine-tuning, with the slots ranked once a task, over
all of its rows, and not for each batch: so the optimiser's state is that of the chosen rows alone.

Source: Continual Learning via Sparse Memory Finetuning (Lin et al., 2025), Section 3.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mftjax import sft
from mftjax.baselines.continual.method import Method, Setup
from mftjax.models import Memory, MemoryParam, StoredAdapters, WrittenSlots, slots

# What a run has of a memory beside what is trained, its `MemoryWrite`.
HELD = (MemoryParam, WrittenSlots, StoredAdapters)


def usages(setup: Setup, weights, rows, masks, num_parts: int = 1):
  """`[num_parts, num_slots]` reads of each memory of the model, in a list, on as many parts of the rows.

  Args:
    masks: `[num_rows, length]` tokens whose reads count.
  """
  model = setup.merge(weights)
  cut = lambda x: x[: len(x) // num_parts * num_parts].reshape(num_parts, -1, *x.shape[1:])
  count = lambda part: model.memory_usage(part[0].tokens, part[0].segment_ids, part[0].positions, part[1])
  return jax.lax.map(count, jax.tree.map(cut, (rows, masks)))


def choose(setup: Setup, params, carry, task, values, key):
  """Opens the slots of the highest TF-IDF to the task; the background is what the base model was trained on."""
  weights = (params, carry["held"])
  others = setup.background
  background = usages(setup, weights, others, others.segment_ids > 0, num_parts=min(32, len(others.tokens)))
  # Only where an answer is given: what is read elsewhere is not what the task has to learn.
  answering = jnp.pad(sft.target_mask(task.rows), ((0, 0), (0, 1)))
  counts = usages(setup, weights, task.rows, answering)
  model = setup.merge(weights)
  for memory, own, other in zip(model.memories(), counts, background, strict=True):
    slots.open_most_specific(memory, own[0], other)
  return params, {**carry, "held": nnx.state(model, HELD)}


def allocate(setup: Setup, params, carry, task, values, key):
  """Opens the next block of slots, none of which another task has written, with their keys at the task's own queries.

  When all blocks are used, the oldest one is taken again.
  """
  model = setup.merge((params, carry["held"]))
  for number, memory in enumerate(model.memories()):
    rows = block(memory, slots.num_open(memory), task.number)
    slots.open_at(memory, rows)
    place(model, number, rows, task.rows)
  if model.adapters is not None:
    model.adapters.open(task.number % model.adapters.num_blocks)
  return params, {**carry, "held": nnx.state(model, HELD)}


def block(memory: Memory, num_rows: int, number):
  """`[num_rows]` int32 slots of a task's own block."""
  place = number % max(memory.num_blocks(num_rows), 1)
  return place * num_rows + jnp.arange(num_rows, dtype=jnp.int32)


def num_in_blocks(memory: Memory, num_rows: int) -> int:
  """Slots that stand in blocks of `num_rows`; those behind them are no task's, and only the outer loop writes them."""
  return memory.num_blocks(num_rows) * num_rows


def read_with(model, number: int, batch) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What one of the model's memories is read with, which of these tokens answer, and which do not.

  Returns:
    `[num_layers, batch, length, dim + context_dim]`, for each layer that reads the memory, and masks without the last
    axis; padding is in none of them.
  """
  if batch.states is None:
    inputs = model.memory_inputs(batch.tokens, batch.segment_ids, batch.positions)
  else:
    inputs = [batch.states if model.adapters is not None else model.last_memory_input(batch.states)]
  memory = model.memories()[number]
  own = [x for x, layer in zip(inputs, model.memory_layers, strict=True) if model.memory_of(layer) is memory]
  answering = jnp.pad(sft.target_mask(batch), ((0, 0), (0, 1))) > 0
  masks = (jnp.stack([mask] * len(own)) for mask in (answering, (batch.segment_ids > 0) & ~answering))
  return jnp.stack(own), *masks


def place(model, number: int, rows, batch) -> None:
  """Moves the keys of these slots of one of the model's memories to queries of the tokens that answer in a batch."""
  inputs, answering, _ = read_with(model, number, batch)
  slots.place(model.memories()[number], rows, inputs, answering)


def place_shared(model, batch) -> None:
  """Moves the keys of the slots that are no task's to queries of a batch, most of tokens that answer."""
  for number, memory in enumerate(model.memories()):
    inputs, *masks = read_with(model, number, batch)
    first = memory.num_slots - memory.num_shared
    for count, mask in zip(shared_of(memory.num_shared), masks, strict=True):
      if count:
        slots.place(memory, first + jnp.arange(count), inputs, mask)
      first += count


def shared_of(num_shared: int) -> tuple[int, int]:
  """How many shared slots stand for tokens that answer, and for others: few of these are near to a task's."""
  return num_shared - num_shared // 4, num_shared // 4


def fold(setup: Setup, params, carry, task, values):
  """Adds what was written to the values; the next task starts at a zero change."""
  model = setup.merge((params, carry["held"]))
  for memory in model.memories():
    memory.fold()
  if model.adapters is not None:
    model.adapters.fold()
  return jax.tree.map(jnp.zeros_like, params), {**carry, "held": nnx.state(model, HELD)}


def method(rule: str) -> Method:
  """The method of a rule of writing, "all", "sparse", "new", or "frozen": then a LoRA is trained beside the memory."""
  if rule == "frozen":
    return Method(trained="memory")
  method = Method(trained="memory", end=fold)
  return method if rule == "all" else dataclasses.replace(method, begin={"sparse": choose, "new": allocate}[rule])
