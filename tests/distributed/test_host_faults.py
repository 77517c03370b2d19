"""One of several processes goes wrong, done to two that run one command: the other ends soon and says so."""

import subprocess
import sys
import time

import psutil
import pytest
from pages import ROOT

from mftjax import tracking
from tests.commands import run
from tests.distributed.test_hosts import FLAGS, start_two


def kill(process, number):
  """Of the two processes one, and what the other said until it ended, which it does soon."""
  psutil.Process(process.pid).children()[number].kill()
  _, said = process.communicate(timeout=60)
  return said


def test_a_process_that_dies_ends_the_other_and_the_run_goes_on(tmp_path):
  process = start_two("meta_train", tmp_path / "run", lines=3)
  said = kill(process, 1)
  assert process.returncode == 1 and "error: Another process of this run is gone. Start all again" in said, said
  assert "Traceback" not in said
  again = run("meta_train", tmp_path / "run", *FLAGS, "--config.cpu_devices=4")
  assert again.returncode == 0 and "Going on from outer step" in again.stderr, again.stderr
  assert [line["step"] for line in tracking.read(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 9))


def test_a_first_process_that_dies_ends_the_other(tmp_path):
  process = start_two("meta_train", tmp_path / "run", lines=3)
  said = kill(process, 0)
  # JAX's own thread may be the first to see it, and aborts.
  assert "Another process of this run is gone" in said or "another task died" in said, said


@pytest.mark.parametrize(
  ("coordinator", "expected"),
  [("localhost:1", "No first process listens on"), ("localhost", "--coordinator=localhost must be HOST:PORT")],
)
def test_a_coordinator_that_is_not_there(coordinator, expected):
  script = f"from mftjax import hosts; hosts._JOIN_SECONDS = 1; hosts.start({coordinator!r}, 2, 1)"
  begun = time.monotonic()
  done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
  assert f"InputError: {expected}" in done.stderr, done.stderr
  assert time.monotonic() - begun < 60
