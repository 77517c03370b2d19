"""Features of a probed task: symmetries, gradient matching against exact solutions, exact match against decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from flax import nnx
from probe_problems import (
  BUDGET,
  LENGTH,
  OPTIONS,
  ROWS,
  VOCAB,
  apply,
  compiled,
  embed,
  make_params,
  make_rows,
  make_task,
  run,
)

from mftjax import features, matching, models, types
from mftjax.data import tokens
from mftjax.errors import InputError

SKETCHED = dataclasses.replace(OPTIONS, sketch_dim=64)


def assert_close(found, expected, rtol=1e-4, atol=1e-4):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), found, expected)


def select(batch, index):
  return jax.tree.map(lambda x: x[np.asarray(index)], batch)


@pytest.mark.parametrize("options", [OPTIONS, SKETCHED], ids=["exact", "sketched"])
def test_equivariant_to_the_order_of_sources_and_of_abilities(options):
  source_rows, ability_rows, static, mask, weight = make_task()
  order, ability_order = [2, 0, 3, 1], [1, 2, 0]
  found = run((source_rows, ability_rows, static, mask, weight), options)
  task = select((source_rows, static, mask), order), select((ability_rows, weight), ability_order)
  moved = run((task[0][0], task[1][0], task[0][1], task[0][2], task[1][1]), options)
  expected = found.replace(
    source=found.source[jnp.array(order)],
    ability=found.ability[jnp.array(ability_order)],
    pair=found.pair[jnp.array(order)][:, jnp.array(ability_order)],
    match=found.match[jnp.array(order)],
    ability_weight=found.ability_weight[jnp.array(ability_order)],
  )
  assert_close(moved, expected, atol=1e-3)
  assert np.std(found.pair[..., 0]) > 0.02  # there was something to permute


@pytest.mark.parametrize("options", [OPTIONS, SKETCHED], ids=["exact", "sketched"])
def test_absent_entries_are_zero_and_change_nothing(options):
  source_rows, ability_rows, static, mask, weight = make_task(num_sources=3, num_abilities=2)
  alone = run((source_rows, ability_rows, static, mask, weight), options)
  # Tokens that the model does not have.
  more = lambda batch: jax.tree.map(lambda x: jnp.concatenate([jnp.full_like(x[:1], 10**6), x]), batch)
  wide = run(
    (
      *(more(source_rows), more(ability_rows), jnp.concatenate([jnp.full((1, 3), jnp.nan), static])),
      *(jnp.array([0.0, 1, 1, 1]), jnp.concatenate([jnp.zeros(1), weight])),
    ),
    options,
  )
  for name in ("source", "ability", "match", "source_mask", "ability_weight"):
    assert not np.any(getattr(wide, name)[0]), name
    np.testing.assert_allclose(getattr(wide, name)[1:], getattr(alone, name), rtol=1e-4, atol=1e-4, err_msg=name)
  assert not np.any(wide.pair[0]) and not np.any(wide.pair[:, 0])
  np.testing.assert_allclose(wide.pair[1:, 1:], alone.pair, rtol=1e-4, atol=1e-4)
  assert wide.tokens == alone.tokens


def test_empty_rows_fill_up_a_group_without_changing_it():
  """Fewer rows than another group, or an odd number of them, leave means as they are."""
  source_rows, *rest = make_task(seed=3)
  odd = jax.tree.map(lambda x: x[:, :5], source_rows)
  filled = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 1)) + ((0, 0),) * (x.ndim - 2)), odd)
  assert_close(run((odd, *rest)), run((filled, *rest)))


def test_values_against_plain_computation():
  """Loss, spread, gradient norm, cosines, influence and drops after training on an ability, written out once more."""
  task = make_task(seed=1)
  params, found = make_params(), run(task)
  source_rows, ability_rows, _, _, weight = task
  trained_rows = jax.tree.map(lambda x: x[:, ROWS:], ability_rows)
  ability_rows = jax.tree.map(lambda x: x[:, :ROWS], ability_rows)

  def mean_loss(params, rows):
    log_probs = jax.nn.log_softmax(apply(params, rows))
    losses = []
    for r in range(ROWS):
      terms = [
        -log_probs[r, i - 1, rows.tokens[r, i]]
        for i in range(1, LENGTH)
        if rows.loss_mask[r, i] and rows.segment_ids[r, i] == rows.segment_ids[r, i - 1]
      ]
      losses += [jnp.stack(terms).mean()] if terms else []
    return jnp.stack(losses).mean(), jnp.stack(losses)

  gradient = lambda batch, g: jax.grad(mean_loss, has_aux=True)(params, select(batch, g))
  flat = lambda tree: jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
  (s, losses), (a, _) = gradient(source_rows, 2), gradient(ability_rows, 1)
  s, a = flat(s), flat(a)
  row = dict(zip(features.SOURCE_FEATURES, found.source[2], strict=True))
  np.testing.assert_allclose(row["loss"], losses.mean(), rtol=1e-5)
  np.testing.assert_allclose(row["loss_std"], losses.std(), rtol=1e-4)
  np.testing.assert_allclose(row["log_gradient_norm"], jnp.log(jnp.linalg.norm(s)), atol=1e-5)
  pair = dict(zip(features.PAIR_FEATURES, found.pair[2, 1], strict=True))
  np.testing.assert_allclose(pair["cosine"], s @ a / jnp.linalg.norm(s) / jnp.linalg.norm(a), atol=1e-5)
  ratio = s @ a / (a @ a)
  np.testing.assert_allclose(pair["influence"], jnp.sign(ratio) * jnp.log1p(jnp.abs(ratio)), atol=1e-5)

  def trained_on(ability):
    """Two steps, of the first two rows and of the third with the first; the rate falls to a tenth by a cosine."""
    trained, state, rows = params, None, select(trained_rows, ability)
    schedule = lambda step: OPTIONS.learning_rate * jnp.array([0.1 + 0.9 * 0.5, 0.1])[step]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01, eps_root=1e-16))
    state = optimizer.init(params)
    for part in ([0, 1], [2, 0]):
      gradient = jax.grad(lambda p: _plain_mean(apply, p, select(rows, part)))(trained)  # noqa: B023
      updates, state = optimizer.update(gradient, state, trained)
      trained = optax.apply_updates(trained, updates)
    return trained

  after = [trained_on(g) for g in range(3)]
  loss = lambda params, batch, g: mean_loss(params, select(batch, g))[0]
  drops = [1 - loss(after[g], ability_rows, g) / loss(params, ability_rows, g) for g in range(3)]
  np.testing.assert_allclose(found.ability[:, features.ABILITY_FEATURES.index("loss_drop")], drops, atol=1e-5)
  np.testing.assert_allclose(pair["loss_after"], loss(after[1], source_rows, 2), atol=1e-5)
  source_drops = jnp.stack([1 - loss(p, source_rows, 2) / loss(params, source_rows, 2) for p in after])
  np.testing.assert_allclose(pair["loss_drop"], source_drops[1], atol=1e-5)
  assert np.abs(source_drops).max() > 1e-3
  np.testing.assert_allclose(row["best_loss_drop"], source_drops.max(), atol=1e-5)
  np.testing.assert_allclose(row["mean_loss_drop"], found.ability_weight @ source_drops, atol=1e-5)
  transfers = np.clip(source_drops / np.maximum(drops, 0.05), -3, 3)
  np.testing.assert_allclose(pair["transfer"], transfers[1], atol=1e-3)
  np.testing.assert_allclose(row["best_transfer"], transfers.max(), atol=1e-3)
  np.testing.assert_allclose(found.ability[:, features.ABILITY_FEATURES.index("task_log_budget")], np.log(BUDGET))
  s, a = (
    flat(jax.grad(mean_loss, has_aux=True)(after[1], select(batch, g))[0])
    for batch, g in ((source_rows, 2), (ability_rows, 1))
  )
  np.testing.assert_allclose(pair["cosine_after"], s @ a / jnp.linalg.norm(s) / jnp.linalg.norm(a), atol=1e-4)
  np.testing.assert_allclose(found.ability_weight, weight / weight.sum(), rtol=1e-6)
  task_drop = features.ABILITY_FEATURES.index("task_loss_drop")
  np.testing.assert_allclose(found.ability[:, task_drop], found.ability_weight @ jnp.stack(drops), atol=1e-5)


def _plain_mean(apply, params, rows):
  """Mean over rows with a target of the mean loss, in arrays."""
  log_probs = jax.nn.log_softmax(apply(params, rows))[:, :-1]
  mask = rows.loss_mask[:, 1:] * (rows.segment_ids[:, 1:] == rows.segment_ids[:, :-1]) * (rows.segment_ids[:, 1:] > 0)
  picked = jnp.take_along_axis(log_probs, rows.tokens[:, 1:, None], axis=2)[..., 0]
  losses = -jnp.sum(picked * mask, axis=1) / jnp.maximum(mask.sum(axis=1), 1)
  return losses.sum() / (mask.sum(axis=1) > 0).sum()


def test_tokens_are_counted_by_hand():
  """4 x 6 source rows before and after training on each of 3 abilities, twice 6 of its own, and 2 x 2 trained on."""
  assert run(make_task()).tokens == LENGTH * ((1 + 3) * 4 * 6 + 2 * 3 * 6 + 3 * 2 * 2)


def test_a_source_that_answers_as_the_ability_does_becomes_easier_and_a_wrong_one_harder():
  """Three sources with the ability's prompts: its own answers, shuffled ones, and the other tokens of the prompts."""
  rng = np.random.default_rng(0)
  table = rng.permutation(VOCAB)
  prompts = rng.integers(0, VOCAB, (24, 1, 5))

  def rows(answers):
    pairs = np.stack([prompts, answers], axis=-1).reshape(24, 1, 10).swapaxes(0, 1)
    ones = jnp.ones(pairs.shape, jnp.int32)
    mask = jnp.asarray(np.tile([0.0, 1.0], 5) * np.ones(pairs.shape), jnp.float32)
    return types.Batch(jnp.asarray(pairs, jnp.int32), mask, ones, 0 * ones, 0 * ones[..., 0], jnp.ones((1, 24)))

  right, wrong = rows(table[prompts]), rows(rng.permutation(table)[prompts])
  join = lambda *batches: jax.tree.map(lambda *x: jnp.concatenate(x), *batches)
  options = dataclasses.replace(OPTIONS, num_steps=12, batch_size=4, learning_rate=0.2)
  task = (join(right, wrong), right, jnp.zeros((2, 3)), jnp.ones(2), jnp.ones(1))
  drop = run(task, options).pair[:, 0, features.PAIR_FEATURES.index("loss_drop")]
  assert drop[0] > 0.5 and drop[1] < -0.1


