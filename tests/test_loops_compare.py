"""Many tasks in one program: against plain runs one by one, and what trains the learner."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import compare as compare_config
from experiments import meta_train as experiment
from mftjax import errors, sft, tracking, types
from mftjax.loops import compare, many_tasks, meta_learn
from mftjax.loops import setting as setting_lib


@pytest.fixture(scope="module")
def config():
  return compare_config.get_config("tiny")


@pytest.fixture(scope="module")
def setting(config):
  return setting_lib.build(config)


@pytest.fixture(scope="module")
def found(config, setting):
  return meta_learn.sample_tasks(config, setting, "unseen", 4, seed=5)


def test_an_outcome_is_that_of_a_plain_training_loop(setting, found):
  tasks = jax.tree.map(lambda x: x[:1], found.tasks).replace(budget=jnp.ones(1))
  task = jax.tree.map(lambda x: x[0], tasks)
  weights, key = many_tasks.mixture(jnp.arange(6.0), task.source_mask), jax.random.key(3)
  values = setting.defaults | {"learning_rate": 3e-3}
  losses = setting.outcome("test", compare.repeated(values, 1), weights[None], tasks, key[None])[0]

  batches = many_tasks.draw(setting.pools, task, weights, key, setting.run.num_steps, setting.run.batch_size)
  optimizer = sft.optimizer({**setting.fixed, "learning_rate": 3e-3}, setting.run.num_steps)
  params, opt_state = setting.model.params, optimizer.init(setting.model.params)

  def loss(params, batch):
    return sft.row_losses(setting.model.apply(params, batch), batch)[0].mean()

  grad = jax.jit(jax.grad(loss))
  for step in range(setting.run.num_steps):
    updates, opt_state = optimizer.update(
      grad(params, jax.tree.map(lambda x, t=step: x[t], batches)), opt_state, params
    )
    params = jax.tree.map(lambda p, u: p + u, params, updates)
  for number, weight in enumerate(task.ability_weight):
    if weight > 0:
      pool = int(task.ability[number].argmax())
      fields = {name: values[pool, :4] for name, values in setting.pools.test.items()}
      batch = types.Batch(**fields, source=jnp.zeros(4, jnp.int32), proposal=jnp.ones(4))
      if task.ability[number, pool] == 1:  # not a planted mixture
        assert losses[number] == pytest.approx(float(loss(params, batch)), rel=1e-4)


def test_the_recipe_gradient_is_the_slope_of_the_whole_run(config, setting, found):
  """Along the mixture's logits and the learning rate, central differences in the very batches of the unroll."""
  task = jax.tree.map(lambda x: x[1], found.tasks)
  differentiate = many_tasks.value_and_grad(setting.model, setting.run, setting.space, setting.fixed, setting.pools)
  scale = setting_lib.task_scale(setting.scale["validation"], task)
  objective = setting_lib.build_objective(scale, task.ability_weight, setting.objective)
  recipe = jax.tree.map(lambda x: x[0], compare.default_recipes(config, setting, 1))
  value = jax.jit(lambda recipe: differentiate(recipe, task, objective, jax.random.key(0)))
  grad = value(recipe)[1]
  step = 2e-2
  moved = lambda sign: {
    **recipe,
    "hyperparameters": {**recipe["hyperparameters"]}
    | {"learning_rate": recipe["hyperparameters"]["learning_rate"] + sign * step},
  }
  slope = (value(moved(1))[0] - value(moved(-1))[0]) / (2 * step)
  assert grad["hyperparameters"]["learning_rate"] == pytest.approx(float(slope), rel=0.05)


def test_filling_up_a_batch_changes_nothing():
  program = lambda x, y: (2 * x, x + y) if len(x) == 4 else None
  x, y = jnp.arange(6.0), jnp.ones(6)
  double, more = many_tasks.in_batches(program, (x, y), batch_size=4)
  np.testing.assert_array_equal(double, 2 * x)
  np.testing.assert_array_equal(more, x + 1)
  chosen = np.asarray([5, 0, 3, 1, 4])
  np.testing.assert_array_equal(many_tasks.in_batches(program, (x, y), 4, chosen)[0], 2.0 * chosen)


