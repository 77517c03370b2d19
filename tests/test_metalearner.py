"""The meta-learner: symmetries, what it says before training, and that its calibration covers what it claims."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from mftjax import errors, features, metalearner, spaces

NUM_SOURCES, NUM_ABILITIES = 5, 3
SPACE = spaces.Space({"learning_rate": spaces.Log(1e-4, 1e-1), "weight_decay": spaces.Log(1e-4, 1.0)})
START = {"learning_rate": 1e-3, "weight_decay": 0.01}


def random_features(seed, num_present=5, num_wanted=3):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  is_source = np.arange(NUM_SOURCES) < num_present
  weight = np.where(np.arange(NUM_ABILITIES) < num_wanted, rng.uniform(0.5, 1, NUM_ABILITIES), 0.0)
  match = rng.dirichlet(np.ones(NUM_SOURCES)) * is_source
  return features.Features(
    source=normal(NUM_SOURCES, len(features.SOURCE_FEATURES)),
    ability=normal(NUM_ABILITIES, len(features.ABILITY_FEATURES)),
    pair=normal(NUM_SOURCES, NUM_ABILITIES, len(features.PAIR_FEATURES)),
    match=(match / match.sum()).astype(np.float32),
    source_mask=is_source.astype(np.float32),
    ability_weight=(weight / weight.sum()).astype(np.float32),
    tokens=np.float32(0),
  )


@pytest.fixture(scope="module")
def learner():
  """With every weight random, so that no symmetry holds because an output is zero."""
  made = metalearner.MetaLearner(SPACE.init(START), width=16, rngs=nnx.Rngs(0))
  graphdef, params, rest = nnx.split(made, nnx.Param, ...)
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  leaves = [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
  return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves), rest)


def test_permuting_sources_permutes_the_mixture_and_nothing_else(learner):
  task, order = random_features(0), np.asarray([3, 0, 4, 1, 2])
  moved = task.replace(
    source=task.source[order], pair=task.pair[order], match=task.match[order], source_mask=task.source_mask[order]
  )
  a, b = learner(task), learner(moved)
  np.testing.assert_allclose(a.mixture_logits[order], b.mixture_logits, atol=1e-5)
  np.testing.assert_allclose(a.hyperparameters["learning_rate"], b.hyperparameters["learning_rate"], atol=1e-5)
  np.testing.assert_allclose(a.loss_ratio, b.loss_ratio, atol=1e-5)


def test_the_order_of_abilities_does_not_matter(learner):
  task, order = random_features(1), np.asarray([2, 0, 1])
  moved = task.replace(ability=task.ability[order], pair=task.pair[:, order], ability_weight=task.ability_weight[order])
  a, b = learner(task), learner(moved)
  np.testing.assert_allclose(a.mixture_logits, b.mixture_logits, atol=1e-5)
  np.testing.assert_allclose(a.loss_ratio[order], b.loss_ratio, atol=1e-5)


def test_absent_sources_and_abilities_change_nothing(learner):
  task = random_features(2, num_present=3, num_wanted=2)
  garbage = task.replace(
    source=np.where(task.source_mask[:, None] > 0, task.source, 1e3).astype(np.float32),
    ability=np.where(task.ability_weight[:, None] > 0, task.ability, -1e3).astype(np.float32),
  )
  smaller = features.Features(
    source=task.source[:3],
    ability=task.ability[:2],
    pair=task.pair[:3, :2],
    match=task.match[:3],
    source_mask=task.source_mask[:3],
    ability_weight=task.ability_weight[:2],
    tokens=task.tokens,
  )
  a, b, c = learner(task), learner(garbage), learner(smaller)
  np.testing.assert_allclose(a.mixture_logits[:3], b.mixture_logits[:3], atol=1e-5)
  np.testing.assert_allclose(a.mixture_logits[:3], c.mixture_logits, atol=1e-5)
  np.testing.assert_allclose(a.hyperparameters["weight_decay"], c.hyperparameters["weight_decay"], atol=1e-5)
  assert jax.nn.softmax(a.mixture_logits)[3:].max() < 1e-6


@pytest.mark.parametrize("sharpness", [4.0, 0.25])
def test_an_untrained_learner_predicts_the_defaults_and_leans_to_matching_and_likelihood(sharpness):
  made = metalearner.MetaLearner(SPACE.init(START), sharpness=sharpness, rngs=nnx.Rngs(0))
  task = random_features(3)
  found = made(task)
  values = SPACE.constrain(found.hyperparameters)
  assert values["learning_rate"] == pytest.approx(1e-3, rel=1e-5)
  before, after = (
    task.source[:, features.SOURCE_FEATURES.index("loss")],
    task.pair[:, :3, features.PAIR_FEATURES.index("loss_after")],  # of the abilities that are there
  )
  logits = 0.5 * np.log(np.maximum(task.match, 1e-3))[:, None] + sharpness * (before[:, None] - after)
  wanted = scipy.special.softmax(logits, axis=0)  # by each ability
  np.testing.assert_allclose(np.exp(found.mixture_logits), wanted @ task.ability_weight[:3], rtol=1e-4)


def test_a_feature_that_all_tasks_share_says_nothing_even_where_a_new_task_differs_by_rounding():
  made = metalearner.MetaLearner(SPACE.init(START), rngs=nnx.Rngs(0))
  tasks = jax.tree.map(lambda *x: np.stack(x), *(random_features(seed) for seed in range(3)))
  tasks.ability[..., -1] = 9.7
  made.fit_normaliser(tasks)
  normalised = (np.float32(9.7) + 1e-5 - made.mean["ability"][-1]) / made.spread["ability"][-1]
  assert abs(normalised) < 1e-4


def test_a_shared_hyperparameter_is_the_same_for_all_tasks():
  made = metalearner.MetaLearner(SPACE.init(START), shared=("weight_decay",), rngs=nnx.Rngs(0))
  assert set(made.heads) == {"learning_rate"}
  made.offsets["weight_decay"][...] = jnp.asarray(0.7)
  found = [made(random_features(seed)).hyperparameters["weight_decay"] for seed in (4, 5)]
  assert found[0] == found[1]
  with pytest.raises(errors.InputError, match="learning_rate"):
    metalearner.MetaLearner(SPACE.init(START), shared=("learning_rat",), rngs=nnx.Rngs(0))


def test_the_outcome_loss_is_least_at_the_sample_mean_and_spread():
  observed = np.random.default_rng(0).normal(-0.4, 0.2, size=(400, 1)).astype(np.float32)

  def loss(mean, log_spread):
    made = metalearner.Prediction({}, jnp.zeros(1), jnp.full(1, mean), jnp.full(1, log_spread))
    return jax.vmap(lambda one: metalearner.outcome_loss(made, one, jnp.ones(1)))(observed).mean()

  slope = jax.grad(loss, argnums=(0, 1))(float(observed.mean()), float(np.log(observed.std())))
  np.testing.assert_allclose(slope, 0.0, atol=2e-4)
  absent = metalearner.Prediction({}, jnp.zeros(1), jnp.zeros(2), jnp.zeros(2))
  with_nan = metalearner.outcome_loss(absent, jnp.asarray([0.5, jnp.nan]), jnp.asarray([1.0, 0.0]))
  assert with_nan == pytest.approx(0.125)


@pytest.mark.parametrize("level", [0.8, 0.9])
def test_conformal_intervals_cover_what_they_claim(level):
  rng = np.random.default_rng(1)
  # Wrong spreads and heavy tails: calibration has to mend them.
  sample = lambda: 0.3 * rng.standard_t(3, size=(2000, 2))
  zeros = np.zeros((2000, 2))
  made = metalearner.Prediction({}, zeros, zeros, np.log(0.1) + zeros)
  factor = metalearner.conformal_scale(made, sample(), np.ones((2000, 2)), level)
  covered = (np.abs(sample()) <= factor * 0.1).mean()
  assert covered == pytest.approx(level, abs=0.02)
  with pytest.raises(errors.InputError, match="at least one"):
    metalearner.conformal_scale(made, sample(), np.zeros((2000, 2)))
