"""Pools of real data: folders of JSON Lines, of which each family gives a clean, a redundant and a corrupted source."""

import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mftjax import errors
from mftjax.data import meta_tasks, sources, tokens

_PARTS = {"train": 0.5, "validation": 0.25, "test": 0.25}  # of a family's examples
_LEAST_ROWS = 8  # of each part: with fewer, neither a probe nor a held-out loss says much


def find(folders: Sequence[str]) -> dict[str, dict[str, pathlib.Path]]:
  """Family -> `{"train": file}`, with `"test"` where the folder itself sets a file apart.

  Args:
    folders: each a `.jsonl` file, which is one family; a folder with `train.jsonl` and `test.jsonl`, which is one too;
      or a folder of other `.jsonl` files, each of which is one. A family is called as its file or folder is.

  Raises:
    InputError: nothing there, a folder without `.jsonl` files, or two families of one name.
  """
  found: dict[str, dict[str, pathlib.Path]] = {}
  for folder in folders:
    path = pathlib.Path(folder)
    if not path.exists():
      raise errors.InputError(f"config.tasks.folders: {folder} does not exist.")
    files = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
    if not files:
      raise errors.InputError(f"config.tasks.folders: {folder} holds no .jsonl file.")
    named = {file.stem: {"train": file} for file in files}
    if {"train", "test"} <= named.keys():
      named = {path.resolve().name: {part: path / f"{part}.jsonl" for part in ("train", "test")}}
    for name, parts in named.items():
      if name in found:
        raise errors.InputError(
          f"config.tasks.folders names the family {name!r} twice: {found[name]['train']} and {parts['train']}."
        )
      found[name] = parts
  return found


def split(names: Sequence[str], num_validation: int, num_unseen: int, seed: int) -> dict[str, tuple[str, ...]]:
  """Which families are for training, validation and comparing: in the order of a hash of the seed and the name.

  The first `num_unseen` are unseen, the next `num_validation` for validation, the others for training. Two families
  never change their order, whatever others there are.

  Raises:
    InputError: no family is left to train on.
  """
  num_train = len(names) - num_validation - num_unseen
  if num_train < 1:
    raise errors.InputError(
      f"config.tasks.folders has {len(names)} families: with {num_validation} for validation and {num_unseen} unseen "
      "(config.tasks.validation_families, config.tasks.unseen_families) none is left to train on."
    )
  order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).hexdigest())
  unseen, validation, train = np.split(np.asarray(order), [num_unseen, num_unseen + num_validation])
  parts = {"train": train, "validation": validation, "unseen": unseen}
  return {part: tuple(sorted(map(str, found))) for part, found in parts.items()}


def build(
  folders: Sequence[str],
  tokenizer: Any,
  length: int,
  num_rows: int,
  seed: int,
  num_validation: int,
  num_unseen: int,
  truncate_side: str = "left",
) -> meta_tasks.Pools:
  """Pools of every family: a clean, a redundant and a corrupted one to train on, two held-out ones.

  A family's examples are shuffled, of each prompt only the first is kept, and one half is to train on, a quarter for
  validation and a quarter for test, or the whole file that the folder sets apart. So no prompt is in two parts.

  Args:
    folders: as of `find`.
    tokenizer: of the model.
    length: tokens in a row.
    num_rows: rows of each pool; a part with fewer repeats its own.
    seed: of the split into families and of that into parts.
    num_validation, num_unseen: families, as of `split`.
    truncate_side: side on which a prompt that is too long is cut.

  Raises:
    InputError: as of `find`, `split` and `sources.read`, or a family with too few rows.
  """
  found = find(folders)
  families = split(list(found), num_validation, num_unseen, seed)
  most = num_rows * max(1, length // 8)  # examples that so many rows hold, if each has at least 8 tokens
  train: dict[str, tokens.Rows] = {}
  held_out: dict[str, dict[str, tokens.Rows]] = {"validation": {}, "test": {}}
  for name in (name for part in families.values() for name in part):

    def rows(examples: list, corruption: str = "none", where: str = str(found[name]["train"])) -> tokens.Rows:
      spec = {"examples": examples[:most], "corruption": corruption, "seed": seed}
      return sources.load_rows(spec, tokenizer, length, where=where, truncate_side=truncate_side)

    parts = _parts(found[name], seed)
    made = {part: rows(examples) for part, examples in parts.items() if examples}
    for part, examples in parts.items():
      count = len(made[part].tokens) if examples else 0
      if count < _LEAST_ROWS:
        raise errors.InputError(
          f"config.tasks.folders: the family {name!r} ({found[name]['train']}) has too few examples: its "
          f"{len(examples)} for {part} make {count} rows of {length} tokens, and {_LEAST_ROWS} is the least."
        )
    train[f"{name}/clean"] = made["train"]
    for kind, corruption in (("redundant", "redundant"), ("corrupted", "shuffle")):
      train[f"{name}/{kind}"] = rows(parts["train"], corruption)
    for part, pools in held_out.items():
      pools[name] = made[part]
  return meta_tasks.Pools(
    train=meta_tasks.stack_rows(train, num_rows),
    validation=meta_tasks.stack_rows(held_out["validation"], num_rows),
    test=meta_tasks.stack_rows(held_out["test"], num_rows),
    names=tuple(train),
    ability_names=tuple(held_out["test"]),
    families=families,
  )


def _parts(files: Mapping[str, pathlib.Path], seed: int) -> dict[str, list[dict[str, Any]]]:
  """A family's examples by part, no prompt in two of them."""
  examples = {part: _distinct(file, seed) for part, file in files.items()}
  apart = examples.get("test", [])
  own = {_prompt(example) for example in apart}
  left = [example for example in examples["train"] if _prompt(example) not in own]
  parts = {part: share for part, share in _PARTS.items() if part not in examples or part == "train"}
  ends = np.cumsum([share / sum(parts.values()) for share in parts.values()])
  found: dict[str, list[dict[str, Any]]] = {"test": apart}
  start = 0
  for part, end in zip(parts, np.round(ends * len(left)).astype(int), strict=True):
    found[part], start = left[start:end], end
  return {part: found[part] for part in _PARTS}


def _distinct(file: pathlib.Path, seed: int) -> list[dict[str, Any]]:
  """The examples in a random order, of each prompt the first."""
  examples = sources.read({"path": str(file)}, where=str(file))
  found: dict[str, dict[str, Any]] = {}
  for index in np.random.default_rng(seed).permutation(len(examples)):
    found.setdefault(_prompt(examples[index]), examples[index])
  return list(found.values())


def _prompt(example: Mapping[str, Any]) -> str:
  """What two examples must not share: the prompt, or the whole of a text; of messages all but the last."""
  if "messages" in example:
    return str(example["messages"][:-1])
  return str(example.get("prompt", example.get("text")))
