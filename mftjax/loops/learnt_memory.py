"""What a memory holds after a sequence of tasks: which slots each wrote, who else reads them, and for which prompts."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mftjax import models
from mftjax.data import sequences
from mftjax.loops import sequence
from mftjax.models import lora

_NUM_EXAMPLES = 3  # that are shown of a slot


def changed(params: Any, held: Any) -> np.ndarray:
  """Slots whose values the first run has changed since its last `fold`, of its first memory; ascending.

  All that are open, where what is written is an adapter; none, where a LoRA is trained beside the memory.
  """
  written, delta = np.asarray(_leaf(held, "written"))[0], _leaf(params, "delta")
  if delta is not None:
    return written[np.any(np.asarray(delta)[0] != 0, axis=-1)]
  has_adapters = _leaf(held, "block") is not None
  return written if has_adapters else written[:0]


def view(
  model: models.Decoder, written: Sequence[np.ndarray], stream: sequences.Stream, tokenizer: Any
) -> dict[str, Any]:
  """The `memory` entry of `continual.json`, of a model's first memory.

  Args:
    model: after the last task of the first run.
    written: the slots that each of its tasks changed.
    stream: the tasks.
    tokenizer: of the model.

  Returns:
    `num_slots`; `tasks`; `slots_by_task`, how many slots each wrote; `usage` `[num_tasks, num_tasks]`, the part of each
    task's reads that falls on the slots that were last written by each; `overlap` `[num_tasks, num_tasks]`, the part of
    its reads that falls on slots that each wrote; `examples` of the slot that each task reads most, of its own if it
    wrote any.
  """
  memory = model.memories()[0]
  order, names = np.asarray(stream.order[0]), stream.names
  batches = [sequence.as_batch({name: values[pool] for name, values in stream.test.items()}) for pool in order]
  usage = np.stack(
    [np.asarray(model.memory_usage(b.tokens, b.segment_ids, b.positions, b.segment_ids > 0)[0]) for b in batches]
  )
  usage = usage / np.maximum(usage.sum(axis=1, keepdims=True), 1)
  wrote = np.stack([np.isin(np.arange(memory.num_slots), slots) for slots in written])
  last = np.where(wrote.any(axis=0), len(wrote) - 1 - wrote[::-1].argmax(axis=0), -1)
  examples = []
  for number, batch in enumerate(batches):
    slot = int(np.argmax(usage[number] * (wrote[number] if wrote[number].any() else 1)))
    examples.append(
      {
        "slot": slot,
        "task": names[order[number]],
        "usage": float(usage[number, slot]),
        "nearest": _nearest(model, memory, batch, slot, tokenizer),
      }
    )
  return {
    "num_slots": memory.num_slots,
    "tasks": [names[pool] for pool in order],
    "slots_by_task": wrote.sum(axis=1).tolist(),
    "usage": [[float(row[last == other].sum()) for other in range(len(order))] for row in usage],
    "overlap": (usage @ wrote.T).tolist(),
    "examples": examples,
  }


def _nearest(model: Any, memory: Any, batch: Any, slot: int, tokenizer: Any) -> list[str]:
  """The texts, up to the token that reads, by which the slot is read with the highest weights."""
  slots, weights = memory.lookup(model.memory_inputs(batch.tokens, batch.segment_ids, batch.positions)[0])
  of_slot = np.where(np.asarray(slots) == slot, np.asarray(weights), 0.0).max(axis=(-2, -1))  # [rows, length]
  of_slot = of_slot * (np.asarray(batch.segment_ids) > 0)
  texts: list[str] = []
  for flat in np.argsort(-of_slot, axis=None):
    row, place = np.unravel_index(flat, of_slot.shape)
    if len(texts) == _NUM_EXAMPLES or of_slot[row, place] == 0:
      break
    first = int(place) - int(batch.positions[row, place])
    text = tokenizer.decode(np.asarray(batch.tokens[row, first : place + 1]))
    if text not in texts:
      texts.append(text)
  return texts


def _leaf(tree: Any, name: str) -> Any:
  """The first array of this name in a state, None if there is none."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if name in lora.names_of(path):
      return leaf
  return None
