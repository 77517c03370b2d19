"""Methods against forgetting, compared on sequences of tasks at equal tokens and with as many trials for each."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import scipy.stats
from absl import logging
from flax import nnx

from mftjax import checkpoint, command, errors, files, metrics, models, sft
from mftjax import config as config_lib
from mftjax.baselines import continual as methods_lib
from mftjax.data import sequences
from mftjax.loops import base_model, episode, learnt_memory, retention, sequence
from mftjax.loops import task as task_lib
from mftjax.models import slots

OURS = ("memory", "memory, no outer loop", "memory, meta-learned", "memory, meta-learned, replay 5 %")
METHODS = (*methods_lib.METHODS, *OURS)
GROUPS = {"joint": "upper bound", **dict.fromkeys(OURS, "ours")}
_TRAINED = {"full": nnx.Param, "lora": models.lora.LoRAParam, "memory": models.MemoryWrite}
_MOST_STEPS = 1_000_000  # of a task, so that checkpoints count up
_BASE_ROWS = 4096  # of the procedural base model's training


@dataclasses.dataclass(frozen=True)
class Setting:
  """The base model and the tasks, and the programs' common numbers."""

  config: ml_collections.ConfigDict
  base: tuple[Any, Any]  # the base model taken apart
  tokenizer: Any
  stream: sequences.Stream  # the sequences to judge on
  validation: jax.Array  # [num_validation, num_tasks] int32, pools of the sequences to tune on
  training: sequences.Stream | None  # the sequences to meta-train on
  background: Any  # Batch of rows like the base model's training data
  run: sequence.Run

  def setup(self, trained: str, num_rows: int | None = None) -> methods_lib.Setup:
    """The base model with what a kind of method trains.

    Args:
      trained: "full", "lora" or "memory".
      num_rows: slots that a memory is open to; `config.continual.written_rows` by default.
    """
    config, model = self.config, nnx.merge(*self.base)
    if trained == "lora":
      rngs = nnx.Rngs(config.seed + 2)
      models.lora.add(model, config.lora.rank, config.lora.alpha, tuple(config.lora.targets), rngs=rngs)
    if trained == "memory":
      task_lib.attach_memory(model, config)
      rows = self.background
      states = model.memory_inputs(rows.tokens, rows.segment_ids, rows.positions)
      for number, memory in enumerate(model.memories()):
        if config.continual.write_rule == "new":
          memory.keys[...] = jnp.zeros_like(memory.keys[...])  # no query is near a slot that no task has yet
        if config.memory.whitened:
          slots.whiten(memory, states[number], rows.segment_ids > 0)
        memory.open(min(num_rows or config.continual.written_rows, memory.num_slots))
    parts: Any = nnx.split(model, _TRAINED[trained], methods_lib.memory.HELD, ...)
    graphdef, params, held, frozen = parts
    return methods_lib.Setup(graphdef, params, held, frozen, self.stream.num_tasks, self.background)


def build(config: ml_collections.ConfigDict) -> Setting:
  """The procedural setting: makes the tasks and trains the base model.

  Raises:
    InputError: kinds of tasks or sizes that do not go together.
  """
  decoder, tokenizer = task_lib.load_model(config)
  options, length = config.continual, config.length
  held_out, background = (sequences.base_rows(length, options.base_rows, seed) for seed in (1, 2))

  made = [
    sequences.sample(split, options.kinds, config.seed * 1000 + number, options.num_conflicts)
    for split, count in (("unseen", options.num_sequences), ("validation", options.num_validation))
    for number in range(count)
  ]
  both = sequences.build(made, held_out, length, options.train_rows, options.test_rows, config.seed)
  stream = dataclasses.replace(both, order=both.order[: options.num_sequences])
  needs_training = set(options.methods or METHODS) & set(OURS[1:])
  training = _training_stream(config, held_out) if needs_training else None
  graphdef, params = nnx.split(decoder)
  pools = {name: rows[None] for name, rows in sequences.base_rows(length, _BASE_ROWS, 0).items()}
  apply = lambda params, batch: nnx.merge(graphdef, params)(batch.tokens, batch.segment_ids, batch.positions)
  key = jax.random.key(config.seed)
  params = base_model.train(apply, params, pools, jnp.zeros(1, jnp.int32), options.base_steps, 32, key)
  run = sequence.Run(config_lib.num_steps(config), config.batch_size)
  validation = both.order[options.num_sequences :]
  return Setting(
    config, (graphdef, params), tokenizer, stream, validation, training, sequence.as_batch(background), run
  )


