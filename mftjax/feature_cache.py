"""Features kept in the workdir, under a hash of all that they depend on."""

import dataclasses
import hashlib
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mftjax import files
from mftjax.errors import InputError
from mftjax.features import ABILITY_FEATURES, PAIR_FEATURES, SOURCE_FEATURES, Features

# Features of another meaning are never read from a cache.
_MEANING = repr((SOURCE_FEATURES, ABILITY_FEATURES, PAIR_FEATURES))


def digest(tree: Any) -> str:
  """sha256 of a pytree's arrays with their places, dtypes and shapes, as 64 hex digits."""
  found = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = np.asarray(leaf)
    _add(found, f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode(), array.tobytes())
  return found.hexdigest()


def cached(
  workdir: str | os.PathLike[str], what: Mapping[str, bytes | str | np.ndarray], compute: Callable[[], Features]
) -> Features:
  """Features from `workdir/features/<sha256 of what>.npz`, computed and written if there is no such file.

  Args:
    workdir: folder of the run; a reader sees a whole file or none.
    what: all that the features depend on, with the base model's `digest` as `"model"`.
    compute: makes them.

  Returns:
    The features.

  Raises:
    InputError: `what` names no model, or anything `load` refuses.
  """
  model = what.get("model")
  if not isinstance(model, str):
    raise InputError("what['model'] must be the base model's digest: feature_cache.digest(params).")
  found = hashlib.sha256(_MEANING.encode())
  for name in sorted(what):
    value = what[name]
    content = value.encode() if isinstance(value, str) else value
    _add(found, name.encode(), content if isinstance(content, bytes) else digest(content).encode())
  path = pathlib.Path(workdir) / "features" / f"{found.hexdigest()}.npz"
  if path.exists():
    return load(path, model)
  features = compute()
  names = [field.name for field in dataclasses.fields(features)]
  arrays: dict[str, Any] = {name: np.asarray(getattr(features, name)) for name in names}
  files.write_npz(path, {**arrays, "model": np.asarray(model), "meaning": np.asarray(_MEANING)})
  return features


def load(path: str | os.PathLike[str], model_digest: str) -> Features:
  """Features that `cached` wrote.

  Raises:
    InputError: no such file, a damaged one, or features of another base model or another version of mftjax.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = dict(file)
    model, meaning = str(arrays.pop("model")), str(arrays.pop("meaning"))
    features = Features(**{name: jnp.asarray(array) for name, array in arrays.items()})
  except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
    raise InputError(f"{path}: cannot read the features: {error}. Delete the file to probe again.") from error
  if model != model_digest:
    raise InputError(
      f"{path}: features of the base model {model[:8]}, but this one is {model_digest[:8]}. Probe this model instead."
    )
  if meaning != _MEANING:
    raise InputError(f"{path}: other features than this version of mftjax reads. Delete the file to probe again.")
  return features


def _add(found: Any, *parts: bytes) -> None:
  """Adds each with its length before it, so that no two lists of parts read the same."""
  for part in parts:
    found.update(len(part).to_bytes(8, "big") + part)
