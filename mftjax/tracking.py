"""What a run tells while it runs: a progress bar, one JSON line a step, TensorBoard scalars, other trackers."""

import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import IO, Any

import numpy as np
import rich.console
import rich.progress

from mftjax import events, files, hosts, trackers, watching
from mftjax.errors import InputError

_PLAIN_SECONDS = 5.0  # at most one plain line in this time
FILE = "metrics.jsonl"


class Tracker:
  """Follows one phase of a run, for example its outer steps.

  A context manager. Only the first of several hosts writes and prints.

  Args:
    workdir: gets `metrics.jsonl` (appended) and `tensorboard/`.
    total_steps: what the bar counts to.
    title: what the bar is called.
    name: the phase, in each line of `metrics.jsonl` and before each TensorBoard tag.
    start_step: steps done before, when resuming; what the phase wrote after that is dropped.
    tokens_per_step, flops_per_step, num_devices: for tokens/s and utilisation, see `watching.Watch`.
    quiet: print nothing.
    console: where to print; standard error by default.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    total_steps: int,
    *,
    title: str,
    name: str,
    start_step: int = 0,
    tokens_per_step: int = 0,
    flops_per_step: float = 0.0,
    num_devices: int = 1,
    quiet: bool = False,
    console: rich.console.Console | None = None,
  ):
    self._workdir = pathlib.Path(workdir)
    self._total_steps = total_steps
    self._title = title
    self._name = name
    self._start_step = start_step
    self._tokens_per_step = tokens_per_step
    self._watch = watching.Watch(
      self._workdir,
      name,
      tokens_per_step=tokens_per_step,
      flops_per_step=flops_per_step,
      num_devices=num_devices,
    )
    self._console = console or rich.console.Console(stderr=True)
    self._is_writer = hosts.is_first()
    self._is_loud = self._is_writer and not quiet
    self._progress: rich.progress.Progress | None = None
    self._file: IO[str] | None = None
    self._events: events.Events | None = None
    self._trackers: list[trackers.Tracker] = []
    self._last_plain_seconds = -math.inf

  def __enter__(self) -> "Tracker":
    self._seconds_before = 0.0
    if self._is_writer:
      self._workdir.mkdir(parents=True, exist_ok=True)
      path = self._workdir / FILE
      if path.exists():
        # A torn last line would swallow the next one.
        _keep(path, lambda line: line.get("phase") != self._name or line.get("step", 0) <= self._start_step)
        seconds = [line["time_seconds"] for line in read(path) if line.get("phase") == self._name]
        if self._start_step and seconds:
          self._seconds_before = float(seconds[-1])
      self._file = path.open("a", encoding="utf-8")
      self._events = events.Events(self._workdir / "tensorboard", self._start_step)
      self._trackers = trackers.open_all(self._workdir, self._name)
    self._start_seconds = time.monotonic()
    if self._is_loud and self._console.is_terminal:
      self._progress = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[numbers]}", markup=False),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left"),
        rich.progress.TimeRemainingColumn(),
        console=self._console,
      )
      self._bar = self._progress.add_task(self._title, total=self._total_steps, completed=self._start_step, numbers="")
      self._progress.start()
    return self

  def __exit__(self, *_: object) -> None:
    if self._progress is not None:
      self._progress.stop()
      self._progress = None
    if self._file is not None:
      self._file.close()
      self._file = None
    if self._events is not None:
      self._events.close()
      self._events = None
    while self._trackers:
      self._trackers.pop().finish()

  def steps(self) -> Iterator[int]:
    """The steps to do, counted from `start_step`; each is watched."""
    return self._watch.steps(self._start_step, self._total_steps)

  def input(self) -> AbstractContextManager[None]:
    """Around what a step waits for before its program starts."""
    return self._watch.input()

  def log(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes one line of `metrics.jsonl`, the TensorBoard scalars, and moves the bar.

    Args:
      step: steps done, the same count as `start_step`.
      values: name -> number, list or dict of numbers, nested as deep as you like; arrays are taken as lists. A
        value that is not finite is written as `null`, which JSON has, instead of `NaN`, which it has not. What the
        step took, `Watch.figures`, stands beside them as `machine`.
    """
    reserved = {"phase", "step", "time_seconds", "machine"} & set(values)
    if reserved:
      raise InputError(f"{', '.join(sorted(reserved))}: the tracker writes this field itself; use another name.")
    if not self._is_writer:
      return
    if self._file is None or self._events is None:
      raise RuntimeError("log is called inside `with Tracker(...)` only.")
    plain = {name: _plain(value) for name, value in {**values, "machine": self._watch.figures()}.items()}
    elapsed = time.monotonic() - self._start_seconds
    seconds = round(self._seconds_before + elapsed, 3)
    line = {"phase": self._name, "step": int(step), "time_seconds": seconds, **plain}
    self._file.write(json.dumps(line, allow_nan=False) + "\n")
    self._file.flush()
    scalars = _scalars(self._name, plain)
    self._events.write(int(step), scalars)
    for tracker in self._trackers:
      tracker.log(int(step), dict(scalars))
    if self._is_loud:
      self._show(int(step), plain, elapsed)

  def _show(self, step: int, plain: dict[str, Any], elapsed: float) -> None:
    numbers = [f"{name} {value:.4g}" for name, value in plain.items() if name.endswith("loss") and _is_number(value)]
    done = step - self._start_step
    if self._tokens_per_step and done > 0 and elapsed > 0:
      numbers.append(f"{done * self._tokens_per_step / elapsed:,.0f} tokens/s")
    if self._progress is not None:
      self._progress.update(self._bar, completed=step, numbers="  ".join(numbers))
      return
    if elapsed - self._last_plain_seconds < _PLAIN_SECONDS and step < self._total_steps:
      return
    self._last_plain_seconds = elapsed
    if done > 0:
      numbers.append(f"{elapsed / done * max(0, self._total_steps - step):.0f} s left")
    self._console.print(
      f"{self._title} {step}/{self._total_steps}  {'  '.join(numbers)}",
      markup=False,
      highlight=False,
      soft_wrap=True,
    )


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The lines of a `metrics.jsonl`, in order; a torn last line is left out.

  Args:
    path: the file; one that is not there has no lines.

  Returns:
    One dict a line.

  Raises:
    InputError: a line other than the last is not a JSON object.
  """
  file = pathlib.Path(path)
  if not file.exists():
    return []
  lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
  parsed = []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    value = _parse(line)
    if value is None:
      if number == len(lines):  # no line break after it: the write was cut
        continue
      raise InputError(f"{path}:{number}: not a JSON object: {line[:80]!r}.")
    parsed.append(value)
  return parsed


def _keep(path: pathlib.Path, is_kept: Any) -> None:
  text = "".join(json.dumps(line) + "\n" for line in read(path) if is_kept(line))
  if text.encode() != path.read_bytes():
    files.write(path, text)


def _parse(line: str) -> dict[str, Any] | None:
  try:
    value = json.loads(line)
  except json.JSONDecodeError:
    return None
  return value if isinstance(value, dict) else None


def _plain(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {str(name): _plain(entry) for name, entry in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(entry) for entry in value]
  if value is None or isinstance(value, str | bool | int):
    return value
  if not isinstance(value, float):
    value = np.asarray(value)
    if value.dtype.name == "bfloat16":  # a list of these is not one of floats
      value = value.astype(np.float32)
    value = value.tolist()
    if not isinstance(value, float):
      return _plain(value)
  return value if math.isfinite(value) else None


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _scalars(prefix: str, value: Any) -> list[tuple[str, float]]:
  if isinstance(value, Mapping):
    return [pair for name, entry in value.items() for pair in _scalars(f"{prefix}/{name}", entry)]
  if isinstance(value, list):
    return [pair for index, entry in enumerate(value) for pair in _scalars(f"{prefix}/{index}", entry)]
  return [(prefix, value)] if _is_number(value) else []
