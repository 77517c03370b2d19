"""A decoder's memory, and adapters in its slots, from and to safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from mftjax import files
from mftjax.errors import InputError
from mftjax.models import slots
from mftjax.models.adapters import Adapters
from mftjax.models.decoder import Decoder
from mftjax.models.memory import Memory

_SETTINGS = (
  "num_slots",
  "dim",
  "key_dim",
  "num_heads",
  "top_k",
  "product_keys",
  "gated",
  "qk_norm",
  "null_cosine",
  "context_dim",
  "num_shared",
  "has_values",
)


def save(model: Decoder, file: Path) -> None:
  """Writes a decoder's memory, with what is in its slots; what an open task has written counts as its own.

  Args:
    model: a decoder with a memory, which stays as it is.
    file: written over.
  """
  memories = model.memories()
  settings: list[dict[str, Any]] = []
  tensors: dict[str, np.ndarray] = {}
  for number, memory in enumerate(nnx.clone(memories)):
    memory.fold()
    settings.append({name: getattr(memory, name) for name in _SETTINGS})
    arrays = {name: x for name, x in slots.state(memory).items() if name not in ("delta", "written")}
    prefix = "" if model.memory is memories[0] else f"{number}."
    tensors |= {prefix + name: value for name, value in arrays.items()}
  metadata = {
    "settings": json.dumps(settings[0] if model.memory is memories[0] else settings),
    "layers": json.dumps(model.memory_layers),
    "placement": json.dumps(model.memory_placement),
  }
  if model.adapters is not None:
    found = nnx.clone(model.adapters)
    found.fold()
    metadata["adapters"] = json.dumps(found.settings())
    for part in ("start", "stored"):
      tensors |= {f"adapters.{part}.{name}": np.asarray(x[...]) for name, x in getattr(found, part).items()}
  files.write_safetensors(file, tensors, metadata)


def load(model: Decoder, file: Path) -> None:
  """Attaches the memory that `save` wrote.

  Args:
    model: a decoder without a memory.

  Raises:
    InputError: another kind of file, or tensors that are missing or do not fit.
  """
  with files.open_safetensors(file) as opened:
    metadata = opened.metadata() or {}
    if not {"settings", "layers"} <= set(metadata):
      raise InputError(f"{file} was not written by mftjax: its metadata lacks settings and layers.")
    tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
  settings = json.loads(metadata["settings"])
  memories = [Memory(**one, rngs=nnx.Rngs(0)) for one in (settings if isinstance(settings, list) else [settings])]
  for number, memory in enumerate(memories):
    prefix = f"{number}." if isinstance(settings, list) else ""
    own = {name: x for name, x in tensors.items() if name.startswith(prefix) and not name.startswith("adapters.")}
    arrays = {name.removeprefix(prefix): x for name, x in own.items()}
    # Files of before there were these hold none.
    later = {"log_temperature": np.zeros(memory.num_heads), "query_bias": np.zeros(memory.query_bias.shape)}
    slots.load(memory, later | arrays)
  adapters = None
  if "adapters" in metadata:
    adapters = Adapters(model.layers, **json.loads(metadata["adapters"]), rngs=nnx.Rngs(0))
    for part in ("start", "stored"):
      for name, variable in getattr(adapters, part).items():
        variable[...] = _checked(tensors, f"adapters.{part}.{name}", variable.shape, file)
  placement, layers = json.loads(metadata.get("placement", '"after"')), json.loads(metadata["layers"])
  model.attach_memory(memories if isinstance(settings, list) else memories[0], layers, placement, adapters)


def _checked(tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], file: Path) -> np.ndarray:
  if name not in tensors or tensors[name].shape != shape:
    there = tensors[name].shape if name in tensors else "missing"
    raise InputError(f"{file}: tensor {name} is {there}, but the model's is {shape}.")
  return tensors[name]
