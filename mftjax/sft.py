"""The one SFT step: masked loss weighted by source, and the optimiser built from traced hyperparameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mftjax import errors, types
from mftjax.models import lora

# Common hyperparameters for fine-tuning with AdamW; what a recipe does not name takes these. One that is left at a
# Python number equal to its default here and changes nothing there costs nothing and rounds nothing.
DEFAULTS: dict[str, float] = {
  "learning_rate": 1e-3,
  "weight_decay": 0.01,
  "b1": 0.9,
  "b2": 0.999,
  "eps": 1e-8,
  "clip_norm": 1.0,
  "warmup_fraction": 0.05,
  "final_fraction": 0.1,
  "decay_power": 1.0,  # the cosine of the schedule to this power
  "stop_fraction": 1.0,  # part of the budget that is used; the schedule spans that part
  "label_smoothing": 0.0,  # training loss only
  "prompt_loss_weight": 0.0,  # weight of prompt tokens in the training loss
  "learning_rate_embedding": 1.0,  # multipliers of the learning rate, by group of parameters
  "learning_rate_attention": 1.0,
  "learning_rate_mlp": 1.0,
  "learning_rate_norm": 1.0,
  "learning_rate_memory": 1.0,
  "lora_scale": 1.0,  # multiplies alpha / rank
}

# Those without a common value: without them the batch has all its rows, and the LoRA its whole rank.
RELAXED = ("batch_size", "lora_rank")

NAMES = (*DEFAULTS, *RELAXED)

GROUPS = {
  "embedding": ("embedding", "head"),
  "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
  "mlp": ("gate_proj", "up_proj", "down_proj"),
  "norm": ("norm",),
  "memory": (
    "query",
    "query_bias",
    "keys",
    "values",
    "delta",
    "gate",
    "log_temperature",
    "null_score",
    "log_null_temperature",
  ),
}


def row_losses(
  logits: jax.Array,
  batch: types.Batch,
  label_smoothing: jax.typing.ArrayLike = 0.0,
  prompt_loss_weight: jax.typing.ArrayLike = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of the masked tokens of each row.

  Args:
    logits: `[batch, length, vocab]` f32 or f64; position l predicts token l + 1.
    batch: rows of tokens; a token is a target if its mask is 1 and the token before it is of the same segment.
    label_smoothing: part of the target distribution that is uniform over the vocabulary.
    prompt_loss_weight: weight of tokens whose mask is 0 and whose segment goes on, against 1 of the targets.

  Returns:
    `[batch]` weighted mean over the row's tokens in nats (0 for a row without any), and `[batch]` the sum of weights,
    which without prompt weight is the number of targets.
  """
  targets = batch.tokens[:, 1:]
  mask = target_mask(batch)
  nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], targets)
  if not _is_fixed(label_smoothing, 0.0):
    of_target = jnp.take_along_axis(logits[:, :-1], targets[..., None], axis=-1)[..., 0]
    nll = nll + label_smoothing * (of_target - logits[:, :-1].mean(axis=-1))
  if not _is_fixed(prompt_loss_weight, 0.0):
    mask = mask + prompt_loss_weight * (1 - batch.loss_mask[:, 1:]) * _same_segment(batch)
  total = mask.sum(axis=1)
  # `where`, not `maximum`, which halves the derivative in the prompt's weight where a row has a single target.
  return (nll * mask).sum(axis=1) / jnp.where(total >= 1, total, 1.0), total


def target_mask(batch: types.Batch) -> jax.Array:
  """`[batch, length - 1]` f32, 1 where the token before is to predict the next: at l, token l + 1 is a target."""
  return batch.loss_mask[:, 1:] * _same_segment(batch)


