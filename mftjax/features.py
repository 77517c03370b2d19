"""What a short probe of a base model says about a task: features of its sources, its abilities and their pairs."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mftjax import matching, sft, types
from mftjax.data import tokens
from mftjax.errors import InputError

STATIC_FEATURES: tuple[str, ...] = ("log_num_rows", "log_targets_of_all_rows", "duplicate_rate")
_GROUP_FEATURES = ("loss", "loss_std", "log_gradient_norm", "gradient_agreement", "exact_match", "log_targets")
SOURCE_FEATURES: tuple[str, ...] = (
  *(*_GROUP_FEATURES, "best_loss_drop", "mean_loss_drop", "best_transfer"),
  *STATIC_FEATURES,
)
ABILITY_FEATURES: tuple[str, ...] = (
  *(*_GROUP_FEATURES, "loss_drop"),
  *("task_loss_drop", "task_match_residual", "task_log_num_sources", "task_log_budget"),
)
PAIR_FEATURES: tuple[str, ...] = (
  *("cosine", "cosine_after", "embedding_cosine", "influence"),
  *("loss_drop", "loss_after", "transfer"),
)
NAMES = {"source": SOURCE_FEATURES, "ability": ABILITY_FEATURES, "pair": PAIR_FEATURES}  # by field of `Features`

_DROP_FLOOR = 0.05  # a smaller loss_drop of an ability is no unit to measure in
_LOSS_FLOOR = 1e-3  # nats; a relative drop of a smaller loss is noise
_NORM_FLOOR = 1e-8
_BOUND = 3.0  # of ratios
_LOSS_CEILING = 5.0  # nats; of a loss after training


@flax.struct.dataclass
class Features:
  """What a meta-learner reads about one task; see `probe` for the meaning. Absent entries are exactly 0."""

  source: jax.Array  # [num_sources, len(SOURCE_FEATURES)] f32
  ability: jax.Array  # [num_abilities, len(ABILITY_FEATURES)] f32
  pair: jax.Array  # [num_sources, num_abilities, len(PAIR_FEATURES)] f32
  match: jax.Array  # [num_sources] f32, weights on the simplex of `match_weights`
  source_mask: jax.Array  # [num_sources] f32, 1 = present
  ability_weight: jax.Array  # [num_abilities] f32, sums to 1; 0 = absent
  tokens: jax.Array  # [] f32, tokens that the probe processed


@dataclasses.dataclass(frozen=True)
class Probe:
  """How a task is probed.

  Raises:
    InputError: a count below 1, or a learning rate that is not positive.
  """

  rows: int = 8  # of each source and of each ability that are measured, the first ones
  num_steps: int = 16  # of probe training on each ability
  learning_rate: float = 6e-3  # of probe training
  batch_size: int = 6  # rows in a step of probe training
  sketch_dim: int = 1024
  match_steps: int = 1000

  def __post_init__(self):
    for name in ("rows", "num_steps", "batch_size", "sketch_dim", "match_steps"):
      if getattr(self, name) < 1:
        raise InputError(f"Probe.{name} = {getattr(self, name)!r} must be at least 1.")
    if not self.learning_rate > 0:
      raise InputError(f"Probe.learning_rate = {self.learning_rate!r} must be above 0.")


class _Half(NamedTuple):
  """Sums over half of the rows of one source or ability, so that halves add up."""

  losses: jax.Array  # [rows] mean token cross-entropy, nats; 0 for a row without target
  is_row: jax.Array  # [rows] f32, 1 for a row with a target
  num_targets: jax.Array  # []
  num_examples: jax.Array  # [] examples with a target
  num_right: jax.Array  # [] of them, those whose every target is the likeliest token
  sketch: jax.Array  # [sketch_dim] of the gradient of the sum of `losses`


class _Measured(NamedTuple):
  """What one model says about each group, a source or an ability."""

  values: jax.Array  # [num_groups, len(_GROUP_FEATURES)]
  sketch: jax.Array  # [num_groups, sketch_dim] of the gradient of the mean loss


def probe(
  apply: Callable[[Any, types.Batch], jax.Array],
  embed: Callable[[Any, types.Batch], jax.Array],
  params: Any,
  source_rows: types.Batch,
  ability_rows: types.Batch,
  static: jax.Array,
  source_mask: jax.Array,
  ability_weight: jax.Array,
  key: jax.Array,
  options: Probe,
  budget_tokens: jax.Array | float,
) -> Features:
  """Features of one task from a few rows of its data; pure, for `jax.jit` and `jax.vmap` over tasks.

  What tells a good source from a bad one is whether a model that has learnt a little of an ability finds the source
  easier than before: so a copy of the model is trained briefly on held-out rows of each ability.

  Losses are means over the rows that have a target, as SFT's are, so a group with too few rows is filled up with
  empty ones. All rows give losses and gradients alike, from the one pass that both need.

  A source's and an ability's features (`SOURCE_FEATURES`, `ABILITY_FEATURES`):
    loss, loss_std: mean and standard deviation over rows of the mean token cross-entropy, nats.
    log_gradient_norm: of the mean loss, from the sketch.
    gradient_agreement: cosine of the gradients of the even and of the odd rows; near 0 where noise prevails.
    exact_match: share of examples whose every target is the likeliest token given the true ones before it, which are
      those that greedy decoding gets right.
    log_targets: log of the mean number of targets a row.
    best_loss_drop, mean_loss_drop: of a source, the greatest loss_drop of its pairs, and their weighted mean.
    best_transfer: of a source, the greatest transfer of its pairs.
    loss_drop: of an ability, `1 - after / before` after training on its other rows, in [-3, 1].
    `STATIC_FEATURES`: given by the host (`static_features`).
    task_loss_drop: the weighted mean over abilities of loss_drop.
    task_match_residual: `|match gradient - ability gradient|^2 / |ability gradient|^2`, at most 3.
    task_log_num_sources: of those present.
    task_log_budget: of `budget_tokens`.

  A pair's (`PAIR_FEATURES`), s and a gradients of the mean losses:
    cosine, cosine_after: of s and a, before and after training on the ability.
    embedding_cosine: of the mean embeddings, from which that of all groups is subtracted.
    influence: `sign(r) log(1 + |r|)` of `r = <s, a> / <a, a>`, in [-3, 3]: what a step on the source does for the
      ability, against a step on the ability itself.
    loss_drop: `1 - after / before` of the source's loss after training on the ability, in [-3, 1].
    loss_after: the source's loss then, nats, at most 5.
    transfer: the source's loss_drop in units of the ability's own, in [-3, 3]; near 1 where both are of one kind,
      however hard that is to learn.

  Probe training: `sft.optimizer`, on rows of the ability after the `options.rows` measured ones, in the order given
  and round again.

  Args:
    apply: `(params, batch) -> [rows, length, vocab]` logits; position l predicts token l + 1.
    embed: `(params, batch) -> [rows, length, hidden]` embeddings of the tokens.
    params: pytree of floating arrays.
    source_rows: leaves `[num_sources, rows, ...]`; anything stands where a source is absent.
    ability_rows: leaves `[num_abilities, rows, ...]` of the same length of rows; where there are no more than
      `options.rows`, the model is trained on those that are measured.
    static: `[num_sources, len(STATIC_FEATURES)]`.
    source_mask: `[num_sources]`, 0 = absent.
    ability_weight: `[num_abilities]`, at least 0, of any sum; 0 = absent.
    key: draws the signs of the sketches; not used where the model has `sketch_dim` parameters or fewer.
    options: how to probe.
    budget_tokens: that the run to choose for processes, above 0.

  Returns:
    The features. Its tokens are those of present rows that hold a token, padding included as in the training budget,
    counted once a forward pass with or without its backward pass. Looking up embeddings is not counted.

  Raises:
    InputError: `static` of another width, or rows of sources and abilities of different lengths.

  Source: the loss of a source under a model of the target domain against that under a general one, Moore and Lewis
  (2010), Section 2; here the former starts from the latter.
  """
  if static.shape[-1] != len(STATIC_FEATURES):
    raise InputError(f"static has {static.shape[-1]} features a source; it needs {', '.join(STATIC_FEATURES)}.")
  if source_rows.tokens.shape[-1] != ability_rows.tokens.shape[-1]:
    lengths = f"{source_rows.tokens.shape[-1]} and {ability_rows.tokens.shape[-1]}"
    raise InputError(f"Rows of sources and abilities are {lengths} tokens long; give rows of one length.")
  num_sources = source_rows.tokens.shape[0]
  is_source, is_ability = source_mask > 0, ability_weight > 0
  source_rows, ability_rows = _present(source_rows, is_source), _present(ability_rows, is_ability)
  train_rows = _training_rows(ability_rows, options)
  measured = lambda rows: jax.tree.map(lambda x: x[:, : options.rows], rows)
  weight = jnp.where(is_ability, ability_weight, 0.0).astype(jnp.float32)
  weight = weight / jnp.maximum(weight.sum(), jnp.finfo(jnp.float32).tiny)
  is_present = jnp.concatenate([is_source, is_ability])
  groups = _together(measured(source_rows), measured(ability_rows))

  before = _measure(apply, params, groups, is_present, key, options)
  loss, sketch = before.values[:, 0], before.sketch
  of_sources = jax.tree.map(lambda x: x[:num_sources], groups)

  def trained_on(ability):
    """Losses `[num_sources + 1]` of the sources and of the ability after training on it, and the gradients' cosines."""
    rows = jax.tree.map(lambda x: x[ability], train_rows)
    here = jax.tree.map(lambda x, own: jnp.concatenate([x, own[num_sources + ability][None]]), of_sources, groups)
    is_here = jnp.append(is_source, is_ability[ability])
    after = _measure(apply, _train(apply, params, rows, options), here, is_here, key, options)
    return after.values[:, 0], _cosines(after.sketch[:-1], after.sketch[-1:])[:, 0]

  after, cosine_after = jax.lax.map(trained_on, jnp.arange(len(weight)))
  after, cosine_after = after.T, cosine_after.T  # [num_sources + 1, num_abilities], [num_sources, num_abilities]
  drop = jnp.where(is_ability, _drop(loss[:num_sources, None], after[:-1]), 0.0)
  ability_drop = jnp.where(is_ability, _drop(loss[num_sources:], after[-1]), 0.0)
  loss_after = jnp.clip(jnp.where(jnp.isfinite(after[:-1]), after[:-1], _LOSS_CEILING), 0.0, _LOSS_CEILING)

  transfer = jnp.where(is_ability, jnp.clip(drop / jnp.maximum(ability_drop, _DROP_FLOOR), -_BOUND, _BOUND), 0.0)

  target = matching.product(weight, sketch[num_sources:])
  match = matching.match_weights(sketch[:num_sources], target, source_mask, options.match_steps)
  residual = jnp.sum((matching.product(match, sketch[:num_sources]) - target) ** 2)
  residual = jnp.minimum(_ratio(residual, jnp.sum(target**2)), _BOUND)
  log_num_sources, log_budget = jnp.log(jnp.maximum(is_source.sum(), 1)), jnp.log(budget_tokens)
  task = jnp.stack([jnp.vdot(weight, ability_drop), residual, log_num_sources, log_budget])

  centroids = _centroids(embed, params, groups, is_present)
  split = lambda x: (x[:num_sources], x[num_sources:])
  inner = matching.product(sketch[:num_sources], sketch[num_sources:].T)
  influence = _ratio(inner, jnp.sum(sketch[num_sources:] ** 2, axis=1)[None])
  influence = jnp.clip(jnp.sign(influence) * jnp.log1p(jnp.abs(influence)), -_BOUND, _BOUND)
  pair = [_cosines(*split(sketch)), cosine_after, _cosines(*split(centroids)), influence, drop, loss_after, transfer]

  best = lambda values: jnp.max(jnp.where(is_ability, values, -_BOUND), axis=1)
  by_pairs = jnp.stack([best(drop), drop @ weight, best(transfer)], axis=1)
  source = jnp.concatenate([before.values[:num_sources], by_pairs, static], axis=1)
  ability = [before.values[num_sources:], ability_drop[:, None], jnp.broadcast_to(task, (*weight.shape, *task.shape))]
  is_pair = is_source[:, None, None] & is_ability[None, :, None]
  return Features(
    source=jnp.where(is_source[:, None], source, 0.0).astype(jnp.float32),
    ability=jnp.where(is_ability[:, None], jnp.concatenate(ability, axis=1), 0.0),
    pair=jnp.where(is_pair, jnp.stack(pair, axis=-1), 0.0),
    match=match,
    source_mask=is_source.astype(jnp.float32),
    ability_weight=weight,
    tokens=_num_tokens(groups, train_rows, is_source, is_ability),
  )


