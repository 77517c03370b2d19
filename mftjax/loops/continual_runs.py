"""Runs of one method over whole sequences of tasks, some at once, which go on where they were killed."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mftjax import checkpoint, models, sft
from mftjax import config as config_lib
from mftjax.baselines import continual as methods_lib
from mftjax.loops import continual_methods, episode, learnt_memory, sequence
from mftjax.loops import task as task_lib
from mftjax.loops.continual_setting import Setting

_MOST_STEPS = 1_000_000  # of a task, so that checkpoints count up


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
  method = continual_methods.get(name, options.write_rule)
  setup = setting.setup(method.trained)
  # The config's hyperparameters are those of writing into a memory.
  fixed, trained = dict(sft.DEFAULTS), continual_methods.trained_of(method.trained, options.write_rule)
  if trained == "memory":
    fixed = config_lib.default_hyperparameters(setting.config) | {"weight_decay": 0.0}
  rates = tuple(options[f"{trained}_learning_rates"])
  if name == "memory, no outer loop":
    setup = dataclasses.replace(setup, held=episode.held(setup, memories["joint"]))
  if "meta-learned" in name:
    setup = dataclasses.replace(setup, held=episode.held(setup, memories["meta"]))
    fixed |= memories["values"]
    rates = tuple(memories["values"]["learning_rate"] * factor for factor in (0.25, 4.0))
  space = {"learning_rate": ("log", rates)}
  space |= {name: scale for name, scale in method.hyperparameters.items() if name not in fixed}  # or it is learned
  stream = setting.memory_stream if method.trained == "memory" else setting.stream
  programs = sequence.build(setup, method, stream, setting.run)
  return Entry(name, method, setup, fixed, space, programs)


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
    is_measured: whether before and after every task, or else after the last only, with zeros before.
  """
  programs, every = found.programs, setting.config.checkpoint_every
  stacked = {name: jnp.asarray([one[name] for one in values], jnp.float32) for name in values[0]}
  tasks, num_steps = setting.stream.num_tasks, setting.run.num_steps
  num_tasks, num_steps = (1, num_steps * tasks) if found.method.is_joint else (tasks, num_steps)
  state = programs.start(stacked)
  empty = sequence.Measured(jnp.zeros(order.shape), jnp.zeros(order.shape), jnp.zeros(len(order)))
  before = programs.measure(state, stacked, order) if is_measured else empty
  after: list[sequence.Measured] = []
  written: list[np.ndarray] = []
  begun, done = 0, 0  # the task, and its steps that are done
  with _Saved(folder, empty, num_tasks) as saved:
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


def first_model(found: Entry, runs: Runs, values: Mapping[str, float]) -> models.Decoder:
  """The model of the first run, after its last task."""
  state = jax.tree.map(lambda x: x[0], runs.final)
  return found.setup.merge(found.method.final(state.inner.params, state.carry, values))


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


class _Saved:
  """Checkpoints of some runs, or none without a folder."""

  def __init__(self, folder: pathlib.Path | None, measured: Any, num_tasks: int):
    self._checkpoints = checkpoint.Checkpoints(folder / "checkpoints") if folder else None
    self._empty = jax.tree.map(lambda x: jnp.zeros((num_tasks, *x.shape), x.dtype), measured)

  def __enter__(self) -> "_Saved":
    if self._checkpoints:
      self._checkpoints.__enter__()
    return self

  def __exit__(self, *error: object) -> None:
    if self._checkpoints:
      self._checkpoints.__exit__(*error)

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
