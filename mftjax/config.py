"""Configs: made, checked, and read for the run's length and its hyperparameters."""

import math
from collections.abc import Mapping
from typing import Any

import ml_collections

from mftjax import errors, metagrad, objectives, sft, spaces
from mftjax.fields import FIELDS

SOURCE_HELP = {
  "path": "local .jsonl, .parquet or .csv file, or a hub id",
  "split": "which part, in the words of `datasets`, e.g. train[:80%]",
  "suite": "a procedural suite instead of a file",
  "num_examples": "examples made of the suite",
  "prompt_column": "column of the prompt",
  "completion_column": "column of the completion",
  "messages_column": "column of chat messages",
  "text_column": "column of plain text",
  "corruption": "none, shuffle (answers permuted) or redundant (few examples repeated)",
}

HYPERPARAMETER_HELP = {
  "value": "where it starts, or stays",
  "low": "least value that is tried",
  "high": "greatest value that is tried; that of batch_size is config.batch_size",
  "values": "the allowed values in ascending order, in place of low and high (scale ordered)",
  "scale": "linear, log (default) or ordered",
  "learn": "whether it is learned (default False)",
  "conditioned": "whether it may depend on the task (default True), or is one value for all tasks",
}

# Hyperparameters that mean something on a part of the numbers only: the least and the greatest.
_HYPERPARAMETER_RANGES = {
  "stop_fraction": (1e-3, 1.0),
  "label_smoothing": (0.0, 0.999),
  "prompt_loss_weight": (0.0, math.inf),
  "decay_power": (1e-3, math.inf),
  "lora_scale": (0.0, math.inf),
  **{f"learning_rate_{group}": (0.0, math.inf) for group in sft.GROUPS},
}


def default() -> ml_collections.ConfigDict:
  """A config with every field at its default and no sources or abilities yet.

  `config.sources` maps a name to where its examples are read from; `config.abilities` likewise, where
  `split` is what meta-training looks at, `test_split` (and `test_path`) what `evaluate` does, `weight` (default 1)
  the ability's part in the objective, and `reference` the loss that it is measured against.
  `config.hyperparameters` maps a name to `{value, low, high, scale, learn, conditioned}`, with `values` in place of the
  bounds for the scale "ordered".
  """
  config = ml_collections.ConfigDict()
  for name, field in FIELDS.items():
    *sections, leaf = name.split(".")
    section = config
    for part in sections:
      if part not in section:
        section[part] = ml_collections.ConfigDict()
      section = section[part]
    section[leaf] = field.default
  config.sources = ml_collections.ConfigDict()
  config.abilities = ml_collections.ConfigDict()
  config.hyperparameters = ml_collections.ConfigDict()
  learned("learning_rate", config, 1e-6, 1e-1)
  learned("weight_decay", config, 1e-4, 1.0)
  learned("b1", config, 0.5, 0.99, scale="linear")
  return config


def learned(
  name: str,
  config: ml_collections.ConfigDict,
  low: float,
  high: float,
  scale: str = "log",
  value: float | None = None,
) -> None:
  """Let a hyperparameter be learned between two bounds, from `value` or else its common value on."""
  start = sft.DEFAULTS[name] if value is None else value
  config.hyperparameters[name] = ml_collections.ConfigDict(
    {"value": start, "low": low, "high": high, "scale": scale, "learn": True}
  )


