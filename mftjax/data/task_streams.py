"""Real tasks to be learnt one after another: rows to train on, rows to judge by, and examples to be answered."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mftjax import errors
from mftjax.data import abilities, classification, sources, tokens


@dataclasses.dataclass(frozen=True)
class TaskStream:
  """The tasks of a sequence, in their order; no prompt is in two parts of a task."""

  names: tuple[str, ...]
  train: tuple[tokens.Rows, ...]
  validation: tuple[tokens.Rows, ...]
  test: tuple[tokens.Rows, ...]
  examples: tuple[
    list[dict[str, Any]], ...
  ]  # those of `test`: `{"prompt", "completion"}`, to be answered by generation


def from_files(
  paths: Sequence[str | pathlib.Path],
  tokenizer: Any,
  length: int,
  seed: int,
  truncate_side: str = "left",
  templates: Mapping[str, str] | None = None,
) -> TaskStream:
  """Each file a task, called as the file is, and as its folder too where two files have one name.

  A prompt belongs to one part by a hash of its text (`abilities.split_of`): of ten, eight are in train, one each in
  validation and test, whatever the seed. So what was chosen with one seed has not seen the test examples of another.

  Examples with a column `template` are the same items in several wordings. Only those of one template are taken: with
  two, an item would be in train in one wording and in test in the other.

  Args:
    paths: `.jsonl` files of `prompt` and `completion`.
    tokenizer: of the model.
    length: tokens in a row.
    seed: of the order of the examples.
    truncate_side: side on which a prompt that is too long is cut.
    templates: task -> the template to take; the file's first where nothing is said.

  Raises:
    InputError: no file, one that repeats, is missing or wrong, a template or task that does not exist, or a part
      without examples.
  """
  files = [pathlib.Path(path).expanduser() for path in paths]
  names = _names(files)
  for name in templates or {}:
    if name not in names:
      raise errors.unknown_name("task in templates", name, names)
  tasks = {}
  for name, file in zip(names, files, strict=True):
    found = _of_template(file, (templates or {}).get(name))
    parts: dict[str, list[dict[str, Any]]] = {part: [] for part in abilities.SPLITS}
    for i in np.random.default_rng(seed).permutation(len(found)):
      parts[abilities.split_of(found[i]["prompt"])].append(found[i])
    tasks[name] = parts
  return _stream(tasks, tokenizer, length, truncate_side, {name: str(f) for name, f in zip(names, files, strict=True)})


def from_benchmark(
  order: str,
  tokenizer: Any,
  length: int,
  seed: int = 0,
  folder: str = "",
  num_train: int = 1000,
  num_validation: int = 500,
  num_test: int = 500,
  truncate_side: str = "left",
) -> TaskStream:
  """A benchmark of text classification in one of its orders.

  O-LoRA and Progressive Prompts train on 1,000 examples of each task of the long sequence and hold out 500 a class.

  Args:
    order: in `classification.ORDERS`.
    tokenizer: of the model.
    length: tokens in a row.
    seed: of the draw of the examples.
    folder: as of `classification.read`.
    num_train, num_validation: examples of each task, both from its train split, shared in this proportion where it has
      fewer; those whose prompt is among the test examples, or repeats, are left out.
    num_test: examples of each task from its test split.
    truncate_side: side on which a prompt that is too long is cut. "left" cuts the instruction and keeps `Answer:`.

  Raises:
    InputError: an unknown order, or as of `classification.read`, or a part without examples.
  """
  if order not in classification.ORDERS:
    raise errors.unknown_name("order of tasks", order, classification.ORDERS)
  wanted = num_train + num_validation
  tasks = {}
  for name in classification.ORDERS[order]:
    test = classification.read(name, "test", num_test, seed, folder)
    held_out = {example["prompt"] for example in test}
    drawn = {example["prompt"]: example for example in classification.read(name, "train", wanted, seed, folder)}
    left = [example for prompt, example in drawn.items() if prompt not in held_out]
    end = num_train * min(len(left), wanted) // wanted
    tasks[name] = {"train": left[:end], "validation": left[end:], "test": test}
  return _stream(tasks, tokenizer, length, truncate_side, {name: f"{order}, {name}" for name in tasks})


def _names(files: Sequence[pathlib.Path]) -> list[str]:
  if not files:
    raise errors.InputError("A sequence of tasks needs at least one file.")
  stems = [file.stem for file in files]
  names = [f"{f.resolve().parent.name}/{f.stem}" if stems.count(f.stem) > 1 else f.stem for f in files]
  for i, name in enumerate(names):
    if name in names[:i]:
      first = files[names.index(name)]
      raise errors.InputError(f"The sequence has the task {name!r} twice: {first} and {files[i]}.")
  return names


def _of_template(file: pathlib.Path, template: str | None) -> list[dict[str, Any]]:
  """The file's examples, of one template."""
  where = str(file)
  if not file.is_file() or file.suffix != ".jsonl":
    sources.read({"path": where}, where=where)  # says what is wrong, and what is near
    raise errors.InputError(f"{file} must end in .jsonl.")
  rows = sources.json_lines(file)
  there = list(dict.fromkeys(str(row["template"]) for row in rows if row.get("template") is not None))
  if template is None and there:
    template = there[0]
  if template is not None:
    if template not in there:
      raise errors.unknown_name(f"template in {file}", template, there or ["none: it has no column template"])
    rows = [row for row in rows if row.get("template") == template]
  columns = {"prompt_column": "prompt", "completion_column": "completion"}
  return sources.read({"examples": rows, **columns}, where=where)


def _stream(
  tasks: Mapping[str, Mapping[str, list[dict[str, Any]]]],
  tokenizer: Any,
  length: int,
  truncate_side: str,
  where: Mapping[str, str],
) -> TaskStream:
  made: dict[str, list[tokens.Rows]] = {part: [] for part in abilities.SPLITS}
  for name, parts in tasks.items():
    for part, rows in made.items():
      examples = parts[part]
      if not examples:
        sizes = ", ".join(f"{len(parts[other])} for {other}" for other in abilities.SPLITS)
        raise errors.InputError(f"{where[name]}: the task {name!r} has no examples for {part} ({sizes}).")
      spec = {"examples": examples}
      rows.append(
        sources.load_rows(spec, tokenizer, length, where=f"{where[name]}, {part}", truncate_side=truncate_side)
      )
  return TaskStream(
    names=tuple(tasks),
    train=tuple(made["train"]),
    validation=tuple(made["validation"]),
    test=tuple(made["test"]),
    examples=tuple(list(parts["test"]) for parts in tasks.values()),
  )
