"""A task of one's own for the tiny meta-learner of configs/compare.py: three sources, two abilities."""

import ml_collections

from mftjax import config as config_lib


def get_config(variant=""):
  config = config_lib.default()
  config.task = "own"
  config.length = 32
  config.budget_tokens = 6 * 8 * 32
  config.meta.unroll_length = 2
  config.sources = ml_collections.ConfigDict(
    {
      "copying": {"suite": "copying", "num_examples": 100},
      "modular": {"suite": "modular", "num_examples": 20},
      "wrong": {"suite": "modular", "num_examples": 60, "corruption": "shuffle"},
    }
  )
  config.abilities = ml_collections.ConfigDict(
    {name: {"suite": name, "num_examples": 30} for name in ("copying", "modular")}
  )
  if variant == "one_source":
    del config.sources["modular"]
    del config.sources["wrong"]
  elif variant == "no_ability":
    config.abilities = ml_collections.ConfigDict()
  elif variant == "many_sources":
    for number in range(4):
      config.sources[f"more{number}"] = ml_collections.ConfigDict({"suite": "sorting", "num_examples": 20})
  elif variant == "many_abilities":
    for name in ("addition", "sorting"):
      config.abilities[name] = ml_collections.ConfigDict({"suite": name, "num_examples": 20})
  return config