def _same_segment(batch: types.Batch) -> jax.Array:
  """`[batch, length - 1]` bool, whether token l + 1 is of token l's segment, and no padding."""
  return (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & (batch.segment_ids[:, 1:] > 0)


def exact_matches(logits: jax.Array, batch: types.Batch) -> tuple[jax.Array, jax.Array]:
  """How many of the examples of each row are answered exactly, each target being the likeliest token.

  The targets stand in the row, so an example counts exactly if greedy generation would give its very completion, up to
  the end-of-sequence token.

  Args:
    logits: `[batch, length, vocab]`; position l predicts token l + 1.
    batch: rows of tokens; targets as of `row_losses`. Examples are the row's segments that have a target.

  Returns:
    `[batch]` f32 examples answered exactly, and `[batch]` f32 examples.
  """
  return whole_examples(jnp.argmax(logits[:, :-1], axis=-1) == batch.tokens[:, 1:], batch)


def whole_examples(is_right: jax.Array, batch: types.Batch) -> tuple[jax.Array, jax.Array]:
  """How many of the examples of each row have all of their targets right, and how many there are; as `exact_matches`.

  Args:
    is_right: `[batch, length - 1]` bool, whether token l + 1 is predicted; only those of targets count.
  """
  segments = batch.segment_ids[:, 1:]
  is_target = target_mask(batch) > 0
  is_wrong = is_target & ~is_right
  count = jax.vmap(lambda flags, ids: jax.ops.segment_sum(flags.astype(jnp.float32), ids, batch.tokens.shape[1]))
  has_target, has_wrong = count(is_target, segments) > 0, count(is_wrong, segments) > 0
  return jnp.sum(has_target & ~has_wrong, axis=1, dtype=jnp.float32), jnp.sum(has_target, axis=1, dtype=jnp.float32)


def mixture_at(mixture_logits: jax.Array, progress: jax.Array) -> jax.Array:
  """A curriculum's logits at some moments of the run, linear between its knots.

  Args:
    mixture_logits: `[num_knots, num_sources]`, the knots evenly spaced from the start of the run to its end; or
      `[num_sources]`, the same all the time.
    progress: `[...]` in 0..1.

  Returns:
    `[..., num_sources]`.
  """
  if mixture_logits.ndim == 1:
    return jnp.broadcast_to(mixture_logits, (*progress.shape, *mixture_logits.shape))
  last = mixture_logits.shape[0] - 1
  position = jnp.clip(progress, 0.0, 1.0) * last
  lower = jnp.clip(jnp.floor(position).astype(jnp.int32), 0, max(last - 1, 0))
  part = (position - lower)[..., None]
  return (1 - part) * mixture_logits[lower] + part * mixture_logits[jnp.minimum(lower + 1, last)]


def masked_logits(mixture_logits: jax.Array, source_mask: jax.Array) -> jax.Array:
  """Logits whose softmax gives absent sources (mask 0) nothing: a weight of 1e-13, and no gradient."""
  return jnp.where(source_mask > 0, mixture_logits, -30.0)


def importance_weights(mixture_logits: jax.Array, batch: types.Batch) -> jax.Array:
  """`[batch]` weight of each row, softmax(mixture_logits)[source] / proposal.

  With rows drawn from the proposal, the weighted mean of row losses is an unbiased estimate of the mixture's
  loss, and differentiable in the logits (`[num_sources]`, or `[num_knots, num_sources]` read at `batch.progress`).

  Raises:
    InputError: a curriculum, but a batch without progress.
  """
  if mixture_logits.ndim == 1:
    return jax.nn.softmax(mixture_logits)[batch.source] / batch.proposal
  if batch.progress is None:
    raise errors.InputError(
      f"Mixture logits {mixture_logits.shape} are a curriculum, which needs batches with `progress`."
    )
  weights = jax.nn.softmax(mixture_at(mixture_logits, batch.progress))
  return jnp.take_along_axis(weights, batch.source[:, None], axis=1)[:, 0] / batch.proposal


def source_means(losses: jax.Array, batch: types.Batch, num_sources: int) -> jax.Array:
  """`[num_sources]` mean of the row losses (`[batch]`, nats) of each source; 0 where the batch has no row."""
  totals = jax.ops.segment_sum(losses, batch.source, num_sources)
  counts = jax.ops.segment_sum(jnp.ones_like(losses), batch.source, num_sources)
  return totals / jnp.maximum(counts, 1.0)


def relaxed_mean(losses: jax.Array, size: jax.Array) -> jax.Array:
  """Mean over the first `size` rows of `[batch]` losses, sum_r clip(size - r, 0, 1) losses_r / size.

  Differentiable in `size`; at whole sizes the derivative is the one from below.
  """
  return jnp.sum(lora.ramp(size - jnp.arange(len(losses))) * losses) / size


def adapted(params: Any, hyperparameters: Mapping[str, Any]) -> Any:
  """Params with the adapters' rank and scale that the hyperparameters name: what a loss is taken of."""
  rank, scale = hyperparameters.get("lora_rank"), hyperparameters.get("lora_scale", 1.0)
  return params if rank is None and _is_fixed(scale, 1.0) else lora.masked(params, rank, scale)


def inner_loss(
  apply: Callable[..., jax.Array],
  params: Any,
  meta_params: Mapping[str, Any],
  batch: types.Batch,
  hyperparameters: Mapping[str, Any] | None = None,
  largest_batch: int | None = None,
) -> jax.Array:
  """Training loss of one batch: mean over rows of importance weight times mean token loss, nats.

  Args:
    apply: `(params, memory, batch) -> logits [batch, length, vocab]`.
    params: what the inner step trains.
    meta_params: `mixture_logits [num_sources]` (or a curriculum of them) and `memory`, the slots (None without memory).
    batch: rows drawn from the proposal, in random order.
    hyperparameters: constrained values; it reads `label_smoothing`, `prompt_loss_weight`, `lora_scale`, and where they
      are there `batch_size` (at least 1, at most the rows of the batch), a mean over that many rows, and `lora_rank`.
    largest_batch: rows of a whole batch, for a batch that is only a part of one (a micro-batch): it then has its part
      of `batch_size` too. None: the batch is whole.
  """
  values = {**DEFAULTS, **(hyperparameters or {})}
  logits = apply(adapted(params, values), meta_params["memory"], batch)
  losses, _ = row_losses(logits, batch, values["label_smoothing"], values["prompt_loss_weight"])
  losses = importance_weights(meta_params["mixture_logits"], batch) * losses
  if "batch_size" not in values:
    return jnp.mean(losses)
  return relaxed_mean(losses, values["batch_size"] * (len(losses) / (largest_batch or len(losses))))


def schedule(
  hyperparameters: Mapping[str, jax.typing.ArrayLike], num_steps: int, largest_batch: int | None = None
) -> optax.Schedule:
  """Linear warm-up over `warmup_fraction` of the run, then a cosine from 1 to `final_fraction`, then nothing.

  The run ends after `num_steps * stop_fraction * largest_batch / batch_size` steps, when its part of the budget of
  `num_steps * largest_batch` rows is used. The step in which it ends counts as far as the budget lasts, so the
  multiplier is differentiable in each hyperparameter (at whole numbers of steps, the derivative from below).
  Without a batch size, and with a `stop_fraction` that is a plain 1, steps past `num_steps` stay at the last value.

  Args:
    hyperparameters: name -> scalar; of those that are missing, `batch_size` is `largest_batch` and the others take
      `DEFAULTS`.
    num_steps: of a run at the largest batch that uses the whole budget.
    largest_batch: rows; needed with `batch_size`.

  Returns:
    step -> multiplier of the learning rate.

  Raises:
    InputError: a batch size without a largest batch.
  """
  values = {**DEFAULTS, **hyperparameters}
  has_end = not _is_fixed(values["stop_fraction"], 1.0) or "batch_size" in values
  last = num_steps * values["stop_fraction"] if has_end else num_steps
  if "batch_size" in values:
    if largest_batch is None:
      raise errors.InputError("A schedule with `batch_size` needs `largest_batch`, the rows that its budget counts in.")
    last = last * (largest_batch / values["batch_size"])

  def multiplier(step: jax.Array) -> jax.Array:
    progress = jnp.minimum((step + 1.0) / last, 1.0)
    warmup = jnp.maximum(values["warmup_fraction"], 1e-6)
    decayed = jnp.clip((progress - warmup) / jnp.maximum(1.0 - warmup, 1e-6), 0.0, 1.0)
    floor = values["final_fraction"]
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * decayed))
    if not _is_fixed(values["decay_power"], 1.0):
      # A power below 1 has no derivative at 0, nor has any power in its exponent.
      cosine = jnp.where(cosine > 0, jnp.where(cosine > 0, cosine, 1.0) ** values["decay_power"], 0.0)
    rate = jnp.minimum(progress / warmup, 1.0) * (floor + (1.0 - floor) * cosine)
    return rate * lora.ramp(last - step) if has_end else rate

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


