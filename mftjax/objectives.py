"""Losses on every ability -> the one number that the outer step lowers."""

import jax
import jax.numpy as jnp


def weighted_mean(losses: jax.Array, weights: jax.Array) -> jax.Array:
  """Mean of the ability losses by weight.

  Args:
    losses: `[num_abilities]` mean token cross-entropy, nats.
    weights: `[num_abilities]` non-negative, not all zero.

  Returns:
    Scalar, nats: sum(weights * losses) / sum(weights).
  """
  return jnp.sum(weights * losses) / jnp.sum(weights)