def _training_stream(config: ml_collections.ConfigDict, held_out: dict[str, jax.Array]) -> sequences.Stream:
  """Sequences to meta-train on, each of kinds drawn anew."""
  options, kinds = config.retention, sorted(set(config.continual.kinds))
  made = []
  for number in range(options.num_sequences):
    rng = np.random.default_rng([config.seed, number])
    drawn = rng.choice(kinds, size=options.tasks_per_episode).tolist()
    made.append(sequences.sample("train", drawn, config.seed * 100_000 + number))
  base = {name: rows[: options.base_rows] for name, rows in held_out.items()}
  return sequences.build(made, base, config.length, config.continual.train_rows, options.test_rows, config.seed + 1)


@dataclasses.dataclass(frozen=True)
class Entry:
  """A method with the setup that it works on, and how its trials are drawn."""

  name: str
  method: methods_lib.Method
  setup: methods_lib.Setup
  fixed: Mapping[str, float]  # hyperparameters that are not tuned
  space: Mapping[str, tuple[str, tuple[float, float]]]  # those that are
  programs: sequence.Programs


def entry(setting: Setting, name: str, memories: Mapping[str, Any]) -> Entry:
  """A compared method by its name.

  Args:
    memories: what meta-training left: `meta` and `joint` states of the memory, and `values` of the hyperparameters.
  """
  options = setting.config.continual
  method = methods_lib.METHODS.get(name) or methods_lib.memory.method(options.write_rule)
  if name.endswith("replay 5 %") and name not in methods_lib.METHODS:
    method = methods_lib.replay.replaying(method, 0.05)
  setup = setting.setup(method.trained)
  # The config's hyperparameters are those of writing into a memory.
  fixed = dict(sft.DEFAULTS)
  if method.trained == "memory":
    fixed = config_lib.default_hyperparameters(setting.config) | {"weight_decay": 0.0}
  rates = tuple(options[f"{method.trained}_learning_rates"])
  if name == "memory, no outer loop":
    setup = dataclasses.replace(setup, held=episode.held(setup, memories["joint"]))
  if "meta-learned" in name:
    setup = dataclasses.replace(setup, held=episode.held(setup, memories["meta"]))
    fixed |= memories["values"]
    rates = tuple(memories["values"]["learning_rate"] * factor for factor in (0.25, 4.0))
  space = {"learning_rate": ("log", rates), **method.hyperparameters}
  programs = sequence.build(setup, method, setting.stream, setting.run)
  return Entry(name, method, setup, fixed, space, programs)


def trials(space: Mapping[str, tuple[str, tuple[float, float]]], count: int, seed: int) -> list[dict[str, float]]:
  """Evenly spread settings of the hyperparameters, the first in the middle of each.

  Source: scrambled Halton points, as `scipy.stats.qmc.Halton` draws them.
  """
  points = scipy.stats.qmc.Halton(len(space), rng=np.random.default_rng(seed)).random(count)
  points[0] = 0.5
  found = []
  for point in points:
    values = {}
    for part, (name, (scale, (low, high))) in zip(point, space.items(), strict=True):
      values[name] = float(low * (high / low) ** part if scale == "log" else low + (high - low) * part)
    found.append(values)
  return found


@dataclasses.dataclass(frozen=True)
class Runs:
  """What some runs of a method came to, each array with a leading axis of runs."""

  before: sequence.Measured
  after: list[sequence.Measured]  # after each task; of joint training once, at the end
  written: list[np.ndarray]  # slots that each task changed in the first run, where it has a memory
  final: Any  # State

  def matrix(self, name: str) -> np.ndarray:
    """`[num_runs, num_tasks (after), num_tasks (on)]` accuracy or loss."""
    return np.stack([np.asarray(getattr(one, name)) for one in self.after], axis=1)


