"""The decoder, its adapters and its memory; pretrained weights in and out; generation."""

from mftjax.models import lora, slots
from mftjax.models.adapters import Adapters, StoredAdapters
from mftjax.models.decoder import Decoder
from mftjax.models.generate import generate
from mftjax.models.layers import DecoderConfig
from mftjax.models.memory import Memory, MemoryParam, MemoryWrite, WrittenSlots
from mftjax.models.pretrained import load, save

__all__ = [
  "Adapters",
  "Decoder",
  "DecoderConfig",
  "Memory",
  "MemoryParam",
  "MemoryWrite",
  "StoredAdapters",
  "WrittenSlots",
  "generate",
  "load",
  "lora",
  "save",
  "slots",
]
