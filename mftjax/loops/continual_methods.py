"""The methods that a comparison on sequences of tasks may have, by name."""

import ml_collections

from mftjax import errors
from mftjax.baselines import continual

_META_TRAINED = ("memory, no outer loop", "memory, meta-learned", "memory, meta-learned, replay 5 %")
OURS = ("memory", *_META_TRAINED)
METHODS = (*continual.METHODS, *OURS)
GROUPS = {"joint": "upper bound", **dict.fromkeys(OURS, "ours")}


def chosen(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """The names in `config.continual.methods`; without any, all for which the config names data.

  Raises:
    InputError: an unknown method, or one that the config's tasks or memory leave nothing to train with.
  """
  names = tuple(config.continual.methods)
  for name in names:
    if name not in METHODS:
      raise errors.unknown_name("method in config.continual.methods", name, METHODS)
  missing: dict[str, str] = {}
  if config.memory.placement == "adapters":
    missing["memory, no outer loop"] = "trains the values of slots, which a memory with adapters does not have."
  if config.continual.source != "procedural" and not config.retention.files:
    reason = "is trained on sequences of other tasks first: name files of theirs in config.retention.files."
    missing |= dict.fromkeys(_META_TRAINED, reason)
  if config.retention.stored_fraction:
    missing["memory, meta-learned"] = "keeps no rows: set config.retention.stored_fraction = 0."
  for name in names:
    if name in missing:
      raise errors.InputError(f"{name!r} in config.continual.methods {missing[name]}")
  return names or tuple(name for name in METHODS if name not in missing)


def needs_training(config: ml_collections.ConfigDict) -> bool:
  """Whether a chosen method is trained on sequences of other tasks first."""
  return not set(_META_TRAINED).isdisjoint(chosen(config))


def trained_of(kind: str, write_rule: str) -> str:
  """What the inner steps of a kind of method train, "full", "lora" or "memory": beside a frozen memory, a LoRA."""
  return "lora" if kind == "memory" and write_rule == "frozen" else kind


def get(name: str, write_rule: str) -> continual.Method:
  """A method by its name.

  Args:
    name: in `METHODS`.
    write_rule: `config.continual.write_rule`, for memories.
  """
  if name in continual.METHODS:
    return continual.METHODS[name]
  method = continual.memory.method(write_rule)
  return continual.replay.replaying(method, 0.05) if name.endswith("replay 5 %") else method
