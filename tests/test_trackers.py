"""A run's metrics go to other programs too, to one run a phase, which goes on when the phase does."""

import sys
import types

import ml_collections
import pytest

from mftjax import trackers, tracking
from mftjax.errors import InputError


class Package(types.ModuleType):
  """Stands for wandb or trackio: keeps what it is told."""

  def __init__(self, name):
    super().__init__(name)
    self.__spec__ = types.SimpleNamespace()  # importlib asks for it
    self.opened, self.logged, self.finished = [], [], 0

  def init(self, **about):
    self.opened.append(about)
    return types.SimpleNamespace(log=lambda values, step: self.logged.append((step, values)))

  def finish(self):
    self.finished += 1


@pytest.fixture(params=trackers.NAMES)
def package(request, monkeypatch):
  found = Package(request.param)
  monkeypatch.setitem(sys.modules, request.param, found)
  monkeypatch.setattr(trackers, "_config", None)
  trackers.start(ml_collections.ConfigDict({"trackers": (request.param,), "project": "mine", "seed": 7}))
  return found


def _run(workdir, name, start, stop):
  with tracking.Tracker(workdir, stop, title="t", name=name, start_step=start, quiet=True) as tracker:
    for step in tracker.steps():
      tracker.log(step + 1, {"loss": 0.5, "mixture": {"a": 0.25, "b": None}})


def test_a_phase_is_a_run_and_goes_on_as_the_same(package, tmp_path):
  _run(tmp_path / "run", "meta_train", 0, 2)
  _run(tmp_path / "run", "meta_train", 2, 3)
  _run(tmp_path / "run", "finetune/learnt", 0, 1)
  assert [step for step, _ in package.logged] == [1, 2, 3, 1] and package.finished == 3
  values = package.logged[0][1]
  assert values["meta_train/loss"] == 0.5 and values["meta_train/mixture/a"] == 0.25
  assert "meta_train/mixture/b" not in values and values["meta_train/machine/step_seconds"] > 0
  first, again, other = package.opened
  assert first == again and first["project"] == "mine" and first["config"]["seed"] == 7
  assert (first["name"], other["name"]) == ("run/meta_train", "run/finetune/learnt")
  if package.__name__ == "wandb":
    assert first["id"] != other["id"]


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
  monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"wandb, which is not installed: pip install 'mftjax\[wandb\]'"):
    trackers.start(ml_collections.ConfigDict({"trackers": ("wandb",), "project": "mine"}))
