"""The tasks that a config of a comparison on sequences names: made, of files, or of a benchmark."""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from mftjax import errors, types
from mftjax.data import classification, real_sequences, sequences, sources, task_streams, tokens
from mftjax.loops import continual_methods, sequence
from mftjax.loops import task as task_lib


@dataclasses.dataclass(frozen=True)
class Tasks:
  """The sequences of a comparison, and data for what the model could do before them."""

  stream: sequences.Stream  # the sequences to judge on; its base rows are held out
  validation: jax.Array  # [num_validation, num_tasks] int32, pools of the sequences to tune on
  training: sequences.Stream | None  # the sequences to meta-train on, where a chosen method needs them
  background: types.Batch  # other rows like the base ones


def read(config: ml_collections.ConfigDict, tokenizer: Any) -> Tasks:
  """The tasks of the config.

  Raises:
    InputError: tasks, orders, files or sizes that do not go together.
  """
  return _procedural(config) if config.continual.source == "procedural" else _real(config, tokenizer)


def _procedural(config: ml_collections.ConfigDict) -> Tasks:
  options, length = config.continual, config.length
  if config.model.path:
    raise errors.InputError(
      f"config.model.path = {config.model.path!r} has no meaning for config.continual.source = 'procedural', whose "
      "base model is a small one that is trained first: take 'files' or 'benchmark'."
    )
  held_out = sequences.base_rows(length, options.base_rows, 1)
  background = sequences.base_rows(length, options.background_rows, 2)
  made = [
    sequences.sample(split, options.kinds, config.seed * 1000 + number, options.num_conflicts)
    for split, count in (("unseen", options.num_sequences), ("validation", options.num_validation))
    for number in range(count)
  ]
  both = sequences.build(made, held_out, length, options.train_rows, options.test_rows, config.seed)
  stream = dataclasses.replace(both, order=both.order[: options.num_sequences])
  training = _procedural_training(config) if continual_methods.needs_training(config) else None
  return Tasks(stream, both.order[options.num_sequences :], training, sequence.as_batch(background))


def _procedural_training(config: ml_collections.ConfigDict) -> sequences.Stream:
  """Sequences to meta-train on, each of kinds drawn anew."""
  options, kinds = config.retention, sorted(set(config.continual.kinds))
  made = []
  for number in range(options.num_sequences):
    rng = np.random.default_rng([config.seed, number])
    drawn = rng.choice(kinds, size=options.tasks_per_episode).tolist()
    made.append(sequences.sample("train", drawn, config.seed * 100_000 + number))
  base = sequences.base_rows(config.length, options.base_pool, 3)
  return sequences.build(made, base, config.length, config.continual.train_rows, options.test_rows, config.seed + 1)


def _real(config: ml_collections.ConfigDict, tokenizer: Any) -> Tasks:
  options = config.continual
  judged = _files(options.files) if options.source == "files" else {}
  base_path = _base_path(config, judged)
  others = _training_files(config, judged | {base_path.resolve(): str(base_path)})
  if options.source == "files":
    tasks = _from_files(config, tokenizer, options.files, options.templates, "continual")
    where = "config.continual.orders"
    orders = real_sequences.places(options.orders, tasks.names, where) if options.orders else None
    orders = orders or real_sequences.drawn([range(len(tasks.names))], options.num_sequences, config.seed)
  else:
    tasks, orders = _benchmark(config, tokenizer)
  validation = real_sequences.drawn(orders, options.num_validation, config.seed + 1, orders)
  base, background, outer_base = _base_rows(config, tokenizer, base_path)
  sizes = options.train_rows, options.test_rows
  stream, tuned_on = real_sequences.build(tasks, orders, validation, base, *sizes)
  training = None
  if continual_methods.needs_training(config):
    known = _from_files(config, tokenizer, others, config.retention.templates, "retention")
    training = real_sequences.sampled(
      known,
      config.retention.num_sequences,
      config.retention.tasks_per_episode,
      config.seed + 2,
      outer_base,
      options.train_rows,
      config.retention.test_rows,
    )
  return Tasks(stream, tuned_on, training, sequence.as_batch(background))


def _from_files(
  config: ml_collections.ConfigDict, tokenizer: Any, files: Sequence[str], templates: Any, section: str
) -> task_streams.TaskStream:
  """The tasks of `config.SECTION.files`."""
  try:
    found = task_streams.from_files(
      files, tokenizer, config.length, config.seed, config.truncate_side, dict(map(tuple, templates))
    )
  except errors.InputError as error:
    raise errors.InputError(f"config.{section}.files: {error}") from error
  _warn(config, found, f"config.{section}.files")
  return found


