"""A recipe: hyperparameters and data mixture of one fine-tuning run, as a JSON file any trainer can use."""

import importlib.metadata
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml
from absl import logging

from mftjax.errors import InputError, unknown_name

FORMAT = "mftjax-recipe/1"
_KEYS = ("format", "task", "model", "hyperparameters", "mixture", "predicted", "provenance")
_SUM_TOLERANCE = 1e-3
_PACKAGES = ("mftjax", "jax", "flax", "optax")

# What each trainer calls our hyperparameters. Those left out of a row are reported as not exported.
_TRANSFORMERS_NAMES = {
  "learning_rate": "learning_rate",
  "weight_decay": "weight_decay",
  "b1": "adam_beta1",
  "b2": "adam_beta2",
  "eps": "adam_epsilon",
  "warmup_fraction": "warmup_ratio",
  "warmup_ratio": "warmup_ratio",
  "warmup_steps": "warmup_steps",
  "clip_norm": "max_grad_norm",
  "max_grad_norm": "max_grad_norm",
  "batch_size": "per_device_train_batch_size",
  "num_steps": "max_steps",
  "label_smoothing": "label_smoothing_factor",
  "final_fraction": "final_fraction",  # _cosine turns it into the scheduler's own argument
}
_TRL_NAMES = _TRANSFORMERS_NAMES | {"length": "max_length"}
_AXOLOTL_NAMES = {k: v for k, v in _TRANSFORMERS_NAMES.items() if k != "label_smoothing"} | {
  "batch_size": "micro_batch_size",
  "length": "sequence_len",
  "lora_rank": "lora_r",
  "lora_alpha": "lora_alpha",
}
_LLAMAFACTORY_NAMES = _TRANSFORMERS_NAMES | {
  "length": "cutoff_len",
  "lora_rank": "lora_rank",
  "lora_alpha": "lora_alpha",
}
_TUNIX_NAMES = {
  "learning_rate": "optimizer_config.learning_rate",
  "weight_decay": "optimizer_config.weight_decay",
  "b1": "optimizer_config.b1",
  "b2": "optimizer_config.b2",
  "eps": "optimizer_config.eps",
  "warmup_fraction": "optimizer_config.warmup_ratio",
  "warmup_ratio": "optimizer_config.warmup_ratio",
  "warmup_steps": "optimizer_config.warmup_steps",
  "final_fraction": "optimizer_config.final_fraction",
  "clip_norm": "optimizer_config.max_grad_norm",
  "max_grad_norm": "optimizer_config.max_grad_norm",
  "batch_size": "batch_size",
  "num_steps": "training_config.max_steps",
  "length": "max_target_length",
  "lora_rank": "model_config.lora_config.rank",
  "lora_alpha": "model_config.lora_config.alpha",
}
_WHOLE = ("batch_size", "num_steps", "warmup_steps", "length", "lora_rank")