def static_features(rows: tokens.Rows) -> np.ndarray:
  """`[len(STATIC_FEATURES)]` f32 features of a whole source, all 0 for one without rows.

  They are the log of the number of rows, the log of the mean number of targets a row, and the share of rows whose
  tokens stand in an earlier row already.
  """
  num_rows = len(rows.tokens)
  if not num_rows:
    return np.zeros(len(STATIC_FEATURES), np.float32)
  num_distinct = len({hashlib.sha256(row.tobytes()).digest() for row in rows.tokens})
  log_targets = np.log(max(float(rows.loss_mask.sum()) / num_rows, 1.0))
  return np.asarray([np.log(num_rows), log_targets, 1.0 - num_distinct / num_rows], np.float32)


def present(found: Features) -> dict[str, np.ndarray]:
  """Which entries of each field of `NAMES` are there, of one task or many: `[..., num]`, of pairs `[..., num, num]`."""
  is_source, is_ability = np.asarray(found.source_mask) > 0, np.asarray(found.ability_weight) > 0
  return {
    "source": is_source,
    "ability": is_ability,
    "pair": is_source[..., :, None] & is_ability[..., None, :],
  }


def summaries(found: Features) -> np.ndarray:
  """`[num_tasks, dim]` f64 means of each task's features over what is there, abilities by their weight."""
  source, ability, pair, mask, weight = (
    np.asarray(getattr(found, name), np.float64)
    for name in ("source", "ability", "pair", "source_mask", "ability_weight")
  )
  mask = mask / mask.sum(axis=1, keepdims=True)
  parts = [
    np.einsum("tsf,ts->tf", source, mask),
    np.einsum("taf,ta->tf", ability, weight),
    np.einsum("tsaf,ts,ta->tf", pair, mask, weight),
  ]
  return np.concatenate(parts, axis=1)


