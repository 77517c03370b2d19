"""Meta-Fine-Tuning in JAX: a fine-tuning run that learns its own recipe."""

__version__ = "0.1.0"
