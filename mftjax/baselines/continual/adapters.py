"""The adapters of all tasks side by side, for methods that give each task a LoRA of its own."""

import jax
import jax.numpy as jnp

from mftjax.models import lora


def empty(params, num_tasks):
  """Room for `num_tasks` LoRAs like `params`: leaves `[num_tasks, ...]` of zeros, which change nothing."""
  return jax.tree.map(lambda x: jnp.zeros((num_tasks, *x.shape), x.dtype), params)


def stored(stack, params, number):
  """The stack with these adapters at a place."""
  return jax.tree.map(lambda all_tasks, own: all_tasks.at[number].set(own), stack, params)


def keep(setup, params, carry, task, values):
  """The `end` of a method with such a stack: the task's adapters go to their place in it."""
  return params, {**carry, "stack": stored(carry["stack"], params, task.number)}


def side_by_side(stack, scale=1.0):
  """One LoRA whose rank is that of all tasks together: its product is `scale` times the sum of their products."""

  def join(path, leaf):  # A [num_tasks, num_layers, in, rank], B [num_tasks, num_layers, rank, out]
    if lora.is_b(path):
      return scale * jnp.moveaxis(leaf, 0, 1).reshape(leaf.shape[1], -1, leaf.shape[-1])
    return jnp.moveaxis(leaf, 0, 2).reshape(*leaf.shape[1:3], -1)

  return jax.tree.map_with_path(join, stack)


def fresh(params, key):
  """Adapters like `params` with A drawn anew, as `lora.add` draws it, and B zero."""
  keys = iter(jax.random.split(key, len(jax.tree.leaves(params))))

  def draw(path, leaf):
    if lora.is_b(path):
      return jnp.zeros_like(leaf)
    return lora.draw_a(next(keys), leaf.shape)

  return jax.tree.map_with_path(draw, params)
