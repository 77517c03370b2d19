"""The one SFT step: masked loss weighted by source, and the optimiser built from traced hyperparameters."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mftjax import types

# Common hyperparameters for fine-tuning with AdamW; what a recipe does not name takes these.
DEFAULTS: dict[str, float] = {
  "learning_rate": 1e-3,
  "weight_decay": 0.01,
  "b1": 0.9,
  "b2": 0.999,
  "eps": 1e-8,
  "clip_norm": 1.0,
  "warmup_fraction": 0.05,
  "final_fraction": 0.1,
}


def row_losses(logits: jax.Array, batch: types.Batch) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of the masked tokens of each row.

  Args:
    logits: `[batch, length, vocab]` f32 or f64; position l predicts token l + 1.
    batch: rows of tokens; a token is a target if its mask is 1 and the token before it is of the same segment.

  Returns:
    `[batch]` mean over the row's targets in nats (0 for a row without any), and `[batch]` their number.
  """
  targets = batch.tokens[:, 1:]
  same_segment = (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & (batch.segment_ids[:, 1:] > 0)
  mask = batch.loss_mask[:, 1:] * same_segment
  nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], targets)
  count = mask.sum(axis=1)
  return (nll * mask).sum(axis=1) / jnp.maximum(count, 1.0), count


def importance_weights(mixture_logits: jax.Array, batch: types.Batch) -> jax.Array:
  """`[batch]` weight of each row, softmax(mixture_logits)[source] / proposal.

  With rows drawn from the proposal, the weighted mean of row losses is an unbiased estimate of the mixture's
  loss, and differentiable in the logits (`[num_sources]`).
  """
  return jax.nn.softmax(mixture_logits)[batch.source] / batch.proposal


def source_means(losses: jax.Array, batch: types.Batch, num_sources: int) -> jax.Array:
  """`[num_sources]` mean of the row losses (`[batch]`, nats) of each source; 0 where the batch has no row."""
  totals = jax.ops.segment_sum(losses, batch.source, num_sources)
  counts = jax.ops.segment_sum(jnp.ones_like(losses), batch.source, num_sources)
  return totals / jnp.maximum(counts, 1.0)


def inner_loss(
  apply: Callable[..., jax.Array], params: Any, meta_params: Mapping[str, Any], batch: types.Batch
) -> jax.Array:
  """Training loss of one batch: mean over rows of importance weight times mean token loss, nats.

  Args:
    apply: `(params, memory, batch) -> logits [batch, length, vocab]`.
    params: what the inner step trains.
    meta_params: `mixture_logits [num_sources]` and `memory`, the slots (None without memory).
    batch: rows drawn from the proposal.
  """
  losses, _ = row_losses(apply(params, meta_params["memory"], batch), batch)
  return jnp.mean(importance_weights(meta_params["mixture_logits"], batch) * losses)


def schedule(hyperparameters: Mapping[str, jax.Array], num_steps: int) -> optax.Schedule:
  """Linear warm-up over `warmup_fraction` of the run, then a cosine from 1 to `final_fraction`.

  Differentiable in both fractions. Returns step -> multiplier of the learning rate.
  """

  def multiplier(step: jax.Array) -> jax.Array:
    progress = jnp.minimum((step + 1.0) / num_steps, 1.0)
    warmup = jnp.maximum(hyperparameters["warmup_fraction"], 1e-6)
    decayed = jnp.clip((progress - warmup) / jnp.maximum(1.0 - warmup, 1e-6), 0.0, 1.0)
    floor = hyperparameters["final_fraction"]
    cosine = floor + (1.0 - floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * decayed))
    return jnp.minimum(progress / warmup, 1.0) * cosine

  return multiplier


def _clip_by_global_norm(clip_norm: jax.Array, is_normalised: bool) -> optax.GradientTransformation:
  """`optax.clip_by_global_norm`, whose derivative is NaN where the whole gradient is zero, with one that is finite.

  With `is_normalised` gradients of a smaller norm are scaled to it as well.
  """

  def update(grads, state, params=None):
    squared = optax.tree.norm(grads, squared=True)
    norm = jnp.sqrt(jnp.where(squared > 0, squared, 1.0))
    scale = jnp.where(is_normalised | (squared > clip_norm**2), clip_norm / norm, 1.0)
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), state

  return optax.GradientTransformation(optax.init_empty_state, update)


def optimizer(
  hyperparameters: Mapping[str, jax.Array], num_steps: int, is_normalised: bool = False
) -> optax.GradientTransformation:
  """AdamW with clipping and the schedule, from traced values.

  Args:
    hyperparameters: name -> scalar; names that are missing take `DEFAULTS`.
    num_steps: steps of the whole run, which the schedule spans.
    is_normalised: whether every gradient is scaled to `clip_norm`, not only the larger ones.

  Source: Loshchilov and Hutter (2019), Algorithm 2.
  """
  values = {**DEFAULTS, **hyperparameters}
  multiplier = schedule(values, num_steps)
  return optax.chain(
    _clip_by_global_norm(values["clip_norm"], is_normalised),
    # eps_root: the square root has no derivative at 0, where LoRA's A starts (its first gradient is 0).
    optax.scale_by_adam(values["b1"], values["b2"], values["eps"], eps_root=1e-16),
    optax.add_decayed_weights(values["weight_decay"]),
    optax.scale_by_schedule(lambda step: -values["learning_rate"] * multiplier(step)),
  )
