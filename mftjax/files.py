"""Files that are there whole or not at all: a reader sees the old one or the new one, never half of one."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np


@contextlib.contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
  """A file to write that takes the path's place once it is whole; the path's folder is made."""
  target = pathlib.Path(path)
  target.parent.mkdir(parents=True, exist_ok=True)
  partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
  try:
    with partial.open("wb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    partial.replace(target)
  finally:
    partial.unlink(missing_ok=True)


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
