"""Where examples come from: files, the hub, procedural suites or memory."""

import csv
import difflib
import json
import math
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from mftjax import errors
from mftjax.data import abilities, tokens

CORRUPTIONS = ("none", "shuffle", "redundant")
_COLUMNS = ("prompt", "completion", "messages", "text")
_ORIGINS = ("path", "suite", "examples")
_KEYS = (
  *_ORIGINS,
  "split",
  "subset",
  "num_examples",
  "suite_split",
  "seed",
  "corruption",
  *(f"{name}_column" for name in _COLUMNS),
)
_READERS = {".parquet": "parquet", ".csv": "csv"}
_JSON_LINES = (".jsonl", ".json")
_REDUNDANCY = 32  # times that each example of a redundant source stands in it


def read(spec: Mapping[str, Any], *, where: str) -> list[dict[str, Any]]:
  """The examples of a source.

  Args:
    spec: one of
      - `path`: a local .jsonl, .parquet or .csv file, or a dataset's id on the hub (its `subset`, if it has several);
        `split` in the words of `datasets` ("train", "train[:80%]"); a local file's only split is "train";
      - `suite`: a name in `abilities.SUITES`, with `num_examples` (1000), `suite_split` ("train");
      - `examples`: a list of examples;
      and, for any of them: `seed` (0); `prompt_column`, `completion_column`, `messages_column`, `text_column` where
      columns have other names than these; `num_examples`, to take the first so many; `corruption`: "none", "shuffle"
      (completions permuted, no example keeps its own) or "redundant" (few examples repeated to the same number).
    where: where the spec stands, e.g. "config.sources.gsm8k"; begins every error.

  Returns:
    `{"prompt", "completion"}`, `{"messages"}` or `{"text"}` of each example.

  Raises:
    InputError: an unknown name, a missing file or column, a line that is not JSON, a value that is not text, or
      nothing to read.
  """
  for key in spec:
    if key not in _KEYS:
      raise errors.unknown_name(f"field of {where}", str(key), _KEYS)
  corruption = spec.get("corruption") or "none"
  if corruption not in CORRUPTIONS:
    raise errors.unknown_name(f"corruption in {where}.corruption", str(corruption), CORRUPTIONS)
  origins = [name for name in _ORIGINS if spec.get(name) is not None]
  if len(origins) != 1:
    raise errors.InputError(f"{where} needs one of {', '.join(_ORIGINS)}; given: {', '.join(origins) or 'none'}.")
  seed = spec.get("seed") or 0
  if spec.get("num_examples", 1) < 1:
    raise errors.InputError(f"{where}.num_examples = {spec['num_examples']} must be at least 1.")
  rows: Sequence[Mapping[str, Any]]
  if origins == ["suite"]:
    rows = _read_suite(spec, seed, where)
  elif origins == ["path"]:
    rows = _read_path(spec, where)
  else:
    rows = list(spec["examples"])
  rows = rows[: spec.get("num_examples", len(rows))]
  if not rows:
    raise errors.InputError(f"{where} is empty: {spec.get('path') or 'it'} has no examples{_in_split(spec)}.")
  examples = _examples(rows, _columns(spec, rows, where), where)
  return _corrupt(examples, corruption, seed, where)


def load_rows(
  spec: Mapping[str, Any], tokenizer: Any, length: int, *, where: str, truncate_side: str = "left"
) -> tokens.Rows:
  """The examples of a source as packed rows; a text longer than a row goes on in the next.

  Args:
    spec, where: as of `read`.
    tokenizer: of `transformers`.
    length: tokens in a row.
    truncate_side: side on which a prompt that is too long is cut.

  Raises:
    InputError: as of `read`; or a completion tokenises to nothing (with the example's number, from 1).
  """
  found: list[tuple[np.ndarray, np.ndarray]] = []
  for number, example in enumerate(read(spec, where=where), start=1):
    try:
      all_tokens, mask = tokens.tokenize(example, tokenizer)
    except errors.InputError as error:
      raise errors.InputError(f"{where}, example {number}: {error}") from error
    step = length if "text" in example else len(all_tokens)
    found += [(all_tokens[i : i + step], mask[i : i + step]) for i in range(0, len(all_tokens), step)]
  return tokens.pack(found, length, truncate_side)


