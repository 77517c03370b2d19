"""Arrays that travel between the parts of mftjax, and their dtypes."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Batch:
  """Packed, masked rows of tokens, each row drawn from one source (or one ability)."""

  tokens: jax.Array  # [batch, length] int32
  loss_mask: jax.Array  # [batch, length] float32, 1 where tokens[b, l] is a target of the loss
  segment_ids: jax.Array  # [batch, length] int32, 0 = padding, 1.. = the example within the row
  positions: jax.Array  # [batch, length] int32, restarts at 0 with each segment
  source: jax.Array  # [batch] int32, index of the source the row was drawn from
  proposal: jax.Array  # [batch] float32, probability with which that source was drawn
  progress: jax.Array | None = None  # [batch] float32 in 0..1, part of the run that is over; for a curriculum
  # [batch, length, ...] what a frozen model says of the tokens, as of `Decoder.before_last_mlp`, or, of a model with
  # adapters, of `Decoder.memory_inputs`.
  states: jax.Array | None = None
  reads: jax.Array | None = None  # [batch, length, num_blocks], as of `Decoder.block_weights`


def at_least_f32(dtype: Any) -> Any:
  """The dtype of sums: f32 for lower precision, f64 for f64."""
  return jnp.promote_types(dtype, jnp.float32)
