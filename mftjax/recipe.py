"""A recipe: hyperparameters and data mixture of one fine-tuning run, as a JSON file any trainer can use."""

import importlib.metadata
import itertools
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from absl import logging

from mftjax import exporters, files
from mftjax.errors import InputError, unknown_name

FORMAT = "mftjax-recipe/1"
_KEYS = ("format", "task", "model", "hyperparameters", "mixture", "predicted", "provenance")
FORMATS = exporters.FORMATS
_SUM_TOLERANCE = 1e-3
_PACKAGES = ("mftjax", "jax", "flax", "optax")


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
      do not sum to 1 (within 1e-3), a hyperparameter that is not a finite number, or a `mixture_schedule` that is not
      such mixtures of the same sources at moments from 0 up to 1.
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
  _check_numbers(recipe["hyperparameters"], f"{where}: hyperparameters")
  _check_mixture(recipe["mixture"], f"{where}: mixture")
  if "mixture_schedule" in recipe:
    _check_schedule(recipe["mixture_schedule"], recipe["mixture"], f"{where}: mixture_schedule")


def _check_numbers(values: Mapping[str, Any], where: str) -> None:
  for name, value in values.items():
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
      raise InputError(f"{where}.{name} must be a finite number, got {value!r}.")


def _check_mixture(mixture: Mapping[str, Any], where: str) -> None:
  _check_numbers(mixture, where)
  if not mixture:
    raise InputError(f"{where} names no source.")
  for source, weight in mixture.items():
    if weight < 0:
      raise InputError(f"{where}.{source} is negative: {weight!r}; weights are >= 0 and sum to 1.")
  total = sum(mixture.values())
  if abs(total - 1) > _SUM_TOLERANCE:
    raise InputError(f"{where}: the weights sum to {total:g}; they must sum to 1.")


def _check_schedule(schedule: Any, mixture: Mapping[str, Any], where: str) -> None:
  is_list = isinstance(schedule, list | tuple) and len(schedule) >= 2
  if not is_list or not all(isinstance(knot, Mapping) and set(knot) == {"progress", "mixture"} for knot in schedule):
    raise InputError(f"{where} must be a list of two or more {{progress, mixture}} objects, got {schedule!r}.")
  for number, knot in enumerate(schedule):
    if not isinstance(knot["mixture"], Mapping):
      raise InputError(f"{where}[{number}].mixture must be an object, got {knot['mixture']!r}.")
    _check_numbers({"progress": knot["progress"]}, f"{where}[{number}]")
    _check_mixture(knot["mixture"], f"{where}[{number}].mixture")
    if set(knot["mixture"]) != set(mixture):
      raise InputError(f"{where}[{number}].mixture must name the sources of mixture: {', '.join(mixture)}.")
  moments = [knot["progress"] for knot in schedule]
  if moments[0] != 0 or moments[-1] != 1 or any(a >= b for a, b in itertools.pairwise(moments)):
    raise InputError(f"{where}: progress must rise from 0 to 1, got {moments}.")


def mixture_at(recipe: Mapping[str, Any], progress: float) -> dict[str, float]:
  """The weight of each source when a part `progress` (0 to 1) of the run is over.

  Without a `mixture_schedule` it is `mixture`. With one the logarithms of the weights are linear between its knots,
  and the weights are divided by their sum, as a mixture whose logits are linear has it.
  """
  schedule = recipe.get("mixture_schedule")
  if schedule is None:
    return dict(recipe["mixture"])
  later = next((n for n, knot in enumerate(schedule) if n and progress <= knot["progress"]), len(schedule) - 1)
  before, after = schedule[later - 1], schedule[later]
  part = (min(max(progress, 0.0), 1.0) - before["progress"]) / (after["progress"] - before["progress"])
  blend = lambda a, b: max(a, 1e-30) ** (1 - part) * max(b, 1e-30) ** part
  weights = {source: blend(before["mixture"][source], after["mixture"][source]) for source in before["mixture"]}
  total = sum(weights.values())
  return {source: weight / total for source, weight in weights.items()}


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
  files.write(path, json.dumps(recipe, indent=2, allow_nan=False) + "\n")


def export(
  recipe: Mapping[str, Any],
  path: str | os.PathLike[str],
  format: str = "trl",
  *,
  num_examples: Mapping[str, int] | None = None,
) -> dict[str, float]:
  """Writes a recipe as another trainer's config, in that trainer's field names.

  - `trl`: `SFTConfig(**config["sft_config"])`, with LoRA `peft.LoraConfig(**config["lora_config"])`, and, from
    `datasets`, `interleave_datasets([...], **config["interleave_datasets"])` in the order of `config["datasets"]`.
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

  Hyperparameters that change nothing (a `stop_fraction` of 1, no label smoothing, ...) need no field and get none.

  Returns:
    The hyperparameters this trainer has no field for. A warning and the file's first lines (YAML) name them, and a
    `mixture_schedule`, which no trainer has a field for: the average, `mixture`, is exported.

  Raises:
    InputError: an unknown format, anything `check` refuses, or `num_examples` without one of the sources.
  """
  check(recipe, "recipe")
  if format not in FORMATS:
    raise unknown_name("recipe format", format, FORMATS)
  config, left_out, notes = exporters.build(recipe, format, num_examples)
  if left_out:
    logging.warning("%s has no field for %s; set these yourself.", format, ", ".join(sorted(left_out)))
  for note in notes:
    logging.warning("%s: not exported: %s.", format, note)
  if pathlib.Path(path).suffix == ".json":
    files.write(path, json.dumps(config, indent=2, allow_nan=False) + "\n")
  else:
    # json.dumps keeps a name with a line break inside its comment.
    header = f"# {format} config made from an {FORMAT} recipe for task {json.dumps(recipe['task'])}.\n"
    header += f"# mixture: {json.dumps(recipe['mixture'])}\n"
    header += "".join(f"# not exported: {json.dumps(name)} = {value!r}\n" for name, value in left_out.items())
    header += "".join(f"# not exported: {note}\n" for note in notes)
    files.write(path, header + yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
  return left_out


class _Dumper(yaml.SafeDumper):
  """Writes 1e-05 as 1.0e-05: YAML 1.1 readers take the first for a string."""


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
  text = repr(value)
  if "e" in text and "." not in text:
    text = text.replace("e", ".0e")
  return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _represent_float)