def test_sketch_is_exact_when_it_fits():
  tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(4, jnp.bfloat16)}
  out = matching.sketch(tree, jax.random.key(0), 16)
  np.testing.assert_array_equal(out, [0, 1, 2, 3, 4, 5, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0])


def test_sketch_keeps_inner_products_on_average():
  x = {"a": jax.random.normal(jax.random.key(1), (13, 7)), "b": jax.random.normal(jax.random.key(2), (50,))}
  y = jax.tree.map(lambda v: 0.5 * v + jnp.roll(v, 1), x)
  product = lambda key: matching.sketch(x, key, 16) @ matching.sketch(y, key, 16)
  products = np.asarray(jax.vmap(product)(jax.random.split(jax.random.key(3), 4096)))
  exact = sum(float(jnp.vdot(x[name], y[name])) for name in x)
  error = products.std() / np.sqrt(len(products))
  assert abs(products.mean() - exact) < 3 * error
  assert error < 0.05 * abs(exact)
  assert products.std() > 0


@pytest.mark.parametrize("is_shared", [False, True], ids=["apart", "with a large part in common"])
def test_match_equals_nnls_on_the_simplex(is_shared):
  rng = np.random.default_rng(0)
  match = jax.jit(jax.vmap(lambda s, a: matching.match_weights(s, a, jnp.ones(8), 1000)))
  sources = rng.normal(size=(40, 8, 20)) * np.exp(rng.normal(size=(40, 8, 1)))
  targets = np.einsum("ns,nsd->nd", rng.dirichlet(np.full(8, 0.4), 40), sources) + rng.normal(size=(40, 20))
  if is_shared:
    common = 30 * rng.normal(size=(40, 1, 20))
    sources, targets = sources + common, targets + common[:, 0]
  found = np.asarray(match(jnp.asarray(sources), jnp.asarray(targets)), np.float64)
  np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=1e-5)
  assert found.min() >= 0
  for weights, source, target in zip(found, sources, targets, strict=True):
    centre = source.mean(axis=0)  # the same on the simplex, and better conditioned for the row that stands for it
    rows = np.vstack([(source - centre).T, np.full(8, 1e4)])
    exact = scipy.optimize.nnls(rows, np.append(target - centre, 1e4))[0]
    assert 0.5 * np.abs(weights - exact).sum() < 1e-3