def help_text() -> str:
  """A line for each field."""
  lines = [f"  --config.{name}={field.default!r}\n        {field.help}" for name, field in FIELDS.items()]
  lines.append(
    f"  --config.hyperparameters.NAME.{{{','.join(HYPERPARAMETER_HELP)}}}, NAME one of: {', '.join(sft.NAMES)}"
  )
  lines += [f"        {name}: {text}" for name, text in HYPERPARAMETER_HELP.items()]
  lines.append(
    "  --config.sources.NAME.FIELD, --config.abilities.NAME.FIELD (also test_path, test_split, weight, reference):"
  )
  lines += [f"        {name}: {text}" for name, text in SOURCE_HELP.items()]
  return "\n".join(lines)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested fields by their dotted names."""
  flat = {}
  for name, value in config.items():
    if isinstance(value, Mapping | ml_collections.ConfigDict):
      flat.update(flatten(value, f"{prefix}{name}."))
    else:
      flat[prefix + name] = value
  return flat


def check(config: ml_collections.ConfigDict) -> None:
  """Raise `InputError` for the first field that is unknown or out of its range."""
  free = ("sources", "abilities", "hyperparameters")
  for name, value in flatten({k: v for k, v in config.items() if k not in free}).items():
    if name not in FIELDS:
      raise errors.unknown_name("config field", name, FIELDS)
    field = FIELDS[name]
    try:
      is_right = field.check(value)
    except TypeError:
      is_right = False
    if not is_right:
      raise errors.InputError(f"config.{name} = {value!r} is out of its range: {field.allowed}.")
  if config.learner.kind == "direct":
    need_sources(config)
  for name, spec in config.abilities.items():
    if not spec.get("weight", 1.0) >= 0:
      raise errors.InputError(f"config.abilities.{name}.weight = {spec.weight} must be at least 0.")
  if config.abilities and not sum(spec.get("weight", 1.0) for spec in config.abilities.values()) > 0:
    raise errors.InputError("The weights of config.abilities sum to 0.")
  if num_steps(config) < config.meta.unroll_length:
    raise errors.InputError(
      f"config.budget_tokens = {config.budget_tokens} gives {num_steps(config)} steps of {config.batch_size} x "
      f"{config.length} tokens, fewer than config.meta.unroll_length = {config.meta.unroll_length}."
    )
  if config.batch_size % config.micro_batches:
    raise errors.InputError(
      f"config.batch_size = {config.batch_size} does not divide into config.micro_batches = {config.micro_batches}."
    )
  method_options(config)
  _check_objective(config)
  for name, spec in config.hyperparameters.items():
    _check_hyperparameter(config, name, spec)
  if config.learner.kind == "direct" and not space(config).spaces and len(config.sources) < 2:
    raise errors.InputError("Nothing to learn: one source, and no hyperparameter with learn=True.")
  space(config).init(initial_hyperparameters(config))


def need_sources(config: ml_collections.ConfigDict) -> None:
  """Raise `InputError` if the config names no source or no ability, which only `learner.kind = "meta"` goes without."""
  for section in ("sources", "abilities"):
    if not config.get(section):
      raise errors.InputError(f"config.{section} is empty: name at least one.")


def _check_hyperparameter(config: ml_collections.ConfigDict, name: str, spec: ml_collections.ConfigDict) -> None:
  """Raise `InputError` if a hyperparameter's value or bounds lie where it has no meaning."""
  where = f"config.hyperparameters.{name}"
  found = _space_of(where, spec) if spec.get("learn", False) else None
  if "value" not in spec:
    raise errors.InputError(f"{where}.value is missing.")
  if not isinstance(spec.get("conditioned", True), bool):
    raise errors.InputError(f"{where}.conditioned = {spec['conditioned']!r} must be True or False.")
  if name in ("lora_rank", "lora_scale") and not config.lora.rank:
    raise errors.InputError(f"{where} has no meaning without LoRA: config.lora.rank = 0.")
  low, high = {
    **_HYPERPARAMETER_RANGES,
    "batch_size": (float(config.micro_batches), float(config.batch_size)),
    "lora_rank": (1.0, float(config.lora.rank)),
  }.get(name, (-math.inf, math.inf))
  bounds = {"value": spec["value"]} if found is None else {"value": spec["value"], "low": found.low, "high": found.high}
  for part, value in bounds.items():
    if not low <= value <= high:
      raise errors.InputError(f"{where}.{part} = {value} is out of its range: {low:g} to {high:g}.")
  if found is not None and name == "batch_size" and found.high != config.batch_size:
    raise errors.InputError(
      f"The greatest value of {where} is {found.high:g} and must be config.batch_size = {config.batch_size}, "
      "the rows that are drawn."
    )


