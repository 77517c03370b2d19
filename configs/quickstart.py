"""The main job on procedural data: which of seven sources help four abilities, and how to train on them.

make quickstart

Sources: four clean suites that the abilities are of, one redundant, one off-target, one corrupted (answers shuffled).
The learnt mixture should leave the last three, above all the corrupted one.
"""

from mftjax import config as config_lib


def get_config():
  config = config_lib.default()
  config.task = "quickstart"
  config.length = 64
  config.batch_size = 16
  config.budget_tokens = 400 * 16 * 64
  config.meta.outer_steps = 150
  config.meta.unroll_length = 8
  config.evaluate.max_new_tokens = 16
  return config
