"""Writing into the slots of a memory: into all of them, or into those that a task uses much more than other data.

Before a task its slots are chosen; after it, what was written is folded into the values. The rule `sparse` is that of
sparse memory fine-tuning, with the slots ranked once a task, over all of its rows, and not for each batch: so the
optimiser's state is that of the chosen rows alone.

Source: Continual Learning via Sparse Memory Finetuning (Lin et al., 2025), Section 3.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mftjax.baselines.continual.method import Method, Setup
from mftjax.models import MemoryParam, WrittenSlots, slots

HELD = (MemoryParam, WrittenSlots)  # what a run has of a memory beside what is trained, its `MemoryWrite`
RULES = ("all", "sparse")  # and `frozen`, which writes nothing: no method of its own


def usages(setup: Setup, weights, rows, num_parts: int = 1):
  """`[num_parts, num_slots]` reads of each memory of the model, in a list, on as many parts of the rows."""
  model = setup.merge(weights)
  cut = lambda x: x[: len(x) // num_parts * num_parts].reshape(num_parts, -1, *x.shape[1:])
  count = lambda part: model.memory_usage(part.tokens, part.segment_ids, part.positions)
  return jax.lax.map(count, jax.tree.map(cut, rows))


def choose(setup: Setup, params, carry, task, values, key):
  """Opens the slots of the highest TF-IDF to the task; the background is what the base model was trained on."""
  weights = (params, carry["held"])
  background = usages(setup, weights, setup.background, num_parts=min(32, len(setup.background.tokens)))
  counts = usages(setup, weights, task.rows)
  model = setup.merge(weights)
  for memory, own, other in zip(model.memories(), counts, background, strict=True):
    slots.open_most_specific(memory, own[0], other)
  return params, {**carry, "held": nnx.state(model, HELD)}


def fold(setup: Setup, params, carry, task, values):
  """Adds what was written to the values; the next task starts at a zero change."""
  model = setup.merge((params, carry["held"]))
  for memory in model.memories():
    memory.fold()
  return jax.tree.map(jnp.zeros_like, params), {**carry, "held": nnx.state(model, HELD)}


def method(rule: str) -> Method:
  """The method of a rule in `RULES`."""
  if rule == "all":
    return Method(trained="memory", end=fold)
  return Method(trained="memory", begin=choose, end=fold)