def _in_split(spec: Mapping[str, Any]) -> str:
  return f" in split {spec['split']!r}" if spec.get("split") else ""


def _read_suite(spec: Mapping[str, Any], seed: int, where: str) -> list[dict[str, str]]:
  split, num_examples = spec.get("suite_split") or "train", spec.get("num_examples", 1000)
  if spec["suite"] not in abilities.SUITES:
    raise errors.unknown_name(f"suite in {where}.suite", str(spec["suite"]), abilities.SUITES)
  if split not in abilities.SPLITS:
    raise errors.unknown_name(f"split in {where}.suite_split", str(split), abilities.SPLITS)
  return abilities.generate(spec["suite"], num_examples, seed, split)


def _read_path(spec: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
  path = pathlib.Path(str(spec["path"])).expanduser()
  split = spec.get("split") or "train"
  known = (*_JSON_LINES, *_READERS)
  if path.is_dir():
    raise errors.InputError(f"{where}.path: {path} is a folder; name a file ending in one of {', '.join(known)}.")
  if path.is_file():
    if path.suffix not in known:
      raise errors.InputError(f"{where}.path: {path} has an ending that is not one of {', '.join(known)}.")
    if not path.stat().st_size:
      raise errors.InputError(f"{where} is empty: {path} has no examples.")
    return _slice(json_lines(path) if path.suffix in _JSON_LINES else read_table(path, where), split, path, where)
  if path.suffix in known or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(spec["path"])):
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
    hint = f" Did you mean {path.parent / near[0]}?" if near else ""
    raise errors.InputError(f"{where}.path: there is no file {path}.{hint}")
  try:
    with _Quiet():
      return list(datasets.load_dataset(str(spec["path"]), spec.get("subset"), split=split))
  except Exception as error:  # the hub's libraries raise a dozen kinds
    raise errors.InputError(
      f"{where}.path: {spec['path']!r} is no local file, and reading it from the hub failed: {last_words(error)}"
    ) from error


def json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """The objects of a JSON Lines file.

  Parsed here and not by Arrow, which names no line in its errors and turns text that looks like a date into one.
  """
  found = []
  with path.open("rb") as file:
    for number, line in enumerate(file, start=1):
      if not line.strip():
        continue
      try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
      except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise errors.InputError(f"{path}:{number} is not JSON: {error}") from error
      if not isinstance(row, dict):
        raise errors.InputError(f"{path}:{number} is not a JSON object with columns but {str(row)[:40]!r}.")
      found.append(row)
  return found


def read_table(path: pathlib.Path, where: str) -> list[dict[str, Any]]:
  """The rows of a .csv or .parquet file; `where` begins every error."""
  # Every CSV cell is text: "007" stays as it is and an empty cell is no NaN.
  options: dict[str, Any] = {}
  if path.suffix == ".csv":
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
      header = next(csv.reader(file), [])
    options = {"features": datasets.Features({name: datasets.Value("string") for name in header})}
    options |= {"keep_default_na": False, "encoding": "utf-8-sig"}
  try:
    with _Quiet(), tempfile.TemporaryDirectory() as cache:
      table = datasets.load_dataset(
        _READERS[path.suffix], data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True, **options
      )
      return list(table)
  except ValueError as error:
    if "corresponds to no data" in str(error):  # how `datasets` says that there are columns but no rows
      return []
    raise errors.InputError(f"{where}.path: {path} cannot be read: {last_words(error)}") from error
  except Exception as error:  # Arrow's, pandas' and those of `datasets` have no common base
    raise errors.InputError(f"{where}.path: {path} cannot be read: {last_words(error)}") from error


def _slice(rows: list[dict[str, Any]], split: str, path: pathlib.Path, where: str) -> list[dict[str, Any]]:
  try:
    instruction: Any = datasets.ReadInstruction.from_spec(split)
    parts = instruction.to_absolute({"train": len(rows)})
  except (ValueError, AssertionError) as error:
    raise errors.InputError(
      f"{where}.split = {split!r} does not fit {path}, whose only split is 'train' (with "
      f"{len(rows)} examples; write e.g. train[:80%]): {error}"
    ) from error
  return [row for part in parts for row in rows[part.from_ : part.to]]


