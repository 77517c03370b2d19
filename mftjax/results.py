"""A run's results, copied to a shared folder or a bucket."""

import pathlib

from etils import epath

from mftjax import errors

# What a command needs to go on, or to draw; nobody reads it elsewhere.
_OF_THE_RUN = ("checkpoints", "retention", "tensorboard", "held_by.json")


def destination(folder: str) -> epath.Path:
  """The folder, made where it is not there.

  Args:
    folder: a path, or `gs://BUCKET/...` and what else epath knows.

  Raises:
    InputError: it cannot be made, or what reads such a bucket is not installed.
  """
  try:
    path = epath.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
  except Exception as error:  # each kind of storage has its own
    raise errors.InputError(f"--results={folder} cannot be written: {error}") from error
  return path


def copy(workdir: pathlib.Path, target: epath.Path) -> None:
  """Copies all that the workdir holds but checkpoints, hidden files and the like; what is there is replaced."""
  for path in sorted(workdir.rglob("*")):
    place = path.relative_to(workdir)
    is_result = not any(part.startswith(".") or part in _OF_THE_RUN for part in place.parts)
    if path.is_file() and is_result:
      (target / place).parent.mkdir(parents=True, exist_ok=True)
      epath.Path(path).copy(target / place, overwrite=True)