def run(
  setting: Setting,
  found: Entry,
  values: Sequence[Mapping[str, float]],
  order: jax.Array,
  keys: jax.Array,
  folder: pathlib.Path | None = None,
  is_measured: bool = True,
) -> Runs:
  """Runs over whole sequences, one for each of `values`, `order` `[num_runs, num_tasks]` and `keys`, all at once.

  Args:
    folder: keeps checkpoints between and inside tasks, from which the same call goes on.
    is_measured: whether after every task, or else after the last only.
  """
  programs, every = found.programs, setting.config.checkpoint_every
  stacked = {name: jnp.asarray([one[name] for one in values], jnp.float32) for name in values[0]}
  tasks, num_steps = setting.stream.num_tasks, setting.run.num_steps
  num_tasks, num_steps = (1, num_steps * tasks) if found.method.is_joint else (tasks, num_steps)
  state = programs.start(stacked)
  before = programs.measure(state, stacked, order)
  after: list[sequence.Measured] = []
  written: list[np.ndarray] = []
  begun, done = 0, 0  # the task, and its steps that are done
  with _Saved(folder, before, num_tasks) as saved:
    resumed = saved.restore(state)
    if resumed:
      state, after, data = resumed
      begun, done, written = data["task"], data["steps"], [np.asarray(slots) for slots in data["written"]]
    for number in range(begun, num_tasks):
      place = jnp.int32(number)
      if done == 0:
        state = programs.begin(state, stacked, order, place, keys)
      for first in range(done, num_steps, every):
        done = min(first + every, num_steps)
        state, _ = programs.advance(state, stacked, order, place, keys, jnp.arange(first, done))
        if done < num_steps:
          saved.save(state, after, {"task": number, "steps": done, "written": written})
      if found.method.trained == "memory" and is_measured:
        written.append(learnt_memory.changed(state.inner.params, state.carry["held"]))
      state, done = programs.end(state, stacked, order, place), 0
      if is_measured or number + 1 == num_tasks:
        after.append(programs.measure(state, stacked, order))
      saved.save(state, after, {"task": number + 1, "steps": 0, "written": written})
  return Runs(before, after, written, state)


def in_groups(
  setting: Setting,
  found: Entry,
  values: Sequence[Mapping[str, float]],
  order: jax.Array,
  keys: jax.Array,
  folder: pathlib.Path | None = None,
  is_measured: bool = True,
) -> Runs:
  """`run`, so many at once as the config says; the last group is filled up, so that no number of runs compiles anew."""
  count, size = len(values), setting.config.continual.at_once
  parts = []
  for start in range(0, count, size):
    place = np.minimum(np.arange(start, start + size), count - 1)
    own = None if folder is None else folder / f"runs_{start}"
    parts.append(run(setting, found, [values[i] for i in place], order[place], keys[place], own, is_measured))
  joined = lambda *trees: jax.tree.map(lambda *x: jnp.concatenate(x)[:count], *trees)
  after = [joined(*steps) for steps in zip(*(part.after for part in parts), strict=True)]
  return Runs(joined(*(part.before for part in parts)), after, parts[0].written, parts[0].final)


def tuned(setting: Setting, found: Entry, seed: int) -> dict[str, float]:
  """The trial of the highest average accuracy over the validation sequences; of equals, that of the lowest loss."""
  asked = trials(found.space, setting.config.continual.num_trials, seed)
  count = len(setting.validation)
  values = [{**found.fixed, **one} for one in asked for _ in range(count)]
  order = jnp.tile(setting.validation, (len(asked), 1))
  keys = jax.vmap(jax.random.key)(1000 + jnp.tile(jnp.arange(count), len(asked)))
  last = in_groups(setting, found, values, order, keys, is_measured=False).after[-1]
  mean = lambda x: np.nan_to_num(np.asarray(x).reshape(len(asked), -1).mean(axis=1), nan=np.inf)
  accuracy, loss = np.where(np.isinf(mean(last.loss)), 0.0, mean(last.accuracy)), mean(last.loss)
  return asked[int(np.lexsort((loss, -accuracy))[0])]