def group_of(path: Sequence[Any]) -> str | None:
  """Which of `GROUPS` the parameter at this path of the params belongs to, with its bias and adapters; None of none."""
  for name in reversed(lora.names_of(path)):
    base = name.removesuffix("_lora_a").removesuffix("_lora_b").removesuffix("_bias")
    for group, members in GROUPS.items():
      if base in members or (group == "norm" and base.endswith("norm")):
        return group
  return None


def _scale_by_group(values: Mapping[str, Any]) -> optax.GradientTransformation:
  """Multiplies each update by the learning rate's multiplier of its group."""

  def scale(path, update):
    group = group_of(path)
    return update if group is None else update * jnp.asarray(values[f"learning_rate_{group}"], update.dtype)

  return optax.stateless(lambda updates, params: jax.tree.map_with_path(scale, updates))


def optimizer(
  hyperparameters: Mapping[str, jax.typing.ArrayLike],
  num_steps: int,
  is_normalised: bool = False,
  largest_batch: int | None = None,
) -> optax.GradientTransformation:
  """AdamW with clipping and the schedule, from traced values.

  Args:
    hyperparameters: name -> scalar; names that are missing take `DEFAULTS`.
    num_steps: steps of the whole run, which the schedule spans (see `schedule` for `stop_fraction`, `batch_size`).
    is_normalised: whether every gradient is scaled to `clip_norm`, not only the larger ones.
    largest_batch: rows in the batch of such a run; needed with `batch_size`.

  Source: Loshchilov and Hutter (2019), Algorithm 2.
  """
  values = {**DEFAULTS, **hyperparameters}
  multiplier = schedule(values, num_steps, largest_batch)
  chain = [
    _clip_by_global_norm(values["clip_norm"], is_normalised),
    # eps_root: the square root has no derivative at 0, where LoRA's A starts (its first gradient is 0).
    optax.scale_by_adam(values["b1"], values["b2"], values["eps"], eps_root=1e-16),
    optax.add_decayed_weights(values["weight_decay"]),
    optax.scale_by_schedule(lambda step: -values["learning_rate"] * multiplier(step)),
  ]
  if not all(_is_fixed(values[f"learning_rate_{group}"], 1.0) for group in GROUPS):
    chain.append(_scale_by_group(values))
  return optax.chain(*chain)


def _is_fixed(value: Any, at: float) -> bool:
  """Whether a hyperparameter is this very number already while the program is built."""
  return isinstance(value, int | float | np.number) and value == at
