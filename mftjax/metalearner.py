"""The meta-learner: features of a task -> its hyperparameters, its mixture, and what to expect of them."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mftjax import errors, features, sft

_NEVER = -1e9  # logit of what is absent; finite, so that its gradient is 0
_SMALLEST_MATCH = 1e-3  # weights of gradient matching below this count as this
# Of the hyperparameters' heads. Past the best learning rate the meta-gradient is mostly noise, in which a step of
# Adam's size, which all weights of a head take together, walks on to the bound.
_STEP = 0.05
_ALIKE = 1e-4  # a feature that varies no more than this is rounding: magnified, it would be noise
_RANGE = 4.0  # normalised features are clipped here: an unseen family must not throw the network far out


class Normaliser(nnx.Variable):
  """Mean and spread of a feature over the training meta-tasks; not trained by gradients."""


@flax.struct.dataclass
class Prediction:
  """What a meta-learner says of one task."""

  hyperparameters: dict[str, jax.Array]  # name -> unconstrained f32 scalar (or as the space has it)
  mixture_logits: jax.Array  # [num_sources] f32, -30 where the source is absent
  loss_ratio: jax.Array  # [num_abilities] f32, log of (loss after training / loss of the base model), expected
  log_spread: jax.Array  # [num_abilities] f32, log of its standard deviation

  @property
  def recipe(self) -> dict[str, Any]:
    """The meta-parameters that it stands for, as runs take them."""
    return {"hyperparameters": self.hyperparameters, "mixture_logits": self.mixture_logits}


class MetaLearner(nnx.Module):
  """Deep sets over pairs of sources and abilities; equivariant in the sources, invariant in the abilities' order.

  A message of each pair, averaged over abilities by their weight, joins a source's own features; sources see the mean
  and the maximum of the others; the task is their mean. Every ability wants sources of its own, by what each gains in
  likelihood from training on it, by gradient matching and by the network; the mixture is the mean of these wishes by
  the abilities' shares, which start at their weights. So an ability that is hard to learn is not outbid by an easy
  one. The network's outputs start at zero: an untrained meta-learner predicts the defaults with a gentle preference.

  Args:
    initial: unconstrained values of the hyperparameters it predicts, as of `Space.init`; where it starts from.
    shared: names that get one value for all tasks, not one conditioned on the task.
    width: of its hidden layers.
    sharpness: log-odds per nat of likelihood gained that an ability's wish starts from, > 0.
    rngs: its `params` stream draws the weights.

  Source: Deep Sets (Zaheer et al., 2017), Theorem 2 and Lemma 3.
  """

  def __init__(
    self,
    initial: Mapping[str, jax.Array],
    shared: tuple[str, ...] = (),
    width: int = 48,
    sharpness: float = 4.0,
    *,
    rngs: nnx.Rngs,
  ):
    for name in shared:
      if name not in initial:
        raise errors.unknown_name("shared hyperparameter", name, initial)
    sizes = {name: len(names) for name, names in features.NAMES.items()}
    num_source, num_ability, num_pair = (sizes[name] for name in ("source", "ability", "pair"))
    self.names, self.sharpness = tuple(sorted(initial)), sharpness
    self.shared = tuple(shared)
    self.mean = nnx.data({name: Normaliser(jnp.zeros(size)) for name, size in sizes.items()})
    self.spread = nnx.data({name: Normaliser(jnp.ones(size)) for name, size in sizes.items()})
    self.start = nnx.data({name: Normaliser(jnp.asarray(initial[name])) for name in self.names})
    dense = lambda size_in, size_out: nnx.Linear(size_in, size_out, rngs=rngs)
    zero = lambda size_in, size_out: nnx.Linear(size_in, size_out, kernel_init=nnx.initializers.zeros, rngs=rngs)
    self.ability_in, self.pair_in = dense(num_ability, width), dense(num_source + num_ability + num_pair, width)
    self.pair_out, self.source_in = dense(width, width), dense(num_source + 1 + width, width)
    self.source_mix, self.task_in = dense(3 * width, width), dense(3 * width, width)
    self.mixture_head, self.pair_head, self.share_head = zero(width, 1), zero(width, 1), zero(width, 2)
    self.heads = nnx.data({name: zero(width, int(np.size(initial[name]))) for name in self.names if name not in shared})
    self.offsets = nnx.data({name: nnx.Param(jnp.zeros_like(jnp.asarray(initial[name]))) for name in self.names})
    self.match_gain = nnx.Param(jnp.asarray(0.5, jnp.float32))
    self.outcome_in, self.outcome_head = dense(2 * width, width), zero(width, 2)

  def __call__(self, task: features.Features) -> Prediction:
    """The prediction for one task; `jax.vmap` for many."""
    is_source = (task.source_mask > 0).astype(jnp.float32)
    weight = task.ability_weight / task.ability_weight.sum()
    is_ability = (weight > 0).astype(jnp.float32)
    source = self._normalised("source", task.source) * is_source[:, None]
    ability = self._normalised("ability", task.ability) * is_ability[:, None]
    pair = self._normalised("pair", task.pair) * (is_source[:, None] * is_ability)[..., None]
    num_sources, num_abilities = task.pair.shape[:2]

    wide = [
      jnp.broadcast_to(source[:, None], (num_sources, num_abilities, source.shape[1])),
      jnp.broadcast_to(ability[None], (num_sources, num_abilities, ability.shape[1])),
      pair,
    ]
    by_pair = self.pair_out(nnx.silu(self.pair_in(jnp.concatenate(wide, axis=-1))))  # [sources, abilities, width]
    message = jnp.einsum("sad,a->sd", by_pair, weight)
    log_match = jnp.log(jnp.maximum(task.match, _SMALLEST_MATCH))
    each = nnx.silu(self.source_in(jnp.concatenate([source, log_match[:, None], message], axis=-1)))
    mean, most = _pooled(each, is_source)
    around = jnp.broadcast_to(jnp.concatenate([mean, most]), (num_sources, 2 * each.shape[1]))
    each = each + nnx.silu(self.source_mix(jnp.concatenate([each, around], axis=-1)))

    by_ability = nnx.silu(self.ability_in(ability))  # [abilities, width]
    log_sharpness, log_share = jnp.moveaxis(jnp.asarray(self.share_head(by_ability)), -1, 0)
    wanted = self.sharpness * jnp.exp(log_sharpness) * _likelihood_gain(task)
    wanted = wanted + jnp.asarray(self.pair_head(by_pair))[..., 0]
    wanted = wanted + (self.match_gain[...] * log_match + jnp.asarray(self.mixture_head(each))[:, 0])[:, None]
    wanted = jax.nn.log_softmax(jnp.where(is_source[:, None] > 0, wanted, _NEVER), axis=0)
    log_share = log_share + jnp.log(jnp.where(is_ability > 0, weight, 1.0))
    log_share = jax.nn.log_softmax(jnp.where(is_ability > 0, log_share, _NEVER))
    logits = jax.nn.logsumexp(wanted + log_share, axis=1)
    whole = nnx.silu(self.task_in(jnp.concatenate([*_pooled(each, is_source), weight @ by_ability])))
    hyperparameters = {}
    for name in self.names:
      moved = self.offsets[name][...]
      if name not in self.shared:
        moved = moved + jnp.asarray(self.heads[name](whole)).reshape(moved.shape)
      hyperparameters[name] = self.start[name][...] + _STEP * moved
    # The likelihood's gradient is now and then a thousand times the meta-gradient: it must not reach the shared layers.
    context = jax.lax.stop_gradient(jnp.broadcast_to(whole, by_ability.shape))
    by_ability = jax.lax.stop_gradient(by_ability)
    outcome = jnp.asarray(self.outcome_head(nnx.silu(self.outcome_in(jnp.concatenate([by_ability, context], axis=-1)))))
    return Prediction(
      hyperparameters=hyperparameters,
      mixture_logits=sft.masked_logits(logits, is_source),
      loss_ratio=outcome[:, 0],
      log_spread=jnp.clip(outcome[:, 1] - 1.0, -3.0, 1.0),
    )

  def fit_normaliser(self, tasks: features.Features) -> None:
    """Takes mean and spread of every feature from `[num_tasks, ...]` training tasks, absent entries left out."""
    for name, where in features.present(tasks).items():
      values = np.asarray(getattr(tasks, name))[where]
      self.mean[name][...] = jnp.asarray(values.mean(axis=0))
      spread = values.std(axis=0)
      self.spread[name][...] = jnp.asarray(np.where(spread > _ALIKE, spread, 1.0))

  def _normalised(self, name: str, values: jax.Array) -> jax.Array:
    return jnp.clip((values - self.mean[name][...]) / self.spread[name][...], -_RANGE, _RANGE)


def _likelihood_gain(task: features.Features) -> jax.Array:
  """`[num_sources, num_abilities]` nats by which a source's loss falls after training on an ability.

  Source: cross-entropy difference, Moore and Lewis (2010), Section 2.
  """
  before = task.source[:, features.SOURCE_FEATURES.index("loss")]
  return before[:, None] - task.pair[..., features.PAIR_FEATURES.index("loss_after")]


def _pooled(each: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean and maximum over the present of `[num, width]`."""
  mean = (each * mask[:, None]).sum(axis=0) / jnp.maximum(mask.sum(), 1.0)
  return mean, jnp.max(jnp.where(mask[:, None] > 0, each, -jnp.inf), axis=0)


