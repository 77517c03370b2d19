"""A-GEM: a gradient that would raise the loss on stored rows of the earlier tasks loses that part of it.

    g - (g . g_past) / (g_past . g_past) g_past    where g . g_past < 0

Source: Efficient Lifelong Learning with A-GEM (Chaudhry et al., 2019), Section 4, equation 11.
"""

import jax
import jax.numpy as jnp
import optax

from mftjax.baselines.continual.method import Method


def project(grads, past_grads):
  """The gradient without its part against the past one; zero past gradients leave it as it is."""
  along, squared = optax.tree.vdot(grads, past_grads), optax.tree.vdot(past_grads, past_grads)
  factor = jnp.where(along < 0, along / jnp.maximum(squared, 1e-30), 0.0)
  return jax.tree.map(lambda g, past: g - factor * past, grads, past_grads)


def method(stored_fraction: float) -> Method:
  """A-GEM with this fraction of each earlier task's rows stored."""
  return Method(adjust=project, stored_fraction=stored_fraction)