def _present(rows: types.Batch, is_present: jax.Array) -> types.Batch:
  """Rows of absent groups become empty, since anything may stand there."""
  return jax.tree.map(lambda x: jnp.where(is_present.reshape(-1, *(1,) * (x.ndim - 1)), x, 0), rows)


def _training_rows(ability_rows: types.Batch, options: Probe) -> types.Batch:
  """`[num_abilities, num_steps, batch_size, ...]` rows after the measured ones in turn; all if there are no more."""
  num_rows = ability_rows.tokens.shape[1]
  first = options.rows if num_rows > options.rows else 0
  index = first + np.arange(options.num_steps * options.batch_size) % (num_rows - first)
  return jax.tree.map(lambda x: x[:, index.reshape(options.num_steps, options.batch_size)], ability_rows)


def _together(source_rows: types.Batch, ability_rows: types.Batch) -> types.Batch:
  """Sources, then abilities, as groups `[num_groups, rows, ...]` with an even number of rows: empty ones fill up."""
  num_rows = max(source_rows.tokens.shape[1], ability_rows.tokens.shape[1])
  num_rows += num_rows % 2

  def join(*leaves):
    filled = [jnp.pad(x, ((0, 0), (0, num_rows - x.shape[1])) + ((0, 0),) * (x.ndim - 2)) for x in leaves]
    return jnp.concatenate(filled)

  return jax.tree.map(join, source_rows, ability_rows)


