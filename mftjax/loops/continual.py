"""Methods against forgetting, compared on sequences of tasks at equal tokens and with as many trials for each."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from mftjax import engine, files, metrics, models, run_folder
from mftjax.loops import (
  answering,
  continual_methods,
  continual_runs,
  continual_setting,
  continual_tuning,
  episode,
  learnt_memory,
  retention,
  sequence,
)
from mftjax.loops import task as task_lib
from mftjax.loops.continual_runs import Entry, Runs
from mftjax.loops.continual_setting import Setting


def compare(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Tunes and runs every method; writes and returns `continual.json`. What is done is not run again.

  Raises:
    InputError: an unknown method or engine, or a config that does not go together, before anything is written.
  """
  names = continual_methods.chosen(config)
  engine.check(config)
  run_folder.check(config, workdir)
  paths = {name: workdir / "methods" / f"{files.named(name)}.json" for name in names}
  finished = workdir / "continual.json"
  if finished.exists() and all(path.exists() for path in paths.values()):
    return json.loads(finished.read_text())
  setting = continual_setting.build(config)
  run_folder.claim(config, workdir)
  memories, meta_training = _memories(setting, names, [name for name in names if not paths[name].exists()], workdir)
  engine.run(config, _method, paths, (setting, memories), _build, config, *_portable(setting, memories))
  rows, matrices, view = [], {}, None
  for name, path in paths.items():
    kept = json.loads(path.read_text())
    rows.append(kept["row"])
    matrices[name] = kept["sequences"]
    view = kept["memory"] or view
  result = {
    "config": config.task,
    "num_sequences": len(setting.stream.order),
    "num_tasks": setting.stream.num_tasks,
    "task_names": [setting.stream.names[pool] for pool in np.asarray(setting.stream.order[0])],
    "num_trials": config.continual.num_trials,
    "tokens_per_task": setting.run.num_steps * config.batch_size * config.length,
    "meta_training": meta_training,
    "rows": rows,
    "pairs": _pairs(rows, matrices),
    "memory": view,
  }
  files.write_json(finished, result)
  return result


def _memories(
  setting: Setting, names: Sequence[str], missing: Sequence[str], workdir: pathlib.Path
) -> tuple[dict[str, Any], Any]:
  """What the methods that start from a trained memory start from, and what meta-training took.

  Args:
    missing: those of the names that are still to be run.
  """
  config, options = setting.config, setting.config.retention
  found: dict[str, Any] = {}
  about = None
  if setting.training is None:
    return found, about
  setup = setting.setup("memory", episode.num_open(config))
  training = answering.prepared(config, setup, setting.training)
  if any("meta-learned" in name for name in names):
    start = time.monotonic()
    meta_params = retention.meta_train(config, setup, training, workdir)
    values = {name: float(x) for name, x in episode.hyperparameters(config, meta_params).items()}
    found |= {"meta": meta_params["memory"], "values": values}
    episodes = options.outer_steps * options.episodes
    about = {"outer_steps": options.outer_steps, "episodes": episodes, "seconds": time.monotonic() - start}
  if "memory, no outer loop" in missing:  # it keeps no checkpoint
    setup = setting.setup("memory")
    found["joint"] = retention.train_without(config, setup, training, options.joint_learning_rate)
  return found, about


