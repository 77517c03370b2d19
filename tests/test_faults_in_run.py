"""What goes wrong inside a run, done to runs of one process: each goes on to the numbers of the undisturbed one."""

import dataclasses
import itertools
import pathlib
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config

from mftjax import config as config_lib
from mftjax import errors, recipe, run_folder, stopping, tracking
from mftjax.loops import finetune, meta_train, predict
from mftjax.loops import task as task_lib
from tests.commands import numbers
from tests.interrupted import cut_off

AT = 3  # the outer step after which something happens


class Runs:
  """Runs of one config, whose outer step is compiled once; `whole` is the workdir of the one that nobody disturbed."""

  def __init__(self, folder, patch):
    self.config = tiny_config.get_config()
    self.config.meta.method = "first_order"  # compiles sooner
    self.config.checkpoint_every, self.config.meta.outer_steps = 1, 6
    path = folder / "data.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}", "completion": "{i + 1}"}}\n' for i in range(9)))
    self.config.sources.copying = {"path": str(path)}
    config_lib.check(self.config)
    self.network, _ = task_lib.build_network(self.config)
    self.build_outer_step = meta_train.build_outer_step
    self.outer_step = self.build_outer_step(self.config, self.network)
    patch.setattr(meta_train, "build_outer_step", lambda *_: self.outer_step)
    # Arrays that a checkpoint has put onto a device would have it compiled anew.
    unpure, to_numpy = task_lib.unpure, lambda arrays: jax.tree.map(np.asarray, arrays)
    patch.setattr(task_lib, "unpure", lambda like, arrays: unpure(like, to_numpy(arrays)))
    self.whole = folder / "whole"
    self.start(self.whole)

  def start(self, workdir):
    meta_train.meta_train(self.config, workdir)

  def cut_off(self, workdir, then=lambda: None):
    """Starts a run, has something done after some steps, and ends it a step later."""
    with cut_off(AT + 1, AT, then):
      self.start(workdir)

  def is_as_undisturbed(self, workdir):
    return numbers(workdir) == numbers(self.whole)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    yield Runs(tmp_path_factory.mktemp("runs"), patch)


@jax.custom_vjp
def spoil(array):
  """The same, with a gradient that is not a number."""
  return array


spoil.defvjp(lambda array: (array, None), lambda _, bar: (bar * jnp.nan,))


def spoilt(problem, place):
  """The problem with numbers that are not finite in one place."""
  inner_loss, outer_loss = problem.inner_loss, problem.outer_loss

  def outer_loss_with(change):
    def spoilt_loss(params, meta_params, *rest):
      loss, aux = outer_loss(params, meta_params, *rest)
      return change(loss, meta_params), aux

    return {"outer_loss": spoilt_loss}

  return dataclasses.replace(
    problem,
    **{
      "inner loss": {"inner_loss": lambda *args: inner_loss(*args) * jnp.nan},
      "inner gradient": {"inner_loss": lambda *args: spoil(inner_loss(*args))},
      "outer loss": outer_loss_with(lambda loss, _: loss + jnp.inf),
      "meta-gradient": outer_loss_with(lambda loss, meta: loss + 0 * spoil(meta["mixture_logits"])[0]),
    }[place],
  )


@pytest.mark.parametrize("place", ["inner loss", "inner gradient", "outer loss", "meta-gradient"])
def test_what_is_not_finite_is_skipped_and_changes_nothing(runs, tmp_path, monkeypatch, caplog, place):
  build, calls = meta_train.build_problem, itertools.count(1)
  monkeypatch.setattr(meta_train, "build_problem", lambda *args: spoilt(build(*args), place))
  spoilt_step = runs.build_outer_step(runs.config, runs.network)
  step = lambda *args: (spoilt_step if next(calls) == AT + 1 else runs.outer_step)(*args)
  monkeypatch.setattr(meta_train, "build_outer_step", lambda *_: step)
  runs.start(tmp_path / "run")
  lines = numbers(tmp_path / "run")
  assert [line["skipped"] for line in lines] == [0] * AT + [1] + [0] * (6 - AT - 1)
  assert lines[:AT] == numbers(runs.whole)[:AT]
  learned = [(line["hyperparameters"], line["mixture"]) for line in lines]
  assert learned[AT] == learned[AT - 1] != learned[AT + 1]
  assert f"Outer step {AT} is not finite and was skipped" in caplog.text


@pytest.mark.parametrize("seconds", [-3e7, 4e5])
def test_a_clock_that_jumps_moves_no_number(runs, tmp_path, monkeypatch, seconds):
  wall, steady = time.time, time.monotonic

  def jump():
    monkeypatch.setattr(time, "time", lambda: wall() + seconds)
    monkeypatch.setattr(time, "monotonic", lambda: steady() + abs(seconds))  # by its definition it never goes back

  runs.cut_off(tmp_path / "run", jump)
  monkeypatch.undo()
  runs.start(tmp_path / "run")
  assert runs.is_as_undisturbed(tmp_path / "run")
  clock = [line["time_seconds"] for line in tracking.read(tmp_path / "run" / "metrics.jsonl")]
  assert clock == sorted(clock) and clock[0] >= 0


