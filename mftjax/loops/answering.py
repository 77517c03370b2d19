"""Rows cut down to the tokens that answer, with the hidden states that a frozen model has for them.

Where a memory in the last layer is all that is trained, everything below it says the same of a row at each step. So it
is computed once: an inner step is then the last MLP, the memory and the head, of the answering tokens alone.
"""

import dataclasses

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

  The write rule `sparse` counts the reads of all tokens; adapters change lower layers too.
  """
  model = setup.merge((setup.params, setup.held))
  is_last = model.memory_layers == (model.config.num_layers - 1,)
  return (
    is_last
    and model.adapters is None
    and config.continual.write_rule != "sparse"
    and "prompt_loss_weight" not in config.hyperparameters
  )


def cut(setup: continual.Setup, stream: sequences.Stream) -> sequences.Stream:
  """The stream with rows of the tokens that are targets or come before one, and their `states`, as of `types.Batch`."""
  of_rows = lambda rows: _cut(setup, rows)
  return dataclasses.replace(stream, train=of_rows(stream.train), test=of_rows(stream.test), base=of_rows(stream.base))


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
  found["states"] = _states(setup, flat, place)
  return {name: values.reshape(*leading, *values.shape[1:]) for name, values in found.items()}


def _states(setup: continual.Setup, rows: dict[str, jax.Array], place: jax.Array) -> jax.Array:
  """`[num_rows, n, hidden_size]` states of the tokens at `place` `[num_rows, n]`, some rows at a time."""

  @jax.jit
  def run(params, held, frozen, rows, place):
    model = dataclasses.replace(setup, frozen=frozen).merge((params, held))

    def of_row(inputs):
      row, place = inputs
      one = {name: row[name][None] for name in ("tokens", "segment_ids", "positions")}
      return jnp.take(model.before_last_mlp(**one)[0], place, axis=0)

    return jax.lax.map(of_row, (rows, place), batch_size=max(_MOST_TOKENS // rows["tokens"].shape[1], 1))

  return run(setup.params, setup.held, setup.frozen, rows, place)
