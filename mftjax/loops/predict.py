"""The recipe that meta-training came to, as a file that any trainer can use."""

import pathlib
import subprocess
from collections.abc import Mapping
from typing import Any

import ml_collections
from absl import logging

from mftjax import config as config_lib
from mftjax import errors, recipe, run_folder, tracking
from mftjax.loops import curriculum, meta_train
from mftjax.loops import task as task_lib


def predict(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
  """Write `recipe.json` from the newest checkpoint; returns its path.

  Raises:
    InputError: nothing was meta-trained in this workdir.
  """
  run_folder.reclaim(config, workdir)
  network, _ = task_lib.build_network(config)
  found = meta_train.restore(config, network, workdir)
  if found is None:
    raise errors.InputError(f"{workdir} holds no checkpoint: run experiments.meta_train there first.")
  step, state, _ = found
  learned, weights = meta_train.readable(config, state.meta_params)
  losses = _ability_loss(workdir / tracking.FILE, step)
  path = workdir / "recipe.json"
  found_recipe = default_recipe(config)
  found_recipe["hyperparameters"].update(learned | adapter(config, learned))
  found_recipe["mixture"] = weights
  schedule = curriculum.schedule(config, state.meta_params["mixture_logits"])
  if schedule is not None:
    found_recipe["mixture_schedule"] = schedule
  found_recipe["predicted"] = losses | {"outer_steps": step}
  recipe.save(found_recipe, path)
  return path


def _ability_loss(path: pathlib.Path, step: int) -> dict[str, Any]:
  """`{"ability_loss": {ability: nats}}` as of that outer step; empty, with a warning, if the file has no such line."""
  for line in tracking.read(path):
    if (line.get("phase"), line.get("step")) == ("meta_train", step):
      return {"ability_loss": line["ability_loss"]}
  logging.warning("%s has no line of outer step %d: the recipe goes without the losses it came to.", path, step)
  return {}


def default_recipe(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """What one would take without learning: uniform mixture, common hyperparameters, the same budget."""
  values = config_lib.default_hyperparameters(config) | run_length(config)
  return recipe.default(
    task_lib.names(config.sources),
    values | adapter(config, values),
    task=config.task,
    model=config.model.path or "random",
    provenance=provenance(config),
  )


def run_length(config: ml_collections.ConfigDict) -> dict[str, int]:
  """The budget in the recipe's words."""
  return {"batch_size": config.batch_size, "num_steps": config_lib.num_steps(config)}


def adapter(config: ml_collections.ConfigDict, hyperparameters: Mapping[str, float]) -> dict[str, float]:
  """The LoRA in the recipe's words, empty without one: its rank, and the alpha whose quotient is the config's."""
  if not config.lora.rank:
    return {}
  rank = hyperparameters.get("lora_rank", config.lora.rank)
  return {"lora_rank": rank, "lora_alpha": config.lora.alpha * rank / config.lora.rank}


def provenance(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Where a recipe comes from: config, seed, versions, git commit (None outside a checkout)."""
  git = subprocess.run(
    ["git", "rev-parse", "HEAD"],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parent,
    check=False,
  )
  return {
    "config": config.task,
    "seed": config.seed,
    "versions": recipe.versions(),
    "git": git.stdout.strip() or None,
  }
