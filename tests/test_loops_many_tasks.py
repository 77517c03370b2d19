"""Runs of many tasks that learn batch size, stopping point or LoRA: against plain loops and finite differences."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import compare as compare_config
from mftjax import config as config_lib
from mftjax import errors, metagrad, models, sft, spaces
from mftjax.data import meta_tasks
from mftjax.loops import many_tasks
from mftjax.loops import setting as setting_lib
from mftjax.loops import task as task_lib

BOUNDS = {"low": 2.0, "high": 8.0, "scale": "log", "learn": True}
LORA = {
  "lora_rank": {"value": 2.6, "values": (1, 2, 4), "scale": "ordered", "learn": True},
  "lora_scale": {"value": 1.3, "low": 0.25, "high": 4.0, "learn": True},
}


def with_learned(lora_rank_of_model=0, **hyperparameters):
  """The tiny config with an untrained model, runs of 6 steps of 8 rows, and these hyperparameters learned besides."""
  config = compare_config.get_config("tiny")
  config.budget_tokens = 6 * 8 * config.length
  config.meta.unroll_length = 6
  config.lora.rank = lora_rank_of_model
  config.hyperparameters.update(hyperparameters)
  config_lib.check(config)
  return config


def assemble(config):
  decoder, _ = task_lib.load_model(config)
  pools = meta_tasks.build_pools(config.length, config.tasks.pool_rows, config.seed)
  return setting_lib.assemble(config, setting_lib.base_model(config, decoder), pools, {})


@pytest.fixture(scope="module")
def setting():
  return assemble(with_learned(batch_size={"value": 8.0, **BOUNDS}))


@pytest.fixture(scope="module")
def task(setting):
  tasks = meta_tasks.sample(setting.pools, "unseen", 1, seed=5)
  return jax.tree.map(lambda x: x[0], tasks).replace(budget=jnp.ones(()))


@pytest.mark.parametrize(
  ("meta", "at_once", "want"),
  [
    ({"memory_bytes": 1000}, 5, {"method": "mixed", "memory_bytes": 200}),
    ({"memory_bytes": 3}, 5, {"method": "mixed", "memory_bytes": 1}),
    ({"method": "es"}, 5, {"method": "es"}),
    ({"recovery": "invert"}, 4, {"method": "mixed", "recovery": "invert", "memory_bytes": 2**29}),
  ],
)
def test_tasks_that_run_at_once_share_the_memory_budget(meta, at_once, want, monkeypatch):
  monkeypatch.setattr(metagrad.recovery, "device_budget", lambda: 2**31)
  config = with_learned()
  config.meta.update(meta)
  config.tasks.at_once = at_once
  assert assemble(config).estimator == want


def test_steps_on_a_single_recipe_draw_by_a_proposal_of_their_own(setting, task, monkeypatch):
  seen = []

  def value_and_grad(model, run, *args, **options):
    seen.append(run.uniform_fraction)
    return lambda recipe, task, objective, key: (0.0, recipe, jnp.zeros(task.ability_weight.shape), True)

  monkeypatch.setattr(many_tasks, "value_and_grad", value_and_grad)
  nothing = setting_lib.Scale(*[jnp.zeros(len(setting.pools.ability_names))] * 2)
  fresh = dataclasses.replace(setting, scale={"validation": nothing})
  one = jax.tree.map(lambda x: x[None], task)
  for gradients in (fresh.gradients, fresh.single_gradients):
    gradients({"x": jnp.ones(1)}, one, jax.random.split(jax.random.key(0), 1))
  assert seen == [0.5, 0.1]


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


def assert_gradient_is_the_slope(config, task, names):
  """Of the whole run, by central differences in f64, in the very batches of the unroll."""
  with jax.enable_x64(True):
    config.model.dtype = "float64"
    setting = assemble(config)
    cast = lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x)
    params, frozen = (jax.tree.map(cast, part) for part in (setting.model.params, setting.model.frozen))
    model = dataclasses.replace(setting.model, params=params, frozen=frozen)
    recipe = {
      "hyperparameters": jax.tree.map(cast, setting.space.init(setting.defaults)),
      "mixture_logits": jnp.zeros(len(task.source)),
    }
    differentiate = many_tasks.value_and_grad(model, setting.run, setting.space, setting.fixed, setting.pools)
    objective = lambda losses: losses @ jax.tree.map(cast, task.ability_weight)
    value = jax.jit(lambda recipe: differentiate(recipe, jax.tree.map(cast, task), objective, jax.random.key(0)))
    grad = value(recipe)[1]["hyperparameters"]
    for name in names:
      moved = lambda step, name=name: {
        **recipe,
        "hyperparameters": {**recipe["hyperparameters"], name: recipe["hyperparameters"][name] + step},
      }
      slope = (value(moved(1e-6))[0] - value(moved(-1e-6))[0]) / 2e-6
      assert abs(float(slope)) > 1e-6
      assert float(grad[name]) == pytest.approx(float(slope), rel=1e-5)


def test_the_gradient_in_batch_size_and_stopping_point_is_the_slope_of_the_whole_run(task):
  """Between whole rows and whole steps."""
  learned = {
    "batch_size": {"value": 4.6, **BOUNDS},
    "stop_fraction": {"value": 0.7, "low": 0.2, "high": 1.0, "scale": "linear", "learn": True},
  }
  assert_gradient_is_the_slope(with_learned(**learned), task, (*learned, "learning_rate"))


def test_the_gradient_in_rank_and_scale_is_the_slope_of_the_whole_run(task):
  """Between whole ranks."""
  assert_gradient_is_the_slope(with_learned(4, **LORA), task, (*LORA, "learning_rate"))


@pytest.fixture(scope="module")
def lora_setting():
  return assemble(with_learned(4, **LORA))


def outcome(setting, task, **values):
  """Test losses after a run of one task, equal weights and a learning rate of 1e-2."""
  values = {name: np.full(1, value) for name, value in {**setting.defaults, "learning_rate": 1e-2, **values}.items()}
  one = jax.tree.map(lambda x: x[None], task)
  return setting.outcome("test", values, equal(task)[None], one, jax.random.key(4)[None])[0]


@pytest.mark.parametrize(("rank", "whole_rank", "scale"), [(1.2, 1, 1.0), (2.3, 2, 1.5), (4.0, 4, 0.5)])
def test_a_learned_rank_is_a_plain_run_of_a_smaller_lora(lora_setting, task, rank, whole_rank, scale):
  """Of one that has no more columns than that, in place of a mask, and the scale in the model itself."""
  setting, model = lora_setting, lora_setting.model

  def first_columns(path, leaf):
    is_a = any(name.endswith("_lora_a") for name in models.lora.names_of(path))
    return leaf[..., :whole_rank] if is_a else leaf[..., :whole_rank, :]

  decoder = model.merge(jax.tree.map_with_path(first_columns, model.params))
  decoder.layers.lora_scale *= scale
  smaller = many_tasks.Model(*nnx.split(decoder, models.lora.LoRAParam, ...))
  batches = many_tasks.draw(setting.pools, task, equal(task), jax.random.key(4), 6, 8)
  optimizer = sft.optimizer({**setting.fixed, "learning_rate": 1e-2}, 6)
  params, opt_state = smaller.params, optimizer.init(smaller.params)

  @jax.jit
  def step(params, opt_state, batch):
    grad = jax.grad(lambda p: sft.row_losses(smaller.apply(p, batch), batch)[0].mean())(params)
    updates, opt_state = optimizer.update(grad, opt_state, params)
    return jax.tree.map(lambda p, u: p + u, params, updates), opt_state

  for number in range(6):
    params, opt_state = step(params, opt_state, jax.tree.map(lambda x, n=number: x[n], batches))
  rows = many_tasks.held_out(setting.pools.test, task, setting.run.test_rows)
  want = many_tasks.ability_losses(smaller, params, rows, len(task.ability_weight))
  np.testing.assert_allclose(outcome(setting, task, lora_rank=rank, lora_scale=scale), want, rtol=2e-5)


def test_ranks_and_scales_of_runs_tell_them_apart(lora_setting, task):
  is_there = np.asarray(task.ability_weight) > 0
  found = [
    np.asarray(outcome(lora_setting, task, lora_rank=rank, lora_scale=scale))[is_there]
    for rank, scale in ((1, 1.0), (2, 1.0), (4, 1.0), (4, 2.0))
  ]
  for a, b in itertools.combinations(found, 2):
    assert np.all(np.abs(a - b) > 1e-3)


def test_a_rank_and_a_scale_that_stay_as_they_are_count_too(lora_setting, task):
  held = {"lora_rank": {"value": 2.0}, "lora_scale": {"value": 1.5}}
  found = outcome(assemble(with_learned(4, **held)), task)
  np.testing.assert_allclose(found, outcome(lora_setting, task, lora_rank=2, lora_scale=1.5), rtol=1e-6)


def test_a_run_that_is_differentiated_ends_where_an_ordinary_one_does(lora_setting, task):
  """At a rank and a scale in between; with equal weights both draw the same rows."""
  setting, key = lora_setting, jax.random.key(5)
  parts = setting.model, setting.run
  recipe = {"hyperparameters": setting.space.init(setting.defaults), "mixture_logits": jnp.zeros(len(task.source))}
  differentiate = many_tasks.value_and_grad(*parts, setting.space, setting.fixed, setting.pools, "first_order")
  objective = lambda losses: losses @ task.ability_weight
  losses = jax.jit(lambda recipe: differentiate(recipe, task, objective, key)[2])(recipe)

  train = many_tasks.train(*parts, setting.fixed, setting.pools)
  measure = many_tasks.measure(setting.model, setting.pools.validation, setting.run.validation_rows)
  values, data_key = setting.space.constrain(recipe["hyperparameters"]), jax.random.split(key)[0]
  want = jax.jit(lambda values: measure(train(values, equal(task), task, data_key), task))(values)
  np.testing.assert_allclose(losses, want, rtol=1e-5)


@pytest.mark.parametrize("name", LORA)
def test_hyperparameters_of_lora_need_lora(name):
  with pytest.raises(errors.InputError, match=rf"{name} has no meaning without LoRA: config\.lora\.rank = 0"):
    with_learned(0, **{name: LORA[name]})
