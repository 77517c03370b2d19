"""Other programs that keep a run's metrics, where a config asks for them: Weights & Biases, Trackio."""

import importlib
import importlib.util
import json
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

import ml_collections

from mftjax import files
from mftjax.errors import InputError

NAMES = ("wandb", "trackio")  # packages of one interface: init, log, finish
_IDS = "trackers.json"

_config = ml_collections.ConfigDict({"trackers": (), "project": ""})


def start(config: ml_collections.ConfigDict) -> None:
  """Has the phases that follow be kept by `config.trackers` too.

  Raises:
    InputError: one of them is not installed.
  """
  global _config
  for name in config.trackers:
    if importlib.util.find_spec(name) is None:
      raise InputError(f"config.trackers names {name}, which is not installed: pip install 'mftjax[{name}]'.")
  _config = config


def open_all(workdir: pathlib.Path, phase: str) -> "list[Tracker]":
  """A run of each tracker for a phase, `WORKDIR's name/PHASE`; the same one when the phase goes on."""
  return [Tracker(name, workdir, phase) for name in _config.trackers]


class Tracker:
  """A phase, as a run of a package with the interface of Weights & Biases."""

  def __init__(self, name: str, workdir: pathlib.Path, phase: str):
    package = importlib.import_module(name)
    about = {"project": _config.project, "name": f"{workdir.name}/{phase}", "resume": "allow"}
    config = json.loads(_config.to_json_best_effort())
    if name == "wandb":  # the name of a run is its key in Trackio
      about |= {"id": _id(workdir, phase), "dir": str(workdir)}
    self._package, self._run = package, package.init(config=config, **about)

  def log(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log(dict(values), step=step)

  def finish(self) -> None:
    self._package.finish()


def _id(workdir: pathlib.Path, phase: str) -> Any:
  """The phase's key, drawn when it starts and kept in the workdir."""
  path = workdir / _IDS
  found = json.loads(path.read_text()) if path.exists() else {}
  if phase not in found:
    found[phase] = uuid.uuid4().hex
    files.write_json(path, found)
  return found[phase]
