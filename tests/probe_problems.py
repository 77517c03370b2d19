"""A bigram model and a small task that the tests of the probe share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mftjax import features, types

VOCAB, LENGTH, ROWS = 12, 10, 6
TRAINED = 3  # more rows of each ability, which the probe trains on
OPTIONS = features.Probe(rows=ROWS, num_steps=2, batch_size=2, learning_rate=0.05, match_steps=300)
BUDGET = 5e4  # tokens


def make_params(seed=0, scale=0.5):
  """A bigram model: 144 logits and 48 features of embeddings."""
  keys = jax.random.split(jax.random.key(seed))
  return {
    "embedding": jax.random.normal(keys[0], (VOCAB, 4)),
    "logits": scale * jax.random.normal(keys[1], (VOCAB, VOCAB)),
  }


def apply(params, batch):
  return params["logits"][batch.tokens] + params["embedding"].sum() * 1e-3 * jnp.arange(VOCAB)


def embed(params, batch):
  return jnp.take(params["embedding"], batch.tokens, axis=0)


def make_rows(num_groups, rows=ROWS, seed=0):
  """Rows of two examples with their own distribution of tokens for each group, `[num_groups, rows, LENGTH]`."""
  rng = np.random.default_rng(seed)
  shape = (num_groups, rows, LENGTH)
  drawn = [rng.choice(VOCAB, shape[1:], p=rng.dirichlet(np.full(VOCAB, 0.3))) for _ in range(num_groups)]
  segments = np.broadcast_to([1] * 5 + [2] * 4 + [0], shape)
  return types.Batch(
    tokens=jnp.asarray(np.stack(drawn), jnp.int32),
    loss_mask=jnp.asarray(rng.integers(0, 2, shape) * (segments > 0), jnp.float32),
    segment_ids=jnp.asarray(segments, jnp.int32),
    positions=jnp.zeros(shape, jnp.int32),
    source=jnp.zeros(shape[:2], jnp.int32),
    proposal=jnp.ones(shape[:2], jnp.float32),
  )


def make_task(seed=0, num_sources=4, num_abilities=3):
  """Arguments of `probe` between the model's and the key."""
  rng = np.random.default_rng(seed)
  static = jnp.asarray(rng.normal(size=(num_sources, len(features.STATIC_FEATURES))), jnp.float32)
  weight = jnp.asarray(rng.uniform(0.5, 2.0, num_abilities), jnp.float32)
  rows = make_rows(num_sources, seed=seed), make_rows(num_abilities, ROWS + TRAINED, seed=seed + 100)
  return (*rows, static, jnp.ones(num_sources), weight)


@functools.cache
def compiled(options):
  return jax.jit(lambda params, task, key: features.probe(apply, embed, params, *task, key, options, BUDGET))


def run(task, options=OPTIONS, params=None, key=0):
  return compiled(options)(make_params() if params is None else params, task, jax.random.key(key))
