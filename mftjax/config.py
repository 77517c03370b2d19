"""What a config holds: every field with its default, its range and a line of help."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from mftjax import errors, metagrad, sft, spaces
from mftjax.models import attention


@dataclasses.dataclass(frozen=True)
class Field:
  """One field of the config."""

  default: Any
  help: str
  check: Callable[[Any], bool] = lambda value: True
  allowed: str = ""


def _at_least(low: float) -> dict[str, Any]:
  return {"check": lambda value: math.isfinite(value) and value >= low, "allowed": f"at least {low}"}


def _above(low: float) -> dict[str, Any]:
  return {"check": lambda value: math.isfinite(value) and value > low, "allowed": f"above {low}"}


def _one_of(*words: str) -> dict[str, Any]:
  return {"check": lambda value: value in words, "allowed": "one of " + ", ".join(words)}


FIELDS: dict[str, Field] = {
  "seed": Field(0, "seed of everything random", **_at_least(0)),
  "task": Field("task", "name of the task, written into the recipe"),
  "budget_tokens": Field(100_000, "tokens (rows times length) of one fine-tuning run", **_above(0)),
  "length": Field(128, "tokens in a row; examples are packed into rows", **_at_least(8)),
  "batch_size": Field(8, "rows in a batch of the inner step", **_at_least(1)),
  "micro_batches": Field(1, "parts of an inner batch that are computed one after the other", **_at_least(1)),
  "normalise_gradients": Field(False, "scale every inner gradient to clip_norm, not only the larger ones"),
  "average_decay": Field(
    0.0,
    "decay of an average of the inner params, which is what is evaluated and exported; 0 is none",
    lambda value: 0 <= value < 1,
    "at least 0, below 1",
  ),
  "truncate_side": Field("left", "side on which a prompt that is too long is cut", **_one_of("left", "right")),
  "compilation_cache": Field("default", "folder of compiled programs; 'default' is ~/.cache/mftjax, '' is off"),
  "model.path": Field("", "folder or hub id of the model; empty makes a small random one"),
  "model.gguf_file": Field("", "GGUF file within that folder"),
  "model.dtype": Field("float32", "dtype of the computation", **_one_of("float32", "bfloat16")),
  "model.remat": Field(False, "recompute each layer's activations in the backward pass"),
  "model.attention": Field(
    "full",
    "full, blockwise (memory linear in the length) or fused (fastest kernel, no meta-gradient on a GPU)",
    **_one_of(*attention.ATTENTION),
  ),
  "model.hidden_size": Field(64, "width of the random model", **_at_least(2)),
  "model.num_layers": Field(2, "layers of the random model", **_at_least(1)),
  "model.num_heads": Field(4, "attention heads of the random model", **_at_least(1)),
  "lora.rank": Field(0, "rank of the LoRA; 0 trains every parameter", **_at_least(0)),
  "lora.alpha": Field(16.0, "LoRA scale: its output is multiplied by alpha / rank", **_above(0)),
  "lora.targets": Field(("q_proj", "k_proj", "v_proj", "o_proj"), "modules that get a LoRA"),
  "memory.num_slots": Field(0, "key-value slots learned across tasks; 0 is no memory", **_at_least(0)),
  "memory.key_dim": Field(16, "width of a slot's key", **_at_least(1)),
  "memory.num_heads": Field(2, "heads that read the slots", **_at_least(1)),
  "memory.layers": Field((0,), "layers after which the memory is read"),
  "meta.outer_steps": Field(100, "outer steps", **_at_least(1)),
  "meta.unroll_length": Field(8, "inner steps that one meta-gradient goes through", **_at_least(1)),
  "meta.method": Field("mixed", "meta-gradient estimator", **_one_of(*metagrad.METHODS)),
  "meta.recovery": Field("auto", "how inner states are had again", **_one_of(*metagrad.recovery.RECOVERIES)),
  "meta.save": Field("auto", "what is kept of an inner step beside its state", **_one_of(*metagrad.recovery.SAVES)),
  "meta.every": Field(0, "steps between two states that are kept; 0 chooses", **_at_least(0)),
  "meta.memory_bytes": Field(0, "what an unroll may keep; 0 is a quarter of the device's memory", **_at_least(0)),
  "meta.offload": Field(False, "keep states in the host's memory"),
  "meta.central": Field(False, "central differences (method finite_difference)"),
  "meta.num_pairs": Field(8, "antithetic pairs (methods es and pes)", **_at_least(1)),
  "meta.sigma": Field(0.01, "standard deviation of perturbations (methods es and pes)", **_above(0)),
  "meta.check": Field(False, "first compare the method with f64 reverse mode on a few steps and rows"),
  "meta.mixture_learning_rate": Field(0.1, "of the outer Adam, on the mixture logits", **_above(0)),
  "meta.hyperparameter_learning_rate": Field(0.03, "of the outer Adam, on the hyperparameters", **_above(0)),
  "meta.memory_learning_rate": Field(1e-3, "of the outer Adam, on the memory", **_above(0)),
  "meta.clip_norm": Field(1.0, "global norm to which meta-gradients are clipped", **_above(0)),
  "meta.ability_rows": Field(4, "held-out rows of each ability in an outer batch", **_at_least(1)),
  "meta.uniform_fraction": Field(
    0.5,
    "part of the uniform distribution in the proposal that rows are drawn from",
    lambda value: 0 < value <= 1,
    "above 0, at most 1",
  ),
  "meta.max_skipped": Field(10, "non-finite outer steps in a row that stop the run", **_at_least(1)),
  "checkpoint_every": Field(20, "steps between checkpoints", **_at_least(1)),
  "evaluate.num_rows": Field(64, "test rows an ability's loss is taken over, at most", **_at_least(1)),
  "evaluate.num_generated": Field(32, "test prompts answered for exact match; 0 is none", **_at_least(0)),
  "evaluate.max_new_tokens": Field(32, "length of an answer, at most", **_at_least(1)),
}

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


def default() -> ml_collections.ConfigDict:
  """A config with every field at its default and no sources or abilities yet.

  `config.sources` maps a name to where its examples are read from; `config.abilities` likewise, where
  `split` is what meta-training looks at, `test_split` (and `test_path`) what `evaluate` does, and `weight`
  (default 1) the ability's part in the objective. `config.hyperparameters` maps a name to
  `{value, low, high, scale, learn}`.
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


