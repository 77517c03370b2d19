"""Files that are there whole or not at all: a reader sees the old one or the new one, never half of one."""

import json
import os
import pathlib
from typing import Any


def write(path: str | os.PathLike[str], text: str) -> None:
  """Writes UTF-8 text; the file's folder is made."""
  target = pathlib.Path(path)
  target.parent.mkdir(parents=True, exist_ok=True)
  partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
  try:
    with partial.open("w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    partial.replace(target)
  finally:
    partial.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
  """Writes a JSON-able value, indented."""
  write(path, json.dumps(value, indent=2) + "\n")
