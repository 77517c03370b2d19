"""The decoder, its adapters and its memory; pretrained weights in and out; generation."""

from mftjax.models import lora, slots
from mftjax.models.decoder import Decoder, DecoderConfig
from mftjax.models.generate import generate
from mftjax.models.memory import Memory, MemoryParam, MemoryWrite, WrittenSlots
from mftjax.models.pretrained import load, save

__all__ = [
  "Decoder",
  "DecoderConfig",
  "Memory",
  "MemoryParam",
  "MemoryWrite",
  "WrittenSlots",
  "generate",
  "load",
  "lora",
  "save",
  "slots",
]
