"""Independent jobs, through Ray on a cluster that was there before: results, workers that die, errors, stopping."""

import importlib.util
import json
import os
import pathlib
import secrets
import signal
import socket
import subprocess
import sys
import time

import pytest
from pages import ROOT

from configs import compare as compare_config
from configs import continual as continual_config
from mftjax import engine, errors
from mftjax.loops import compare, continual
from tests import engine_jobs, tiny_config

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray")


@pytest.fixture(scope="module")
def address():
  """Of a cluster on this machine, which only who knows its token may use."""
  patch = pytest.MonkeyPatch()  # before Ray is imported, which reads this once
  patch.setenv("RAY_AUTH_MODE", "token")
  patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  words = ["--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2", "--num-gpus=0"]
  words += ["--include-dashboard=false", "--disable-usage-stats"]
  start = "import sys; from ray.scripts.scripts import main; sys.exit(main())"
  process = subprocess.Popen(
    [sys.executable, "-c", start, "start", *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  deadline = time.monotonic() + 120
  while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < deadline:
    time.sleep(0.1)
  yield f"127.0.0.1:{port}"
  process.terminate()
  process.wait()
  patch.undo()


def make_config(kind, address="", workers=2):
  config = tiny_config.get_config()
  config.engine, config.ray.address, config.ray.workers = kind, address, workers
  return config


def run(config, job, folder, *names):
  paths = {name: folder / f"{name}.json" for name in names}
  engine.run(config, job, paths, 3, engine_jobs.build, folder, 3)
  return [json.loads(path.read_text()) for path in paths.values()]


def lines(path):
  return path.read_text().splitlines()


@pytest.fixture
def by_ray(address, tmp_path):
  return lambda job, *names, workers=2: run(make_config("ray", address, workers), job, tmp_path, *names)


def figures(found):
  return [{name: value for name, value in one.items() if name != "process"} for one in found]


@pytest.mark.slow
def test_jobs_are_done_elsewhere_with_the_same_results_and_not_again(by_ray, tmp_path):
  names = [f"job {number}" for number in range(6)]
  (tmp_path / "here").mkdir()
  here = run(make_config("local"), engine_jobs.double, tmp_path / "here", *names)
  assert {one["process"] for one in here} == {os.getpid()} and not (tmp_path / "here" / "build.begun").exists()
  found = by_ray(engine_jobs.double, *names)
  assert figures(found) == figures(here) and os.getpid() not in {one["process"] for one in found}
  # What jobs share is made once in each process.
  assert sorted(lines(tmp_path / "build.begun")) == sorted({str(one["process"]) for one in found})
  (tmp_path / "job 2.json").unlink()
  again = by_ray(engine_jobs.double, *names)
  assert figures(again) == figures(here)
  assert [len(lines(tmp_path / f"{name}.begun")) for name in names] == [1, 1, 2, 1, 1, 1]


@pytest.mark.slow
def test_as_many_jobs_run_at_once_as_are_asked_for(by_ray, tmp_path):
  assert by_ray(engine_jobs.meet, "a", "b") == ["a", "b"]
  assert by_ray(engine_jobs.alone, "c", "d", "e", workers=1) == ["c", "d", "e"]


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced_and_its_job_counts_once(by_ray, tmp_path):
  found = by_ray(engine_jobs.killed_once, "first", "killed", "last")
  assert figures(found) == [{"name": name, "value": 6} for name in ("first", "killed", "last")]
  begun = lines(tmp_path / "killed.begun")
  assert len(begun) == 2 and begun[1] == str(found[1]["process"]) != begun[0]
  assert sorted(path.name for path in tmp_path.glob("*.json")) == ["first.json", "killed.json", "last.json"]


@pytest.mark.slow
def test_a_worker_that_is_killed_when_all_is_written_is_not_asked_again(by_ray, tmp_path):
  (found,) = by_ray(engine_jobs.killed_after_writing, "a")
  assert found["value"] == 6 and lines(tmp_path / "a.begun") == [str(found["process"])] * 2


@pytest.mark.slow
def test_a_job_whose_workers_all_die_is_given_up(by_ray, tmp_path):
  with pytest.raises(errors.MftError, match="a: gave up after 4 workers died"):
    by_ray(engine_jobs.killed, "a")
  assert len(set(lines(tmp_path / "a.begun"))) == 4


@pytest.mark.slow
def test_an_error_in_a_job_is_its_own_message_and_not_tried_again(by_ray, tmp_path):
  with pytest.raises(errors.InputError) as caught:
    by_ray(engine_jobs.refuse, "a")
  assert str(caught.value) == "a is wrong." and type(caught.value) is errors.InputError
  assert len(lines(tmp_path / "a.begun")) == 1
  with pytest.raises(ZeroDivisionError) as caught:
    by_ray(engine_jobs.fail, "a")
  assert "engine_jobs.py" in str(caught.value.__cause__)  # where it was raised
  with pytest.raises(errors.MftError, match=r"a is done, but .*a.json is not here"):
    by_ray(engine_jobs.write_nothing, "a")


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_ends_with_its_workers(tmp_path):
  workdir = tmp_path / "run"
  words = [f"--workdir={workdir}", "--config=tests/tiny_config.py", "--config.engine=ray"]
  process = subprocess.Popen(
    [sys.executable, "-m", "tests.engine_jobs", *words],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  deadline = time.monotonic() + 120
  while not (workdir / "a.begun").exists() and process.poll() is None and time.monotonic() < deadline:
    time.sleep(0.05)
  worker = int((workdir / "a.begun").read_text())
  process.send_signal(signal.SIGTERM)
  said, _ = process.communicate(timeout=60)
  *others, last = said.splitlines()
  assert process.returncode == 0 and last == "Stopped. Give the same command to go on."
  assert others[0].startswith("Stopping") and "Traceback" not in said  # Ray may log a line in between
  deadline = time.monotonic() + 30
  while pathlib.Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not pathlib.Path(f"/proc/{worker}").exists()


@pytest.mark.parametrize(
  ("address", "expected"),
  [("127.0.0.1:1", "no cluster answers there"), ("127.0.0.1:99999", "no cluster answers"), ("here", "HOST:PORT")],
)
def test_a_cluster_that_is_not_there_is_said_to_be(address, expected, tmp_path):
  with pytest.raises(errors.InputError, match=f"config.ray.address = '{address}'.*{expected}"):
    run(make_config("ray", address), engine_jobs.double, tmp_path, "a")


@pytest.mark.parametrize("loop", [(compare.compare, compare_config), (continual.compare, continual_config)])
def test_without_ray_nothing_is_begun(loop, tmp_path, monkeypatch):
  main, configs = loop
  config = configs.get_config("tiny")
  config.engine = "ray"
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(errors.InputError, match=r"pip install 'mftjax\[ray\]'"):
    main(config, tmp_path / "untouched")
  assert not (tmp_path / "untouched").exists()
