"""A config small enough for tests: two suites, one of them also corrupted, a model of width 16."""

import ml_collections

from mftjax import config as config_lib


def get_config(variant=""):
  config = config_lib.default()
  config.task = "tiny"
  config.length = 48
  config.batch_size = 4
  config.budget_tokens = 12 * 4 * 48
  config.model.hidden_size = 16
  config.model.num_layers = 1
  config.model.num_heads = 2
  config.meta.outer_steps = 8
  config.meta.unroll_length = 2
  config.meta.ability_rows = 2
  config.checkpoint_every = 2
  config.evaluate.num_rows = 4
  config.evaluate.num_generated = 2
  config.evaluate.max_new_tokens = 4
  config.sources = ml_collections.ConfigDict(
    {
      "copying": {"suite": "copying", "num_examples": 40},
      "reversal": {"suite": "reversal", "num_examples": 40},
      "wrong": {"suite": "copying", "num_examples": 40, "corruption": "shuffle"},
    }
  )
  config.abilities = ml_collections.ConfigDict(
    {
      "copying": {"suite": "copying", "num_examples": 20},
      "reversal": {"suite": "reversal", "num_examples": 20},
    }
  )
  if variant == "files":
    config.sources.copying = ml_collections.ConfigDict({"path": "missing.jsonl"})
  if variant == "memory":
    config.memory.num_slots = 4
    config.memory.key_dim = 4
    config.lora.rank = 2
  return config
