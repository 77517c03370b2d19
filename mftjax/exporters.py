"""A recipe in the words of other trainers: what each calls a hyperparameter, and how its config is laid out."""

from collections.abc import Callable, Mapping
from typing import Any

from mftjax import sft
from mftjax.errors import InputError

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
_TRL_NAMES = _TRANSFORMERS_NAMES | {
  "length": "max_length",
  "lora_rank": "lora_config.r",
  "lora_alpha": "lora_config.lora_alpha",
}
_AXOLOTL_NAMES = {k: v for k, v in _TRANSFORMERS_NAMES.items() if k != "label_smoothing"} | {
  "batch_size": "micro_batch_size",
  "length": "sequence_len",
  "lora_rank": "lora_r",
  "lora_alpha": "lora_alpha",
  "learning_rate_embedding": "embedding_lr_scale",
  "learning_rate_attention": "lr_groups.attention",  # _axolotl turns these two into its list of groups,
  "learning_rate_mlp": "lr_groups.mlp",  # which can hold no norms
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
  "decay_power": "optimizer_config.exponent",
  "clip_norm": "optimizer_config.max_grad_norm",
  "max_grad_norm": "optimizer_config.max_grad_norm",
  "batch_size": "batch_size",
  "num_steps": "training_config.max_steps",
  "length": "max_target_length",
  "lora_rank": "model_config.lora_config.rank",
  "lora_alpha": "model_config.lora_config.alpha",
}
_WHOLE = ("batch_size", "num_steps", "warmup_steps", "length", "lora_rank")

# What a trainer without such a hyperparameter does: these values need no field.
_NEUTRAL = {
  "decay_power": 1.0,
  "stop_fraction": 1.0,
  "label_smoothing": 0.0,
  "prompt_loss_weight": 0.0,
  "lora_scale": 1.0,
  **{f"learning_rate_{group}": 1.0 for group in sft.GROUPS},
}

# Loss on prompts is all or nothing there: the field that a weight of 1 sets.
_WHOLE_PROMPT_LOSS: dict[str, dict[str, Any]] = {
  "trl": {"completion_only_loss": False},
  "axolotl": {"train_on_inputs": True},
  "llamafactory": {"train_on_prompt": True},
}


def build(
  recipe: Mapping[str, Any], format: str, num_examples: Mapping[str, int] | None = None
) -> tuple[dict[str, Any], dict[str, float], list[str]]:
  """The other trainer's config, the hyperparameters that it has no field for, and what else it does not say.

  Args:
    recipe: a checked recipe.
    format: one of `FORMATS`.
    num_examples: source -> number of training examples, for `axolotl`.

  Raises:
    InputError: the names of the sources do not fit the format, or `num_examples` lacks one.
  """
  names, layout = FORMATS[format]
  fields: dict[str, Any] = {}
  left_out: dict[str, float] = {}
  values = _resolved(recipe["hyperparameters"])
  for name, value in values.items():
    if name == "prompt_loss_weight" and value == 1 and format in _WHOLE_PROMPT_LOSS:
      fields |= _WHOLE_PROMPT_LOSS[format]
    elif name in names and ("lr_groups" not in names[name] or "learning_rate" in values):
      fields[names[name]] = max(1, round(value)) if name in _WHOLE and value > 0 else _plain(value)
    else:
      left_out[name] = value
  mixture = {source: float(weight) for source, weight in recipe["mixture"].items()}
  notes = ["mixture_schedule: `mixture`, its average over the run, stands for it"] * ("mixture_schedule" in recipe)
  notes += ["the modules that the LoRA is on"] * ("lora_rank" in values)
  return layout(recipe, fields, mixture, num_examples), left_out, notes


def _resolved(hyperparameters: Mapping[str, float]) -> dict[str, float]:
  """The hyperparameters that say something, those that act on others worked into them."""
  values = {name: value for name, value in hyperparameters.items() if _NEUTRAL.get(name) != value}
  if "num_steps" in values and "stop_fraction" in values:
    # As finetune.run_length: 1e-3, since 0.7 is not quite 0.7 in f32.
    values["num_steps"] = max(int(values["num_steps"] * values.pop("stop_fraction") + 1e-3), 1)
  if "lora_rank" in values and "lora_alpha" in values:
    # Their output is multiplied by alpha / rank, so a rank that is rounded keeps the quotient.
    rounding = max(1, round(values["lora_rank"])) / values["lora_rank"]
    values["lora_alpha"] = values["lora_alpha"] * values.pop("lora_scale", 1.0) * rounding
  return values