def _portable(setting: Setting, memories: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
  """What other processes cannot read: params of a base model that was trained here, and memories, as arrays by name."""
  arrays = lambda tree: jax.tree.map(np.asarray, task_lib.pure(tree))
  base = arrays(setting.base[1]) if setting.config.continual.source == "procedural" else None
  return base, {name: found if name == "values" else arrays(found) for name, found in memories.items()}


def _build(
  config: ml_collections.ConfigDict, base: Mapping[str, Any] | None, memories: Mapping[str, Any]
) -> tuple[Setting, dict[str, Any]]:
  """The setting and the memories as `compare` has them, in another process."""
  setting = continual_setting.build(config, base)
  own = lambda: retention.init_meta_params(config, setting.setup("memory"))["memory"]
  return setting, {
    name: found if name == "values" else task_lib.unpure(own(), found) for name, found in memories.items()
  }


def _method(shared: tuple[Setting, dict[str, Any]], name: str, path: pathlib.Path) -> None:
  """Tunes and runs a method, and writes its row."""
  setting, memories = shared
  number = continual_methods.chosen(setting.config).index(name)
  found = _row(setting, continual_runs.entry(setting, name, memories), number, path.with_suffix(""))
  files.write_json(path, found)
  logging.warning("%s: %s", name, _summary(found["row"]))


def _row(setting: Setting, found: Entry, number: int, folder: pathlib.Path) -> dict[str, Any]:
  """A method's row of the table, the figures of each sequence, and what its memory holds."""
  config, stream = setting.config, setting.stream
  start = time.monotonic()
  kept = folder / "trials.json"
  if not kept.exists():
    files.write_json(kept, continual_tuning.tuned(setting, found, config.seed + number))
  trials = json.loads(kept.read_text())
  values = trials[0]["values"]
  whole = {**found.fixed, **values}
  count = len(stream.order)
  keys = jax.vmap(jax.random.key)(jnp.arange(count))
  runs = continual_runs.in_groups(setting, found, [whole] * count, stream.order, keys, folder)
  figures = _figures(found, runs)
  interval = lambda x: [float(np.mean(x)), *metrics.bootstrap_interval(x)] if np.isfinite(x).all() else None
  summed = lambda part: {name: None if x is None else interval(x) for name, x in part.items()}
  is_joint = found.method.is_joint
  mean = lambda name: None if is_joint else _listed(runs.matrix(name).mean(axis=0))
  base_loss = np.stack([np.asarray(one.base_loss) for one in (runs.before, *runs.after)])
  row = {
    "name": found.name,
    "group": continual_methods.GROUPS.get(found.name) or ("replay" if found.method.stored_fraction else "replay-free"),
    "trained_parameters": sum(x.size for x in jax.tree.leaves(found.setup.params)),
    "stored_rows": sequence.stored_rows(found.method.stored_fraction, config.continual.train_rows)
    * (stream.num_tasks - 1),
    "trials": len(trials),
    "tried": trials,
    "values": values,
    "accuracy": summed(figures["accuracy"]),
    "loss": summed(figures["loss"]),
    "base_loss_change": interval(base_loss[-1] / base_loss[0] - 1),
    "matrix": {"accuracy": mean("accuracy"), "loss": mean("loss")},
    "base_loss": None if is_joint else _listed(base_loss.mean(axis=1)),
    "seconds": time.monotonic() - start,
  }
  view, has_memory = None, found.method.trained == "memory"
  if has_memory or config.continual.keep_models:
    model = continual_runs.first_model(found, runs, whole)
    if has_memory:
      view = learnt_memory.view(model, runs.written, stream, setting.tokenizer)
    if config.continual.keep_models:
      models.save(model, setting.tokenizer, folder / "model")
  sequences_of = {name: None if x is None else x.tolist() for name, x in figures["accuracy"].items()}
  return {"row": row, "sequences": sequences_of, "memory": view}


def _listed(values: np.ndarray) -> list[Any]:
  """Nested lists, with null for what is not finite: JSON has no word for that."""
  listed = values.astype(object)
  listed[~np.isfinite(values)] = None
  return listed.tolist()


def _figures(found: Entry, runs: Runs) -> dict[str, dict[str, np.ndarray | None]]:
  """The numbers of `metrics.continual` of each run, `[num_runs]` each; joint training has an average only."""
  sums = {"accuracy": metrics.continual, "loss": metrics.continual_loss}
  result: dict[str, dict[str, np.ndarray | None]] = {}
  for part, fn in sums.items():
    before, matrix = np.asarray(getattr(runs.before, part)), runs.matrix(part)
    if found.method.is_joint:
      kind = metrics.Continual if part == "accuracy" else metrics.ContinualLoss
      result[part] = {field.name: None for field in dataclasses.fields(kind)}
      result[part][f"average_{part}"] = matrix[:, -1].mean(axis=1)
      continue
    if not np.isfinite(matrix).all():
      matrix = np.nan_to_num(matrix, nan=0.0 if part == "accuracy" else 100.0, posinf=100.0)
    each = [fn(one, start) for one, start in zip(matrix, before, strict=True)]
    result[part] = {name: np.asarray([one[name] for one in each]) for name in each[0]}
  return result


def _pairs(rows: Sequence[Mapping[str, Any]], figures: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Differences from the meta-learned memory on the same sequences, with their intervals."""
  ours = "memory, meta-learned"
  if ours not in figures:
    return []
  free = [row for row in rows if row["group"] == "replay-free"]
  best = max(free, key=lambda row: row["accuracy"]["average_accuracy"][0])["name"] if free else None
  found: list[dict[str, Any]] = []
  for other in dict.fromkeys(("memory", "memory, no outer loop", "sequential LoRA", best, "joint")):
    if other is None or other not in figures:
      continue
    pair: dict[str, Any] = {"name": f"{ours} − {other}"}
    for field in ("average_accuracy", "backward_transfer"):
      pair[field] = None
      if figures[other][field] is not None:
        gap = np.asarray(figures[ours][field]) - np.asarray(figures[other][field])
        pair[field] = [float(gap.mean()), *metrics.bootstrap_interval(gap)]
    found.append(pair)
  return found


def _summary(row: Mapping[str, Any]) -> str:
  named = {"accuracy": "average_accuracy", "backward": "backward_transfer", "plasticity": "plasticity"}
  parts = [f"{short} {row['accuracy'][name][0]:.3f}" for short, name in named.items() if row["accuracy"][name]]
  change = row["base_loss_change"]
  return ", ".join([*parts, f"base loss {100 * change[0]:+.1f} %" if change else "base loss not finite"])
