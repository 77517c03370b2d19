"""What a frozen model says of rows, computed once.

Where a memory in the last layer is all that is trained, everything below it says the same of a row at each step: an
inner step is then the last MLP, the memory and the head, of the answering tokens alone, to which rows are cut down.
Where it chooses adapters, what it is read with stays the same: an inner step is then one pass and not two.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections

from mftjax import sft
from mftjax.baselines import continual
from mftjax.data import sequences
from mftjax.loops import sequence

_MOST_TOKENS = 1 << 16  # that go through the model at once


def is_possible(config: ml_collections.ConfigDict, setup: continual.Setup) -> bool:
  """Whether cut rows give the losses of whole ones: nothing is asked of other tokens, and no lower layer has a memory.

  The write rule `sparse` counts the reads of all tokens; adapters and a LoRA change lower layers too.
  """
  model = setup.merge((setup.params, setup.held))
  is_last = model.memory_layers == (model.config.num_layers - 1,)
  return (
    is_last
    and model.adapters is None
    and config.continual.write_rule not in ("sparse", "frozen")
    and "prompt_loss_weight" not in config.hyperparameters
  )


def prepared(config: ml_collections.ConfigDict, setup: continual.Setup, stream: sequences.Stream) -> sequences.Stream:
  """The stream with all that the frozen model says of it, and cut where that is possible."""
  return cut(setup, stream) if is_possible(config, setup) else with_inputs(setup, stream)


def with_inputs(setup: continual.Setup, stream: sequences.Stream) -> sequences.Stream:
  """The stream with `states` for a model with adapters, what its memory is read with; as it is for any other."""
  if setup.merge((setup.params, setup.held)).adapters is None:
    return stream
  of_row = lambda model, row, _: model.memory_inputs(**row)[0][0]
  of_rows = lambda rows: rows | {"states": _mapped(setup, of_row, rows, jnp.zeros(rows["tokens"].shape[:-1]))}
  return _with(stream, of_rows)


def cut(setup: continual.Setup, stream: sequences.Stream) -> sequences.Stream:
  """The stream with rows of the tokens that are targets or come before one, and their `states`, as of `types.Batch`."""
  return _with(stream, lambda rows: _cut(setup, rows))


def _with(stream: sequences.Stream, change: Callable[[dict[str, jax.Array]], dict[str, jax.Array]]) -> sequences.Stream:
  return dataclasses.replace(stream, train=change(stream.train), test=change(stream.test), base=change(stream.base))


def _cut(setup: continual.Setup, rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
  *leading, length = rows["tokens"].shape
  flat = {name: values.reshape(-1, length) for name, values in rows.items()}
  mask = sft.target_mask(sequence.as_batch(flat)) > 0
  is_kept = jnp.pad(mask, ((0, 0), (0, 1))) | jnp.pad(mask, ((0, 0), (1, 0)))
  count = int(is_kept.sum(axis=1).max())
  place = jnp.argsort(~is_kept, axis=1, stable=True)[:, :count]
  at_place = lambda values: jnp.take_along_axis(values, place, axis=1)
  found = {name: at_place(values) for name, values in flat.items()}
  for name in ("segment_ids", "loss_mask"):
    found[name] = jnp.where(at_place(is_kept), found[name], 0)  # the rest of a row is padding
  of_row = lambda model, row, place: jnp.take(model.before_last_mlp(**row)[0], place, axis=0)
  found["states"] = _mapped(setup, of_row, flat, place)
  return {name: values.reshape(*leading, *values.shape[1:]) for name, values in found.items()}


def _mapped(setup: continual.Setup, of_row: Callable, rows: dict[str, jax.Array], more: jax.Array) -> jax.Array:
  """`of_row(model, row, more)` of each row, `[*leading, ...]`, some rows at a time."""
  *leading, length = rows["tokens"].shape
  flat = lambda x: x.reshape(-1, *x.shape[len(leading) :])

  @jax.jit
  def run(params, held, frozen, rows, more):
    model = dataclasses.replace(setup, frozen=frozen).merge((params, held))
    one = lambda inputs: of_row(model, {name: values[None] for name, values in inputs[0].items()}, inputs[1])
    return jax.lax.map(one, (rows, more), batch_size=max(_MOST_TOKENS // length, 1))

  read = {name: flat(rows[name]) for name in ("tokens", "segment_ids", "positions")}
  found = run(setup.params, setup.held, setup.frozen, read, flat(more))
  return found.reshape(*leading, *found.shape[1:])
