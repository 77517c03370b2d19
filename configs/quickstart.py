"""The main job on procedural data: which of seven sources help four abilities, and how to train on them.

make quickstart (it trains the base model of configs/base.py first)

Sources: four clean suites that the abilities are of, one redundant, one off-target, one corrupted (answers shuffled).
The learnt mixture should leave the last three, above all the corrupted one.
"""

import ml_collections

from mftjax import config as config_lib


def get_config():
  config = config_lib.default()
  config.task = "quickstart"
  config.model.path = "runs/base/finetune/default/model"
  config.length = 64
  config.batch_size = 16
  config.budget_tokens = 320 * 16 * 64
  clean = ("copying", "formatting", "reversal", "sorting")
  sources = {name: {"suite": name, "num_examples": 4000} for name in clean}
  sources["redundant_copying"] = {"suite": "copying", "num_examples": 400, "corruption": "redundant"}
  sources["off_target_modular"] = {"suite": "modular", "num_examples": 4000}
  sources["corrupted_reversal"] = {"suite": "reversal", "num_examples": 4000, "corruption": "shuffle", "seed": 1}
  config.sources = ml_collections.ConfigDict(sources)
  config.abilities = ml_collections.ConfigDict({name: {"suite": name, "num_examples": 1000} for name in clean})
  config_lib.learned("learning_rate", config, 1e-5, 1e-2)
  config.meta.outer_steps = 80
  config.meta.unroll_length = 24
  config.evaluate.max_new_tokens = 16
  return config
