"""Losses on every ability -> the one number that the outer step lowers.

Everywhere below an ability of weight 0 is absent: its loss may be anything, NaN included, and neither the value nor
the gradient sees it. At least one ability is present.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mftjax import errors


def _only_present(values: jax.Array, weights: jax.Array | None, fill: float = 0.0) -> jax.Array:
  """`values` with `fill` for absent abilities."""
  # Called before any arithmetic: a NaN that is masked after it comes back in the gradient.
  return values if weights is None else jnp.where(weights > 0, values, fill)


def weighted_mean(losses: jax.Array, weights: jax.Array) -> jax.Array:
  """Mean of the ability losses by weight.

  Args:
    losses: `[num_abilities]` mean token cross-entropy, nats.
    weights: `[num_abilities]` non-negative, not all zero.

  Returns:
    Scalar, nats: sum(weights * losses) / sum(weights).
  """
  return jnp.sum(weights * _only_present(losses, weights)) / jnp.sum(weights)


def worst(losses: jax.Array, weights: jax.Array, temperature: float | jax.Array) -> jax.Array:
  """Smooth maximum of the ability losses.

  Args:
    losses: `[num_abilities]` nats.
    weights: `[num_abilities]` only whether an ability is present counts, not how much it weighs.
    temperature: nats, above 0; the maximum itself in the limit 0.

  Returns:
    Scalar, nats: temperature * log sum_present exp(loss / temperature), between the maximum and the maximum plus
    temperature * log(number of present abilities).
  """
  scaled = _only_present(losses, weights) / temperature
  return temperature * jax.nn.logsumexp(scaled, where=weights > 0)


def cvar(losses: jax.Array, weights: jax.Array, fraction: float | jax.Array) -> jax.Array:
  """Mean of the worst `fraction` of the abilities by weight (conditional value at risk).

  Args:
    losses: `[num_abilities]` nats.
    weights: `[num_abilities]` non-negative, not all zero; need not sum to 1.
    fraction: share of the total weight, in (0, 1]; 1 gives the weighted mean, at most the worst ability's share gives
      the maximum. The ability that crosses the share counts with the part that fits.

  Returns:
    Scalar, nats: min_t t + sum_i p_i max(loss_i - t, 0) / fraction, with p = weights / sum(weights).

  Source: Rockafellar & Uryasev, Conditional value-at-risk for general loss distributions (2002), Theorem 10
  (the minimum) and Proposition 8 (the sorted sum computed here).
  """
  order = jnp.argsort(_only_present(losses, weights, -jnp.inf), descending=True)
  mass = (weights / jnp.sum(weights))[order]
  worse = jnp.cumsum(mass) - mass  # [num_abilities] mass of the abilities before this one
  taken = jnp.clip(fraction - worse, 0.0, mass)
  # By the sum and not by `fraction`: they are equal up to rounding, and a mean of equal losses stays exact.
  return jnp.sum(taken * _only_present(losses, weights)[order]) / jnp.sum(taken)


@flax.struct.dataclass
class GroupDroState:
  """Weights that group DRO has put on the abilities so far."""

  log_weights: jax.Array  # [num_abilities] float32, the logarithms of weights that sum to 1


def group_dro_init(num_abilities: int) -> GroupDroState:
  """Equal weights on `num_abilities` abilities."""
  return GroupDroState(log_weights=jnp.full((num_abilities,), -math.log(num_abilities), jnp.float32))


def group_dro_update(
  state: GroupDroState, losses: jax.Array, step_size: float | jax.Array, weights: jax.Array | None = None
) -> GroupDroState:
  """One step of exponentiated gradient ascent on the weights of the abilities.

  Args:
    state: weights q so far.
    losses: `[num_abilities]` nats.
    step_size: 1 / nats, non-negative.
    weights: `[num_abilities]` presence; None: all present. The factor of an absent ability is 1.

  Returns:
    q_i <- q_i exp(step_size * loss_i), divided by their sum. No gradient flows into it.

  Source: Sagawa et al., Distributionally robust neural networks (2020), Algorithm 1.
  """
  gain = step_size * jax.lax.stop_gradient(_only_present(losses, weights))
  return GroupDroState(log_weights=jax.nn.log_softmax(state.log_weights + gain.astype(state.log_weights.dtype)))


def group_dro(state: GroupDroState, losses: jax.Array, weights: jax.Array | None = None) -> jax.Array:
  """Loss under the weights that group DRO keeps.

  Args:
    state: after `group_dro_update` with these losses (Algorithm 1 updates the weights first).
    losses: `[num_abilities]` nats.
    weights: `[num_abilities]` presence; None: all present.

  Returns:
    Scalar, nats: sum_i q_i loss_i, q rescaled to sum 1 over the present abilities.

  Source: Sagawa et al. (2020), Algorithm 1.
  """
  present = None if weights is None else weights > 0
  q = jax.lax.stop_gradient(jax.nn.softmax(state.log_weights, where=present))
  return jnp.sum(q * _only_present(losses, weights))


def excess_loss(losses: jax.Array, reference: jax.Array) -> jax.Array:
  """Loss left to remove on each ability, clipped at zero.

  Args:
    losses: `[num_abilities]` nats.
    reference: `[num_abilities]` the same for the reference model (single-task tuning), nats.

  Returns:
    `[num_abilities]` max(losses - reference, 0), nats.

  Source: DoReMi (Xie et al., 2023), Section 2, step 2.
  """
  return jax.nn.relu(losses - reference)


def normalised_improvement(
  losses: jax.Array, base: jax.Array, reference: jax.Array, minimum_gain: float | jax.Array = 0.05
) -> jax.Array:
  """Improvement over the base model, each ability in units of what single-task tuning gains.

  Args:
    losses: `[num_abilities]` nats.
    base: `[num_abilities]` losses of the model before tuning, nats.
    reference: `[num_abilities]` losses after tuning on that ability alone, nats.
    minimum_gain: nats, above 0, the smallest unit. Where single-task tuning gains less than this, or nothing, or harms
      (base <= reference), `minimum_gain` is the unit: improvement stays positive for a loss below base, and the unit
      neither vanishes nor turns negative.

  Returns:
    `[num_abilities]` (base - losses) / max(base - reference, minimum_gain): 0 at base, 1 at the reference.
  """
  return (base - losses) / jnp.maximum(base - reference, minimum_gain)


def nash(improvements: jax.Array, weights: jax.Array, floor: float | jax.Array = 0.1) -> jax.Array:
  """Minus the Nash product of the improvements, in logarithms.

  Args:
    improvements: `[num_abilities]` for example from `normalised_improvement`; any sign.
    weights: `[num_abilities]` bargaining powers, non-negative, not all zero.
    floor: above 0. Below it the logarithm goes on as its tangent, log(floor) + (x - floor) / floor, so that a model
      that has not improved yet has a finite value and the slope 1 / floor.

  Returns:
    Scalar: -sum_i weights_i log(improvement_i) / sum(weights). exp(-value) is the weighted geometric mean where every
    improvement is above the floor.

  Source: Nash, The bargaining problem (1950); as an objective over tasks, Navon et al., Nash-MTL (2022).
  """
  x = _only_present(improvements, weights, 1.0)
  above = jnp.log(jnp.maximum(x, floor))
  return -weighted_mean(above + jnp.minimum(x - floor, 0.0) / floor, weights)


def retention_violation(
  losses: jax.Array, base: jax.Array, tolerance: float | jax.Array, weights: jax.Array | None = None
) -> jax.Array:
  """How far each ability is beyond what it may lose; signed, so that slack is negative.

  Args:
    losses: `[num_abilities]` nats.
    base: `[num_abilities]` losses before tuning, nats.
    tolerance: scalar or `[num_abilities]`, nats that an ability may lose.
    weights: `[num_abilities]` presence; None: all present.

  Returns:
    `[num_abilities]` losses - base - tolerance, nats; 0 for an absent ability, which leaves its multiplier as it is.
  """
  margin = _only_present(losses, weights) - _only_present(base + jnp.zeros_like(losses), weights)
  return _only_present(margin - tolerance, weights)


def lagrangian(objective: jax.Array, violation: jax.Array, multipliers: jax.Array) -> jax.Array:
  """Objective plus the priced violations.

  Args:
    objective: scalar.
    violation: `[num_constraints]` g, met where <= 0.
    multipliers: `[num_constraints]` lambda, non-negative.

  Returns:
    Scalar: objective + sum_i lambda_i g_i; to be lowered in the parameters and raised in the multipliers.
  """
  return objective + jnp.sum(multipliers * violation)


def augmented_lagrangian(
  objective: jax.Array, violation: jax.Array, multipliers: jax.Array, penalty: float | jax.Array
) -> jax.Array:
  """The Lagrangian with a quadratic term, which damps the swings of dual ascent.

  Args:
    objective: scalar.
    violation: `[num_constraints]` g, met where <= 0.
    multipliers: `[num_constraints]` lambda, non-negative.
    penalty: rho, above 0; also the step size that suits `update_multipliers`.

  Returns:
    Scalar: objective + sum_i (max(0, lambda_i + rho g_i)^2 - lambda_i^2) / (2 rho).

  Source: Rockafellar (1973); Nocedal & Wright, Numerical Optimization (2006), Section 17.4.
  """
  priced = jax.nn.relu(multipliers + penalty * violation)
  return objective + jnp.sum(priced**2 - multipliers**2) / (2 * penalty)


def update_multipliers(multipliers: jax.Array, violation: jax.Array, step_size: float | jax.Array) -> jax.Array:
  """One step of dual ascent, projected on lambda >= 0.

  Args:
    multipliers: `[num_constraints]` non-negative.
    violation: `[num_constraints]` from `retention_violation`.
    step_size: non-negative.

  Returns:
    `[num_constraints]` max(0, multipliers + step_size * violation).
  """
  return jax.nn.relu(multipliers + step_size * violation)


@flax.struct.dataclass
class Context:
  """What an objective may know besides the losses. `build` sets the options; the others keep these defaults."""

  weights: jax.Array  # [num_abilities] float32, non-negative; 0 = absent
  base: jax.Array  # [num_abilities] float32, losses before tuning, nats
  reference: jax.Array  # [num_abilities] float32, losses after tuning on that ability alone, nats
  temperature: float | jax.Array = 0.1  # > 0, of the smooth maximum: nats, or units of `normalised_improvement`
  fraction: float | jax.Array = 0.5  # (0, 1], the share that `cvar` looks at
  floor: float | jax.Array = 0.1  # > 0, improvement below which `nash` goes on linearly
  minimum_gain: float | jax.Array = 0.05  # > 0, nats, the smallest unit of improvement


def _excess(losses: jax.Array, context: Context) -> jax.Array:
  return weighted_mean(excess_loss(losses, context.reference), context.weights)


def _improvement(losses: jax.Array, context: Context) -> jax.Array:
  losses, base, reference = (_only_present(x, context.weights) for x in (losses, context.base, context.reference))
  return normalised_improvement(losses, base, reference, context.minimum_gain)


Objective = Callable[[jax.Array, Context], jax.Array]

OBJECTIVES: dict[str, Objective] = {
  "mean": lambda losses, context: weighted_mean(losses, context.weights),
  "worst": lambda losses, context: worst(losses, context.weights, context.temperature),
  "cvar": lambda losses, context: cvar(losses, context.weights, context.fraction),
  "excess": _excess,
  "normalised": lambda losses, context: -weighted_mean(_improvement(losses, context), context.weights),
  "nash": lambda losses, context: nash(_improvement(losses, context), context.weights, context.floor),
  "worst_normalised": lambda losses, context: worst(
    -_improvement(losses, context), context.weights, context.temperature
  ),
}

# The options that each objective reads, all of them fields of Context.
OPTIONS: dict[str, tuple[str, ...]] = {
  "mean": (),
  "worst": ("temperature",),
  "cvar": ("fraction",),
  "excess": (),
  "normalised": ("minimum_gain",),
  "nash": ("floor", "minimum_gain"),
  "worst_normalised": ("temperature", "minimum_gain"),
}

# Besides OBJECTIVES, those that carry a state from one outer step to the next, with their options.
STATEFUL: dict[str, tuple[str, ...]] = {
  "group_dro": ("step_size",),
  "retention": ("tolerance", "step_size", "penalty"),
}

NAMES = (*OBJECTIVES, *STATEFUL)
NEED_BASE = ("normalised", "nash", "worst_normalised", "retention")
NEED_REFERENCE = ("excess", "normalised", "nash", "worst_normalised")
# Of an ability's weight these read only whether it is above 0.
IGNORE_WEIGHTS = ("worst", "worst_normalised", "group_dro")


def build(name: str, **options: float) -> Objective:
  """The objective of that name with its options set.

  Args:
    name: a word of `OBJECTIVES`.
    **options: those of `OPTIONS[name]`; they go before what the Context says.

  Returns:
    `objective(losses, context) -> scalar`, to be lowered; jit-able and differentiable.

  Raises:
    errors.InputError: an unknown name or option, or a value out of range.

  Example:
    `objectives.build("cvar", fraction=0.25)(losses, objectives.Context(weights, base, reference))`
  """
  if name not in OBJECTIVES:
    raise errors.unknown_name("objective", name, OBJECTIVES)
  for option, value in options.items():
    if option not in OPTIONS[name]:
      if not OPTIONS[name]:
        raise errors.InputError(f"Objective {name!r} has no options; given: {option!r}.")
      raise errors.unknown_name(f"option of objective {name!r}", option, OPTIONS[name])
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    largest = 1.0 if option == "fraction" else math.inf
    if not (is_number and math.isfinite(value) and 0 < value <= largest):
      allowed = "a number in (0, 1]" if option == "fraction" else "a finite number above 0"
      raise errors.InputError(f"Option {option!r} of objective {name!r} is {value!r}; it must be {allowed}.")
  return lambda losses, context: OBJECTIVES[name](losses, dataclasses.replace(context, **options))


def check_preference(vector: Any, num_abilities: int) -> jax.Array:
  """A preference over the abilities, checked: how much each one counts.

  Args:
    vector: `num_abilities` numbers, finite, non-negative, of sum 1 within 1e-4.
    num_abilities: how many abilities there are.

  Returns:
    `[num_abilities]` float32, as given.

  Raises:
    errors.InputError: it is anything else; the message names what was given.
  """
  wanted = f"a preference is {num_abilities} finite, non-negative numbers of sum 1"
  try:
    values = np.asarray(vector, dtype=np.float64)
  except (TypeError, ValueError) as error:
    raise errors.InputError(f"The preference {vector!r} is not a list of numbers; {wanted}.") from error
  if values.shape != (num_abilities,):
    raise errors.InputError(f"The preference {vector!r} has the shape {values.shape}; {wanted}.")
  if not np.all(np.isfinite(values)) or np.any(values < 0):
    place = int(np.flatnonzero(~np.isfinite(values) | (values < 0))[0])
    raise errors.InputError(f"The preference {vector!r} has {values[place]} at place {place}; {wanted}.")
  if abs(values.sum() - 1.0) > 1e-4:
    raise errors.InputError(f"The preference {vector!r} has the sum {values.sum():.6g}; {wanted}.")
  return jnp.asarray(values, jnp.float32)
