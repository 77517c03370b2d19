"""O-LoRA: each task has a LoRA of its own, whose directions are kept orthogonal to those of the earlier tasks.

    loss + strength * sum over earlier tasks t and layers of |A_t^T A|_1

The earlier ones stay as they are, and the model is the sum of all.

Source: Orthogonal Subspace Learning for Language Model Continual Learning (Wang et al., 2023), Section 3.2, equations 6
to 8; the sum of absolute values is that of the reference implementation.
"""

import jax
import jax.numpy as jnp

from mftjax.baselines.continual import adapters
from mftjax.baselines.continual.method import Method
from mftjax.models import lora


def init(setup):
  stack = adapters.empty(setup.params, setup.num_tasks)
  return {"held": setup.held, "stack": stack, "number": jnp.zeros((), jnp.int32)}


def begin(setup, params, carry, task, values, key):
  return adapters.fresh(params, key), {**carry, "number": task.number}


def read(params, carry):
  return adapters.side_by_side(adapters.stored(carry["stack"], params, carry["number"])), carry["held"]


def final(params, carry, values):
  return adapters.side_by_side(carry["stack"]), carry["held"]


def penalty(setup, params, carry, batch, values):
  overlap = lambda stack, own: jnp.sum(jnp.abs(jnp.einsum("tlir,lis->tlrs", stack, own)))
  is_a = lambda path: not lora.is_b(path)
  own = [leaf for path, leaf in jax.tree.leaves_with_path(params) if is_a(path)]
  earlier = [leaf for path, leaf in jax.tree.leaves_with_path(carry["stack"]) if is_a(path)]
  return values["olora_strength"] * sum(map(overlap, earlier, own))


METHOD = Method(
  hyperparameters={"olora_strength": ("log", (1e-3, 1.0))},
  init=init,
  begin=begin,
  read=read,
  final=final,
  penalty=penalty,
  end=adapters.keep,
)