def compare(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Tunes and runs every method; writes and returns `continual.json`. A method that is done is not run again.

  Raises:
    InputError: an unknown method, or a config that does not go together, before anything is written.
  """
  names = tuple(config.continual.methods) or METHODS
  for name in names:
    if name not in METHODS:
      raise errors.unknown_name("method in config.continual.methods", name, METHODS)
  command.check_workdir(config, workdir)
  setting = build(config)
  if set(names) & set(OURS):
    setting.setup("memory")  # its errors come before anything is written
  command.claim_workdir(config, workdir)
  paths = {name: workdir / "methods" / f"{_file_name(name)}.json" for name in names}
  memories, meta_training = _memories(setting, names, [name for name in names if not paths[name].exists()], workdir)
  rows, matrices, view = [], {}, None
  for number, (name, path) in enumerate(paths.items()):
    if not path.exists():
      files.write_json(path, _row(setting, entry(setting, name, memories), number, path.with_suffix("")))
    kept = json.loads(path.read_text())
    rows.append(kept["row"])
    matrices[name] = kept["sequences"]
    view = kept["memory"] or view
    logging.warning("%s: %s", name, _summary(kept["row"]))
  result = {
    "config": config.task,
    "num_sequences": config.continual.num_sequences,
    "num_tasks": setting.stream.num_tasks,
    "task_names": [setting.stream.names[pool] for pool in np.asarray(setting.stream.order[0])],
    "num_trials": config.continual.num_trials,
    "tokens_per_task": setting.run.num_steps * config.batch_size * config.length,
    "meta_training": meta_training,
    "rows": rows,
    "pairs": _pairs(rows, matrices),
    "memory": view,
  }
  files.write_json(workdir / "continual.json", result)
  return result


def _memories(
  setting: Setting, names: Sequence[str], missing: Sequence[str], workdir: pathlib.Path
) -> tuple[dict[str, Any], Any]:
  """What the methods that start from a trained memory start from, and what meta-training took.

  Args:
    missing: those of the names that are still to be run.
  """
  config, options = setting.config, setting.config.retention
  found: dict[str, Any] = {}
  about = None
  if setting.training is None:
    return found, about
  if any("meta-learned" in name for name in names):
    start = time.monotonic()
    setup = setting.setup("memory", episode.num_open(config))
    meta_params = retention.meta_train(config, setup, setting.training, workdir)
    values = {name: float(x) for name, x in episode.hyperparameters(config, meta_params).items()}
    found |= {"meta": meta_params["memory"], "values": values}
    episodes = options.outer_steps * options.episodes
    about = {"outer_steps": options.outer_steps, "episodes": episodes, "seconds": time.monotonic() - start}
  if "memory, no outer loop" in missing:  # it keeps no checkpoint
    setup = setting.setup("memory")
    found["joint"] = retention.train_without(config, setup, setting.training, options.joint_learning_rate)
  return found, about


def _row(setting: Setting, found: Entry, number: int, folder: pathlib.Path) -> dict[str, Any]:
  """A method's row of the table, the figures of each sequence, and what its memory holds."""
  config, stream = setting.config, setting.stream
  start = time.monotonic()
  kept = folder / "values.json"
  if not kept.exists():
    files.write_json(kept, tuned(setting, found, config.seed + number))
  values = json.loads(kept.read_text())
  count = len(stream.order)
  keys = jax.vmap(jax.random.key)(jnp.arange(count))
  runs = in_groups(setting, found, [{**found.fixed, **values}] * count, stream.order, keys, folder)
  figures = _figures(found, runs)
  interval = lambda x: [float(np.mean(x)), *metrics.bootstrap_interval(x)] if np.isfinite(x).all() else None
  summed = lambda part: {name: None if x is None else interval(x) for name, x in part.items()}
  is_joint = found.method.is_joint
  mean = lambda name: None if is_joint else _listed(runs.matrix(name).mean(axis=0))
  base_loss = np.stack([np.asarray(one.base_loss) for one in (runs.before, *runs.after)])
  row = {
    "name": found.name,
    "group": GROUPS.get(found.name) or ("replay" if found.method.stored_fraction else "replay-free"),
    "trained_parameters": sum(x.size for x in jax.tree.leaves(found.setup.params)),
    "stored_rows": sequence.stored_rows(found.method.stored_fraction, config.continual.train_rows)
    * (stream.num_tasks - 1),
    "trials": config.continual.num_trials,
    "values": values,
    "accuracy": summed(figures["accuracy"]),
    "loss": summed(figures["loss"]),
    "base_loss_change": interval(base_loss[-1] / base_loss[0] - 1),
    "matrix": {"accuracy": mean("accuracy"), "loss": mean("loss")},
    "base_loss": None if is_joint else _listed(base_loss.mean(axis=1)),
    "seconds": time.monotonic() - start,
  }
  view = None
  if found.method.trained == "memory":
    view = learnt_memory.view(found.setup, runs.final, runs.written, stream, setting.tokenizer)
  sequences_of = {name: None if x is None else x.tolist() for name, x in figures["accuracy"].items()}
  return {"row": row, "sequences": sequences_of, "memory": view}


def _listed(values: np.ndarray) -> list[Any]:
  """Nested lists, with null for what is not finite: JSON has no word for that."""
  listed = values.astype(object)
  listed[~np.isfinite(values)] = None
  return listed.tolist()


def _figures(found: Entry, runs: Runs) -> dict[str, dict[str, np.ndarray | None]]:
  """The numbers of `metrics.continual` of each run, `[num_runs]` each; joint training has an average only."""
  sums = {"accuracy": metrics.continual, "loss": metrics.continual_loss}
  result: dict[str, dict[str, np.ndarray | None]] = {}
  for part, fn in sums.items():
    before, matrix = np.asarray(getattr(runs.before, part)), runs.matrix(part)
    if found.method.is_joint:
      kind = metrics.Continual if part == "accuracy" else metrics.ContinualLoss
      result[part] = {field.name: None for field in dataclasses.fields(kind)}
      result[part][f"average_{part}"] = matrix[:, -1].mean(axis=1)
      continue
    if not np.isfinite(matrix).all():
      matrix = np.nan_to_num(matrix, nan=0.0 if part == "accuracy" else 100.0, posinf=100.0)
    each = [fn(one, start) for one, start in zip(matrix, before, strict=True)]
    result[part] = {name: np.asarray([one[name] for one in each]) for name in each[0]}
  return result


def _pairs(rows: Sequence[Mapping[str, Any]], figures: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Differences from the meta-learned memory on the same sequences, with their intervals."""
  ours = "memory, meta-learned"
  if ours not in figures:
    return []
  free = [row for row in rows if row["group"] == "replay-free"]
  best = max(free, key=lambda row: row["accuracy"]["average_accuracy"][0])["name"] if free else None
  found: list[dict[str, Any]] = []
  for other in dict.fromkeys(("memory", "memory, no outer loop", "sequential LoRA", best, "joint")):
    if other is None or other not in figures:
      continue
    pair: dict[str, Any] = {"name": f"{ours} − {other}"}
    for field in ("average_accuracy", "backward_transfer"):
      pair[field] = None
      if figures[other][field] is not None:
        gap = np.asarray(figures[ours][field]) - np.asarray(figures[other][field])
        pair[field] = [float(gap.mean()), *metrics.bootstrap_interval(gap)]
    found.append(pair)
  return found


class _Saved:
  """Checkpoints of some runs, or none without a folder."""

  def __init__(self, folder: pathlib.Path | None, before: Any, num_tasks: int):
    self._checkpoints = checkpoint.Checkpoints(folder / "checkpoints") if folder else None
    self._empty = jax.tree.map(lambda x: jnp.zeros((num_tasks, *x.shape), x.dtype), before)

  def __enter__(self) -> "_Saved":
    return self

  def __exit__(self, *_: object) -> None:
    if self._checkpoints:
      self._checkpoints.close()

  def restore(self, state: Any) -> tuple[Any, list[Any], dict[str, Any]] | None:
    """The state, what was measured after each task, and the rest, of the last checkpoint."""
    like = {"state": task_lib.pure(state), "after": self._empty}
    found = self._checkpoints.restore(like) if self._checkpoints else None
    if not found:
      return None
    _, arrays, data = found
    after = [jax.tree.map(lambda x, i=i: x[i], arrays["after"]) for i in range(data["measured"])]
    return task_lib.unpure(state, arrays["state"]), after, data

  def save(self, state: Any, after: Sequence[Any], data: dict[str, Any]) -> None:
    if not self._checkpoints:
      return
    kept = self._empty
    for place, one in enumerate(after):
      kept = jax.tree.map(lambda all_tasks, x, i=place: all_tasks.at[i].set(x), kept, one)
    slots = [np.asarray(found).tolist() for found in data["written"]]
    step = data["task"] * _MOST_STEPS + data["steps"]
    arrays = {"state": task_lib.pure(state), "after": kept}
    self._checkpoints.save(step, arrays, {**data, "written": slots, "measured": len(after)})


def _file_name(name: str) -> str:
  return "".join(letter if letter.isalnum() else "_" for letter in name.replace("%", "percent"))


def _summary(row: Mapping[str, Any]) -> str:
  named = {"accuracy": "average_accuracy", "backward": "backward_transfer", "plasticity": "plasticity"}
  parts = [f"{short} {row['accuracy'][name][0]:.3f}" for short, name in named.items() if row["accuracy"][name]]
  change = row["base_loss_change"]
  return ", ".join([*parts, f"base loss {100 * change[0]:+.1f} %" if change else "base loss not finite"])
