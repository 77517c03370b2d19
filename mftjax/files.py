"""Files that are there whole or not at all: a reader sees the old one or the new one, never half of one."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np
import safetensors
import safetensors.numpy

from mftjax.errors import InputError

_PARTIAL = ".partial"


@contextlib.contextmanager
def _partial(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Where to write what takes the path's place once it is whole; the path's folder is made."""
  target = pathlib.Path(path)
  target.parent.mkdir(parents=True, exist_ok=True)
  partial = target.with_name(f".{target.name}.{os.getpid()}{_PARTIAL}")
  try:
    yield partial
    with partial.open("rb") as file:
      os.fsync(file.fileno())
    partial.replace(target)
  finally:
    partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
  with _partial(path) as partial, partial.open("wb") as file:
    yield file


def remove_partial(folder: str | os.PathLike[str]) -> None:
  """Removes what processes that were killed have left half written, in a folder in which nobody writes now."""
  for path in pathlib.Path(folder).rglob(f".*{_PARTIAL}"):
    path.unlink()


def named(name: str) -> str:
  """A name that a file may have, with `_` for all but letters and digits."""
  return "".join(letter if letter.isalnum() else "_" for letter in name.replace("%", "percent"))


def write(path: str | os.PathLike[str], text: str) -> None:
  """Writes UTF-8 text; the file's folder is made."""
  with _replacing(path) as file:
    file.write(text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
  """Writes a JSON-able value, indented."""
  write(path, json.dumps(value, indent=2) + "\n")


def write_npz(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
  """Writes arrays by name, as `numpy.load` reads them."""
  with _replacing(path) as file:
    np.savez(file, **arrays)  # type: ignore[arg-type]


def write_safetensors(
  path: str | os.PathLike[str], arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
  """Writes arrays by name, and texts about them."""
  with _partial(path) as partial:
    safetensors.numpy.save_file(arrays, partial, metadata=metadata)


def open_safetensors(path: str | os.PathLike[str]) -> Any:
  """A file of arrays by name, as `safetensors.safe_open` gives it.

  Raises:
    InputError: it is cut, or otherwise no such file.
  """
  try:
    return safetensors.safe_open(path, framework="numpy")
  except safetensors.SafetensorError as error:
    raise InputError(f"{path} is not a whole safetensors file: {error}.") from error
