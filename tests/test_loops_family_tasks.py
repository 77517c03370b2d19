"""Meta-tasks of real data with LoRA on a frozen model: against a plain loop, and the comparison end to end."""

import families
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import compare as compare_config
from mftjax import config as config_lib
from mftjax import errors, models, recipe, sft
from mftjax.loops import compare, finetune, many_tasks, meta_learn, predict_task
from mftjax.loops import setting as setting_lib


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  config = compare_config.get_config("tiny")
  config.length, config.batch_size, config.budget_tokens, config.meta.unroll_length = 24, 4, 3 * 4 * 24, 3
  config.lora.rank = 2
  config.hyperparameters.lora_rank = {"value": 1.5, "values": (1, 2), "scale": "ordered", "learn": True}
  config.hyperparameters.lora_scale = {"value": 1.0, "low": 0.25, "high": 4.0, "learn": True}
  config.tasks.folders = (str(families.write(tmp_path_factory.mktemp("data"))),)
  config.tasks.validation_families, config.tasks.unseen_families = 2, 2
  config.tasks.max_sources, config.tasks.max_abilities, config.tasks.planted_fraction = 4, 2, 0.0
  config.tasks.num_train, config.tasks.num_validation, config.tasks.at_once = 2, 2, 2
  config.tasks.reference_rates, config.tasks.reference_seeds = (1e-2, 1e-30), 1
  config.probe.rows, config.probe.num_steps, config.probe.batch_size = 2, 1, 2
  config.meta.outer_steps, config.learner.tasks_per_step = 1, 2
  config.compare.num_tasks, config.compare.num_seeds, config.compare.num_trials = 3, 1, 3
  config.compare.methods = ("uniform, default", "random search", "predicted", "predicted, refined")
  config_lib.check(config)
  return config


@pytest.fixture(scope="module")
def setting(config):
  return setting_lib.build(config)


def test_only_the_lora_is_trained_and_an_outcome_is_that_of_a_plain_loop(config, setting):
  found = meta_learn.meta_tasks.sample(setting.pools, "unseen", 1, 5, meta_learn.meta_tasks.Shape(4, 2, 1.0))
  task, model, key = jax.tree.map(lambda x: jnp.asarray(x[0]), found), setting.model, jax.random.key(3)
  names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(model.params)]
  assert len(names) == 2 * len(config.lora.targets) and all("_lora_" in name for name in names)
  weights = many_tasks.mixture(jnp.arange(4.0), task.source_mask)
  values = setting.defaults | {"learning_rate": 1e-2, "lora_rank": 2.0}
  one = jax.tree.map(lambda x: x[None], (task, key))
  losses = setting.outcome("test", compare.repeated(values, 1), weights[None], *one)[0]

  batches = many_tasks.draw(setting.pools, task, weights, key, 3, 4)
  optimizer = sft.optimizer({**setting.fixed, **values}, 3)
  params, opt_state = model.params, optimizer.init(model.params)
  grad = jax.jit(jax.grad(lambda params, batch: sft.row_losses(model.apply(params, batch), batch)[0].mean()))
  for step in range(3):
    updates, opt_state = optimizer.update(
      grad(params, jax.tree.map(lambda x, t=step: x[t], batches)), opt_state, params
    )
    params = jax.tree.map(lambda p, u: p + u, params, updates)
  rows = many_tasks.held_out(setting.pools.test, task, config.tasks.test_rows)
  want = many_tasks.ability_losses(model, params, rows, 2)
  before = many_tasks.ability_losses(model, model.params, rows, 2)
  np.testing.assert_allclose(losses, want, rtol=1e-5)
  assert np.all(np.abs(want - before) > 1e-4)


def test_the_reference_is_the_best_rate_on_the_own_data(setting):
  """A rate of nearly 0 is the base model, so none is worse than that where recipes are chosen."""
  scale = setting.scale["validation"]
  assert np.all(np.asarray(scale.reference) <= np.asarray(scale.base) + 1e-6)
  assert np.any(np.asarray(scale.reference) < np.asarray(scale.base) - 1e-4)


