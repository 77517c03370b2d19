"""Runs of many tasks whose batch size or stopping point is learned: against plain loops and finite differences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import compare as compare_config
from mftjax import config as config_lib
from mftjax import errors, sft, spaces
from mftjax.data import meta_tasks
from mftjax.loops import many_tasks
from mftjax.loops import setting as setting_lib
from mftjax.loops import task as task_lib

BOUNDS = {"low": 2.0, "high": 8.0, "scale": "log", "learn": True}


def with_learned(**hyperparameters):
  """The tiny config with an untrained model, runs of 6 steps of 8 rows, and these hyperparameters learned besides."""
  config = compare_config.get_config("tiny")
  config.budget_tokens = 6 * 8 * config.length
  config.meta.unroll_length = 6
  config.hyperparameters.update(hyperparameters)
  config_lib.check(config)
  return config


def assemble(config):
  decoder, _ = task_lib.load_model(config)
  pools = meta_tasks.build_pools(config.length, config.tasks.pool_rows, config.seed)
  return setting_lib.assemble(config, many_tasks.Model(*nnx.split(decoder)), pools, {})


@pytest.fixture(scope="module")
def setting():
  return assemble(with_learned(batch_size={"value": 8.0, **BOUNDS}))


@pytest.fixture(scope="module")
def task(setting):
  tasks = meta_tasks.sample(setting.pools, "unseen", 1, seed=5)
  return jax.tree.map(lambda x: x[0], tasks).replace(budget=jnp.ones(()))


def equal(task):
  return task.source_mask / task.source_mask.sum()


def assert_close(params, want, tolerance):
  close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
  jax.tree.map(close, params, want)


@pytest.fixture(scope="module")
def trained(setting, task):
  """`{batch size: params}` after whole runs, and the key of their data."""
  key = jax.random.key(3)
  train = jax.jit(many_tasks.train(setting.model, setting.run, setting.fixed, setting.pools))
  return {size: train({"batch_size": jnp.float32(size)}, equal(task), task, key) for size in (2, 4, 8)}, key


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_learned_batch_size_is_a_plain_run_of_smaller_batches_and_more_steps(setting, task, trained, size):
  found, key = trained
  num_steps = 6 * 8 // size
  assert setting.run.most_steps == 24  # of 2 rows
  batches = many_tasks.draw(setting.pools, task, equal(task), key, 24, 8)
  optimizer = sft.optimizer({n: v for n, v in setting.fixed.items() if n != "batch_size"}, num_steps)
  params, opt_state = setting.model.params, optimizer.init(setting.model.params)

  @jax.jit
  def step(params, opt_state, batch):
    grad = jax.grad(lambda p: sft.row_losses(setting.model.apply(p, batch), batch)[0].mean())(params)
    updates, opt_state = optimizer.update(grad, opt_state, params)
    return jax.tree.map(lambda p, u: p + u, params, updates), opt_state

  for number in range(num_steps):
    params, opt_state = step(params, opt_state, jax.tree.map(lambda x, n=number: x[n, :size], batches))
  assert_close(found[size], params, 2e-5)
  moved = lambda tree: max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, tree), strict=True))
  assert moved((params, setting.model.params)) > 5e-3


def test_the_largest_batch_is_the_run_without_a_batch_size(setting, task):
  """In the same batches: nothing but rounding tells them apart."""
  run, key = dataclasses.replace(setting.run, smallest_batch=None), jax.random.key(1)
  plain = {name: value for name, value in setting.fixed.items() if name != "batch_size"}
  train = lambda fixed: jax.jit(many_tasks.train(setting.model, run, fixed, setting.pools))
  want = train(plain)({}, equal(task), task, key)
  assert_close(train(setting.fixed)({"batch_size": jnp.float32(8)}, equal(task), task, key), want, 2e-6)


def test_a_stopping_point_is_a_part_of_the_task_s_budget(setting, task):
  train = jax.jit(many_tasks.train(setting.model, setting.run, setting.fixed, setting.pools))
  stopped, key = {"stop_fraction": jnp.float32(0.5)}, jax.random.key(2)
  found = train(stopped, equal(task), task.replace(budget=jnp.float32(0.8)), key)
  want = train({"stop_fraction": jnp.float32(1.0)}, equal(task), task.replace(budget=jnp.float32(0.4)), key)
  assert_close(found, want, 1e-7)


def test_runs_that_judge_have_whole_rows(setting, task):
  one = jax.tree.map(lambda x: x[None], task)
  values = {name: np.full(1, value) for name, value in setting.defaults.items()}
  outcome = lambda size: setting.outcome(
    "test", {**values, "batch_size": np.full(1, size)}, equal(task)[None], one, jax.random.key(0)[None]
  )
  np.testing.assert_array_equal(outcome(3.6), outcome(4.0))
  assert not np.array_equal(outcome(3.6), outcome(5.0))


def test_values_of_runs_are_allowed_ones():
  space = spaces.Space({"batch_size": spaces.Ordered((2, 4, 8)), "b1": spaces.Interval(0, 1)})
  found = setting_lib.whole(space, {"batch_size": np.asarray([2.7, 3.0, 6.0]), "b1": np.asarray([0.3, 0.4, 0.5])})
  np.testing.assert_array_equal(found["batch_size"], [2, 4, 8])
  np.testing.assert_array_equal(found["b1"], [0.3, 0.4, 0.5])
  np.testing.assert_array_equal(setting_lib.whole(spaces.Space({}), {"batch_size": 3.6})["batch_size"], 4)


def test_runs_are_as_long_as_their_least_batch_needs():
  assert assemble(with_learned()).run.most_steps == 6
  assert assemble(with_learned(batch_size={"value": 4.0})).run.most_steps == 12
  # 2.6 is rounded to 3, 2.4 to 2.
  for low, most_steps in ((2.6, 19), (2.4, 24)):
    spec = {"value": 4.0, **BOUNDS, "low": low}
    assert assemble(with_learned(batch_size=spec)).run.most_steps == most_steps


def test_the_gradient_in_batch_size_and_stopping_point_is_the_slope_of_the_whole_run(task):
  """Central differences in f64, in the very batches of the unroll, between whole rows and whole steps."""
  learned = {
    "batch_size": {"value": 4.6, **BOUNDS},
    "stop_fraction": {"value": 0.7, "low": 0.2, "high": 1.0, "scale": "linear", "learn": True},
  }
  config = with_learned(**learned)
  with jax.enable_x64(True):
    config.model.dtype = "float64"
    setting = assemble(config)
    cast = lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x)
    model = dataclasses.replace(setting.model, params=jax.tree.map(cast, setting.model.params))
    recipe = {
      "hyperparameters": jax.tree.map(cast, setting.space.init(setting.defaults)),
      "mixture_logits": jnp.zeros(len(task.source)),
    }
    differentiate = many_tasks.value_and_grad(model, setting.run, setting.space, setting.fixed, setting.pools)
    objective = lambda losses: losses @ jax.tree.map(cast, task.ability_weight)
    value = jax.jit(lambda recipe: differentiate(recipe, jax.tree.map(cast, task), objective, jax.random.key(0)))
    grad = value(recipe)[1]["hyperparameters"]
    for name in ("batch_size", "stop_fraction", "learning_rate"):
      moved = lambda step, name=name: {
        **recipe,
        "hyperparameters": {**recipe["hyperparameters"], name: recipe["hyperparameters"][name] + step},
      }
      slope = (value(moved(1e-6))[0] - value(moved(-1e-6))[0]) / 2e-6
      assert abs(float(slope)) > 1e-6
      assert float(grad[name]) == pytest.approx(float(slope), rel=1e-5)


@pytest.mark.parametrize("name", ["lora_rank", "lora_scale"])
def test_hyperparameters_of_lora_are_refused(name):
  config = compare_config.get_config("tiny")
  config.lora.rank = 4
  config.hyperparameters[name] = {"value": 1.0, "low": 1.0, "high": 4.0, "learn": True}
  with pytest.raises(errors.InputError, match=f"{name} cannot be learned"):
    setting_lib.build(config)