def method_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The options of `config.meta.method` that are not at their default.

  Raises:
    InputError: an option that the method does not have, or that does not go with another.
  """
  known = metagrad.method_options(config.meta.method)
  options: dict[str, Any] = {}
  for name in ("recovery", "save", "every", "memory_bytes", "offload", "central", "num_pairs", "sigma"):
    if config.meta[name] == FIELDS[f"meta.{name}"].default:
      continue
    if name not in known:
      raise errors.InputError(f"config.meta.{name} has no meaning for config.meta.method = {config.meta.method!r}.")
    options[name] = config.meta[name]
  if "recovery" in known:
    metagrad.recovery.Options(**{name: value for name, value in options.items() if name != "central"})
  return options


def _check_objective(config: ml_collections.ConfigDict) -> None:
  """Raise `InputError` if fields of the objective do not go together, with the learner or with the abilities."""
  objective = config.objective
  objective_options(config)
  if config.learner.kind == "meta":
    asked = {
      "objective.name": objective.name in objectives.STATEFUL,
      "objective.balancing": objective.balancing != "none",
      "objective.preference": bool(objective.preference),
      "objective.reference": bool(objective.reference),
      "mixture.knots": config.mixture.knots > 1,
    }
    for name in (name for name, is_asked in asked.items() if is_asked):
      value = flatten(config)[name]
      raise errors.InputError(f"config.{name} = {value!r} needs config.learner.kind = 'direct'.")
    return
  if objective.balancing != "none" and objective.name != "mean":
    raise errors.InputError(
      f"config.objective.balancing = {objective.balancing!r} weighs the abilities itself, which leaves no place for "
      f"config.objective.name = {objective.name!r}: take 'mean'."
    )
  names = sorted(config.abilities)
  weights = [float(config.abilities[name].get("weight", 1.0)) for name in names]
  if objective.preference:
    _check_preference(config, weights)
  given = [name for name in names if "reference" in config.abilities[name]]
  for name in given:
    value = config.abilities[name].reference
    if isinstance(value, bool) or not (isinstance(value, int | float) and math.isfinite(value)):
      raise errors.InputError(f"config.abilities.{name}.reference = {value!r} must be a finite loss in nats.")
  if objective.name not in objectives.NEED_REFERENCE:
    for field in ["objective.reference"] if objective.reference else [f"abilities.{name}.reference" for name in given]:
      raise errors.InputError(f"config.{field} has no meaning for config.objective.name = {objective.name!r}.")
  elif not objective.reference:
    for name in (name for name, weight in zip(names, weights, strict=True) if weight > 0 and name not in given):
      raise errors.InputError(
        f"config.objective.name = {objective.name!r} measures each ability against a reference: set "
        f"config.abilities.{name}.reference, a loss in nats, or config.objective.reference, an evaluation.json."
      )


def _check_preference(config: ml_collections.ConfigDict, weights: list[float]) -> None:
  objective, value = config.objective, config.objective.preference
  try:
    preference = objectives.check_preference(value, len(weights))
  except errors.InputError as error:
    raise errors.InputError(f"config.objective.preference: {error}") from None
  if objective.name in objectives.IGNORE_WEIGHTS:
    raise errors.InputError(
      f"config.objective.preference has no meaning for config.objective.name = {objective.name!r}."
    )
  if objective.balancing in ("mgda", "famo"):
    raise errors.InputError(
      f"config.objective.preference has no meaning for config.objective.balancing = {objective.balancing!r}."
    )
  if not sum(float(p) * w for p, w in zip(preference, weights, strict=True)) > 0:
    raise errors.InputError(
      f"config.objective.preference = {value!r} times the weights of config.abilities, {weights}, leaves no ability."
    )


def objective_options(config: ml_collections.ConfigDict) -> dict[str, float]:
  """The options that `config.objective.name`, or its balancing, has, with their values.

  Raises:
    InputError: an option that is not at its default and that neither has.
  """
  objective = config.objective
  options = {**objectives.OPTIONS, **objectives.STATEFUL}
  known = ("step_size",) if objective.balancing == "famo" else options[objective.name]
  for name in dict.fromkeys(option for names in options.values() for option in names):
    if name not in known and objective[name] != FIELDS[f"objective.{name}"].default:
      raise errors.InputError(
        f"config.objective.{name} has no meaning for config.objective.name = {objective.name!r}"
        + (f" with config.objective.balancing = {objective.balancing!r}." if objective.balancing != "none" else ".")
      )
  return {name: float(objective[name]) for name in known}


def num_steps(config: ml_collections.ConfigDict, batch_size: int | None = None) -> int:
  """Inner steps of one whole fine-tuning run, at `config.batch_size` or another."""
  return config.budget_tokens // ((batch_size or config.batch_size) * config.length)


def space(config: ml_collections.ConfigDict) -> spaces.Space:
  """The space of the hyperparameters that are learned.

  Raises:
    InputError: an unknown name, scale or field, or bounds that are missing or do not go with the scale.
  """
  found = {}
  for name, spec in config.hyperparameters.items():
    where = f"config.hyperparameters.{name}"
    if name not in sft.NAMES:
      raise errors.unknown_name("hyperparameter", name, sft.NAMES)
    for key in spec:
      if key not in HYPERPARAMETER_HELP:
        raise errors.unknown_name(f"field of {where}", key, HYPERPARAMETER_HELP)
    if spec.get("learn", False):
      found[name] = _space_of(where, spec)
  return spaces.Space(found)


def _space_of(where: str, spec: ml_collections.ConfigDict) -> spaces.Interval | spaces.Ordered:
  scale = spec.get("scale", "log")
  if scale not in spaces.SCALES:
    raise errors.unknown_name(f"{where}.scale", scale, spaces.SCALES)
  needed, other = (("values",), ("low", "high")) if scale == "ordered" else (("low", "high"), ("values",))
  for key in needed:
    if key not in spec:
      raise errors.InputError(f"{where}.{key} is missing, which scale = {scale!r} needs.")
  for key in other:
    if key in spec:
      raise errors.InputError(f"{where}.{key} has no meaning for scale = {scale!r}.")
  try:
    if scale == "ordered":
      return spaces.Ordered(tuple(spec["values"]))
    return {"linear": spaces.Interval, "log": spaces.Log}[scale](spec.low, spec.high)
  except errors.InputError as error:
    raise errors.InputError(f"{where}: {error}") from None


def shared(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """The learned hyperparameters with `conditioned=False`: one value for all tasks."""
  return tuple(name for name in space(config).spaces if not config.hyperparameters[name].get("conditioned", True))


def initial_hyperparameters(config: ml_collections.ConfigDict) -> dict[str, float]:
  """Where the learned hyperparameters start."""
  return {name: float(config.hyperparameters[name].value) for name in space(config).spaces}


def default_hyperparameters(config: ml_collections.ConfigDict) -> dict[str, float]:
  """Every hyperparameter before any learning: the config's value, or the common one."""
  return {**sft.DEFAULTS, **{name: float(spec.value) for name, spec in config.hyperparameters.items()}}
