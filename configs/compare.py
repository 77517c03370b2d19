"""Recipes predicted by a meta-learner against searches, on unseen procedural tasks with a tiny model.

python -m experiments.compare --config=configs/compare.py:small --workdir=runs/compare

Codes of three disjoint families make the tasks: to meta-train on, to calibrate with, and unseen ones to compare on.
Variants: `small` takes about half an hour on 2 CPU cores; `tiny` only shows that it runs.
"""

from mftjax import config as config_lib


def get_config(variant="small"):
  config = config_lib.default()
  config.task = "compare"
  config.learner.kind = "meta"
  config.objective.name = "normalised"
  config.length = 32
  config.batch_size = 8
  config.budget_tokens = 64 * 8 * 32
  config.model.hidden_size = 32
  config.model.num_layers = 1
  config.model.num_heads = 2
  config_lib.learned("learning_rate", config, 1e-4, 2e-2, value=3e-3)
  config_lib.learned("weight_decay", config, 1e-4, 1.0)
  del config.hyperparameters["b1"]
  config.tasks.base_steps = 4000
  config.tasks.validation_rows = 64
  config.meta.outer_steps = 150
  config.learner.learning_rate = 2e-3
  config.learner.tasks_per_step = 16
  config.compare.constant_tasks = 40
  config.checkpoint_every = 50
  if variant == "tiny":
    config.budget_tokens = 8 * 8 * 32
    config.model.hidden_size = 16
    config.meta.outer_steps = 2
    config.meta.unroll_length = 8
    config.tasks.num_train = 8
    config.tasks.num_validation = 4
    config.tasks.pool_rows = 16
    config.tasks.base_steps = 4
    config.tasks.validation_rows = 4
    config.tasks.test_rows = 4
    config.probe.rows = 4
    config.learner.tasks_per_step = 4
    config.compare.num_tasks = 4
    config.compare.num_seeds = 2
    config.compare.num_trials = 12
    config.compare.constant_tasks = 4
    config.compare.refine_steps = 1
    config.compare.direct_steps = 1
  elif variant != "small":
    raise ValueError(f"No variant {variant!r} of configs/compare.py; there are: small, tiny.")
  return config
