"""The SFT step's loss, weights, schedule and optimiser against closed forms and optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mftjax import errors, metagrad, models, sft, types
from mftjax.data import tokens


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


def table(params, memory, batch):
  """Logits of a model that is a table: those of the token after each token."""
  return params["embedding"][batch.tokens]


PARAMS = {"embedding": np.random.default_rng(1).normal(size=(5, 5))}
META = {"mixture_logits": np.asarray([0.2, -0.4]), "memory": None}


def eight_rows() -> types.Batch:
  batch = make_batch((0, 1, 1, 0, 1, 0, 0, 1), (0.5,) * 8)
  return batch.replace(loss_mask=jnp.ones((8, 6)))


@pytest.mark.parametrize("size", [1, 4, 8])
def test_a_whole_batch_size_is_the_mean_over_the_first_rows(size):
  batch, params = eight_rows(), jax.tree.map(jnp.asarray, PARAMS)
  meta = {"mixture_logits": jnp.asarray(META["mixture_logits"]), "memory": None}
  found = sft.inner_loss(table, params, meta, batch, {"batch_size": jnp.float32(size)})
  wanted = sft.inner_loss(table, params, meta, jax.tree.map(lambda x: x[:size], batch))
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_parts_of_a_batch_share_its_batch_size():
  batch, params = eight_rows(), jax.tree.map(jnp.asarray, PARAMS)
  meta = {"mixture_logits": jnp.asarray(META["mixture_logits"]), "memory": None}
  values = {"batch_size": jnp.float32(6)}
  parts = [jax.tree.map(lambda x, at=at: x[at : at + 4], batch) for at in (0, 4)]
  found = np.mean([sft.inner_loss(table, params, meta, part, values, 8) for part in parts])
  rows = jax.tree.map(lambda x: x[np.asarray([0, 1, 2, 4, 5, 6])], batch)
  np.testing.assert_allclose(found, sft.inner_loss(table, params, meta, rows), rtol=1e-6)


@pytest.mark.parametrize("method", ["mixed", "reverse"])
def test_meta_gradients_of_relaxed_hyperparameters_against_finite_differences(method):
  """The budget ends in the fifth of eight steps, so batch size and stop fraction see that fewer steps are left."""
  start = {
    "batch_size": 3.3,
    "stop_fraction": 0.3,
    "label_smoothing": 0.1,
    "prompt_loss_weight": 0.2,
    "decay_power": 0.7,
    "learning_rate_embedding": 0.6,
  }
  fixed = {"learning_rate": 0.05, "eps": 1e-3}
  values = lambda meta: {**fixed, **jax.tree.map(jnp.exp, meta)}

  def inner_loss(params, meta, batch, rng):
    constant = {"mixture_logits": jnp.asarray(META["mixture_logits"]), "memory": None}
    return sft.inner_loss(table, params, constant, batch, values(meta))

  def outer_loss(params, meta, batch, rng):
    return sft.row_losses(table(params, None, batch), batch)[0].mean()

  problem = metagrad.Problem(inner_loss, outer_loss, lambda meta: sft.optimizer(values(meta), 6, largest_batch=8))
  with jax.enable_x64(True):
    meta = {name: jnp.log(jnp.float64(value)) for name, value in start.items()}
    batch = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, eight_rows())
    batch = batch.replace(loss_mask=batch.loss_mask.at[:, :2].set(0.0))
    batches = jax.tree.map(lambda x: jnp.stack([jnp.roll(x, step, axis=0) for step in range(8)]), batch)
    state = metagrad.init(problem, meta, jax.tree.map(jnp.asarray, PARAMS))
    keys = jax.random.split(jax.random.key(0), 8)

    @jax.jit
    def loss(meta):
      return outer_loss(metagrad.run(problem, meta, state, batches, keys)[0].params, meta, batch, None)

    step = jax.jit(metagrad.value_and_grad(problem, method))
    grad = step(meta, state, batches, batch, jax.random.key(0)).grad
    for name in start:
      numeric = (loss({**meta, name: meta[name] + 1e-5}) - loss({**meta, name: meta[name] - 1e-5})) / 2e-5
      assert abs(numeric) > 1e-5, name
      np.testing.assert_allclose(grad[name], numeric, rtol=1e-5, err_msg=name)


def test_stopping_at_half_is_a_run_with_half_the_budget():
  stopped = sft.schedule({"stop_fraction": jnp.float32(0.5)}, num_steps=20)
  half = sft.schedule({}, num_steps=10)
  values = np.asarray([stopped(step) for step in range(20)])
  np.testing.assert_allclose(values[:10], [half(step) for step in range(10)], rtol=1e-5)
  np.testing.assert_array_equal(values[10:], 0.0)


def test_a_budget_that_ends_within_a_step_counts_for_its_part():
  stopped = sft.schedule({"stop_fraction": 0.375, "final_fraction": 1.0}, num_steps=20)
  np.testing.assert_allclose([stopped(step) for step in (6, 7, 8)], [1.0, 0.5, 0.0])


def test_half_the_batch_has_twice_the_steps():
  relaxed = sft.schedule({"batch_size": jnp.float32(4.0)}, num_steps=10, largest_batch=8)
  ordinary = sft.schedule({}, num_steps=20)
  np.testing.assert_allclose([relaxed(step) for step in range(20)], [ordinary(step) for step in range(20)], rtol=1e-5)
  assert relaxed(20) == 0
  with pytest.raises(errors.InputError, match="needs `largest_batch`"):
    sft.schedule({"batch_size": 4.0}, 10)


def test_after_the_end_params_stay():
  optimizer = sft.optimizer({"stop_fraction": 0.5, "weight_decay": 0.3}, 4)
  params = {"w": jnp.asarray([1.0, -2.0])}
  state = optimizer.init(params)
  for step in range(4):
    updates, state = optimizer.update({"w": jnp.ones(2)}, state, params)
    assert np.all(updates["w"] != 0) if step < 2 else np.all(updates["w"] == 0)


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0, 3.0])
def test_decay_power(power):
  def at(power, step):
    return sft.schedule({"decay_power": power, "warmup_fraction": 1e-6}, num_steps=10)(step)

  cosine = 0.5 * (1 + np.cos(np.pi * np.arange(1, 11) / 10))
  np.testing.assert_allclose(
    [at(jnp.float32(power), s) for s in range(10)], 0.1 + 0.9 * cosine**power, rtol=1e-4, atol=1e-5
  )
  slopes = [jax.grad(at)(jnp.float32(power), float(s)) for s in range(10)]
  assert np.all(np.isfinite(slopes)) and slopes[-1] == 0 and slopes[4] < 0
  assert np.isfinite(jax.grad(at, 1)(jnp.float32(power), 9.0))


def test_label_smoothing_equals_optax():
  batch, logits = make_batch(), jax.random.normal(jax.random.key(0), (3, 6, 5))
  found, _ = sft.row_losses(logits, batch, label_smoothing=0.2)
  labels = optax.smooth_labels(jax.nn.one_hot(batch.tokens[:, 1:], 5), 0.2)
  nll = optax.softmax_cross_entropy(logits[:, :-1], labels)
  mask = batch.loss_mask[:, 1:] * np.asarray([1, 1, 0, 1, 0])
  np.testing.assert_allclose(found, (nll * mask).sum(1) / np.maximum(mask.sum(1), 1), rtol=1e-5)


def test_prompt_loss_weight():
  batch, logits = make_batch(), jax.random.normal(jax.random.key(0), (3, 6, 5))
  found, weight = sft.row_losses(logits, batch, prompt_loss_weight=1.0)
  wanted, count = sft.row_losses(logits, batch.replace(loss_mask=jnp.ones((3, 6))))
  np.testing.assert_allclose(found, wanted, rtol=1e-6)
  np.testing.assert_array_equal(weight, count)


def test_the_derivative_in_the_prompt_weight_with_one_target():
  batch = make_batch().replace(loss_mask=jnp.zeros((3, 6)).at[:, 1].set(1.0))
  logits = jax.random.normal(jax.random.key(0), (3, 6, 5))
  loss = lambda weight: sft.row_losses(logits, batch, prompt_loss_weight=weight)[0].sum()
  np.testing.assert_allclose(jax.grad(loss)(0.0), (loss(1e-3) - loss(0.0)) / 1e-3, rtol=1e-2)


def test_multipliers_equal_one_optimiser_a_group():
  params = {
    "embedding": jnp.ones(2),
    "layers": {
      "q_proj": jnp.ones(2),
      "v_proj_bias": jnp.ones(2),
      "o_proj_lora_a": jnp.ones(2),
      "up_proj": jnp.ones(2),
      "down_proj_lora_b": jnp.ones(2),
      "mlp_norm": jnp.ones(2),
    },
    "norm": jnp.ones(2),
    "head": jnp.ones(2),
    "other": jnp.ones(2),
  }
  factors = {"embedding": 0.0, "attention": 0.5, "mlp": 2.0, "norm": 3.0}
  labels = {
    "embedding": "embedding",
    "layers": {
      "q_proj": "attention",
      "v_proj_bias": "attention",
      "o_proj_lora_a": "attention",
      "up_proj": "mlp",
      "down_proj_lora_b": "mlp",
      "mlp_norm": "norm",
    },
    "norm": "norm",
    "head": "embedding",
    "other": "other",
  }
  common = {"clip_norm": 1e9, "weight_decay": 0.1}
  ours = sft.optimizer({**common, **{f"learning_rate_{g}": jnp.float32(f) for g, f in factors.items()}}, 10)
  one = lambda factor: sft.optimizer({**common, "learning_rate": 1e-3 * factor}, 10)
  theirs = optax.partition({g: one(f) for g, f in {**factors, "other": 1.0}.items()}, labels)
  states = [ours.init(params), theirs.init(params)]
  for step in range(3):
    grads = jax.tree.map(lambda x, step=step: x * (0.1 + step), params)
    mine, states[0] = ours.update(grads, states[0], params)
    wanted, states[1] = theirs.update(grads, states[1], params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), mine, wanted)


def test_traced_common_values_change_nothing():
  batch, logits = make_batch(), jax.random.normal(jax.random.key(0), (3, 6, 5))
  traced = {name: jnp.float32(value) for name, value in sft.DEFAULTS.items()}
  old = ("learning_rate", "weight_decay", "b1", "b2", "eps", "clip_norm", "warmup_fraction", "final_fraction")
  before = sft.optimizer({name: traced[name] for name in old}, 10)
  after = sft.optimizer(traced, 10)
  grads, params = {"head": logits[0]}, {"head": logits[1]}
  first, _ = before.update(grads, before.init(params), params)
  second, _ = after.update(grads, after.init(params), params)
  np.testing.assert_array_equal(first["head"], second["head"])
  losses = sft.row_losses(logits, batch, traced["label_smoothing"], traced["prompt_loss_weight"])[0]
  np.testing.assert_array_equal(losses, sft.row_losses(logits, batch)[0])


def test_a_curriculum_passes_through_its_knots():
  logits = jnp.asarray([[0.0, 1.0], [4.0, -1.0], [2.0, 2.0]])
  progress = jnp.asarray([0.0, 0.25, 0.5, 1.0])
  np.testing.assert_allclose(sft.mixture_at(logits, progress), [[0, 1], [2, 0], [4, -1], [2, 2]])
  np.testing.assert_array_equal(sft.mixture_at(logits[:1], progress), logits[:1].repeat(4, 0))
  np.testing.assert_array_equal(sft.mixture_at(logits[0], progress), logits[:1].repeat(4, 0))
  batch = make_batch().replace(progress=jnp.asarray([0.0, 0.5, 1.0]))
  for row, knot in enumerate(logits):
    wanted = sft.importance_weights(knot, batch)[row]
    np.testing.assert_allclose(sft.importance_weights(logits, batch)[row], wanted, rtol=1e-6)
  with pytest.raises(errors.InputError, match="needs batches with `progress`"):
    sft.importance_weights(logits, make_batch())


def greedy_rows():
  """A decoder, and packed rows of which some examples are just what it would say: `(model, batch, end token)`."""
  config = models.DecoderConfig(
    family="llama",
    vocab_size=12,
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    max_length=64,
  )
  model = models.Decoder(config, rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(model)
  model = nnx.merge(graphdef, jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params))  # so that tokens alternate
  rng = np.random.default_rng(0)
  prompts = [rng.integers(1, 12, size=rng.integers(1, 5)) for _ in range(24)]
  said = models.generate(model, prompts, 8, eos_id=None, pad_id=0)
  end = int(np.bincount(np.concatenate([row[1:] for row in said])).argmax())
  examples = []
  for number, (prompt, own) in enumerate(zip(prompts, said, strict=True)):
    completion = own[: np.argmax(own == end)] if end in own else own
    if number % 4 == 1 and len(completion):
      completion = np.append(completion[:-1], (completion[-1] + 1) % 12)
    if number % 4 == 2:
      completion = completion[:1]
    if number % 4 == 3:
      completion = np.append(completion, 5)
    if len(completion):
      whole = np.concatenate([prompt, completion, [end]]).astype(np.int32)
      examples.append((whole, (np.arange(len(whole)) >= len(prompt)).astype(np.float32)))
  rows = tokens.pack(examples, 28)
  fields = {name: jnp.asarray(getattr(rows, name)) for name in ("tokens", "loss_mask", "segment_ids", "positions")}
  count = len(rows.tokens)
  return model, types.Batch(**fields, source=jnp.zeros(count, jnp.int32), proposal=jnp.ones(count)), end


def test_an_example_is_answered_exactly_if_greedy_generation_says_its_completion():
  model, batch, end = greedy_rows()
  found = sft.exact_matches(model(batch.tokens, batch.segment_ids, batch.positions), batch)
  prompts, wanted, rows = [], [], []
  for row, segments in enumerate(np.asarray(batch.segment_ids)):
    for segment in range(1, segments.max() + 1):
      own = np.asarray(batch.tokens[row])[segments == segment]
      mask = np.asarray(batch.loss_mask[row])[segments == segment] > 0
      prompts.append(own[~mask])
      wanted.append(own[mask][:-1].tolist())
      rows.append(row)
  said = models.generate(model, prompts, 16, eos_id=end, pad_id=0)
  is_right = [mine.tolist() == theirs for mine, theirs in zip(said, wanted, strict=True)]
  np.testing.assert_array_equal(found[0], np.bincount(rows, weights=is_right))
  np.testing.assert_array_equal(found[1], np.bincount(rows))
  assert found[1].max() > 2 and 4 <= sum(is_right) <= len(is_right) - 4


def test_a_row_without_targets_has_no_example():
  batch = make_batch()
  batch = batch.replace(loss_mask=jnp.zeros((3, 6)).at[1, 4].set(1.0).at[2, 3].set(1.0))
  # A segment's first token is no target, since nothing of its own stands before it.
  right, examples = sft.exact_matches(jax.nn.one_hot(jnp.roll(batch.tokens, -1, axis=1), 5), batch)
  np.testing.assert_array_equal(examples, [0, 1, 0])
  np.testing.assert_array_equal(right, [0, 1, 0])
