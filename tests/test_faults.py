"""What can go wrong around a run, done to it: each is one message, and what was saved goes on to the same numbers."""

import gc
import json
import os
import signal
import socket
import time

import pytest

from configs import quickstart
from mftjax import errors, run_folder, stopping
from tests.commands import numbers, run, started

RARELY = "--config.checkpoint_every=1000"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("faults") / "whole"
  done = run("meta_train", workdir, RARELY)
  assert done.returncode == 0, done.stderr
  return workdir


@pytest.fixture
def config():
  return quickstart.get_config()


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_numbers(whole, tmp_path, sent):
  process = started("meta_train", tmp_path / "run", RARELY, lines=3)
  process.send_signal(sent)
  _, said = process.communicate()
  assert process.returncode == 0 and "Give the same command to go on" in said and "Traceback" not in said
  before = len(numbers(tmp_path / "run"))
  assert 3 <= before < 8 and f"after step {before}" in said
  again = run("meta_train", tmp_path / "run", RARELY)
  assert again.returncode == 0 and f"from outer step {before}" in again.stderr
  assert numbers(tmp_path / "run") == numbers(whole)


@pytest.mark.slow
def test_a_command_that_has_nothing_to_save_stops_at_once(tmp_path):
  process = started("meta_train", tmp_path / "run", lines=0)
  while not (tmp_path / "run" / "held_by.json").exists() and process.poll() is None:
    pass
  process.send_signal(signal.SIGTERM)
  _, said = process.communicate()
  assert process.returncode == 0 and "Traceback" not in said


def test_asked_twice_nothing_is_waited_for(monkeypatch):
  monkeypatch.setattr(stopping, "_is_asked", False)
  with pytest.raises(stopping.Stopped):
    stopping._ask(signal.SIGTERM, None)
  with pytest.raises(stopping.Stopped), stopping.saving():  # and when saving ends
    stopping._ask(signal.SIGTERM, None)
    assert stopping.is_asked()
    with pytest.raises(stopping.Stopped):
      stopping._ask(signal.SIGTERM, None)


def test_asked_where_nothing_can_be_raised_it_is_raised_later(listening):
  def callback(phase, info):
    if phase == "start" and not asked:
      asked.append(phase)
      signal.raise_signal(signal.SIGTERM)

  asked = []
  gc.callbacks.append(callback)
  with pytest.raises(stopping.Stopped):
    gc.collect()
    time.sleep(5)
  gc.callbacks.remove(callback)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_asked_in_a_finaliser_the_next_part_that_saves_does_not_begin(listening):
  class Closing:
    def __del__(self):
      signal.raise_signal(signal.SIGTERM)

  Closing()
  with pytest.raises(stopping.Stopped), stopping.saving():
    pytest.fail("it began")


def test_who_saves_nothing_more_stops_when_saving_ends(monkeypatch):
  monkeypatch.setattr(stopping, "_is_asked", False)
  with pytest.raises(stopping.Stopped), stopping.saving():
    with stopping.saving():
      stopping._ask(signal.SIGTERM, None)
    assert stopping.is_asked()
  monkeypatch.setattr(stopping, "_is_asked", False)
  with pytest.raises(KeyError), stopping.saving():  # an error is not hidden
    raise KeyError
  assert stopping._open == 0


@pytest.mark.slow
def test_a_second_run_on_a_workdir_is_told_who_holds_it(tmp_path, config):
  workdir = tmp_path / "run"
  done = run("meta_train", workdir, "--config.meta.outer_steps=1")
  assert done.returncode == 0, done.stderr
  run_folder._hold(workdir)
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
  done = run("meta_train", workdir, "--config.meta.outer_steps=1")
  assert done.returncode == 2 and f"in use by process {os.getpid()} on {socket.gethostname()}" in done.stderr
  assert "Traceback" not in done.stderr
  assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_who_has_the_lock_and_has_not_said_so_is_another_process(tmp_path, config, monkeypatch):
  run_folder.claim(config, tmp_path)
  run_folder.claim(config, tmp_path)  # its own again
  (tmp_path / "held_by.json").write_text("{")
  monkeypatch.setattr(run_folder, "_held", {})
  with pytest.raises(errors.InputError, match="in use by another process"):
    run_folder.claim(config, tmp_path)


def test_a_workdir_that_was_let_go_is_anybodys(tmp_path, config):
  run_folder.claim(config, tmp_path)
  run_folder.release()
  run_folder.claim(config, tmp_path)
  assert json.loads((tmp_path / "held_by.json").read_text())["process"] == os.getpid()


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"seed": 0'])
def test_a_config_that_is_damaged_is_said_to_be(tmp_path, config, text):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(errors.InputError, match=r"config.json is damaged.*Delete it"):
    run_folder.claim(config, tmp_path)


def test_a_workdir_that_cannot_be_written_is_said_to_be(tmp_path, config):
  (tmp_path / "file").write_text("")
  for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
    with pytest.raises(errors.InputError, match=r"cannot be written: .*another --workdir"):
      run_folder.claim(config, workdir)


@pytest.mark.slow
def test_a_full_disk_is_said_to_be_and_what_was_saved_goes_on(whole, tmp_path):
  no_room = ("bash", "-c", 'ulimit -f 20 && exec "$@"', "bash")  # KiB that a file may have
  no_cache = "--config.compilation_cache="
  flags = ("--config.model.hidden_size=32", "--config.checkpoint_every=2")
  done = run("meta_train", tmp_path / "run", *flags, no_cache, prefix=no_room)
  # The threads that write may add lines of their own, before ours.
  assert done.returncode == 1 and "Make room" in done.stderr.splitlines()[-1], done.stderr
  again = run("meta_train", tmp_path / "run", *flags)
  assert again.returncode == 0, again.stderr
  assert run("meta_train", tmp_path / "undisturbed", *flags).returncode == 0
  assert numbers(tmp_path / "run") == numbers(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_fine_tuning_loss_that_is_not_finite_is_one_message(tmp_path):
  flags = [f"--config.hyperparameters.learning_rate.{name}" for name in ("high=1e38", "value=1e37")]
  done = run("finetune", tmp_path / "run", "--recipe=default", *flags)
  assert done.returncode == 1 and "loss of fine-tuning step" in done.stderr and "Traceback" not in done.stderr
  assert all(line["loss"] is not None for line in numbers(tmp_path / "run"))
