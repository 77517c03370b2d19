"""The decoder, its adapters and its memory; pretrained weights in and out; generation."""

from mftjax.models import lora
from mftjax.models.decoder import Decoder, DecoderConfig
from mftjax.models.generate import generate
from mftjax.models.memory import Memory, MemoryParam
from mftjax.models.pretrained import load, save

__all__ = ["Decoder", "DecoderConfig", "Memory", "MemoryParam", "generate", "load", "lora", "save"]
