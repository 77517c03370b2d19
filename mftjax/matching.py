"""Gradients as short vectors, and the mixture of some that comes nearest to another."""

from typing import Any

import jax
import jax.numpy as jnp


def sketch(tree: Any, key: jax.Array, dim: int) -> jax.Array:
  """A short vector whose inner products are unbiased estimates of the pytree's.

  The arrays stand one behind the other; the entry at place i is added, with a random sign, to entry i mod `dim`. The
  relative error of a squared norm is about `sqrt(2 / dim)`. Entries up to `dim` are kept as they are, without signs.

  Args:
    tree: floating arrays.
    key: of the signs; the same for all that are compared.
    dim: length of the sketch.

  Returns:
    `[dim]` f32.

  Source: count sketch (Charikar, Chen and Farach-Colton, 2002) with buckets taken in turn rather than hashed.
  """
  leaves = [leaf.astype(jnp.float32).ravel() for leaf in jax.tree.leaves(tree)]
  total = sum(leaf.size for leaf in leaves)
  if total <= dim:
    return jnp.pad(jnp.concatenate(leaves), (0, dim - total))
  out, start = jnp.zeros(dim), 0
  for number, leaf in enumerate(leaves):
    words = jax.random.bits(jax.random.fold_in(key, number), (-(-leaf.size // 32), 1), jnp.uint32)
    bits = ((words >> jnp.arange(32, dtype=jnp.uint32)) & 1).ravel()[: leaf.size]
    signed = jnp.where(bits == 1, leaf, -leaf)
    out += jnp.roll(jnp.pad(signed, (0, -leaf.size % dim)).reshape(-1, dim).sum(axis=0), start % dim)
    start += leaf.size
  return out


def match_weights(source: jax.Array, target: jax.Array, source_mask: jax.Array, num_steps: int) -> jax.Array:
  """The mixture of the sources that comes nearest to the target: argmin over the simplex of `|w source - target|^2`.

  Accelerated projected gradient, restarted where its momentum points uphill, from equal weights. The mean of the
  sources is subtracted from all, which changes nothing on the simplex but takes away what the sources share.

  Args:
    source: `[num_sources, dim]`.
    target: `[dim]`.
    source_mask: `[num_sources]`, 0 = absent: weight 0.
    num_steps: of the iteration; 1000 are exact to 1e-3 where the Gram matrix's condition number is below about 1e4.

  Returns:
    `[num_sources]` f32 weights, at least 0, with sum 1 (0 without any source).

  Source: Beck and Teboulle (2009), FISTA; O'Donoghue and Candes (2015), Section 3.2, gradient scheme.
  """
  is_source = source_mask > 0
  equal = is_source / jnp.maximum(is_source.sum(), 1)
  source = jnp.where(is_source[:, None], source, 0.0)
  centre = product(equal, source)
  source, target = jnp.where(is_source[:, None], source - centre, 0.0), target - centre
  gram, linear = product(source, source.T), product(source, target)
  largest = jnp.linalg.eigvalsh(gram / jnp.maximum(jnp.trace(gram), jnp.finfo(jnp.float32).tiny))[-1]
  largest = jnp.where(largest > 0, largest, 1.0) * jnp.where(jnp.trace(gram) > 0, jnp.trace(gram), 1.0)

  def step(carry, _):
    weights, ahead, momentum = carry
    new = _project(ahead - (product(gram, ahead) - linear) / largest, is_source)
    momentum = jnp.where(jnp.sum((ahead - new) * (new - weights)) > 0, 1.0, momentum)
    new_momentum = 0.5 * (1.0 + jnp.sqrt(1.0 + 4.0 * momentum**2))
    return (new, new + (momentum - 1.0) / new_momentum * (new - weights), new_momentum), None

  weights = jax.lax.scan(step, (equal, equal, jnp.ones(())), None, num_steps)[0][0]
  return jnp.where(is_source, weights, 0.0)


def _project(values: jax.Array, is_allowed: jax.Array) -> jax.Array:
  """The nearest point of the simplex with 0 where not allowed (Duchi et al., 2008, Figure 1)."""
  # A shift changes nothing, and what is 1 or more below the largest ends at 0: -2 stands for all of that.
  values = values - jnp.max(jnp.where(is_allowed, values, -jnp.inf))
  values = jnp.where(is_allowed, jnp.maximum(values, -2.0), -2.0)
  falling = -jnp.sort(-values)
  excess = (jnp.cumsum(falling) - 1.0) / jnp.arange(1, len(values) + 1)
  threshold = excess[jnp.sum(falling > excess) - 1]
  return jnp.maximum(values - threshold, 0.0)


def product(x: jax.Array, y: jax.Array) -> jax.Array:
  """The matrix product in full f32: an accelerator's quicker one has 3 digits, too few for the Gram matrix."""
  return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
