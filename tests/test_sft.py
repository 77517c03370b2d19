"""The SFT step's loss, weights, schedule and optimiser against closed forms and optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mftjax import sft, types


def make_batch(source=(0, 1, 1), proposal=(0.5, 0.25, 0.25)) -> types.Batch:
  rng = np.random.default_rng(0)
  rows, length = len(source), 6
  return types.Batch(
    tokens=jnp.asarray(rng.integers(0, 5, (rows, length)), jnp.int32),
    loss_mask=jnp.asarray(rng.integers(0, 2, (rows, length)), jnp.float32),
    segment_ids=jnp.asarray([[1, 1, 1, 2, 2, 0]] * rows, jnp.int32),
    positions=jnp.asarray([[0, 1, 2, 0, 1, 0]] * rows, jnp.int32),
    source=jnp.asarray(source, jnp.int32),
    proposal=jnp.asarray(proposal, jnp.float32),
  )


def test_row_losses_equal_a_loop_over_tokens():
  batch = make_batch()
  logits = jax.random.normal(jax.random.key(0), (3, 6, 5))
  losses, counts = sft.row_losses(logits, batch)
  log_probs = np.asarray(jax.nn.log_softmax(logits))
  for row in range(3):
    terms = [
      -log_probs[row, i - 1, batch.tokens[row, i]]
      for i in range(1, 6)
      if batch.loss_mask[row, i] and batch.segment_ids[row, i] == batch.segment_ids[row, i - 1] != 0
    ]
    assert counts[row] == len(terms)
    np.testing.assert_allclose(losses[row], np.mean(terms) if terms else 0.0, rtol=1e-5)


def test_importance_weights_are_unbiased():
  """The mean over the proposal of weight times loss is the mixture's loss, for any logits."""
  logits = jnp.asarray([0.3, -1.0, 2.0])
  proposal, loss_of_source = jnp.asarray([0.2, 0.5, 0.3]), jnp.asarray([1.0, 5.0, 2.0])
  batch = make_batch(source=(0, 1, 2), proposal=tuple(map(float, proposal)))
  expected = jnp.sum(proposal * sft.importance_weights(logits, batch) * loss_of_source)
  np.testing.assert_allclose(expected, jnp.sum(jax.nn.softmax(logits) * loss_of_source), rtol=1e-6)


def test_source_means():
  means = sft.source_means(jnp.asarray([1.0, 2.0, 4.0]), make_batch(), 3)
  np.testing.assert_allclose(means, [1.0, 3.0, 0.0])


def test_schedule_warms_up_and_ends_at_the_floor():
  multiplier = sft.schedule({"warmup_fraction": 0.1, "final_fraction": 0.2}, num_steps=100)
  values = np.asarray([multiplier(step) for step in range(100)])
  np.testing.assert_allclose(values[:10], np.arange(1, 11) / 10, rtol=1e-5)
  np.testing.assert_allclose(values[-1], 0.2, rtol=1e-5)
  assert np.all(np.diff(values[10:]) < 0)


def test_optimizer_equals_optax_adamw():
  values = {
    "learning_rate": 0.01,
    "weight_decay": 0.1,
    "warmup_fraction": 1e-6,
    "final_fraction": 1.0,
    "clip_norm": 1e9,
  }
  ours, theirs = sft.optimizer(values, 10), optax.adamw(0.01, eps_root=1e-16, weight_decay=0.1)
  params = {"w": jnp.asarray([1.0, -2.0])}
  states = [ours.init(params), theirs.init(params)]
  for step in range(3):
    grads = {"w": jnp.asarray([0.3 * step + 0.1, -0.2])}
    mine, states[0] = ours.update(grads, states[0], params)
    reference, states[1] = theirs.update(grads, states[1], params)
    np.testing.assert_allclose(mine["w"], reference["w"], rtol=1e-5)
