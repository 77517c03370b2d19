"""Sequences of real tasks, learnt one after another by methods against forgetting.

python -m experiments.continual --config=configs/continual_real.py:smollm2 --workdir=runs/continual-smollm2

Variants: `smollm2`, eight short tasks in three orders for SmolLM2-135M-Instruct on 2 CPU cores; for one accelerator
`standard_1` to `standard_3`, `five_1` to `five_3` and `long_1` to `long_3`, the benchmark of text classification in the
orders of O-LoRA and de Masson d'Autume et al., of a model that config.model.path names. Model and data are found as in
configs/smollm2.py; the benchmark comes from the hub, or from the folder config.continual.benchmark_folder.
"""

from configs import smollm2
from mftjax import config as config_lib
from mftjax.data import classification

_FILES = (
  "bbh/boolean_expressions",
  "p3/paws_labeled_final",
  "bbh/object_counting",
  "p3/quartz",
  "bbh/sports_understanding",
  "p3/qasc",
  "bbh/dyck_languages",
  "p3/social_i_qa",
)
_OTHER_FILES = (  # that only meta-training sees
  "bbh/causal_judgement",
  "bbh/disambiguation_qa",
  "bbh/formal_fallacies",
  "bbh/logical_deduction_three_objects",
  "bbh/multistep_arithmetic_two",
  "bbh/penguins_in_a_table",
  "bbh/reasoning_about_colored_objects",
  "bbh/tracking_shuffled_objects_three_objects",
  "p3/commonsense_qa",
  "p3/dbpedia_14",
  "p3/quarel",
  "p3/wiqa",
)
_TEMPLATES = (
  ("paws_labeled_final", "paws_labeled_final_PAWS_ANLI_GPT3_no_label"),
  ("quartz", "quartz_paragraph_question_plain_concat"),
  ("qasc", "qasc_qa_with_separated_facts_3"),
)


def get_config(variant="smollm2"):
  config = config_lib.default()
  config.task = "continual"
  config.learner.kind = "meta"
  smollm2.use_model(config)
  config.continual.base_path = str(smollm2.data_folder() / "gsm8k" / "train.jsonl")
  config.memory.update(placement="adapters", context=True, layers=(29,))  # the last of SmolLM2-135M
  config.memory.update(num_heads=1, key_dim=192, top_k=8, temperature=0.2, qk_norm=True)
  config.meta.unroll_length = 1  # not used: an episode is one unroll
  del config.hyperparameters["b1"], config.hyperparameters["weight_decay"]
  config_lib.learned("learning_rate", config, 1e-4, 1e-1, value=2e-3)
  config.continual.lora_learning_rates = (3e-4, 1e-2)
  config.continual.memory_learning_rates = config.continual.lora_learning_rates
  if variant == "smollm2":
    config.length = 96
    config.batch_size = 4
    config.budget_tokens = 8 * 4 * 96  # of each task
    config.continual.source = "files"
    config.continual.files = tuple(str(smollm2.data_folder() / f"{name}.jsonl") for name in _FILES)
    config.continual.templates = _TEMPLATES
    config.continual.methods = ("sequential LoRA", "O-LoRA", "replay 5 %", "joint", "memory", "memory, meta-learned")
    config.continual.num_sequences = 3
    config.continual.num_validation = 1
    config.continual.num_trials = 2
    config.continual.at_once = 1
    config.continual.train_rows = 40
    config.continual.test_rows = 8
    config.continual.update(base_rows=16, background_rows=96)
    config.continual.written_rows = 96
    config.memory.num_shared = 3000
    config.retention.files = tuple(str(smollm2.data_folder() / f"{name}.jsonl") for name in _OTHER_FILES)
    config.retention.update(matching_steps=200, outer_steps=4, episodes=1, tasks_per_episode=2, steps_per_task=4)
    config.retention.learning_rate = 3e-3
    config.retention.update(num_sequences=12, test_rows=8, base_rows=8, base_pool=64, base_weight=5.0)
    config.checkpoint_every = 8
  elif variant in classification.ORDERS:
    config.length = 512
    config.batch_size = 16
    config.budget_tokens = 100 * 16 * 512  # of each task: three times its 1,000 examples or more
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.continual.source = "benchmark"
    config.continual.orders = (variant,)
    config.continual.num_validation = 1
    config.continual.num_trials = 4
    config.continual.at_once = 1
    config.continual.train_rows = 512  # room for 1,000 examples of 250 tokens
    config.continual.test_rows = 256
    config.continual.full_learning_rates = (3e-6, 3e-4)
    config.continual.update(lora_learning_rates=(1e-4, 3e-3), memory_learning_rates=(1e-4, 3e-3))
    config.continual.written_rows = 1024
    config.memory.num_shared = 8192
    config.checkpoint_every = 50
  else:
    known = ", ".join(["smollm2", *classification.ORDERS])
    raise ValueError(f"No variant {variant!r} of configs/continual_real.py; there are: {known}.")
  num_tasks = len(classification.ORDERS.get(variant, _FILES))
  config.memory.num_slots = num_tasks * config.continual.written_rows + config.memory.num_shared
  return config
