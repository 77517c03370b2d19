"""The recipe that a trained meta-learner predicts for a task it never saw, and what is to be expected of it."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from mftjax import config as config_lib
from mftjax import errors, fields, files, run_folder
from mftjax import recipe as recipe_lib
from mftjax.loops import case as case_lib
from mftjax.loops import explain, learnt, many_tasks, predict, refine
from mftjax.loops import setting as setting_lib

FILE = "prediction.json"
LEVEL = 0.9  # of the intervals, for which the meta-learner is calibrated


def predict_task(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  task: ml_collections.ConfigDict,
  preference: Sequence[float] | None = None,
  refine_steps: int = 0,
  num_preferences: int = 21,
) -> pathlib.Path:
  """Probes a task, predicts its recipe and writes `WORKDIR/tasks/NAME/recipe.json` and `prediction.json`.

  Args:
    config: of the meta-training that the workdir holds.
    task: a config with sources, abilities and `budget_tokens`; its `task` is the name. `model.path` is the base model
      that the meta-learner is for, or empty.
    preference: weights of the abilities in the order of their names, sum 1; by default those of the config.
    refine_steps: meta-gradient steps on the predicted recipe, each of them a whole run.
    num_preferences: how many the Pareto front is predicted for, at most; 0 is no front.

  Returns:
    The path of the recipe.

  Raises:
    InputError: workdir, task, preference or a number do not fit; before anything is compiled or written.
  """
  if config.learner.kind != "meta":
    raise errors.InputError("--task needs a meta-learner: a config with learner.kind = 'meta', as configs/compare.py.")
  for name, value in (("refine", refine_steps), ("front", num_preferences)):
    if value < 0:
      raise errors.InputError(f"--{name} = {value} must be at least 0.")
  _check_task(config, task)
  run_folder.check(config, workdir)
  kept = learnt.load(config, workdir, task.model.path, task.model.gguf_file)
  case = case_lib.read(kept, workdir, task, preference)

  probed = jax.tree.map(lambda x: x[0], case.probe(case.task.ability_weight[None]))
  prediction = kept.predict(probed)
  expected = case.expected(prediction)
  recipe = prediction.recipe
  run_tokens = case.setting.run.num_steps * config.batch_size * config.length
  predicted = {
    "ability_loss": case.by_ability(expected["expected"]),
    "ability_loss_interval": case.by_ability(np.stack([expected["low"], expected["high"]], axis=-1)),
    "level": LEVEL,
    "base_loss": case.by_ability(case.base),
    "ability_weight": case.by_ability(case.task.ability_weight),
    "probe_tokens": int(probed.tokens),
    "refine_steps": refine_steps,
    "refine_tokens": refine_steps * run_tokens,
  }
  if refine_steps:
    recipe, losses = _refine(case, recipe, expected["expected"], refine_steps)
    predicted["refine_loss"] = case.by_ability(losses)
  nearest = explain.nearest(kept.known, probed)
  predicted |= {
    "nearest_distance": nearest["tasks"][0]["distance"],
    "typical_distance": nearest["typical_distance"],
  }
  shown = {
    "nearest": nearest,
    "attributions": explain.attributions(case, probed),
    "front": explain.front(case, num_preferences),
  }
  folder = workdir / "tasks" / task.task
  files.write_json(folder / FILE, shown)
  recipe_lib.save(_recipe(case, task, recipe, predicted), folder / "recipe.json")
  return folder / "recipe.json"


def _check_task(config: ml_collections.ConfigDict, task: ml_collections.ConfigDict) -> None:
  """Refuses what can be seen before the data is read."""
  missing = sorted(fields.FIELDS.keys() - config_lib.flatten(task).keys())
  if missing:
    raise errors.InputError(f"--task: the file's config lacks {missing[0]}; start from mftjax.config.default().")
  for section, what in (("sources", "source"), ("abilities", "ability")):
    if not task.get(section):
      raise errors.InputError(f"--task: {section} is empty: name at least one {what} with its data.")
  if not re.fullmatch(r"\w[\w.-]*", task.task):
    raise errors.InputError(f"--task: task = {task.task!r} must be a name of letters, digits, '_', '-' and '.'.")
  if task.length != config.length:
    raise errors.InputError(
      f"--task: length = {task.length}, but the meta-learner is for rows of {config.length} tokens; set it to that."
    )
  task = task.copy_and_resolve_references()
  # The run is the meta-learner's in these.
  task.hyperparameters, task.lora = config.hyperparameters, config.lora
  task.batch_size, task.micro_batches = config.batch_size, 1
  task.learner.kind, task.meta.unroll_length = "direct", 1
  try:
    config_lib.check(task)
  except errors.InputError as error:
    raise errors.InputError(f"--task: {error}") from error


def _refine(case: case_lib.Case, recipe: Any, expected: np.ndarray, num_steps: int) -> tuple[Any, np.ndarray]:
  """The recipe after meta-gradient steps, and the held-out losses of the run that the last of them started from.

  What the abilities gain counts in units of what was predicted: nobody has tuned on each of them alone.
  """
  count, config = len(case.abilities), case.kept.config
  scale = setting_lib.Scale(jnp.asarray(case.base[:count]), jnp.asarray(np.minimum(expected, case.base)[:count]))
  setting = setting_lib.assemble(config, case.kept.model, case.setting.pools, {"validation": scale, "test": scale})
  key, rate = jax.random.key(config.seed + 1), config.compare.refine_learning_rate
  one = lambda tree: jax.tree.map(lambda x: jnp.asarray(x)[None], tree)
  keys = lambda step: jax.random.fold_in(key, step)[None]
  refined, losses = refine.descend(setting, one(case.task), keys, one(recipe), num_steps, rate, batch_size=1)
  num_bad = int((~np.isfinite(losses[:, 0, :count])).any(axis=-1).sum())
  if num_bad:
    logging.warning("The runs of %d of %d refine steps were not finite; they moved nothing.", num_bad, num_steps)
  return jax.tree.map(lambda x: x[0], refined), losses[-1, 0]


def _recipe(
  case: case_lib.Case, task: ml_collections.ConfigDict, recipe: Any, predicted: Mapping[str, Any]
) -> dict[str, Any]:
  """As a file has it: constrained, by name, and with the budget in steps."""
  config, setting = case.kept.config, case.setting
  learned = setting_lib.whole(setting.space, setting.space.constrain(recipe["hyperparameters"]))
  values = {"batch_size": config.batch_size, **setting.fixed, **{name: float(x) for name, x in learned.items()}}
  weights = np.asarray(many_tasks.mixture(recipe["mixture_logits"], jnp.asarray(case.task.source_mask)), np.float64)
  num_steps = config_lib.num_steps(task, round(values["batch_size"]))
  found = recipe_lib.default(
    case.sources,
    {**values, "num_steps": num_steps, **predict.adapter(config, values)},
    task=task.task,
    model=case.kept.model_path,
    predicted=predicted,
    provenance={**predict.provenance(config), "model_digest": case.kept.digest},
  )
  found["mixture"] = {name: float(w / weights.sum()) for name, w in zip(case.sources, weights, strict=False)}
  return found