@pytest.mark.parametrize("options", [OPTIONS, SKETCHED], ids=["exact", "sketched"])
def test_match_recovers_a_planted_mixture(options):
  """An ability that is made of whole copies of three of the four sources."""
  few = make_rows(4, rows=3, seed=5)
  whole = lambda copies: [g for g, count in enumerate(copies) for _ in range(count)]
  source_rows = jax.tree.map(lambda x: jnp.concatenate([x] * 4, axis=1), few)  # 12 rows: 3, four times
  ability = lambda copies: jax.tree.map(lambda x: x[np.asarray(whole(copies))].reshape(12, *x.shape[2:]), few)
  ability_rows = jax.tree.map(lambda *x: jnp.stack(x), ability([2, 0, 1, 1]), ability([0, 0, 3, 1]))
  static = jnp.zeros((4, len(features.STATIC_FEATURES)))
  options = dataclasses.replace(options, rows=12, match_steps=1000)
  found = run((source_rows, ability_rows, static, jnp.ones(4), jnp.array([3.0, 1.0])), options)
  planted = 0.75 * np.array([2, 0, 1, 1]) / 4 + 0.25 * np.array([0, 0, 3, 1]) / 4
  assert 0.5 * np.abs(found.match - planted).sum() < 0.02
  assert np.all(found.ability[:, features.ABILITY_FEATURES.index("task_match_residual")] < 1e-3)


