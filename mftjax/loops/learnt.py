"""What a meta-training leaves for later predictions: the base model, the meta-learner, and the tasks it knows."""

import dataclasses
import json
import pathlib
import zipfile
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from mftjax import config as config_lib
from mftjax import errors, feature_cache, features, files, metalearner, models
from mftjax.data import meta_tasks, tokens
from mftjax.loops import many_tasks
from mftjax.loops import setting as setting_lib
from mftjax.loops import task as task_lib

FILE, ARRAYS, BASE_MODEL = "meta_learner.json", "meta_learner.npz", "base_model"
FORMAT = "mftjax-meta-learner/1"
_MOST_KNOWN = 4096  # training tasks that are kept
_FEATURES = {name: list(names) for name, names in features.NAMES.items()}


@dataclasses.dataclass(frozen=True)
class Known:
  """The tasks of the meta-training, with the recipes that are predicted for them in the end."""

  features: features.Features  # [num_tasks, ...]
  hyperparameters: dict[str, np.ndarray]  # name -> [num_tasks]
  weights: np.ndarray  # [num_tasks, max_sources], 0 = absent
  sources: np.ndarray  # [num_tasks, max_sources] names, "" where absent
  abilities: np.ndarray  # [num_tasks, max_abilities] likewise; a mixed one is called after its parts


@dataclasses.dataclass(frozen=True)
class Kept:
  """A trained meta-learner as it is read back from its workdir."""

  config: ml_collections.ConfigDict
  model_path: str  # of the base model
  model: many_tasks.Model
  tokenizer: Any
  digest: str  # of the base model's weights
  graphdef: Any
  state: Any
  spread_factor: float  # on its predicted spreads, for 90 % intervals
  known: Known

  def predict(self, task: features.Features) -> metalearner.Prediction:
    """The prediction for one task."""
    return nnx.merge(self.graphdef, self.state)(task)


def keep(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  setting: setting_lib.Setting,
  state: Any,
  spread_factor: float,
  tasks: meta_tasks.MetaTask,
  task_features: features.Features,
  prediction: metalearner.Prediction,
) -> None:
  """Writes `base_model/` (if the config names no model), `meta_learner.npz` and, last, `meta_learner.json`.

  Args:
    state: params and normalisers of the meta-learner.
    tasks, task_features, prediction: `[num_tasks, ...]` of the meta-training.
  """
  if not config.model.path:
    decoder = setting.model.merge(setting.model.params)
    if models.lora.adapted(decoder):
      models.lora.merge(decoder)  # new, so it changes nothing
    models.save(decoder, tokens.char_tokenizer(), workdir / BASE_MODEL)
  values, weights = setting_lib.constrained(setting, prediction.recipe, tasks)
  arrays: dict[str, Any] = {f"known/hyperparameters/{name}": value for name, value in values.items()}
  arrays |= {"known/weights": weights, **_names(setting.pools, tasks)}
  for field in dataclasses.fields(task_features):
    arrays[f"known/features/{field.name}"] = getattr(task_features, field.name)
  arrays = {name: np.asarray(array)[:_MOST_KNOWN] for name, array in arrays.items()}
  arrays |= {f"learner/{name}": np.asarray(array) for name, array in task_lib.pure(state).items()}
  files.write_npz(workdir / ARRAYS, arrays)
  found = {
    "format": FORMAT,
    "spread_factor": spread_factor,
    "model": config.model.path or BASE_MODEL,
    "model_digest": weights_digest(setting.model),
    "features": _FEATURES,
  }
  files.write_json(workdir / FILE, found)


def load(config: ml_collections.ConfigDict, workdir: pathlib.Path, model_path: str = "", gguf_file: str = "") -> Kept:
  """Reads back what `keep` wrote; nothing is trained or compiled.

  Args:
    config: of the meta-training.
    model_path, gguf_file: of the base model, where it lies elsewhere now; empty is the meta-learner's own.

  Raises:
    InputError: nothing there, damaged files, those of another version of mftjax, or another base model.
  """
  path = workdir / FILE
  if not path.exists():
    raise errors.InputError(f"{path} does not exist: meta-train there first, with experiments.compare.")
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
    with np.load(workdir / ARRAYS, allow_pickle=False) as file:
      arrays = dict(file)
    version, meaning, digest = found["format"], found["features"], found["model_digest"]
    spread_factor = float(found["spread_factor"])
  except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
    raise errors.InputError(f"{workdir}: cannot read the meta-learner ({FILE}, {ARRAYS}): {error}.") from error
  if version != FORMAT or meaning != _FEATURES:
    raise errors.InputError(f"{path} is of another version of mftjax, with other features; meta-train again.")

  config = config.copy_and_resolve_references()
  own = config.model.path or str(workdir / BASE_MODEL)
  if model_path:
    config.model.gguf_file = gguf_file
  config.model.path = model_path or own
  decoder, tokenizer = task_lib.load_model(config)
  model = setting_lib.base_model(config, decoder)
  given = weights_digest(model)
  if given != digest:
    raise errors.InputError(
      f"{config.model.path} holds another base model ({given[:8]}) than the meta-learner in {workdir} is for "
      f"({digest[:8]}); take {own}."
    )
  graphdef, like = nnx.split(build(config))
  part = lambda prefix: {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
  try:
    state = task_lib.unpure(like, part("learner/"))
    known = Known(
      features.Features(**{name: jnp.asarray(array) for name, array in part("known/features/").items()}),
      part("known/hyperparameters/"),
      *(arrays[f"known/{name}"] for name in ("weights", "sources", "abilities")),
    )
  except (KeyError, TypeError) as error:
    raise errors.InputError(f"{workdir / ARRAYS} is of another version of mftjax: it lacks {error}.") from error
  return Kept(config, config.model.path, model, tokenizer, digest, graphdef, state, spread_factor, known)


def weights_digest(model: many_tasks.Model) -> str:
  """Of the base model's weights, its LoRA's among them."""
  return feature_cache.digest(nnx.merge_state(model.params, model.frozen))


def build(config: ml_collections.ConfigDict) -> metalearner.MetaLearner:
  """An untrained meta-learner by the config."""
  initial = config_lib.space(config).init(config_lib.initial_hyperparameters(config))
  asked = config.learner
  return metalearner.MetaLearner(
    initial, config_lib.shared(config), asked.width, asked.sharpness, rngs=nnx.Rngs(config.seed)
  )


def _names(pools: meta_tasks.Pools, tasks: meta_tasks.MetaTask) -> dict[str, np.ndarray]:
  """What the sources and abilities of tasks are called."""
  sources = np.where(np.asarray(tasks.source_mask) > 0, np.asarray(pools.names)[np.asarray(tasks.source)], "")
  mixed, weight = np.asarray(tasks.ability), np.asarray(tasks.ability_weight)
  abilities = [
    [
      " + ".join(np.asarray(pools.ability_names)[parts > 0]) if here > 0 else ""
      for parts, here in zip(*task, strict=True)
    ]
    for task in zip(mixed, weight, strict=True)
  ]
  return {"known/sources": sources, "known/abilities": np.asarray(abilities)}
