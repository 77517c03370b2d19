"""Checkpoints of a run: arrays and where the data stood, written whole, the last whole one read back."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore
from absl import logging

from mftjax import hosts, stopping
from mftjax.errors import InputError, MftError

# Orbax asks for these at each save to log a count of bytes, and tensorstore 0.1 never frees what it returns: 40 KB.
tensorstore.experimental_collect_matching_metrics = lambda *_: []

_TORN = ".torn"
# Orbax counts them by the wall clock, which jumps when a machine wakes up or its clock is set.
_SAVE_SECONDS = 7 * 24 * 3600


class Checkpoints:
  """The checkpoints of one workdir.

  Saving goes on in the background; `close` (or leaving a `with` block) waits for it. Typed PRNG keys are not
  arrays: store `jax.random.key_data(key)`. In a `with` block a run that is asked to stop saves first.

  Args:
    directory: the folder that holds them; it is made.
    keep: how many of the newest to keep, at least 1; 2 or more leave one to fall back to.
  """

  def __init__(self, directory: str | os.PathLike[str], keep: int = 2):
    if keep < 1:
      raise InputError(f"keep must be at least 1, got {keep}.")
    self._directory = pathlib.Path(directory).absolute()
    hosts.first_does(self._clear)
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      create=True,
      async_options=ocp.AsyncOptions(timeout_secs=_SAVE_SECONDS),
    )
    self._checkpoints = ocp.CheckpointManager(self._directory, options=options, item_names=("arrays", "data"))

  def __enter__(self) -> "Checkpoints":
    self._saving = stopping.saving()
    self._saving.__enter__()
    return self

  def __exit__(self, *error: Any) -> None:
    try:
      self.close()
    finally:
      self._saving.__exit__(*error)

  @property
  def steps(self) -> list[int]:
    """The steps there are, oldest first."""
    return sorted(self._checkpoints.all_steps())

  def is_due(self, step: int, last: int, every: int) -> bool:
    """Whether to save after so many steps: every so many, after the last one, and when the run is asked to stop."""
    # First, because all hosts have to ask, whatever the step.
    return hosts.any_of(stopping.is_asked()) or step % every == 0 or step == last

  def save(self, step: int, arrays: Any, data: dict[str, Any]) -> None:
    """Writes a checkpoint; a step that is there already is left as it is.

    Args:
      step: the number of steps done, larger than that of any checkpoint before.
      arrays: pytree of jax or numpy arrays.
      data: JSON-able: where the data stood, counters.

    Raises:
      stopping.Stopped: the run was asked to stop; the checkpoint is whole.
      MftError: this one or the one before cannot be written.
    """
    with self._writing():
      if step not in self._checkpoints.all_steps():
        args = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), data=ocp.args.JsonSave(data))
        self._checkpoints.save(step, args=args, force=True)
      is_asked = hosts.any_of(stopping.is_asked())
      if is_asked:
        self._checkpoints.wait_until_finished()
    if is_asked:
      raise stopping.Stopped(f"after step {step}")

  def restore(self, arrays_like: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]] | None:
    """Reads the last whole checkpoint.

    A torn one (files missing or cut) is skipped with a warning and renamed to `STEP.torn`, so that the run can
    write that step again.

    Args:
      arrays_like: pytree with the structure, shapes, dtypes and shardings of what was saved; arrays or
        `jax.ShapeDtypeStruct`.
      step: read this one and no other.

    Returns:
      (step, arrays, data), or None when there is no checkpoint.

    Raises:
      InputError: there are checkpoints, but none is whole and fits `arrays_like`; or not the one asked for.
    """
    self._checkpoints.wait_until_finished()
    steps = sorted(self._checkpoints.all_steps(), reverse=True)
    if step is not None:
      if step not in steps:
        raise InputError(f"{self._directory}: no checkpoint of step {step}; there are: {steps or 'none'}.")
      steps = [step]
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, arrays_like)
    args = ocp.args.Composite(arrays=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore())
    torn: list[int] = []
    cause: Exception | None = None
    for candidate in steps:
      try:
        restored = self._checkpoints.restore(candidate, args=args)
        arrays, data = restored["arrays"], restored["data"]
        if data is None or arrays is None:
          raise ValueError("a part of it is missing")
        jax.block_until_ready(arrays)
      except Exception as error:  # what orbax raises depends on which file is damaged
        logging.warning(
          "Checkpoint of step %d in %s is torn or does not fit: %s",
          candidate,
          self._directory,
          _first_line(error),
        )
        torn.append(candidate)
        cause = cause or error
        continue
      self._set_aside(torn)
      return candidate, arrays, data
    if cause is not None:
      raise InputError(
        f"{self._directory}: no checkpoint of {steps} can be read. Of step {steps[0]}: {_first_line(cause)}. "
        "Give another workdir, or delete this folder to start again."
      ) from cause
    return None

  def close(self) -> None:
    """Waits until everything is written.

    Raises:
      MftError: the last one cannot be.
    """
    with self._writing():
      self._checkpoints.wait_until_finished()
      self._checkpoints.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # what orbax raises depends on what its threads met
      raise MftError(f"{self._directory}: a checkpoint cannot be written: {_first_line(error)}") from error

  def _clear(self) -> None:
    # Orbax would do it in a thread that goes on after `close`, in the way of whoever opens this folder next.
    for half_written in ocp.path.step.all_temporary_paths(self._directory):
      half_written.get().rmtree()

  def _set_aside(self, torn: list[int]) -> None:
    # Orbax never saves a step that is not newer than what it finds, so a torn one would block the run.
    if not torn:
      return
    hosts.first_does(lambda: self._rename(torn))
    self._checkpoints.reload()

  def _rename(self, torn: list[int]) -> None:
    for step in torn:
      source = self._directory / str(step)
      target = source.with_name(f"{step}{_TORN}")
      number = 1
      while target.exists():
        number += 1
        target = source.with_name(f"{step}{_TORN}{number}")
      source.rename(target)


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
