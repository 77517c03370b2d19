"""A small base model that has read a little of every procedural suite: what the quickstart fine-tunes.

python -m experiments.finetune --config=configs/base.py --workdir=runs/base --recipe=default
"""

import ml_collections

from mftjax import config as config_lib
from mftjax.data import abilities


def get_config():
  config = config_lib.default()
  config.task = "base"
  config.length = 64
  config.batch_size = 16
  config.budget_tokens = 1500 * 16 * 64
  config.hyperparameters.learning_rate.value = 3e-3
  suites = {name: {"suite": name, "num_examples": 4000, "seed": 100} for name in abilities.SUITES}
  config.sources = ml_collections.ConfigDict(suites)
  config.abilities = ml_collections.ConfigDict(suites)
  config.checkpoint_every = 500
  config.evaluate.num_generated = 16
  return config
