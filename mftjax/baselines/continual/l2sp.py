"""L2-SP: a quadratic pull towards the weights before the first task.

Source: Explicit Inductive Bias for Transfer Learning (Li et al., 2018), Section 3, equation 2, with all layers alike.
"""

import jax
import jax.numpy as jnp

from mftjax.baselines.continual.method import Method


def squared_distance(params, anchor, weights=None):
  """`sum weights (params - anchor)^2` over all leaves, scalar; weights 1 when left out."""
  weights = jax.tree.map(jnp.ones_like, params) if weights is None else weights
  terms = jax.tree.map(lambda p, a, w: jnp.sum(w * (p - a) ** 2), params, anchor, weights)
  return sum(jax.tree.leaves(terms))


def penalty(setup, params, carry, batch, values):
  return 0.5 * values["l2sp_strength"] * squared_distance(params, setup.params)


METHOD = Method(hyperparameters={"l2sp_strength": ("log", (1e-4, 1.0))}, penalty=penalty)
