"""The folder of a run: whose config it holds, and that one command at a time works in it."""

import datetime
import errno
import json
import os
import pathlib
import socket
import sys

import filelock
import ml_collections

from mftjax import config as config_lib
from mftjax import errors, files, hosts, parallel

_LOCK, _HOLDER = ".lock", "held_by.json"
# Fields of the machine, not of the run.
_HERE_ALONE = (
  *("compilation_cache", "cpu_devices", "stuck_seconds", "trackers", "project"),
  *("engine", "ray.address", "ray.workers", "ray.gpus"),
  *(f"parallel.{name}" for name in ("strategy", *parallel.AXES)),
)

_CANNOT_WRITE = (
  errno.EACCES,
  errno.EPERM,
  errno.EROFS,
  errno.ENOTDIR,
  errno.EEXIST,
  errno.ENOENT,
  errno.ENAMETOOLONG,
)

# Until the process ends: the system then lets go of them, whatever ended it.
_held: dict[pathlib.Path, filelock.FileLock] = {}


def claim(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Makes the workdir this run's own until it ends, and writes `config.json` or sees that it is the same.

  Of several hosts the first has it.

  Raises:
    InputError: the workdir belongs to another config, is another process's, or cannot be written.
  """
  check(config, workdir)
  hosts.first_does(lambda: _claim(config, workdir))


def _claim(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    _hold(workdir)
    if not (workdir / "config.json").exists():
      files.write_json(workdir / "config.json", json.loads(config.to_json_best_effort()))
  except OSError as error:
    if error.errno not in _CANNOT_WRITE:
      raise
    raise errors.InputError(f"{workdir} cannot be written: {error.strerror}. Give another --workdir.") from error


def reclaim(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """As `claim` for a workdir that has a run in it; one that has none is left as it is.

  Before checkpoints are read, as that clears away what a run that still writes there has half done.
  """
  if hosts.any_of(check(config, workdir)):  # none goes on to write it before all have looked
    hosts.first_does(lambda: _claim(config, workdir))


def check(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> bool:
  """Whether the workdir has a run in it.

  Raises:
    InputError: one of another config; the message names the first field that differs.
  """
  path = workdir / "config.json"
  try:
    if not path.exists():
      return False
    theirs = config_lib.flatten(json.loads(path.read_text()))
  except OSError as error:
    raise errors.InputError(f"{path} cannot be read: {error.strerror}. Give another --workdir.") from error
  except (ValueError, AttributeError) as error:
    raise errors.InputError(f"{path} is damaged: {error}. Delete it, and the same command goes on.") from error
  mine = config_lib.flatten(json.loads(config.to_json_best_effort()))
  for name in sorted(mine.keys() | theirs.keys()):
    if mine.get(name) != theirs.get(name) and name not in _HERE_ALONE:
      raise errors.InputError(
        f"{workdir} belongs to another config: {name} is {theirs.get(name)!r} there and {mine.get(name)!r} here. "
        "Take another --workdir or the config it was made with."
      )
  return True


def release() -> None:
  """Lets go of all folders before the process ends."""
  while _held:
    _held.popitem()[1].release()


def _hold(workdir: pathlib.Path) -> None:
  if workdir in _held:
    return
  lock = filelock.FileLock(workdir / _LOCK)
  try:
    lock.acquire(timeout=0)
  except filelock.Timeout as error:
    raise errors.InputError(
      f"{workdir} is in use by {_holder(workdir)}. Wait for it, or take another --workdir."
    ) from error
  _held[workdir] = lock
  files.remove_partial(workdir)
  now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
  mine = {"process": os.getpid(), "host": socket.gethostname(), "since": now, "command": " ".join(sys.argv)}
  files.write_json(workdir / _HOLDER, mine)


def _holder(workdir: pathlib.Path) -> str:
  try:
    found = json.loads((workdir / _HOLDER).read_text())
    return "process {process} on {host} since {since} ({command})".format(**found)
  except (OSError, ValueError, KeyError):  # it has the lock and has not said so yet
    return "another process"