def log_ratio(loss: jax.Array, base: jax.Array) -> jax.Array:
  """log(loss / base), both floored at 1e-6 nats: what `Prediction.loss_ratio` predicts."""
  return jnp.log(jnp.maximum(loss, 1e-6) / jnp.maximum(base, 1e-6))


def outcome_loss(prediction: Prediction, log_ratio: jax.Array, ability_weight: jax.Array) -> jax.Array:
  """Negative log likelihood of the outcomes under the Gaussian head, nats, mean over the present abilities.

  Args:
    log_ratio: `[num_abilities]` log(loss after training / loss of the base model), observed.
    ability_weight: `[num_abilities]`; 0 = absent.

  Source: Nix and Weigend (1994), equation 2.
  """
  present = (ability_weight > 0).astype(jnp.float32)
  residual = jnp.where(present > 0, log_ratio - prediction.loss_ratio, 0.0)
  nll = 0.5 * jnp.square(residual * jnp.exp(-prediction.log_spread)) + prediction.log_spread
  return (nll * present).sum() / present.sum()


def conformal_scale(
  predictions: Prediction, log_ratio: np.ndarray, ability_weight: np.ndarray, level: float = 0.9
) -> float:
  """Factor on the predicted spread whose intervals cover `level` of outcomes on tasks like these.

  Args:
    predictions: `[num_tasks, ...]`, of held-out meta-tasks.
    log_ratio, ability_weight: `[num_tasks, num_abilities]` what came out, and which of them count.
    level: in (0, 1).

  Returns:
    The ceil((n + 1) level)-th smallest of |observed - predicted| / spread (the largest when n is too small).

  Raises:
    InputError: no outcome.

  Source: split conformal prediction with normalised scores (Lei et al., 2018, Section 5.2).
  """
  present = np.asarray(ability_weight) > 0
  if not present.any():
    raise errors.InputError("Calibration needs the outcome of at least one held-out meta-task.")
  residual = np.abs(np.asarray(log_ratio) - np.asarray(predictions.loss_ratio))
  scores = np.sort((residual / np.exp(np.asarray(predictions.log_spread)))[present])
  rank = min(int(np.ceil((len(scores) + 1) * level)), len(scores))
  return float(scores[rank - 1])