def test_exact_match_is_that_of_greedy_decoding():
  """On a decoder that was trained on half of the examples, so that some continuations come out right, some not."""
  config = models.DecoderConfig("llama", 16, 16, 32, 1, 2, 2, 8, max_length=16)
  graphdef, params = nnx.split(models.Decoder(config, rngs=nnx.Rngs(0)))
  decode = lambda params, batch: nnx.merge(graphdef, params)(batch.tokens, batch.segment_ids, batch.positions)
  rng = np.random.default_rng(0)
  prompts, answers = rng.integers(3, 16, (8, 3)), rng.integers(3, 16, (8, 3))
  mask = np.array([0.0, 0, 0, 1, 1, 1, 1])
  packed = tokens.pack([(np.array([*p, *a, 2]), mask) for p, a in zip(prompts, answers, strict=True)], 8)
  assert len(packed.tokens) == 8
  batch = types.Batch(
    *(jnp.asarray(x) for x in (packed.tokens, packed.loss_mask, packed.segment_ids, packed.positions)),
    *(jnp.zeros(8, jnp.int32), jnp.ones(8)),
  )
  known = select(batch, np.arange(4))
  optimizer = optax.adam(1e-2)

  def step(carry, _):
    params, state = carry
    updates, state = optimizer.update(jax.grad(lambda p: _plain_mean(decode, p, known))(params), state)
    return (optax.apply_updates(params, updates), state), None

  params = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, 150)[0][0])(params)
  outs = models.generate(nnx.merge(graphdef, params), list(prompts), 4, eos_id=2, pad_id=0)
  is_right = np.array([list(out) == list(answer) for out, answer in zip(outs, answers, strict=True)])
  assert 0 < is_right.sum() < 8
  each = jax.tree.map(lambda x: x[:, None], batch)  # each example an ability of its own
  group = jax.tree.map(lambda x: x[None], batch)
  look_up = lambda params, batch: nnx.merge(graphdef, params).embed(batch.tokens)
  options = dataclasses.replace(OPTIONS, rows=8, num_steps=1)
  task = (group, each, jnp.zeros((1, 3)), jnp.ones(1), jnp.ones(8), jax.random.key(0))
  found = jax.jit(lambda params: features.probe(decode, look_up, params, *task, options, BUDGET))(params)
  np.testing.assert_array_equal(found.ability[:, features.ABILITY_FEATURES.index("exact_match")], is_right)
  np.testing.assert_allclose(found.source[0, features.SOURCE_FEATURES.index("exact_match")], is_right.mean())


