"""Training the small base models that procedural experiments fine-tune."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mftjax import metagrad, sft, types


def train(
  apply: Callable[[Any, types.Batch], jax.Array],
  params: Any,
  pools: Mapping[str, jax.Array],
  shown: jax.Array,
  num_steps: int,
  batch_size: int,
  key: jax.Array,
  learning_rate: float = 5e-3,
) -> Any:
  """Params after ordinary training on rows of pools, each row's pool drawn anew.

  Args:
    apply: `(params, batch) -> logits`.
    params: where training starts.
    pools: fields of a Batch's rows, each `[num_pools, num_rows, length]`.
    shown: `[n]` pools to draw from; one that stands there twice is drawn twice as often.
    num_steps, batch_size: of the run.
    key: of the draws.
  """
  uniform = {"mixture_logits": jnp.zeros(1), "memory": None}
  values = {"learning_rate": jnp.float32(learning_rate)}
  loss = lambda params, _, batch, rng: sft.inner_loss(lambda p, memory, b: apply(p, b), params, uniform, batch)
  problem = metagrad.Problem(loss, loss, lambda _: sft.optimizer(values, num_steps))

  @jax.jit
  def run(params, key):
    def draw(key):
      pool_key, row_key = jax.random.split(key)
      pool = jax.random.choice(pool_key, shown, (batch_size,))
      row = jax.random.randint(row_key, (batch_size,), 0, pools["tokens"].shape[1])
      fields = {name: array[pool, row] for name, array in pools.items()}
      return types.Batch(**fields, source=jnp.zeros(batch_size, jnp.int32), proposal=jnp.ones(batch_size))

    keys = jax.random.split(key, num_steps)
    state = metagrad.init(problem, None, params)
    return metagrad.run(problem, None, state, jax.vmap(draw)(keys), keys)[0].params

  return run(params, key)
