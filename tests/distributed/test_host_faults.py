"""One of several processes goes wrong, done to two that run one command: the other ends soon and says so."""

import subprocess
import sys
import time

import psutil
import pytest
from pages import ROOT

from tests.distributed.test_hosts import start_two


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_dies_ends_the_other_and_both_go_on(tmp_path, number):
  process = start_two("meta_train", tmp_path / "run", lines=3)
  psutil.Process(process.pid).children()[number].kill()
  begun = time.monotonic()
  _, said = process.communicate()
  print(process.returncode, time.monotonic() - begun, said)


def test_a_coordinator_that_is_not_there(tmp_path):
  script = "from mftjax import hosts; hosts._JOIN_SECONDS = 3; hosts.start('localhost:1', 2, 1)"
  begun = time.monotonic()
  done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
  print(done.returncode, time.monotonic() - begun, done.stderr)