def learned(name: str, config: ml_collections.ConfigDict, low: float, high: float, scale: str = "log") -> None:
  """Let a hyperparameter be learned between two bounds, from its common value on."""
  config.hyperparameters[name] = ml_collections.ConfigDict(
    {"value": sft.DEFAULTS[name], "low": low, "high": high, "scale": scale, "learn": True}
  )


def help_text() -> str:
  """A line for each field."""
  lines = [f"  --config.{name}={field.default!r}\n        {field.help}" for name, field in FIELDS.items()]
  lines.append("  --config.hyperparameters.NAME.{value,low,high,scale,learn}, NAME one of: " + ", ".join(sft.DEFAULTS))
  lines.append("  --config.sources.NAME.FIELD, --config.abilities.NAME.FIELD (also test_path, test_split, weight):")
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
  for section in ("sources", "abilities"):
    if not config.get(section):
      raise errors.InputError(f"config.{section} is empty: name at least one.")
  for name, spec in config.abilities.items():
    if not spec.get("weight", 1.0) >= 0:
      raise errors.InputError(f"config.abilities.{name}.weight = {spec.weight} must be at least 0.")
  if not sum(spec.get("weight", 1.0) for spec in config.abilities.values()) > 0:
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
  if config.meta.outer_steps and not space(config).spaces and len(config.sources) < 2:
    raise errors.InputError("Nothing to learn: one source, and no hyperparameter with learn=True.")
  space(config).init(initial_hyperparameters(config))


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


def num_steps(config: ml_collections.ConfigDict) -> int:
  """Inner steps of one whole fine-tuning run."""
  return config.budget_tokens // (config.batch_size * config.length)


def space(config: ml_collections.ConfigDict) -> spaces.Space:
  """The space of the hyperparameters that are learned."""
  found = {}
  for name, spec in config.hyperparameters.items():
    where = f"config.hyperparameters.{name}"
    if name not in sft.DEFAULTS:
      raise errors.unknown_name("hyperparameter", name, sft.DEFAULTS)
    for key in spec:
      if key not in ("value", "low", "high", "scale", "learn"):
        raise errors.unknown_name(f"field of {where}", key, ("value", "low", "high", "scale", "learn"))
    if spec.get("learn", False):
      scale = spec.get("scale", "log")
      if scale not in spaces.SCALES:
        raise errors.unknown_name(f"{where}.scale", scale, spaces.SCALES)
      found[name] = spaces.SCALES[scale](spec.low, spec.high)
  return spaces.Space(found)


def initial_hyperparameters(config: ml_collections.ConfigDict) -> dict[str, float]:
  """Where the learned hyperparameters start."""
  return {name: float(config.hyperparameters[name].value) for name in space(config).spaces}


def default_hyperparameters(config: ml_collections.ConfigDict) -> dict[str, float]:
  """Every hyperparameter before any learning: the config's value, or the common one."""
  return {**sft.DEFAULTS, **{name: float(spec.value) for name, spec in config.hyperparameters.items()}}