def default(
  sources: Sequence[str],
  hyperparameters: Mapping[str, float],
  *,
  task: str = "",
  model: str = "",
  predicted: Mapping[str, Any] | None = None,
  provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """A recipe that mixes all sources equally.

  Args:
    sources: names of the sources, at least one, no two alike.
    hyperparameters: name -> number.
    task: the task's name.
    model: folder or hub id of the model.
    predicted: what the run is expected to reach, if anything predicted it.
    provenance: config, seed, git; the versions of the libraries are added.

  Returns:
    The recipe, checked, as `save` writes it.

  Raises:
    InputError: no sources, a name twice, or a hyperparameter that is not a finite number.
  """
  if not sources:
    raise InputError("A recipe needs at least one source.")
  if len(set(sources)) != len(sources):
    raise InputError(f"A recipe names each source once; given: {', '.join(sources)}.")
  recipe = {
    "format": FORMAT,
    "task": task,
    "model": model,
    "hyperparameters": dict(hyperparameters),
    "mixture": {source: 1.0 / len(sources) for source in sources},
    "predicted": dict(predicted or {}),
    "provenance": {"versions": versions(), **(provenance or {})},
  }
  check(recipe, "the default recipe")
  return recipe


def versions() -> dict[str, str]:
  """Versions of the installed libraries that a result depends on, for `provenance`."""
  found = {}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
      continue
  return found


def check(recipe: Any, where: str) -> None:
  """Refuses a recipe that no trainer could follow.

  Args:
    recipe: what was read, or is to be written.
    where: where it came from (a path or a config field), for the message.

  Raises:
    InputError: not an object, another format version, a missing key, weights that are negative, not finite or
      do not sum to 1 (within 1e-3), a hyperparameter that is not a finite number.
  """
  if not isinstance(recipe, Mapping):
    raise InputError(f"{where}: a recipe is a JSON object, this is {type(recipe).__name__}.")
  if recipe.get("format") != FORMAT:
    raise InputError(f"{where}: format is {recipe.get('format')!r}; this version reads {FORMAT!r}.")
  missing = [key for key in _KEYS if key not in recipe]
  if missing:
    raise InputError(f"{where}: missing {', '.join(missing)}. A recipe has: {', '.join(_KEYS)}.")
  for key in ("hyperparameters", "mixture", "predicted", "provenance"):
    if not isinstance(recipe[key], Mapping):
      raise InputError(f"{where}: {key} must be an object, got {recipe[key]!r}.")
  for key in ("hyperparameters", "mixture"):
    for name, value in recipe[key].items():
      if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{where}: {key}.{name} must be a finite number, got {value!r}.")
  mixture = recipe["mixture"]
  if not mixture:
    raise InputError(f"{where}: mixture names no source.")
  for source, weight in mixture.items():
    if weight < 0:
      raise InputError(f"{where}: mixture.{source} is negative: {weight!r}; weights are >= 0 and sum to 1.")
  total = sum(mixture.values())
  if abs(total - 1) > _SUM_TOLERANCE:
    raise InputError(f"{where}: the weights of mixture sum to {total:g}; they must sum to 1.")


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads and checks a recipe.

  Args:
    path: a `recipe.json`.

  Returns:
    The recipe.

  Raises:
    InputError: no such file, not JSON, or anything `check` refuses.
  """
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
    raise InputError(f"{path}: cannot read the recipe: {reason}.") from error
  try:
    recipe = json.loads(text)
  except json.JSONDecodeError as error:
    raise InputError(f"{path}:{error.lineno}: not JSON: {error.msg}.") from error
  check(recipe, str(path))
  return recipe


def save(recipe: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
  """Checks a recipe and writes it; a reader sees the old file or the new one, never half of one.

  Args:
    recipe: the recipe.
    path: the file to write; its folder is made.

  Raises:
    InputError: anything `check` refuses; the file is then left as it was.
  """
  check(recipe, str(path))
  _write(path, json.dumps(recipe, indent=2, allow_nan=False) + "\n")


def export(
  recipe: Mapping[str, Any],
  path: str | os.PathLike[str],
  format: str = "trl",
  *,
  num_examples: Mapping[str, int] | None = None,
) -> dict[str, float]:
  """Writes a recipe as another trainer's config, in that trainer's field names.

  - `trl`: `SFTConfig(**config["sft_config"])` and, from `datasets`,
    `interleave_datasets([...], **config["interleave_datasets"])` in the order of `config["datasets"]`.
  - `llamafactory`: its flat file, with `mix_strategy: interleave_over` and `interleave_probs`.
  - `axolotl`: it has no weights, so each source is cut by its `split` to the size that makes the mixture.
  - `tunix`: its nested config, to be laid over its `base_config.yaml`. It mixes nothing itself: `data_mixture` is
    ours, for `grain.MapDataset.mix` in the data module.

  Args:
    recipe: the recipe.
    path: the file to write, JSON if it ends in `.json`, else YAML.
    format: one of `FORMATS`.
    num_examples: source -> number of training examples, used by `axolotl` only. Without it the sources are
      taken to be equally large.

  Returns:
    The hyperparameters this trainer has no field for; a warning and the file's first lines (YAML) name them too.

  Raises:
    InputError: an unknown format, anything `check` refuses, or `num_examples` without one of the sources.
  """
  check(recipe, "recipe")
  if format not in FORMATS:
    raise unknown_name("recipe format", format, FORMATS)
  names, layout = FORMATS[format]
  fields: dict[str, Any] = {}
  left_out: dict[str, float] = {}
  for name, value in recipe["hyperparameters"].items():
    if name in names:
      fields[names[name]] = max(1, round(value)) if name in _WHOLE and value > 0 else _plain(value)
    else:
      left_out[name] = value
  mixture = {source: float(weight) for source, weight in recipe["mixture"].items()}
  config = layout(recipe, fields, mixture, num_examples)
  if left_out:
    logging.warning("%s has no field for %s; set these yourself.", format, ", ".join(sorted(left_out)))
  if pathlib.Path(path).suffix == ".json":
    _write(path, json.dumps(config, indent=2, allow_nan=False) + "\n")
  else:
    # json.dumps keeps a name with a line break inside its comment.
    header = f"# {format} config made from an {FORMAT} recipe for task {json.dumps(recipe['task'])}.\n"
    header += f"# mixture: {json.dumps(mixture)}\n"
    header += "".join(f"# not exported: {json.dumps(name)} = {value!r}\n" for name, value in left_out.items())
    _write(path, header + yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
  return left_out


def _cosine(fields: dict[str, Any]) -> None:
  # Our schedule is a warm-up and a cosine; transformers would take a straight line.
  final = fields.pop("final_fraction", 0.0)
  fields["lr_scheduler_type"] = "cosine_with_min_lr"
  fields["lr_scheduler_kwargs"] = {"min_lr_rate": final}


def _trl(recipe: Mapping, fields: dict, mixture: dict[str, float], num_examples: Mapping | None) -> dict:
  _cosine(fields)
  # transformers 5 takes a fraction of the run as warmup_steps below 1, and drops warmup_ratio.
  if "warmup_ratio" in fields:
    fields["warmup_steps"] = fields.pop("warmup_ratio")
  return {
    "model_name_or_path": recipe["model"],
    "sft_config": fields,
    "datasets": list(mixture),
    "interleave_datasets": {
      "probabilities": _normalised(mixture),
      "seed": _seed(recipe),
      "stopping_strategy": "all_exhausted",
    },
  }


def _axolotl(recipe: Mapping, fields: dict, mixture: dict[str, float], num_examples: Mapping | None) -> dict:
  used = {source: weight for source, weight in mixture.items() if weight > 0}
  missing = [source for source in used if num_examples is not None and source not in num_examples]
  if missing:
    raise InputError(f"num_examples has no entry for source {missing[0]!r}.")
  sizes = {source: num_examples[source] for source in used} if num_examples else dict.fromkeys(used, 100)
  # The largest epoch in which no source is needed more often than it is there.
  total = min(sizes[source] / weight for source, weight in used.items())
  unit = "" if num_examples else "%"
  fields["lr_scheduler"] = "cosine"
  if "final_fraction" in fields:
    fields["cosine_min_lr_ratio"] = fields.pop("final_fraction")
  if "lora_r" in fields:
    fields["adapter"] = "lora"
  return {
    "base_model": recipe["model"],
    **fields,
    "gradient_accumulation_steps": 1,
    "optimizer": "adamw_torch",
    "seed": _seed(recipe),
    "datasets": [
      {"path": source, "type": "chat_template", "split": f"train[:{max(1, round(weight * total))}{unit}]"}
      for source, weight in used.items()
    ],
  }


def _llamafactory(recipe: Mapping, fields: dict, mixture: dict[str, float], num_examples: Mapping | None) -> dict:
  commas = [source for source in mixture if "," in source]
  if commas:
    raise InputError(f"llamafactory separates datasets by commas; rename source {commas[0]!r}.")
  _cosine(fields)
  return {
    "stage": "sft",
    "do_train": True,
    "model_name_or_path": recipe["model"],
    "finetuning_type": "lora" if "lora_rank" in fields else "full",
    **fields,
    "dataset": ",".join(mixture),
    "mix_strategy": "interleave_over",
    "interleave_probs": ",".join(repr(weight) for weight in _normalised(mixture)),
    "seed": _seed(recipe),
  }


def _tunix(recipe: Mapping, fields: dict, mixture: dict[str, float], num_examples: Mapping | None) -> dict:
  config: dict[str, Any] = {
    "model_config": {"model_source": "huggingface", "model_id": recipe["model"], "rng_seed": _seed(recipe)},
    "tokenizer_config": {"tokenizer_type": "huggingface", "tokenizer_path": recipe["model"]},
    "optimizer_config": {"opt_type": "adamw"},
  }
  for path, value in fields.items():
    *folders, name = path.split(".")
    place = config
    for folder in folders:
      place = place.setdefault(folder, {})
    place[name] = value
  optimizer = config["optimizer_config"]
  final = optimizer.pop("final_fraction", 0.0)
  if "learning_rate" in optimizer:
    optimizer |= {
      "schedule_type": "warmup_cosine_decay_schedule",
      "init_value": 0.0,
      "peak_value": optimizer["learning_rate"],
      "end_value": final * optimizer["learning_rate"],
    }
  config["data_mixture"] = {"datasets": list(mixture), "weights": _normalised(mixture)}
  return config


_Layout = Callable[[Mapping, dict, dict[str, float], Mapping | None], dict]
FORMATS: dict[str, tuple[dict[str, str], _Layout]] = {
  "trl": (_TRL_NAMES, _trl),
  "axolotl": (_AXOLOTL_NAMES, _axolotl),
  "llamafactory": (_LLAMAFACTORY_NAMES, _llamafactory),
  "tunix": (_TUNIX_NAMES, _tunix),
}


class _Dumper(yaml.SafeDumper):
  """Writes 1e-05 as 1.0e-05: YAML 1.1 readers take the first for a string."""


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
  text = repr(value)
  if "e" in text and "." not in text:
    text = text.replace("e", ".0e")
  return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _represent_float)


def _plain(value: float) -> float:
  return int(value) if isinstance(value, int) else float(value)


def _normalised(mixture: Mapping[str, float]) -> list[float]:
  # The trainers ask numpy for a choice, which wants a sum of 1 to 1e-8; a recipe may be 1e-3 off.
  total = sum(mixture.values())
  return [weight / total for weight in mixture.values()]


def _seed(recipe: Mapping[str, Any]) -> int:
  seed = recipe["provenance"].get("seed")
  return seed if isinstance(seed, int) else 0


def _write(path: str | os.PathLike[str], text: str) -> None:
  target = pathlib.Path(path)
  target.parent.mkdir(parents=True, exist_ok=True)
  partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
  try:
    with partial.open("w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    partial.replace(target)
  finally:
    partial.unlink(missing_ok=True)
