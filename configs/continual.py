"""Sequences of tasks, learnt one after another by methods against forgetting.

python -m experiments.continual --config=configs/continual.py:small --workdir=runs/continual

Variants: `small`, a memory whose slots hold adapters against six other methods; `full`, all methods, tuned on four
sequences; `facts`, likewise on eight tasks of facts alone, as many as there are names for; `values`, a memory whose
slots hold values that the last layer reads; `frozen`, the same where tasks train a LoRA and no slots; `tiny`, that of
`values` for tests.
"""

from mftjax import config as config_lib


def get_config(variant="small"):
  config = config_lib.default()
  config.task = "continual"
  config.learner.kind = "meta"
  config.length = 28
  config.batch_size = 8
  config.budget_tokens = 48 * 8 * 28  # of each task
  config.model.hidden_size = 48
  config.model.num_layers = 3
  config.model.num_heads = 3
  config.lora.rank = 8
  config.lora.targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
  config.memory.num_slots = 10 * 80 + 64  # a block for each task, and what all share
  config.memory.key_dim = 24
  config.memory.num_heads = 3
  config.memory.top_k = 8
  config.memory.temperature = 0.3
  config.memory.qk_norm = True
  config.memory.null_cosine = 0.6
  config.memory.layers = (2,)
  config.memory.placement = "beside"
  config.meta.unroll_length = 1  # not used: an episode is one unroll
  config.meta.hyperparameter_learning_rate = 0.03
  del config.hyperparameters["b1"], config.hyperparameters["weight_decay"]
  config_lib.learned("learning_rate", config, 0.1, 1e2, value=5.0)
  config.retention.outer_steps = 200
  config.retention.learning_rate = 0.02
  config.retention.base_weight = 2.0
  config.checkpoint_every = 64
  if variant == "tiny":
    config.budget_tokens = 4 * 8 * 28
    config.model.hidden_size = 16
    config.model.num_layers = 1
    config.model.num_heads = 1
    config.lora.rank = 2
    config.memory.num_slots = 24
    config.memory.key_dim = 4
    config.memory.layers = (0,)
    config.continual.kinds = ("rule", "facts", "code")
    config.continual.num_sequences = 2
    config.continual.num_validation = 1
    config.continual.num_trials = 2
    config.continual.at_once = 2
    config.continual.train_rows = 20
    config.continual.test_rows = 4
    config.continual.update(base_rows=32, background_rows=32)
    config.continual.base_steps = 4
    config.continual.written_rows = 8
    config.retention.outer_steps = 2
    config.retention.episodes = 2
    config.retention.tasks_per_episode = 2
    config.retention.steps_per_task = 2
    config.retention.num_sequences = 4
    config.retention.test_rows = 2
    config.retention.update(base_rows=4, base_pool=8)
    config.retention.written_rows = 16
    config.checkpoint_every = 3
  elif variant in ("small", "full", "facts"):
    config.memory.update(placement="adapters", context=True, num_shared=12000, num_slots=10 * 80 + 12000)
    config.memory.update(num_heads=1, key_dim=96, temperature=0.2, null_cosine=0.0)
    config_lib.learned("learning_rate", config, 1e-3, 1e-1, value=1e-2)
    config.continual.memory_learning_rates = config.continual.lora_learning_rates
    config.continual.update(base_rows=256, background_rows=4096, num_trials=5, num_validation=4, at_once=5)
    config.budget_tokens = 24 * 8 * 28
    config.retention.update(learning_rate=0.003, matching_steps=400, outer_steps=30)
    config.retention.update(steps_per_task=12, base_weight=20.0, num_sequences=60)
    if variant == "small":
      config.continual.methods = (
        "sequential LoRA",
        "EWC",
        "O-LoRA",
        "replay 5 %",
        "joint",
        "memory",
        "memory, meta-learned",
      )
      config.continual.num_validation = 1
    if variant == "facts":
      config.continual.kinds = ("facts",) * 8
  elif variant == "frozen":
    config.continual.write_rule = "frozen"
    config_lib.learned("learning_rate", config, 1e-3, 1e-1, value=1e-2)
  elif variant != "values":
    known = "small, full, facts, values, frozen, tiny"
    raise ValueError(f"No variant {variant!r} of configs/continual.py; there are: {known}.")
  return config
