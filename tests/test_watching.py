"""What a run is said to take is what it took; a step that hangs, and one that compiles again, are told."""

import gzip
import json
import logging
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging

from mftjax import tracking, watching
from mftjax.errors import InputError
from tests.commands import numbers, run, started
from tests.pages import ROOT


@pytest.fixture
def options(monkeypatch):
  return lambda **asked: monkeypatch.setattr(watching, "_options", watching.Options(**asked))


@pytest.fixture
def clock(monkeypatch):
  found = types.SimpleNamespace(now=0.0)
  monkeypatch.setattr(watching, "time", types.SimpleNamespace(perf_counter=lambda: found.now))
  return found


@pytest.fixture
def said(caplog):
  logger = absl_logging.get_absl_logger()
  logger.addHandler(caplog.handler)
  with caplog.at_level(logging.WARNING, logger="absl"):
    yield caplog
  logger.removeHandler(caplog.handler)


def test_time_is_divided_into_input_and_the_rest(tmp_path, clock):
  watch = watching.Watch(tmp_path, "p", tokens_per_step=100)
  clock.now += 7  # before the first step
  found = []
  for step in watch.steps(0, 2):
    with watch.input():
      clock.now += 2 * (step + 1)
    clock.now += 3
    found.append(watch.figures())
    clock.now += 10  # saving, say
  figures = [(each["step_seconds"], each["input_seconds"], each["tokens_per_second"]) for each in found]
  assert figures == [(5, 2, 20), (17, 4, 100 / 17)]


def test_utilisation_is_the_part_of_all_devices_peak(tmp_path, clock, monkeypatch):
  kind = jax.local_devices()[0].device_kind
  monkeypatch.setitem(watching.PEAK_FLOPS, kind, 1e12)
  watch = watching.Watch(tmp_path, "p", flops_per_step=6e12, num_devices=4)
  clock.now += 3
  assert watch.figures()["utilisation"] == 0.5
  monkeypatch.delitem(watching.PEAK_FLOPS, kind)
  assert "utilisation" not in watch.figures()


def test_memory_is_what_the_process_holds(tmp_path):
  before = watching.memory_bytes()["host"]
  held = np.ones(64 << 20, np.uint8)
  assert 60 << 20 < watching.memory_bytes()["host"] - before < 80 << 20
  assert held.all()


def test_a_step_that_compiles_again_is_told_by_name(tmp_path, said):
  @jax.jit
  def my_step(x):
    return 2 * x

  counts = []
  watch = watching.Watch(tmp_path, "p")
  for step in watch.steps(0, 5):
    my_step(jnp.ones(3 if step < 4 else 4)).block_until_ready()
    counts.append(watch.figures()["compiles"])
    assert "again" not in said.text
  assert "p step 5 compiled again" in said.text and "my_step" in said.text
  assert counts[0] < counts[4] and counts[1] == counts[2] == counts[3]


def test_a_trace_holds_the_steps_asked_for(tmp_path, options):
  options(profile=(2, 3))
  for step in watching.Watch(tmp_path, "finetune/learnt").steps(0, 5):
    jnp.ones(step + 1).block_until_ready()
  (trace,) = (tmp_path / "profile" / "finetune" / "learnt").rglob("*.trace.json.gz")
  events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
  assert {event["args"]["step_num"] for event in events if event.get("name") == "finetune/learnt"} == {"2", "3"}


def test_a_trace_that_the_run_ends_in_is_whole(tmp_path, options):
  options(profile=(2, 30))
  with pytest.raises(KeyError):
    for step in watching.Watch(tmp_path, "p").steps(0, 5):
      if step == 3:
        raise KeyError
  assert list((tmp_path / "profile" / "p").rglob("*.trace.json.gz"))


@pytest.mark.parametrize("text", ["3", "3:", ":3", "0:3", "5:4", "a:b", "1:2:3"])
def test_steps_of_a_trace_are_two_in_order(text):
  with pytest.raises(InputError, match="first and the last step"):
    watching.start(text, 0.0)


STUCK = """
import pathlib, time
from mftjax import watching
watching.start(None, 1.0)
def hanging(): time.sleep(2.5)
for step in watching.Watch(pathlib.Path("."), "p").steps(0, 4):
  time.sleep(0.01) if step != 2 else hanging()
"""


def test_a_step_that_takes_too_long_shows_its_stacks():
  done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, cwd=ROOT, check=True)
  assert "Timeout" in done.stderr and "in hanging" in done.stderr
  assert done.stderr.count("Timeout") <= 3  # steps in time say nothing


@pytest.mark.slow
def test_a_command_shows_its_stacks_when_asked_and_goes_on(tmp_path):
  process = started("meta_train", tmp_path / "run", "--config.checkpoint_every=1000", lines=1)
  process.send_signal(signal.SIGUSR1)
  _, told = process.communicate()
  assert process.returncode == 0 and "most recent call first" in told and "meta_train" in told
  lines = tracking.read(tmp_path / "run" / "metrics.jsonl")
  assert len(numbers(tmp_path / "run")) == 8 and "compiled again" not in told
  assert all(line["machine"]["step_seconds"] > line["machine"]["input_seconds"] > 0 for line in lines)


def test_a_wrong_trace_is_said_before_anything_is_done(tmp_path):
  done = run("meta_train", tmp_path / "run", "--profile=9")
  assert done.returncode == 2 and "--profile=9" in done.stderr and not (tmp_path / "run").exists()
