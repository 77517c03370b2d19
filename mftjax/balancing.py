"""One outer gradient per ability -> the one direction that the outer step follows.

An ability of weight 0 is absent: its gradient may be anything, NaN included, and has no influence. At least one ability
is present. `mgda` and `pcgrad` need the gradients; FAMO needs the losses only and stands apart from `BALANCERS`: it
weighs the losses of one backward pass.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.flatten_util
import jax.numpy as jnp

from mftjax import errors, types


def flatten(gradients: Any) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
  """Gradients as the rows of one matrix.

  Args:
    gradients: pytree whose leaves have a leading axis `[num_abilities, ...]`.

  Returns:
    `[num_abilities, dim]`, and the function that turns `[dim]` back into a pytree without the leading axis.
  """
  rows = jax.vmap(lambda gradient: jax.flatten_util.ravel_pytree(gradient)[0])(gradients)
  _, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(lambda leaf: leaf[0], gradients))
  return rows, unravel


def _only_present(grads: jax.Array, weights: jax.Array) -> jax.Array:
  grads = grads.astype(types.at_least_f32(grads.dtype))
  return jnp.where(weights[:, None] > 0, grads, 0.0)


def _products(grads: jax.Array) -> jax.Array:
  """`[num_abilities, num_abilities]` inner products of the rows."""
  # HIGHEST: the solutions are differences of these products, which TF32's ten bits would drown.
  return jnp.matmul(grads, grads.T, precision=jax.lax.Precision.HIGHEST)


def _combine(coefficients: jax.Array, grads: jax.Array) -> jax.Array:
  return jnp.matmul(coefficients.astype(grads.dtype), grads, precision=jax.lax.Precision.HIGHEST)


def weighted_sum(grads: jax.Array, weights: jax.Array) -> jax.Array:
  """The gradient without balancing.

  Args:
    grads: `[num_abilities, dim]`.
    weights: `[num_abilities]` non-negative.

  Returns:
    `[dim]` sum_i weights_i grads_i.
  """
  return _combine(weights, _only_present(grads, weights))


def mgda_coefficients(grads: jax.Array, weights: jax.Array, num_iterations: int = 1000) -> jax.Array:
  """Coefficients of the point of least norm in the convex hull of the gradients.

  Args:
    grads: `[num_abilities, dim]`.
    weights: `[num_abilities]` only whether an ability is present counts.
    num_iterations: steps of Frank-Wolfe, each O(num_abilities^2). Two abilities need one; six gradients whose lengths
      differ tenfold need hundreds.

  Returns:
    `[num_abilities]` non-negative, sum 1, 0 for absent abilities: argmin |sum_i coefficient_i grads_i|^2.

  Source: Désidéri (2012); Sener & Koltun (2018), Equation 3 and Algorithm 2 (Frank-Wolfe with exact line
  search), here with pairwise steps (Lacoste-Julien & Jaggi, 2015, Algorithm 2), which converge linearly where the
  plain ones zigzag.
  """
  grads = _only_present(grads, weights)
  present = weights > 0
  products = _products(grads)
  # The solution does not depend on the scale; dividing keeps squares of tiny gradients away from underflow.
  largest = jax.lax.stop_gradient(jnp.max(jnp.diagonal(products)))
  products = products / jnp.where(largest > 0, largest, 1.0)

  def step(_: int, coefficients: jax.Array) -> jax.Array:
    slopes = products @ coefficients  # [num_abilities] inner products with the present point
    toward = jnp.argmin(jnp.where(present, slopes, jnp.inf))
    away = jnp.argmax(jnp.where(coefficients > 0, slopes, -jnp.inf))
    gap = slopes[away] - slopes[toward]
    curvature = products[toward, toward] - 2 * products[toward, away] + products[away, away]
    is_curved = curvature > 0
    length = jnp.where(is_curved, gap / jnp.where(is_curved, curvature, 1.0), 0.0)
    length = jnp.clip(length, 0.0, coefficients[away])
    return coefficients.at[toward].add(length).at[away].add(-length)

  start = present.astype(grads.dtype) / jnp.sum(present)
  return jax.lax.fori_loop(0, num_iterations, step, start)


def mgda(grads: jax.Array, weights: jax.Array, num_iterations: int = 1000) -> jax.Array:
  """The point of least norm in the convex hull of the gradients: a descent direction for every ability, or 0.

  Args:
    grads: `[num_abilities, dim]`.
    weights: `[num_abilities]` only whether an ability is present counts.
    num_iterations: see `mgda_coefficients`.

  Returns:
    `[dim]` d with grads_i . d >= |d|^2 for every present ability; 0 at a Pareto-stationary point.

  Source: Désidéri, Multiple-gradient descent algorithm (2012); Sener & Koltun (2018), Equation 3.
  """
  coefficients = mgda_coefficients(grads, weights, num_iterations)
  return _combine(coefficients, _only_present(grads, weights))


def pcgrad(grads: jax.Array, weights: jax.Array, key: jax.Array) -> jax.Array:
  """Sum of the gradients, each without its part that goes against the others.

  Args:
    grads: `[num_abilities, dim]`.
    weights: `[num_abilities]` non-negative; factors of the terms of the sum (1 in the paper).
    key: random key; each gradient meets the others in an order of its own.

  Returns:
    `[dim]` sum_i weights_i g_i, where for each other present j in turn g_i <- g_i - min(g_i . grads_j, 0) grads_j /
    |grads_j|^2, from g_i = grads_i.

  Source: Yu et al., Gradient surgery for multi-task learning (2020), Algorithm 1.
  """
  grads = _only_present(grads, weights)
  num_abilities = grads.shape[0]
  products = _products(grads)

  def project(ability: jax.Array, order_key: jax.Array) -> jax.Array:
    # g_i as coefficients [num_abilities] on the gradients: every inner product is then a row of `products`.
    def meet(coefficients: jax.Array, other: jax.Array) -> tuple[jax.Array, None]:
      squared_norm = products[other, other]
      is_other = (other != ability) & (squared_norm > 0)
      conflict = jnp.minimum(coefficients @ products[:, other], 0.0)
      part = jnp.where(is_other, conflict / jnp.where(squared_norm > 0, squared_norm, 1.0), 0.0)
      return coefficients.at[other].add(-part), None

    order = jax.random.permutation(order_key, num_abilities)
    return jax.lax.scan(meet, jax.nn.one_hot(ability, num_abilities, dtype=grads.dtype), order)[0]

  coefficients = jax.vmap(project)(jnp.arange(num_abilities), jax.random.split(key, num_abilities))
  return _combine(weights @ coefficients, grads)


@flax.struct.dataclass
class FamoState:
  """What FAMO remembers between steps."""

  logits: jax.Array  # [num_abilities] float32; their softmax z is the share of each log-loss


def famo_init(num_abilities: int) -> FamoState:
  """Equal shares for `num_abilities` abilities."""
  return FamoState(logits=jnp.zeros((num_abilities,), jnp.float32))


# Losses enter FAMO as logarithms; below this one is as good as solved.
_SMALLEST_LOSS = 1e-8


def _shares(state: FamoState, weights: jax.Array | None) -> jax.Array:
  return jax.nn.softmax(state.logits, where=None if weights is None else weights > 0)


def _positive(losses: jax.Array, weights: jax.Array | None) -> jax.Array:
  losses = losses if weights is None else jnp.where(weights > 0, losses, 1.0)
  return jax.lax.stop_gradient(jnp.maximum(losses, _SMALLEST_LOSS))


def famo_weights(state: FamoState, losses: jax.Array, weights: jax.Array | None = None) -> jax.Array:
  """Weights of the losses in this step.

  Args:
    state: logits so far.
    losses: `[num_abilities]` positive, at the parameters before the step.
    weights: `[num_abilities]` presence; None: all present.

  Returns:
    `[num_abilities]` sum 1, 0 for absent abilities, no gradient: c z_i / loss_i with z = softmax(logits) and
    c = 1 / sum_i (z_i / loss_i). Lower sum_i of these times loss_i.

  Source: Liu et al., FAMO (2023), Algorithm 1, step of the parameters.
  """
  by_loss = jax.lax.stop_gradient(_shares(state, weights)) / _positive(losses, weights)
  return by_loss / jnp.sum(by_loss)


def famo_update(
  state: FamoState,
  losses_before: jax.Array,
  losses_after: jax.Array,
  learning_rate: float | jax.Array,
  weights: jax.Array | None = None,
  decay: float | jax.Array = 1e-3,
) -> FamoState:
  """More share for the abilities whose log-loss fell least in the step just taken.

  Args:
    state: logits xi so far.
    losses_before: `[num_abilities]` positive, before the step of the parameters.
    losses_after: `[num_abilities]` the same data after the step.
    learning_rate: beta, of the logits.
    weights: `[num_abilities]` presence; None: all present. The logit of an absent ability stays as it is.
    decay: gamma, pull of the logits towards 0. The rates become equal only as far as it is small beside delta, and
      only if beta is large enough to outrun the factor 1 / loss, which favours whoever is ahead.

  Returns:
    xi <- xi - beta (delta + gamma xi), delta_i = z_i (r_i - sum_j z_j r_j), r = log(losses_before / losses_after).

  Source: Liu et al., FAMO (2023), Algorithm 1, step of the logits.
  """
  rates = jnp.log(_positive(losses_before, weights)) - jnp.log(_positive(losses_after, weights))
  shares = _shares(state, weights)
  delta = shares * (rates - jnp.sum(shares * rates))
  logits = state.logits - learning_rate * (delta + decay * state.logits)
  if weights is not None:
    logits = jnp.where(weights > 0, logits, state.logits)
  return FamoState(logits=logits.astype(state.logits.dtype))


BALANCERS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
  "sum": lambda grads, weights, key: weighted_sum(grads, weights),
  "mgda": lambda grads, weights, key: mgda(grads, weights),
  "pcgrad": pcgrad,
}

WORDS = ("none", "mgda", "pcgrad", "famo")  # of a config; "none" is the gradient of its objective


def balance(name: str, gradients: Any, weights: jax.Array, key: jax.Array) -> Any:
  """One direction out of the abilities' gradients.

  Args:
    name: a word of `BALANCERS`.
    gradients: pytree whose leaves have a leading axis `[num_abilities, ...]`.
    weights: `[num_abilities]` non-negative, not all zero.
    key: random key, read by `pcgrad`.

  Returns:
    Pytree without the leading axis, of the same dtypes.

  Raises:
    errors.InputError: an unknown name.
  """
  if name not in BALANCERS:
    raise errors.unknown_name("gradient balancer", name, BALANCERS)
  grads, unravel = flatten(gradients)
  return unravel(BALANCERS[name](grads, weights, key).astype(grads.dtype))