class _Quiet:
  """No progress bars of `datasets` meanwhile."""

  def __enter__(self) -> None:
    self._had_bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()

  def __exit__(self, *_: object) -> None:
    if self._had_bars:
      datasets.enable_progress_bars()


def last_words(error: BaseException) -> str:
  """The message of the error that started it all, on one line."""
  while error.__cause__ is not None:
    error = error.__cause__
  return " ".join(str(error).split())[:300] or type(error).__name__


def _columns(spec: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], where: str) -> dict[str, str]:
  """What an example is made of -> the column that holds it."""
  there = list(dict.fromkeys(name for row in rows for name in row))
  given = {name: spec[f"{name}_column"] for name in _COLUMNS if spec.get(f"{name}_column")}
  families = (("prompt", "completion"), ("messages",), ("text",))
  named = [family for family in families if any(name in given for name in family)]
  if len(named) > 1:
    raise errors.InputError(f"{where} names columns of {len(named)} kinds of examples: {', '.join(given)}; keep one.")
  if named:
    columns = {name: given.get(name, name) for name in named[0]}
    for name, column in columns.items():
      if column not in there:
        raise errors.unknown_name(f"column in {where}.{name}_column", str(column), there)
    return columns
  for family in families:
    if all(name in there for name in family):
      return {name: name for name in family}
  missing = [name for name in ("prompt", "completion") if name not in there]
  pairs = [(name, difflib.get_close_matches(name, there, n=1)) for name in missing]
  hints = "".join(f" Did you mean {near[0]!r} for {name}? Set {name}_column." for name, near in pairs if near)
  raise errors.InputError(
    f"{where} has no column {' and '.join(missing)} (nor messages, nor text). Its columns: {', '.join(there)}.{hints}"
  )


def _examples(rows: Sequence[Mapping[str, Any]], columns: dict[str, str], where: str) -> list[dict[str, Any]]:
  found = []
  for number, row in enumerate(rows, start=1):
    example: dict[str, Any] = {name: row.get(column) for name, column in columns.items()}
    for name, value in example.items():
      is_right = _is_messages(value) if name == "messages" else isinstance(value, str)
      if not is_right:
        kind = "a list of {role, content}" if name == "messages" else "text"
        raise errors.InputError(
          f"{where}, example {number}: column {columns[name]!r} must be {kind}, not {str(value)[:40]!r} "
          f"({type(value).__name__})."
        )
    if "messages" in example:
      example["messages"] = [{k: v for k, v in m.items() if v is not None} for m in example["messages"]]
    found.append(example)
  return found


def _is_messages(value: Any) -> bool:
  return (
    isinstance(value, list | tuple)
    and len(value) > 0
    and all(isinstance(m, Mapping) and isinstance(m.get("role"), str) and "content" in m for m in value)
  )


def _corrupt(examples: list[dict[str, Any]], corruption: str, seed: int, where: str) -> list[dict[str, Any]]:
  if corruption == "none":
    return examples
  rng = np.random.default_rng([seed, CORRUPTIONS.index(corruption)])
  if corruption == "redundant":
    few = rng.choice(len(examples), size=math.ceil(len(examples) / _REDUNDANCY), replace=False)
    return [examples[few[i % len(few)]] for i in range(len(examples))]
  if "completion" not in examples[0] or len(examples) < 2:
    raise errors.InputError(f"{where}.corruption = 'shuffle' needs at least 2 examples with prompt and completion.")
  donors = list(_one_cycle(len(examples), rng))
  return [{**e, "completion": examples[d]["completion"]} for e, d in zip(examples, donors, strict=True)]


def _one_cycle(size: int, rng: np.random.Generator) -> Iterator[int]:
  """A permutation in which nothing stays where it is: a random order, each taking from the next in it."""
  order = rng.permutation(size)
  following = np.empty(size, np.int64)
  following[order] = np.roll(order, -1)
  return (int(i) for i in following)
