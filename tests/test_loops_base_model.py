"""The training of small base models: against a table whose best entries are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mftjax.loops import base_model

LENGTH, VOCAB = 6, 5


def table(params, batch):
  """Logits of the token after each token."""
  return params[batch.tokens]


@pytest.fixture(scope="module")
def pools():
  """Pool p counts up by p + 1 from token to token."""
  starts = np.arange(VOCAB)[None, :, None]
  tokens = (starts + np.arange(LENGTH) * np.arange(1, 4)[:, None, None]) % VOCAB
  whole = np.ones(tokens.shape)
  return {
    "tokens": jnp.asarray(tokens, jnp.int32),
    "loss_mask": jnp.asarray(whole, jnp.float32),
    "segment_ids": jnp.asarray(whole, jnp.int32),
    "positions": jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), tokens.shape),
  }


def train(pools, shown, seed=0, num_steps=200):
  start = jnp.zeros((VOCAB, VOCAB))
  return base_model.train(table, start, pools, jnp.asarray(shown), num_steps, 16, jax.random.key(seed), 0.1)


def test_it_learns_the_pools_that_are_shown_and_no_other(pools):
  found = train(pools, [1])
  np.testing.assert_array_equal(np.argmax(found, axis=1), (np.arange(VOCAB) + 2) % VOCAB)
  other = {**pools, "tokens": pools["tokens"].at[0].set(0).at[2].set(0)}
  np.testing.assert_array_equal(train(other, [1]), found)


def test_a_pool_that_stands_twice_is_drawn_twice_as_often(pools):
  """The table's best is the share of each successor."""
  shares = jax.nn.softmax(train(pools, [0, 0, 2], num_steps=400), axis=-1)
  at = np.arange(VOCAB)
  np.testing.assert_allclose(shares[at, (at + 1) % VOCAB], 2 / 3, atol=0.12)
  np.testing.assert_allclose(shares[at, (at + 3) % VOCAB], 1 / 3, atol=0.12)


def test_the_key_says_which_rows_are_drawn(pools):
  np.testing.assert_array_equal(train(pools, [0, 1]), train(pools, [0, 1]))
  assert np.abs(train(pools, [0, 1]) - train(pools, [0, 1], seed=1)).max() > 1e-4