def _cosine(fields: dict[str, Any]) -> None:
  # Our schedule is a warm-up and a cosine; transformers would take a straight line.
  final = fields.pop("final_fraction", 0.0)
  fields["lr_scheduler_type"] = "cosine_with_min_lr"
  fields["lr_scheduler_kwargs"] = {"min_lr_rate": final}


def _nested(fields: Mapping[str, Any], into: dict[str, Any]) -> dict[str, Any]:
  """`into` with fields whose dotted names say where they go."""
  for path, value in fields.items():
    *folders, name = path.split(".")
    place = into
    for folder in folders:
      place = place.setdefault(folder, {})
    place[name] = value
  return into


def _trl(recipe: Mapping, fields: dict, mixture: dict[str, float], num_examples: Mapping | None) -> dict:
  _cosine(fields)
  # transformers 5 takes a fraction of the run as warmup_steps below 1, and drops warmup_ratio.
  if "warmup_ratio" in fields:
    fields["warmup_steps"] = fields.pop("warmup_ratio")
  fields = _nested(fields, {})
  lora = {"lora_config": {**fields.pop("lora_config"), "task_type": "CAUSAL_LM"}} if "lora_config" in fields else {}
  return {
    "model_name_or_path": recipe["model"],
    "sft_config": fields,
    **lora,
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
  fields = _nested(fields, {})
  fields["lr_scheduler"] = "cosine"
  if "final_fraction" in fields:
    fields["cosine_min_lr_ratio"] = fields.pop("final_fraction")
  if "lora_r" in fields:
    fields["adapter"] = "lora"
  if "lr_groups" in fields:
    # Its rates are absolute ones, and a module belongs to a group if its name holds one of these words.
    fields["lr_groups"] = [
      {"name": group, "modules": list(sft.GROUPS[group]), "lr": scale * fields["learning_rate"]}
      for group, scale in fields["lr_groups"].items()
    ]
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
  _nested(fields, config)
  optimizer = config["optimizer_config"]
  final = optimizer.pop("final_fraction", 0.0)
  if "learning_rate" in optimizer:
    optimizer |= {
      "schedule_type": "warmup_cosine_decay_schedule",
      "init_value": 0.0,
      "peak_value": optimizer["learning_rate"],
      "end_value": final * optimizer["learning_rate"],
    }
  if "max_steps" in config.get("training_config", {}):
    # Its schedule is optax's, which counts in steps; those of its base config are of a run of ten.
    num_steps = config["training_config"]["max_steps"]
    optimizer["decay_steps"] = num_steps
    optimizer.setdefault("warmup_steps", round(optimizer.get("warmup_ratio", 0.0) * num_steps))
  config["data_mixture"] = {"datasets": list(mixture), "weights": _normalised(mixture)}
  return config


_Layout = Callable[[Mapping, dict, dict[str, float], Mapping | None], dict]
FORMATS: dict[str, tuple[dict[str, str], _Layout]] = {
  "trl": (_TRL_NAMES, _trl),
  "axolotl": (_AXOLOTL_NAMES, _axolotl),
  "llamafactory": (_LLAMAFACTORY_NAMES, _llamafactory),
  "tunix": (_TUNIX_NAMES, _tunix),
}


def _plain(value: float) -> float:
  return int(value) if isinstance(value, int) else float(value)


def _normalised(mixture: Mapping[str, float]) -> list[float]:
  # The trainers ask numpy for a choice, which wants a sum of 1 to 1e-8; a recipe may be 1e-3 off.
  total = sum(mixture.values())
  return [weight / total for weight in mixture.values()]


def _seed(recipe: Mapping[str, Any]) -> int:
  seed = recipe["provenance"].get("seed")
  return seed if isinstance(seed, int) else 0