def test_methods_that_search_are_never_worse_on_what_they_search(setting, found):
  """Random search's best has the least of the objectives that it was told, each with its own batches."""
  tasks = compare.repeat(found, 1)
  told = []

  def build(space, seed, default):
    method = compare.baselines.RandomSearch(space, 5, seed, default)
    plain = method.tell
    method.tell = lambda candidate, loss: (told.append((id(method), candidate, loss)), plain(candidate, loss))
    method_of[id(method)] = method
    return method

  method_of: dict = {}
  choice = compare.search(setting, tasks, build)
  np.testing.assert_array_equal(choice.spent, 5.0)
  for number, method in enumerate(method_of.values()):
    losses = [(loss, candidate) for owner, candidate, loss in told if owner == id(method)]
    best = min(losses, key=lambda pair: pair[0])[1]
    np.testing.assert_allclose(choice.weights[number], best.mixture)


@pytest.fixture(scope="module")
def learner(config, setting, found):
  """`(state, outer_step)` of an untrained meta-learner."""
  graphdef, state = meta_learn.init_learner(config, setting, found)
  return state, meta_learn.build_outer_step(config, setting, graphdef)


def diverging(found, where):
  """Tasks whose runs are not finite at these places."""
  return found.replace(tasks=found.tasks.replace(budget=found.tasks.budget.at[jnp.asarray(where)].set(jnp.nan)))


def test_a_task_that_diverges_is_left_out_of_the_outer_step(learner, found):
  """A step on two tasks of four is the mean of the steps on each alone."""
  state, outer_step = learner
  after, metrics = zip(
    *(outer_step(state, diverging(found, bad), jax.random.key(7)) for bad in ([2, 3], [1, 2, 3], [0, 2, 3])),
    strict=True,
  )
  assert [int(line["non_finite_tasks"]) for line in metrics] == [2, 3, 3]
  for name in ("objective", "outcome_loss"):
    both, *each = (float(line[name]) for line in metrics)
    assert both == pytest.approx(np.mean(each), rel=1e-4) and each[0] != each[1]
  moments = [jax.tree.leaves(x.opt_state.inner_states["train"].inner_state[0].mu) for x in after]
  for both, *each in zip(*moments, strict=True):
    np.testing.assert_allclose(both, np.mean(each, axis=0), atol=1e-6)
  assert any(
    np.any(new != old) for new, old in zip(*map(jax.tree.leaves, (after[0].learner, state.learner)), strict=True)
  )


def test_a_step_of_diverging_tasks_is_skipped_and_too_many_stop_the_run(
  config, setting, learner, tmp_path, monkeypatch
):
  (state, outer_step), sample = learner, meta_learn.sample_tasks
  monkeypatch.setattr(setting_lib, "build", lambda config: setting)
  monkeypatch.setattr(meta_learn, "build_outer_step", lambda *_: outer_step)
  monkeypatch.setattr(meta_learn, "sample_tasks", lambda *args: diverging(sample(*args), range(4)))
  after, metrics = outer_step(state, diverging(sample(config, setting, "train", 4, 0), range(4)), jax.random.key(0))
  assert not metrics["is_finite"] and metrics["non_finite_tasks"] == 4
  jax.tree.map(np.testing.assert_array_equal, after, state)

  config = config.copy_and_resolve_references()
  config.tasks.num_train, config.meta.outer_steps, config.meta.max_skipped = 4, 9, 3
  with pytest.raises(errors.MftError, match="3 outer steps in a row"):
    meta_learn.meta_learn(config, tmp_path)
  assert [line["skipped"] for line in tracking.read(tmp_path / "metrics.jsonl")] == [1, 2, 3]
  assert np.isnan(np.load(tmp_path / "non_finite_batch.npz")[".tasks.budget"]).all()


def test_meta_train_trains_the_learner_that_the_config_names_and_resumes(
  config, setting, learner, tmp_path, monkeypatch
):
  sampled, sample = [], meta_learn.sample_tasks
  monkeypatch.setattr(setting_lib, "build", lambda config: setting)
  monkeypatch.setattr(meta_learn, "build_outer_step", lambda *_: learner[1])
  monkeypatch.setattr(meta_learn, "sample_tasks", lambda *args: (sampled.append(args[2]), sample(*args))[1])
  experiment.main(config, tmp_path)
  assert sampled == ["validation", "train"]
  metrics = (tmp_path / "metrics.jsonl").read_bytes()
  learnt = meta_learn.meta_learn(config, tmp_path)  # nothing is left to train
  assert sampled == ["validation", "train", "validation"]
  assert (tmp_path / "metrics.jsonl").read_bytes() == metrics and metrics.count(b"meta_learn") == 2
  fitted = meta_learn.init_learner(config, setting, sample(config, setting, "train", 8, config.seed))[1].learner
  np.testing.assert_allclose(learnt.state["mean"]["source"][...], fitted["mean"]["source"][...], rtol=1e-6)
