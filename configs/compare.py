"""Recipes predicted by a meta-learner against searches, on unseen tasks.

python -m experiments.compare --config=configs/compare.py:small --workdir=runs/compare
python -m experiments.compare --config=configs/compare.py:smollm2 --workdir=runs/compare_smollm2

`small`: procedural tasks with a tiny model, 25 minutes on 2 CPU cores. Codes of three disjoint families make
the tasks: to meta-train on, to calibrate with, and unseen ones to compare on. `tiny` only shows that it runs.
`smollm2`: tasks of 15 families of real data with SmolLM2-135M-Instruct and LoRA, about an hour and 4 GiB
on 2 CPU cores. The model and the data are those of configs/smollm2.py.
"""

from configs import smollm2
from mftjax import config as config_lib

# Families of which most examples fit 64 tokens, none of them another size of one that is here.
_BBH = (
  *("boolean_expressions", "disambiguation_qa", "dyck_languages", "movie_recommendation", "multistep_arithmetic_two"),
  *("object_counting", "ruin_names", "sports_understanding"),
)
_P3 = ("common_gen", "commonsense_qa", "paws_labeled_final", "qasc", "quarel", "quartz", "social_i_qa")


def get_config(variant="small"):
  if variant == "smollm2":
    return _smollm2()
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
  config.cpu_devices = 2
  config.tasks.base_steps = 4000
  config.tasks.validation_rows = 64
  config.tasks.num_validation = 128
  config.meta.outer_steps = 100
  config.learner.learning_rate = 5e-3
  config.learner.tasks_per_step = 16
  config.compare.constant_tasks = 20
  config.compare.coverage_tasks = 100
  config.compare.direct_steps = 48
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
    config.compare.coverage_tasks = 0
    config.compare.refine_steps = 1
    config.compare.direct_steps = 1
  elif variant != "small":
    raise ValueError(f"No variant {variant!r} of configs/compare.py; there are: small, smollm2, tiny.")
  return config


def _smollm2():
  config = config_lib.default()
  config.task = "compare_smollm2"
  config.learner.kind = "meta"
  config.objective.name = "normalised"
  smollm2.use_model(config)
  config.length = 64
  config.batch_size = 4
  config.budget_tokens = 8 * 4 * 64
  config_lib.learned("learning_rate", config, 1e-4, 2e-2, value=6e-3)
  del config.hyperparameters["b1"], config.hyperparameters["weight_decay"]
  data = smollm2.data_folder()
  files = [data / "bbh" / f"{name}.jsonl" for name in _BBH] + [data / "p3" / f"{name}.jsonl" for name in _P3]
  config.tasks.folders = tuple(str(file) for file in files)
  config.tasks.at_once = 1
  config.tasks.planted_fraction = 0.0
  config.tasks.max_sources = 4
  config.tasks.max_abilities = 2
  config.tasks.min_budget = 1.0
  config.tasks.num_train = 10
  config.tasks.num_validation = 4
  config.tasks.pool_rows = 64
  config.tasks.validation_rows = 8
  config.tasks.test_rows = 24
  config.tasks.reference_rates = (3e-3, 1e-2)
  config.tasks.reference_seeds = 1
  config.probe.rows = 4
  config.probe.num_steps = 4
  config.probe.batch_size = 4
  config.probe.learning_rate = 3e-3
  config.meta.unroll_length = 8
  config.meta.outer_steps = 20
  # Few steps, so larger ones. What a source gains from training on an ability is here mostly the form of answers.
  config.learner.learning_rate = 2e-2
  config.learner.sharpness = 0.25
  config.learner.tasks_per_step = 2
  config.compare.num_tasks = 5
  config.compare.num_seeds = 1
  config.compare.num_trials = 14
  config.compare.constant_tasks = 3
  config.compare.refine_steps = 1
  config.compare.direct_steps = 4
  config.compare.methods = (
    *("uniform, default", "best constant", "TPE"),
    *("predicted", "predicted, refined", "direct"),
  )
  config.checkpoint_every = 4
  return config
