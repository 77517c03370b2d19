"""The meta-gradient through SFT steps of a transformer with memory: mixed mode against reverse mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mftjax import metagrad, models, sft, types

LENGTH, ROWS, UNROLL = 16, 3, 3


def make_batch(seed: int, *leading: int) -> types.Batch:
  rng = np.random.default_rng(seed)
  shape = (*leading, ROWS, LENGTH)
  segments = np.where(np.arange(LENGTH) < 9, 1, 2)
  positions = np.where(np.arange(LENGTH) < 9, np.arange(LENGTH), np.arange(LENGTH) - 9)
  return types.Batch(
    tokens=jnp.asarray(rng.integers(0, 20, shape), jnp.int32),
    loss_mask=jnp.asarray(rng.integers(0, 2, shape), jnp.float32),
    segment_ids=jnp.broadcast_to(jnp.asarray(segments, jnp.int32), shape),
    positions=jnp.broadcast_to(jnp.asarray(positions, jnp.int32), shape),
    source=jnp.broadcast_to(jnp.arange(ROWS, dtype=jnp.int32), shape[:-1]),
    proposal=jnp.full(shape[:-1], 1 / ROWS, jnp.float32),
  )


def adam(meta_params):
  # With the common eps of 1e-8 updates of entries whose gradient is rounding are as large as any: then two methods
  # differ in f32 by the compiler's order of sums, by less than 1e-5 on one machine and by 4e-5 on another.
  values = {"learning_rate": jnp.exp(meta_params["log_learning_rate"]), "eps": 1e-3}
  return sft.optimizer(values, num_steps=10)


def momentum(meta_params):
  return optax.sgd(jnp.exp(meta_params["log_learning_rate"]), momentum=0.9)


@pytest.mark.parametrize("optimizer", [adam, momentum], ids=["adam", "momentum"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.float64, 1e-12)], ids=["f32", "f64"])
def test_mixed_equals_reverse(optimizer, dtype, tolerance):
  with jax.enable_x64(dtype == jnp.float64):
    mixed, reverse = (gradient(method, optimizer, dtype) for method in ("mixed", "reverse"))
  for name in mixed:
    assert mixed[name].dtype == dtype
    assert np.linalg.norm(reverse[name]) > 0
    error = np.linalg.norm(mixed[name] - reverse[name]) / np.linalg.norm(reverse[name])
    assert error < tolerance, name


def gradient(method, optimizer, dtype):
  """The meta-gradient of each meta-parameter, flattened."""
  shape = models.DecoderConfig(
    family="llama",
    vocab_size=20,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
    attention_bias=False,
    max_length=LENGTH,
    remat=False,
    dtype=dtype,
  )
  model = models.Decoder(shape, rngs=nnx.Rngs(0))
  model.attach_memory(models.Memory(6, 16, 4, 2, rngs=nnx.Rngs(1)), (0,))
  graphdef, memory, params = nnx.split(model, models.MemoryParam, ...)
  # Away from the identity, so that keys get a gradient too. With a noisy query bias the gradients of this seed happen
  # to be a hundred times smaller, and rounding would be the larger part of them.
  noisy = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
  memory = jax.tree.map_with_path(lambda path, x: x if "query_bias" in str(path) else noisy(x), memory)
  # The initial 0.02 leaves gradients near Adam's eps, where rounding of either method would be all one sees.
  params = jax.tree.map(lambda x: x * 5.0 if x.ndim > 1 else x, params)

  def apply(params, memory, batch):
    return nnx.merge(graphdef, memory, params)(batch.tokens, batch.segment_ids, batch.positions)

  def outer_loss(params, meta_params, batch, rng):
    return sft.row_losses(apply(params, meta_params["memory"], batch), batch)[0].mean()

  problem = metagrad.Problem(
    inner_loss=lambda p, m, b, r: functools.partial(sft.inner_loss, apply)(p, m, b),
    outer_loss=outer_loss,
    optimizer=optimizer,
  )
  meta_params = {
    "log_learning_rate": jnp.log(0.01),
    "mixture_logits": jnp.asarray([0.5, -0.3, 0.1]),
    "memory": memory,
  }
  params, meta_params = jax.tree.map(lambda x: x.astype(dtype), (params, meta_params))
  state = metagrad.init(problem, meta_params, params)
  # Held-out rows are rows that were trained on: what remains of the gradient is not mere cancellation.
  batches = make_batch(0, UNROLL)
  held_out = jax.tree.map(lambda x: x[0], batches)
  step = jax.jit(metagrad.value_and_grad(problem, method))
  grad = step(meta_params, state, batches, held_out, jax.random.key(0)).grad
  return {name: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for name, tree in grad.items()}