def own_task(config):
  """Of two of the families, without a word of LoRA."""
  task = config_lib.default()
  task.task, task.length, task.batch_size, task.meta.unroll_length = "own", config.length, config.batch_size, 3
  task.budget_tokens = config.budget_tokens
  files = {name: f"{config.tasks.folders[0]}/{name}.jsonl" for name in families.NAMES[:2]}
  task.sources = ml_collections.ConfigDict(
    {name: {"path": path, "split": "train[:50%]"} for name, path in files.items()}
  )
  task.abilities = ml_collections.ConfigDict({"alpha": {"path": files["alpha"], "split": "train[50%:]"}})
  return task


@pytest.fixture(scope="module")
def compared(config, setting, tmp_path_factory):
  """The workdir of a comparison, and what it found."""
  workdir = tmp_path_factory.mktemp("compared")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setting_lib, "build", lambda config: setting)
    return workdir, compare.compare(config, workdir)


@pytest.mark.slow
def test_the_comparison_of_chosen_methods_end_to_end(config, setting, compared):
  workdir, found = compared
  rows = {row["name"]: row for row in found["rows"]}
  assert tuple(rows) == config.compare.methods
  assert rows["random search"]["runs"] == 3 and rows["uniform, default"]["runs"] == 0
  assert rows["predicted, refined"]["runs"] == pytest.approx(rows["predicted"]["runs"] + 1)
  assert all(row["over_tpe"] is None and row["planted_tv"] is None for row in found["rows"])
  assert all(np.isfinite(row["improvement"]) and 0 <= row["corrupted"] <= 1 for row in found["rows"])
  assert (workdir / "base_model").is_dir() and 0 <= found["coverage"] <= 1

  # The model that is kept is the one without LoRA, and is found again.
  kept = meta_learn.learnt.load(config, workdir)
  jax.tree.map(np.testing.assert_array_equal, kept.model.params, setting.model.params)
  jax.tree.map(np.testing.assert_array_equal, kept.model.frozen, setting.model.frozen)
  assert set(kept.known.hyperparameters["lora_rank"]) <= {1.0, 2.0}
  predicted = kept.predict(jax.tree.map(lambda x: x[0], kept.known.features))
  start = setting.space.init(setting.defaults)
  for name in ("lora_rank", "lora_scale"):
    assert abs(predicted.hyperparameters[name] - start[name]) > 1e-6  # the meta-gradient has moved it


@pytest.mark.slow
def test_a_recipe_with_a_rank_and_a_scale_is_predicted_and_followed(config, compared, tmp_path):
  workdir, task = compared[0], own_task(config)
  path = predict_task.predict_task(config, workdir, task, refine_steps=1, num_preferences=0)
  values = recipe.load(path)["hyperparameters"]
  assert values["lora_rank"] in (1.0, 2.0) and 0.25 < values["lora_scale"] < 4.0
  assert values["lora_alpha"] / values["lora_rank"] == config.lora.alpha / config.lora.rank
  with pytest.raises(errors.InputError, match=r"lora_rank = .* is above config\.lora\.rank = 0"):
    finetune.finetune(task, tmp_path / "run", str(path))
  task.lora, task.model.path = config.lora, str(workdir / "base_model")
  assert finetune.inner_hyperparameters(task, values)["lora_scale"] == values["lora_scale"]
  tuned, _ = models.load(finetune.finetune(task, tmp_path / "run", str(path)))
  base, _ = models.load(task.model.path)
  assert np.abs(tuned.layers.q_proj[...] - base.layers.q_proj[...]).max() > 1e-4


def test_an_unknown_method_is_refused_before_anything_else(config, tmp_path):
  config = config.copy_and_resolve_references()
  config.compare.methods = ("TPE", "predictd")
  with pytest.raises(errors.InputError, match="Did you mean 'predicted'"):
    compare.compare(config, tmp_path)
  assert not list(tmp_path.iterdir())