def _measure(apply, params, groups: types.Batch, is_present: jax.Array, key: jax.Array, options: Probe) -> _Measured:
  """One pass for each half of each group in turn, so that one gradient is held at a time."""

  def total(params, rows):
    logits = apply(params, rows)
    losses, num_targets = sft.row_losses(logits, rows)
    return losses.sum(), (losses, num_targets, *_exact(logits, rows))

  def half(rows):
    gradient, (losses, num_targets, num_examples, num_right) = jax.grad(total, has_aux=True)(params, rows)
    is_row = (num_targets > 0).astype(jnp.float32)
    return _Half(
      losses, is_row, num_targets.sum(), num_examples, num_right, matching.sketch(gradient, key, options.sketch_dim)
    )

  num_groups = len(is_present)
  split = lambda x: x.reshape(num_groups, -1, 2, *x.shape[2:]).swapaxes(1, 2).reshape(num_groups * 2, -1, *x.shape[2:])
  halves = jax.lax.map(half, jax.tree.map(split, groups))
  halves = jax.tree.map(lambda x: x.reshape(num_groups, 2, *x.shape[1:]), halves)
  # Training may have diverged; what is not finite then says nothing.
  sketches = jnp.where(is_present[:, None, None] & jnp.isfinite(halves.sketch), halves.sketch, 0.0)
  num_rows = jnp.maximum(halves.is_row.sum(axis=(1, 2)), 1.0)
  mean_sketch = sketches.sum(axis=1) / num_rows[:, None]
  mean = halves.losses.sum(axis=(1, 2)) / num_rows
  variance = jnp.sum(halves.is_row * (halves.losses - mean[:, None, None]) ** 2, axis=(1, 2)) / num_rows
  values = [
    mean,
    jnp.sqrt(variance),
    jnp.log(jnp.linalg.norm(mean_sketch, axis=1) + _NORM_FLOOR),
    jax.vmap(_cosines)(sketches[:, :1], sketches[:, 1:])[:, 0, 0],
    halves.num_right.sum(axis=1) / jnp.maximum(halves.num_examples.sum(axis=1), 1.0),
    jnp.log(jnp.maximum(halves.num_targets.sum(axis=1) / num_rows, 1.0)),
  ]
  return _Measured(jnp.stack(values, axis=1), mean_sketch)