def test_vmap_over_tasks_equals_a_loop():
  tasks = [make_task(seed) for seed in range(3)]
  tasks[1] = (*tasks[1][:3], jnp.array([1.0, 0, 1, 0]), jnp.array([0.0, 2.0, 1.0]))
  keys = jax.random.split(jax.random.key(0), 3)
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *tasks)
  found = jax.jit(jax.vmap(lambda task, key: features.probe(apply, embed, make_params(), *task, key, SKETCHED, BUDGET)))
  together = found(stacked, keys)
  single = [compiled(SKETCHED)(make_params(), *pair) for pair in zip(tasks, keys, strict=True)]
  one_by_one = jax.tree.map(lambda *x: jnp.stack(x), *single)
  assert_close(together, one_by_one, atol=1e-3)


@pytest.mark.parametrize("case", ["nothing present", "one of each", "memorised", "diverging", "no targets"])
def test_finite_everywhere(case):
  source_rows, ability_rows, static, mask, weight = make_task()
  params, options = make_params(), OPTIONS
  if case == "nothing present":
    mask, weight = 0 * mask, 0 * weight
  if case == "one of each":
    mask, weight = mask.at[1:].set(0), weight.at[1:].set(0)
  if case == "memorised":  # every row is one token over and over, and the model is sure of it
    source_rows, ability_rows = (b.replace(tokens=0 * b.tokens) for b in (source_rows, ability_rows))
    params = params | {"logits": 1e3 * jnp.eye(VOCAB)}
  if case == "diverging":
    options = dataclasses.replace(OPTIONS, learning_rate=1e38)
  if case == "no targets":
    source_rows = source_rows.replace(loss_mask=0 * source_rows.loss_mask)
  found = run((source_rows, ability_rows, static, mask, weight), options, params)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))
  if case == "nothing present":
    assert not any(np.any(x) for x in jax.tree.leaves(found))
  else:
    np.testing.assert_allclose(found.match.sum(), 1.0, rtol=1e-5)


def test_static_features():
  rows = np.array([[1, 2, 3], [1, 2, 3], [4, 2, 3], [1, 2, 3]], np.int32)
  mask = np.array([[0, 1, 1]] * 4, np.float32)
  found = features.static_features(tokens.Rows(rows, mask, np.ones_like(rows), np.zeros_like(rows), 0))
  np.testing.assert_allclose(found, [np.log(4), np.log(2), 0.5], rtol=1e-6)
  empty = np.zeros((0, 3), np.int32)
  assert not np.any(features.static_features(tokens.Rows(empty, empty, empty, empty, 0)))


def test_wrong_input_is_refused():
  with pytest.raises(InputError, match="learning_rate"):
    features.Probe(learning_rate=0.0)
  with pytest.raises(InputError, match="sketch_dim"):
    features.Probe(sketch_dim=0)
  source_rows, ability_rows, static, mask, weight = make_task()
  with pytest.raises(InputError, match="log_num_rows"):
    run((source_rows, ability_rows, static[:, :2], mask, weight))
  short = jax.tree.map(lambda x: x[..., :8] if x.ndim == 3 else x, ability_rows)
  with pytest.raises(InputError, match="10 and 8"):
    run((source_rows, short, static, mask, weight))