def move_checkpoints(workdir):
  while not (workdir / "checkpoints" / str(AT - 1)).is_dir():
    time.sleep(0.01)
  (workdir / "checkpoints").rename(workdir / "elsewhere")


def test_checkpoints_that_vanish_in_mid_run_are_written_anew(runs, tmp_path):
  runs.cut_off(tmp_path / "run", lambda: move_checkpoints(tmp_path / "run"))
  assert (tmp_path / "run" / "checkpoints" / str(AT)).is_dir()
  runs.start(tmp_path / "run")
  assert runs.is_as_undisturbed(tmp_path / "run")


def test_checkpoints_that_cannot_be_written_are_said_to_be_and_the_run_starts_again(runs, tmp_path):
  place = tmp_path / "run" / "checkpoints"
  with pytest.raises(errors.MftError, match=r"run/checkpoints: a checkpoint cannot be written: \S"):
    runs.cut_off(tmp_path / "run", lambda: (move_checkpoints(tmp_path / "run"), place.write_text("")))
  place.unlink()
  runs.start(tmp_path / "run")
  assert runs.is_as_undisturbed(tmp_path / "run")


def test_a_workdir_that_is_moved_goes_on_where_it_is(runs, tmp_path):
  runs.cut_off(tmp_path / "run")
  run_folder.release()
  (tmp_path / "run").rename(tmp_path / "moved")
  runs.start(tmp_path / "moved")
  assert runs.is_as_undisturbed(tmp_path / "moved") and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "held_by.json", ".lock", "config.json"])
def test_what_a_run_needs_not_may_be_deleted_between_two_parts(runs, tmp_path, name):
  runs.cut_off(tmp_path / "run")
  run_folder.release()
  path = tmp_path / "run" / name
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  runs.start(tmp_path / "run")
  assert runs.is_as_undisturbed(tmp_path / "run") and path.exists()


def test_metrics_that_are_deleted_begin_anew_and_the_run_goes_on(runs, tmp_path):
  runs.cut_off(tmp_path / "run")
  (tmp_path / "run" / "metrics.jsonl").unlink()
  runs.start(tmp_path / "run")
  assert numbers(tmp_path / "run") == numbers(runs.whole)[AT:] != []


def test_a_recipe_without_metrics_lacks_the_losses(runs, tmp_path, caplog):
  shutil.copytree(runs.whole, tmp_path / "run")
  (tmp_path / "run" / "metrics.jsonl").unlink()
  found = recipe.load(predict.predict(runs.config, tmp_path / "run"))
  assert found["predicted"] == {"outer_steps": 6} and "no line of outer step 6" in caplog.text
  whole = recipe.load(predict.predict(runs.config, runs.whole))
  assert whole["predicted"].pop("ability_loss") == numbers(runs.whole)[-1]["ability_loss"]
  assert found == whole


def test_data_that_changed_between_two_parts_are_refused(runs, tmp_path):
  path = pathlib.Path(runs.config.sources.copying.path)
  runs.cut_off(tmp_path / "run")
  before = path.read_text()
  path.write_text(before.replace("9", "8"))
  try:
    with pytest.raises(errors.InputError, match=r"checksums = .*data changed\. Put back what was there"):
      runs.start(tmp_path / "run")
  finally:
    path.write_text(before)
  runs.start(tmp_path / "run")
  assert runs.is_as_undisturbed(tmp_path / "run")


def test_a_run_that_still_writes_is_left_alone(runs, tmp_path, monkeypatch):
  workdir = tmp_path / "run"
  runs.cut_off(workdir)
  half_done = workdir / "checkpoints" / f"{AT + 2}.orbax-checkpoint-tmp"
  half_done.mkdir()
  monkeypatch.setattr(run_folder, "_held", {})  # as another process has it
  for command in (meta_train.meta_train, predict.predict, lambda *given: finetune.finetune(*given, "default")):
    with pytest.raises(errors.InputError, match="in use by process"):
      command(runs.config, workdir)
  assert half_done.exists()


def test_a_terminal_that_closes_stops_the_run_when_it_has_saved(runs, tmp_path, listening, monkeypatch):
  with pytest.raises(stopping.Stopped, match=f"after step {AT}"):
    runs.cut_off(tmp_path / "run", lambda: signal.raise_signal(signal.SIGHUP))
  monkeypatch.setattr(stopping, "_is_asked", False)
  runs.start(tmp_path / "run")
  assert runs.is_as_undisturbed(tmp_path / "run")


def test_parameters_that_the_last_step_spoils_are_not_exported(runs, tmp_path):
  spoils = predict.default_recipe(runs.config)
  spoils["hyperparameters"] |= {"num_steps": 1, "learning_rate": 1e38, "weight_decay": 1e38}
  recipe.save(spoils, tmp_path / "spoils.json")
  with pytest.raises(errors.MftError, match="last fine-tuning step, 0, are not finite"):
    finetune.finetune(runs.config, tmp_path / "run", str(tmp_path / "spoils.json"))
  assert not (tmp_path / "run" / "finetune" / "spoils" / "model").exists()
