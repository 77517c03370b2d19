"""Every field of a config: its default, its range and a line of help."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from mftjax import balancing, engine, metagrad, objectives, parallel, trackers
from mftjax.models import attention, decoder


@dataclasses.dataclass(frozen=True)
class Field:
  """One field of the config."""

  default: Any
  help: str
  check: Callable[[Any], bool] = lambda value: True
  allowed: str = ""


def _at_least(low: float) -> dict[str, Any]:
  return {"check": lambda value: math.isfinite(value) and value >= low, "allowed": f"at least {low}"}


def _above(low: float) -> dict[str, Any]:
  return {"check": lambda value: math.isfinite(value) and value > low, "allowed": f"above {low}"}


def _one_of(*words: str) -> dict[str, Any]:
  return {"check": lambda value: value in words, "allowed": "one of " + ", ".join(words)}


def _words_of(*words: str) -> dict[str, Any]:
  return {"check": lambda value: set(value) <= set(words), "allowed": "a tuple of " + ", ".join(words)}


_FRACTION: dict[str, Any] = {"check": lambda value: 0 < value <= 1, "allowed": "above 0, at most 1"}

_COUNT: dict[str, Any] = {
  "check": lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
  "allowed": "a whole number, at least 0",
}

_PATHS: dict[str, Any] = {
  "check": lambda value: not isinstance(value, str) and all(isinstance(path, str) for path in value),
  "allowed": "a tuple of paths",
}

_PAIRS: dict[str, Any] = {
  "check": lambda value: all(not isinstance(pair, str) and len(pair) == 2 for pair in value),
  "allowed": "a tuple of pairs (task, template)",
}

FIELDS: dict[str, Field] = {
  "seed": Field(0, "seed of everything random", **_at_least(0)),
  "task": Field("task", "name of the task, written into the recipe"),
  "budget_tokens": Field(100_000, "tokens (rows times length) of one fine-tuning run", **_above(0)),
  "length": Field(128, "tokens in a row; examples are packed into rows", **_at_least(8)),
  "batch_size": Field(8, "rows in a batch of the inner step", **_at_least(1)),
  "micro_batches": Field(1, "parts of an inner batch that are computed one after the other", **_at_least(1)),
  "normalise_gradients": Field(False, "scale every inner gradient to clip_norm, not only the larger ones"),
  "average_decay": Field(
    0.0,
    "decay of an average of the inner params, which is what is evaluated and exported; 0 is none",
    lambda value: 0 <= value < 1,
    "at least 0, below 1",
  ),
  "truncate_side": Field("left", "side on which a prompt that is too long is cut", **_one_of("left", "right")),
  "compilation_cache": Field("default", "folder of compiled programs; 'default' is ~/.cache/mftjax, '' is off"),
  "cpu_devices": Field(0, "devices that a CPU is split into (see parallel); 0 leaves that to JAX", **_at_least(0)),
  "stuck_seconds": Field(
    1800.0, "seconds without a finished step after which all stacks go to standard error; 0 never", **_at_least(0)
  ),
  "trackers": Field((), "other places that metrics go to: wandb, trackio", **_words_of(*trackers.NAMES)),
  "project": Field("mftjax", "name under which those keep the run"),
  "parallel.strategy": Field(
    "mesh", "how tasks are mapped: mesh, or pmap (tasks only)", **_one_of(*parallel.STRATEGIES)
  ),
  "parallel.task": Field(0, "groups of devices that tasks are split over; 0 is the rest of the devices", **_COUNT),
  "parallel.data": Field(1, "parts of a task's rows, each with a model of its own; 0 is the rest", **_COUNT),
  "parallel.fsdp": Field(1, "parts of a task's rows, and of its model; 0 is the rest", **_COUNT),
  "parallel.tensor": Field(1, "parts of a model's heads and MLP; 0 is the rest", **_COUNT),
  "engine": Field(
    "local",
    "how jobs that do not need one another run (compare, continual, transfer): one after the other, or through Ray",
    **_one_of(*engine.ENGINES),
  ),
  "ray.address": Field("", "HOST:PORT of a cluster; '' starts one on this machine, for this run"),
  "ray.workers": Field(1, "jobs at once", **_at_least(1)),
  "ray.gpus": Field(0.0, "GPUs that Ray keeps for each job, parts of one too", **_at_least(0)),
  "model.path": Field("", "folder or hub id of the model; empty makes a small random one"),
  "model.gguf_file": Field("", "GGUF file within that folder"),
  "model.dtype": Field("float32", "dtype of the computation", **_one_of("float32", "bfloat16")),
  "model.matmul_precision": Field(
    "highest",
    "of products of f32 matrices on an accelerator; 'default' is faster and rounds inputs to TF32 (GPU) or bf16 (TPU)",
    **_one_of("highest", "high", "default"),
  ),
  "model.remat": Field(False, "recompute each layer's activations in the backward pass"),
  "model.attention": Field(
    "full",
    "full, blockwise (memory linear in the length) or fused (fastest kernel, no meta-gradient on a GPU)",
    **_one_of(*attention.ATTENTION),
  ),
  "model.hidden_size": Field(64, "width of the random model", **_at_least(2)),
  "model.num_layers": Field(2, "layers of the random model", **_at_least(1)),
  "model.num_heads": Field(4, "attention heads of the random model", **_at_least(1)),
  "lora.rank": Field(0, "rank of the LoRA; 0 trains every parameter", **_at_least(0)),
  "lora.alpha": Field(16.0, "LoRA scale: its output is multiplied by alpha / rank", **_above(0)),
  "lora.targets": Field(("q_proj", "k_proj", "v_proj", "o_proj"), "modules that get a LoRA"),
  "memory.num_slots": Field(0, "key-value slots learned across tasks; 0 is no memory", **_at_least(0)),
  "memory.key_dim": Field(16, "width of a slot's key", **_at_least(1)),
  "memory.num_heads": Field(2, "heads that read the slots", **_at_least(1)),
  "memory.layers": Field((0,), "layers that read the memory"),
  "memory.top_k": Field(0, "slots that a head reads for a token; 0 is all", **_at_least(0)),
  "memory.product_keys": Field(False, "keys are pairs of half keys: num_slots a square, key_dim even, top_k above 0"),
  "memory.gated": Field(False, "each head has a gate that the token sets"),
  "memory.temperature": Field(1.0, "of the softmax over the slots, where its learning starts", **_above(0)),
  "memory.qk_norm": Field(False, "queries and keys are scaled to root mean square 1"),
  "memory.null_cosine": Field(
    0.0, "cosine at which a read falls to nothing, when new; needs qk_norm; 0 is never", lambda v: 0 <= v < 1, "0 to 1"
  ),
  "memory.context": Field(False, "queries also see the mean of the layer's attention values so far; not placed after"),
  "memory.placement": Field(
    "after",
    "on the layer's output, beside its MLP or instead of it; or adapters, which it weighs (experiments.continual)",
    **_one_of(*decoder.PLACEMENTS),
  ),
  "memory.whitened": Field(True, "queries are uncorrelated on the base model's data when new (experiments.continual)"),
  "memory.num_shared": Field(
    0,
    "slots of num_slots that are no task's, with keys at the base model's data (experiments.continual)",
    **_at_least(0),
  ),
  "memory.shared": Field(True, "all layers read one memory, or else each its own"),
  "meta.outer_steps": Field(100, "outer steps", **_at_least(1)),
  "meta.unroll_length": Field(8, "inner steps that one meta-gradient goes through", **_at_least(1)),
  "meta.method": Field("mixed", "meta-gradient estimator", **_one_of(*metagrad.METHODS)),
  "meta.recovery": Field("auto", "how inner states are had again", **_one_of(*metagrad.recovery.RECOVERIES)),
  "meta.save": Field("auto", "what is kept of an inner step beside its state", **_one_of(*metagrad.recovery.SAVES)),
  "meta.every": Field(0, "steps between two states that are kept; 0 chooses", **_at_least(0)),
  "meta.memory_bytes": Field(0, "what an unroll may keep; 0 is a quarter of the device's memory", **_at_least(0)),
  "meta.offload": Field(False, "keep states in the host's memory"),
  "meta.central": Field(False, "central differences (method finite_difference)"),
  "meta.num_pairs": Field(8, "antithetic pairs (methods es and pes)", **_at_least(1)),
  "meta.sigma": Field(0.01, "standard deviation of perturbations (methods es and pes)", **_above(0)),
  "meta.check": Field(False, "first compare the method with f64 reverse mode on a few steps and rows"),
  "meta.mixture_learning_rate": Field(0.1, "of the outer Adam, on the mixture logits", **_above(0)),
  "meta.hyperparameter_learning_rate": Field(0.03, "of the outer Adam, on the hyperparameters", **_above(0)),
  "meta.memory_learning_rate": Field(1e-3, "of the outer Adam, on the memory", **_above(0)),
  "meta.clip_norm": Field(1.0, "global norm to which meta-gradients are clipped", **_above(0)),
  "meta.ability_rows": Field(4, "held-out rows of each ability in an outer batch", **_at_least(1)),
  "meta.uniform_fraction": Field(
    0.5,
    "part of the uniform distribution in the proposal that rows are drawn from",
    **_FRACTION,
  ),
  "meta.max_skipped": Field(10, "non-finite outer steps in a row that stop the run", **_at_least(1)),
  "objective.name": Field("mean", "what the outer step lowers", **_one_of(*objectives.NAMES)),
  "objective.temperature": Field(0.1, "of the smooth maximum (worst, worst_normalised)", **_above(0)),
  "objective.fraction": Field(0.5, "share of the abilities' weight, the worst ones (cvar)", **_FRACTION),
  "objective.floor": Field(0.1, "improvement below which the logarithm goes on as a line (nash)", **_above(0)),
  "objective.minimum_gain": Field(0.05, "nats, least unit of an improvement (normalised objectives)", **_above(0)),
  "objective.tolerance": Field(0.0, "nats that an ability may lose against the base model (retention)", **_at_least(0)),
  "objective.penalty": Field(1.0, "of the quadratic term; 0 is the plain Lagrangian (retention)", **_at_least(0)),
  "objective.step_size": Field(
    0.1, "of the weights (group_dro), the multipliers (retention), the logits (balancing famo)", **_above(0)
  ),
  "objective.preference": Field((), "weights of the abilities, in the order of their names, sum 1; () is none"),
  "objective.reference": Field(
    "", "evaluation.json whose lowest loss of an ability is its reference, unless config.abilities.NAME.reference is"
  ),
  "objective.balancing": Field(
    "none",
    "how the abilities' gradients are combined; mgda and pcgrad take a meta-gradient for each ability",
    **_one_of(*balancing.WORDS),
  ),
  "mixture.knots": Field(1, "moments of the run at which the mixture is learned; 1 keeps it fixed", **_at_least(1)),
  "learner.kind": Field(
    "direct", "direct: one task's own recipe; meta: a network that predicts it", **_one_of("direct", "meta")
  ),
  "learner.width": Field(48, "width of the meta-learner's hidden layers", **_at_least(1)),
  "learner.sharpness": Field(
    4.0,
    "log-odds of a source per nat that it gains from training on an ability, from which the mixtures start",
    **_above(0),
  ),
  "learner.learning_rate": Field(1e-3, "of the outer Adam, on the meta-learner", **_above(0)),
  "learner.outcome_weight": Field(0.1, "of the outcome head's likelihood beside the meta-gradient", **_at_least(0)),
  "learner.tasks_per_step": Field(8, "meta-tasks in an outer step", **_at_least(1)),
  "tasks.folders": Field(
    (),
    "folders of .jsonl files, or such files, whose families make the meta-tasks; () makes procedural ones",
    **_PATHS,
  ),
  "tasks.validation_families": Field(3, "families of the folders for the meta-tasks to calibrate with", **_at_least(1)),
  "tasks.unseen_families": Field(4, "families of the folders that only the comparison sees", **_at_least(1)),
  "tasks.at_once": Field(20, "meta-tasks that a program runs at once", **_at_least(1)),
  "tasks.reference_rates": Field(
    (1e-3, 3e-3, 6e-3, 1e-2, 2e-2),
    "learning rates that single-task tuning tries, from which improvements are measured",
    lambda value: len(value) > 0 and all(math.isfinite(rate) and rate > 0 for rate in value),
    "a tuple of numbers above 0",
  ),
  "tasks.reference_seeds": Field(3, "seeds of each of them", **_at_least(1)),
  "tasks.num_train": Field(256, "meta-tasks to train on", **_at_least(1)),
  "tasks.num_validation": Field(64, "meta-tasks to calibrate with", **_at_least(1)),
  "tasks.max_sources": Field(6, "sources of a meta-task, at most", **_at_least(4)),
  "tasks.max_abilities": Field(3, "abilities of a meta-task, at most", **_at_least(1)),
  "tasks.min_budget": Field(
    0.5, "least budget of a meta-task, as a part of budget_tokens", lambda value: 0 < value <= 1, "above 0, at most 1"
  ),
  "tasks.planted_fraction": Field(
    0.2, "part of the meta-tasks whose best mixture is known", lambda value: 0 <= value <= 1, "from 0 to 1"
  ),
  "tasks.pool_rows": Field(128, "rows of each pool that meta-tasks draw from", **_at_least(4)),
  "tasks.validation_rows": Field(32, "rows of each ability that recipes are chosen by", **_at_least(1)),
  "tasks.test_rows": Field(128, "rows of each ability that recipes are judged by", **_at_least(1)),
  "tasks.base_steps": Field(100, "steps that the small base model is trained for", **_at_least(1)),
  "probe.rows": Field(8, "rows of each source and ability that the probe measures", **_at_least(1)),
  "probe.num_steps": Field(16, "steps of the probe's training on each ability", **_at_least(1)),
  "probe.batch_size": Field(6, "rows of the ability in such a step", **_at_least(1)),
  "probe.learning_rate": Field(6e-3, "of the probe's training", **_above(0)),
  "compare.methods": Field((), "ways of choosing a recipe that are compared; () is all of them"),
  "compare.num_tasks": Field(20, "unseen tasks", **_at_least(1)),
  "compare.num_seeds": Field(5, "seeds of each", **_at_least(1)),
  "compare.coverage_tasks": Field(
    0, "other unseen tasks that the predictions' intervals are checked on; 0 takes those compared on", **_at_least(0)
  ),
  "compare.num_trials": Field(50, "trials of each search", **_at_least(3)),
  "compare.constant_tasks": Field(20, "training tasks that the best constant is chosen on", **_at_least(1)),
  "compare.refine_steps": Field(4, "meta-gradient steps on a predicted recipe", **_at_least(1)),
  "compare.direct_steps": Field(16, "meta-gradient steps of the direct learner", **_at_least(1)),
  "compare.learning_rate": Field(0.2, "of the direct learner's outer Adam", **_above(0)),
  "compare.refine_learning_rate": Field(0.15, "of the outer Adam on a predicted recipe", **_above(0)),
  "compare.uniform_fraction": Field(
    0.1, "as meta.uniform_fraction, in steps on one task's own recipe (direct, refined)", **_FRACTION
  ),
  "continual.methods": Field((), "ways of learning one task after another that are compared; () is all of them"),
  "continual.source": Field(
    "procedural",
    "where the tasks come from: made (procedural), jsonl files, or the benchmark of text classification",
    **_one_of("procedural", "files", "benchmark"),
  ),
  "continual.files": Field((), "jsonl files of prompt and completion, a task each (source files)", **_PATHS),
  "continual.templates": Field(
    (), "pairs (task, template), for files whose items are in several wordings; the first by default", **_PAIRS
  ),
  "continual.orders": Field(
    (),
    "orders of tasks, one for each sequence: each a tuple of tasks, by name or place in files; or (source benchmark) "
    "names such as standard_1; () draws num_sequences orders of the files",
    lambda value: isinstance(value, tuple | list),
    "a tuple of orders",
  ),
  "continual.benchmark_folder": Field("", "folder of NAME/train.jsonl, NAME/test.jsonl, ...; '' reads from the hub"),
  "continual.train_examples": Field(1000, "training examples of each task (source benchmark)", **_at_least(1)),
  "continual.test_examples": Field(
    500, "test examples of each task, and as many to tune on (source benchmark)", **_at_least(1)
  ),
  "continual.base_path": Field(
    "", "jsonl file whose loss says what is left of the model's general ability (source files, benchmark)"
  ),
  "continual.kinds": Field(
    ("rule", "code", "facts", "rule", "code", "facts", "rule", "code", "rule", "code"),
    "kind of each task of a sequence: rule, code or facts",
    lambda value: not isinstance(value, str) and len(value) > 0,
    "a tuple of kinds",
  ),
  "continual.num_conflicts": Field(0, "tasks at the end of a sequence that contradict the base model", **_at_least(0)),
  "continual.num_sequences": Field(
    5, "unseen sequences, one for each seed, where orders are not given", **_at_least(1)
  ),
  "continual.num_validation": Field(2, "other sequences that every method is tuned on", **_at_least(1)),
  "continual.num_trials": Field(8, "trials of each method's tuning", **_at_least(1)),
  "continual.at_once": Field(8, "runs that a program goes through at once", **_at_least(1)),
  "continual.train_rows": Field(32, "training rows of each task", **_at_least(1)),
  "continual.test_rows": Field(16, "test rows of each task", **_at_least(1)),
  "continual.base_rows": Field(128, "held-out rows of the base model's own data", **_at_least(1)),
  "continual.background_rows": Field(128, "other rows of that data, by which memories are addressed", **_at_least(1)),
  "continual.base_steps": Field(6000, "steps that the small base model is trained for", **_at_least(1)),
  "continual.keep_models": Field(False, "saves each method's model after the first sequence, in methods/NAME/model"),
  "continual.write_rule": Field(
    "new",
    "slots that a task may write: new, a block of its own; sparse, by TF-IDF; all; frozen, none, but a LoRA",
    **_one_of("new", "sparse", "all", "frozen"),
  ),
  "continual.written_rows": Field(80, "slots that a task may write (write_rule new, sparse)", **_at_least(1)),
  "continual.full_learning_rates": Field((1e-4, 1e-2), "least and greatest that is tried, training every parameter"),
  "continual.lora_learning_rates": Field((3e-4, 3e-2), "likewise for LoRA"),
  "continual.memory_learning_rates": Field((0.3, 30.0), "likewise for a memory"),
  "retention.outer_steps": Field(100, "outer steps of the memory's meta-training", **_at_least(1)),
  "retention.matching_steps": Field(
    0, "steps before these, in which queries learn to find a task's slots (write_rule new)", **_at_least(0)
  ),
  "retention.matching_learning_rate": Field(3e-3, "of the Adam of these steps", **_above(0)),
  "retention.matching_base_weight": Field(20.0, "of the base model's data in their loss", **_at_least(0)),
  "retention.files": Field((), "jsonl files of other tasks, to meta-train on (source files, benchmark)", **_PATHS),
  "retention.templates": Field((), "as continual.templates, of these files", **_PAIRS),
  "retention.episodes": Field(4, "sequences in an outer step", **_at_least(1)),
  "retention.tasks_per_episode": Field(5, "tasks of a sequence", **_at_least(1)),
  "retention.steps_per_task": Field(24, "inner steps on each of them", **_at_least(1)),
  "retention.stored_fraction": Field(
    0.0,
    "part of each task's rows that an episode keeps and replays, in a mixture that is learned; 0 is none",
    lambda value: 0 <= value <= 1,
    "in 0..1",
  ),
  "retention.num_sequences": Field(100, "sequences to meta-train on", **_at_least(1)),
  "retention.test_rows": Field(8, "rows of each task in the outer loss", **_at_least(1)),
  "retention.base_rows": Field(64, "rows of the base model's data in the outer loss", **_at_least(1)),
  "retention.base_pool": Field(1024, "rows that these are drawn from, anew in each outer step", **_at_least(1)),
  "retention.base_weight": Field(1.0, "of the base model's data in the outer loss", **_at_least(0)),
  "retention.written_rows": Field(2048, "slots that an episode may write", **_at_least(1)),
  "retention.learning_rate": Field(1e-2, "of the outer Adam, on the memory", **_above(0)),
  "retention.joint_learning_rate": Field(1e-3, "of the memory that is trained without an outer loop", **_above(0)),
  "checkpoint_every": Field(20, "steps between checkpoints", **_at_least(1)),
  "evaluate.num_rows": Field(
    64, "rows an ability's loss is taken over, at most; also for the base model's in the objective", **_at_least(1)
  ),
  "evaluate.num_generated": Field(32, "test prompts answered for exact match; 0 is none", **_at_least(0)),
  "evaluate.max_new_tokens": Field(32, "length of an answer, at most", **_at_least(1)),
}
