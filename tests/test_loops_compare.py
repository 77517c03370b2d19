"""Many tasks in one program: against plain runs one by one, and the comparison as a user starts it."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pages import ROOT

from configs import compare as compare_config
from mftjax import sft, types
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
  task = jax.tree.map(lambda x: x[0], found.tasks).replace(budget=jnp.float32(1.0))
  weights, key = many_tasks.mixture(jnp.arange(6.0), task.source_mask), jax.random.key(3)
  outcome = many_tasks.outcome(setting.model, setting.run, setting.fixed, setting.pools, setting.pools.test, 4)
  losses = jax.jit(outcome)({"learning_rate": 3e-3}, weights, task, key)

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
  scale = setting_lib.task_scale(setting.validation, task)
  objective = setting_lib.build_objective(scale, task.ability_weight)
  recipe = jax.tree.map(lambda x: x[0], meta_learn.default_recipes(config, setting, 1))
  value = jax.jit(lambda recipe: differentiate(recipe, task, objective, jax.random.key(0)))
  _, grad, _ = value(recipe)
  step = 2e-2
  moved = lambda sign: {
    **recipe,
    "hyperparameters": {**recipe["hyperparameters"]}
    | {"learning_rate": recipe["hyperparameters"]["learning_rate"] + sign * step},
  }
  slope = (value(moved(1))[0] - value(moved(-1))[0]) / (2 * step)
  assert grad["hyperparameters"]["learning_rate"] == pytest.approx(float(slope), rel=0.05)


def test_filling_up_a_batch_changes_nothing():
  double = many_tasks.mapped(lambda x, y: (2 * x, x + y), batch_size=4)
  x, y = jnp.arange(6.0), jnp.ones(6)
  np.testing.assert_array_equal(double(x, y)[0], 2 * x)
  np.testing.assert_array_equal(double(x, y)[1], x + 1)


def test_methods_that_search_are_never_worse_on_what_they_search(config, setting, found):
  """Random search's best has the least of the objectives that it was told, each with its own batches."""
  tasks = compare.repeat(found, 1)
  judge = compare.Judge(config, setting, tasks)
  told = []

  def build(space, seed, default):
    method = compare.baselines.RandomSearch(space, 5, seed, default)
    plain = method.tell
    method.tell = lambda candidate, loss: (told.append((id(method), candidate, loss)), plain(candidate, loss))
    method_of[id(method)] = method
    return method

  method_of: dict = {}
  choice = compare.search(judge, setting, tasks, build)
  np.testing.assert_array_equal(choice.spent, 5.0)
  for number, method in enumerate(method_of.values()):
    losses = [(loss, candidate) for owner, candidate, loss in told if owner == id(method)]
    best = min(losses, key=lambda pair: pair[0])[1]
    np.testing.assert_allclose(choice.weights[number], best.mixture)


@pytest.mark.slow
def test_the_comparison_as_a_user_starts_it(tmp_path):
  command = [
    sys.executable,
    "-m",
    "experiments.compare",
    "--config=configs/compare.py:tiny",
    f"--workdir={tmp_path}/run",
  ]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
  assert done.returncode == 0, done.stderr
  table = json.loads((tmp_path / "run" / "compare.json").read_text())
  rows = {row["name"]: row for row in table["rows"]}
  assert {"uniform, default", "TPE", "ASHA", "random search", "predicted", "predicted, refined", "direct"} <= set(rows)
  assert rows["TPE"]["runs"] == rows["random search"]["runs"] == 12
  assert 0 < rows["predicted"]["runs"] < rows["predicted, refined"]["runs"]
  assert all(row["low"] <= row["improvement"] <= row["high"] for row in table["rows"])
  assert 0 <= table["coverage"] <= 1
  assert "TPE" in done.stdout