def _benchmark(
  config: ml_collections.ConfigDict, tokenizer: Any
) -> tuple[task_streams.TaskStream, list[tuple[int, ...]]]:
  """The tasks of `config.continual.orders`, and those orders as places among them."""
  options, where = config.continual, "config.continual.orders"
  names = tuple(options.orders)
  if not names:
    raise errors.InputError(f"{where} is empty: name at least one of {', '.join(classification.ORDERS)}.")
  for name in names:
    if name not in classification.ORDERS:
      raise errors.unknown_name(f"order in {where}", str(name), classification.ORDERS)
  orders = [classification.ORDERS[name] for name in names]
  for name, order in zip(names, orders, strict=True):
    if set(order) != set(orders[0]):
      raise errors.InputError(f"{where}: {names[0]!r} and {name!r} are not orders of the same tasks.")
  tasks = task_streams.from_benchmark(
    names[0],
    tokenizer,
    config.length,
    config.seed,
    options.benchmark_folder,
    options.train_examples,
    options.test_examples,
    options.test_examples,
    config.truncate_side,
  )
  _warn(config, tasks, where)
  return tasks, real_sequences.places(orders, tasks.names, where)


def _warn(config: ml_collections.ConfigDict, tasks: task_streams.TaskStream, where: str) -> None:
  for name, rows in zip(tasks.names, tasks.train, strict=True):
    task_lib.warn_of_cut(config, rows, f"{where}, {name}")


def _files(paths: Iterable[str]) -> dict[pathlib.Path, str]:
  """File -> as it was given."""
  return {pathlib.Path(path).expanduser().resolve(): path for path in paths}


def _base_path(config: ml_collections.ConfigDict, judged: dict[pathlib.Path, str]) -> pathlib.Path:
  path = pathlib.Path(config.continual.base_path).expanduser()
  if not config.continual.base_path:
    raise errors.InputError(
      "config.continual.base_path is empty: name a .jsonl file of what the model can do already, which no task "
      "trains on."
    )
  if path.resolve() in judged:
    raise errors.InputError(f"config.continual.base_path: {path} is a task in config.continual.files too.")
  return path


def _training_files(config: ml_collections.ConfigDict, judged: dict[pathlib.Path, str]) -> tuple[str, ...]:
  """`config.retention.files`, none of which the judged sequences have."""
  options, folder = config.retention, config.continual.benchmark_folder
  for path, given in _files(options.files).items():
    is_benchmark = folder and path.is_relative_to(pathlib.Path(folder).expanduser().resolve())
    if path in judged or (config.continual.source == "benchmark" and is_benchmark):
      raise errors.InputError(
        f"config.retention.files: {given} is in config.continual too; meta-training must not see what the "
        "sequences are judged on."
      )
  if continual_methods.needs_training(config) and len(options.files) < options.tasks_per_episode:
    raise errors.InputError(
      f"config.retention.files has {len(options.files)} tasks, fewer than "
      f"config.retention.tasks_per_episode = {options.tasks_per_episode}."
    )
  return tuple(options.files)


def _base_rows(config: ml_collections.ConfigDict, tokenizer: Any, path: pathlib.Path) -> list[dict[str, jax.Array]]:
  """Rows held out, others for the background, and others for the outer loss if there is one; in turns from the file."""
  where, options = "config.continual.base_path", config.continual
  pool = config.retention.base_pool if continual_methods.needs_training(config) else 0
  counts = [options.base_rows, options.background_rows, pool]
  rows: tokens.Rows = sources.load_rows(
    {"path": str(path)}, tokenizer, config.length, where=where, truncate_side=config.truncate_side
  )
  total = sum(counts)
  if len(rows.tokens) < total:
    raise errors.InputError(
      f"{where}: {path} makes {len(rows.tokens)} rows of {config.length} tokens, fewer than continual.base_rows + "
      f"continual.background_rows + retention.base_pool = {' + '.join(map(str, counts))}."
    )
  spread = np.arange(total) * len(rows.tokens) // total
  part = np.repeat(np.arange(len(counts)), counts)
  turn = np.argsort(np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts]), kind="stable")
  return [real_sequences.arrays(rows.take(spread[part[turn] == number])) for number in range(len(counts))]