def _exact(logits: jax.Array, rows: types.Batch) -> tuple[jax.Array, jax.Array]:
  """Number of examples (segments) with a target, and of those whose every target is the likeliest token."""
  segments = rows.segment_ids[:, 1:]
  is_target = (rows.loss_mask[:, 1:] > 0) & (segments == rows.segment_ids[:, :-1]) & (segments > 0)
  is_wrong = is_target & (jnp.argmax(logits[:, :-1], axis=-1) != rows.tokens[:, 1:])
  count = jax.vmap(lambda x, ids: jax.ops.segment_max(x.astype(jnp.int32), ids, rows.tokens.shape[1] + 1))
  has_target, has_wrong = count(is_target, segments) > 0, count(is_wrong, segments) > 0
  return jnp.sum(has_target, dtype=jnp.float32), jnp.sum(has_target & ~has_wrong, dtype=jnp.float32)


def _train(apply, params, rows: types.Batch, options: Probe) -> Any:
  """The parameters after a step on each `[num_steps, batch_size, ...]` batch."""
  values = {"learning_rate": jnp.float32(options.learning_rate), "warmup_fraction": jnp.zeros(())}
  optimizer = sft.optimizer(values, options.num_steps)

  def loss(params, batch):
    losses, num_targets = sft.row_losses(apply(params, batch), batch)
    return losses.sum() / jnp.maximum((num_targets > 0).sum(), 1)

  def body(carry, batch):
    params, state = carry
    updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params)
    return (optax.apply_updates(params, updates), state), None

  return jax.lax.scan(body, (params, optimizer.init(params)), rows)[0][0]


def _centroids(embed, params, groups: types.Batch, is_present: jax.Array) -> jax.Array:
  """`[num_groups, hidden]` mean embedding of each group's tokens, less the mean of the groups that are present."""

  def mean(rows):
    is_token = (rows.segment_ids > 0).astype(jnp.float32)
    hidden = embed(params, rows).astype(jnp.float32)
    return jnp.sum(hidden * is_token[..., None], axis=(0, 1)) / jnp.maximum(is_token.sum(), 1.0)

  means = jnp.where(is_present[:, None], jax.lax.map(mean, groups), 0.0)
  centre = means.sum(axis=0) / jnp.maximum(is_present.sum(), 1)
  return jnp.where(is_present[:, None], means - centre, 0.0)


def _num_tokens(groups, train_rows, is_source, is_ability) -> jax.Array:
  """Of all groups before, and for each ability of its training and of the sources and itself after it."""
  length = groups.tokens.shape[-1]
  count = lambda rows: length * (rows.segment_ids > 0).any(axis=-1).reshape(len(rows.tokens), -1).sum(axis=1)
  of_groups, trained = count(groups), count(train_rows)  # those of absent ones are empty
  sources, abilities = of_groups[: len(is_source)].sum(), of_groups[len(is_source) :].sum()
  return (sources * (1 + is_ability.sum()) + 2 * abilities + trained.sum()).astype(jnp.float32)


def _drop(before: jax.Array, after: jax.Array) -> jax.Array:
  """Relative drop of a loss, in [-3, 1]; -3 where the loss after is not finite."""
  drop = 1.0 - after / jnp.maximum(before, _LOSS_FLOOR)
  return jnp.clip(jnp.where(jnp.isfinite(after), drop, -_BOUND), -_BOUND, 1.0)


def _cosines(x: jax.Array, y: jax.Array) -> jax.Array:
  """`[n, m]` cosines of `[n, dim]` and `[m, dim]`; 0 with a zero vector."""
  normed = [_ratio(v, jnp.linalg.norm(v, axis=1, keepdims=True)) for v in (x, y)]
  return matching.product(normed[0], normed[1].T)


def _ratio(x: jax.Array, y: jax.Array) -> jax.Array:
  """x / y, 0 where y is 0."""
  return jnp.where(y > 0, x / jnp.where(y > 0, y, 1.0), 0.0)
