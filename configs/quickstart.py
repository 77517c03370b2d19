"""The main job on procedural data: which of seven sources help four abilities, and how to train on them.

make quickstart

Sources: four clean suites that the abilities are of, one redundant, one off-target, one corrupted (answers shuffled).
The learnt mixture should leave the last three, above all the corrupted one.
"""

import ml_collections

from mftjax import config as config_lib


def get_config():
  config = config_lib.default()
  config.task = "quickstart"
  config.length = 64
  config.batch_size = 16
  config.budget_tokens = 640 * 16 * 64
  config.sources = ml_collections.ConfigDict(
    {
      "copying": {"suite": "copying", "num_examples": 4000},
      "lookup": {"suite": "lookup", "num_examples": 4000},
      "sorting": {"suite": "sorting", "num_examples": 4000},
      "uppercase": {"suite": "uppercase", "num_examples": 4000},
      "redundant_copying": {"suite": "copying", "num_examples": 400, "corruption": "redundant"},
      "off_target_modular": {"suite": "modular", "num_examples": 4000},
      "corrupted_sorting": {"suite": "sorting", "num_examples": 4000, "corruption": "shuffle", "seed": 1},
    }
  )
  config.abilities = ml_collections.ConfigDict(
    {name: {"suite": name, "num_examples": 1000} for name in ("copying", "lookup", "sorting", "uppercase")}
  )
  # Long unrolls and few outer steps: short ones shrink the learning rate, and see the corrupted source's harm late.
  config.meta.outer_steps = 80
  config.meta.unroll_length = 32
  config.meta.learning_rate = 0.15
  config.evaluate.max_new_tokens = 16
  return config
