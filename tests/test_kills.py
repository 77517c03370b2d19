"""kill -9 at random moments: a run that was killed again and again ends as the undisturbed one, bit for bit."""

import os
import random
import signal
import time

import jax
import numpy as np
import pytest
import tiny_config

from mftjax.loops import meta_train, predict
from mftjax.loops import task as task_lib
from tests.commands import numbers, run, started

NUM_KILLS = int(os.environ.get("MFTJAX_KILLS", "5"))
IN_A_RUN = 5
FIELDS = {"checkpoint_every": 1, "meta.outer_steps": 30}
FLAGS = [f"--config.{name}={value}" for name, value in FIELDS.items()]


@pytest.fixture(scope="module")
def config():
  found = tiny_config.get_config()
  found.update_from_flattened_dict(FIELDS)
  return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """Its workdir, and the seconds that a start takes until the first outer step is done."""
  workdir = tmp_path_factory.mktemp("kills") / "undisturbed"
  first = started("meta_train", workdir.with_name("first"), *FLAGS, lines=1)  # fills the cache of compiled programs
  first.kill()
  first.communicate()
  begun = time.monotonic()
  process = started("meta_train", workdir, *FLAGS, lines=1)
  seconds = time.monotonic() - begun
  _, said = process.communicate()
  assert process.returncode == 0, said
  return workdir, seconds


def kill_once(workdir, rng, start_seconds):
  """Starts the command, and kills it while it starts or, as often, while it steps and writes a checkpoint a step."""
  if rng.random() < 0.5:
    process = started("meta_train", workdir, *FLAGS)
    time.sleep(rng.uniform(0, start_seconds))
  else:
    metrics = workdir / "metrics.jsonl"
    before = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    process = started("meta_train", workdir, *FLAGS, lines=before + 1)
    time.sleep(rng.uniform(0, 0.3))
  assert process.poll() is None, process.communicate()
  process.send_signal(signal.SIGKILL)
  process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(-(-NUM_KILLS // IN_A_RUN)))
def test_a_run_that_is_killed_at_random_moments_ends_as_the_undisturbed_one(seed, undisturbed, config, tmp_path):
  whole, start_seconds = undisturbed
  rng = random.Random(seed)
  for _ in range(min(IN_A_RUN, NUM_KILLS - seed * IN_A_RUN)):
    kill_once(tmp_path / "run", rng, start_seconds)
  again = run("meta_train", tmp_path / "run", *FLAGS)
  assert again.returncode == 0, again.stderr
  assert numbers(tmp_path / "run") == numbers(whole)
  network, _ = task_lib.build_network(config)
  ends = [meta_train.restore(config, network, workdir) for workdir in (tmp_path / "run", whole)]
  arrays = [task_lib.pure(state) for _, state, _ in ends]
  assert ends[0][0] == ends[1][0] == 30 and ends[0][2] == ends[1][2]
  jax.tree.map(np.testing.assert_array_equal, *arrays)
  recipes = [predict.predict(config, workdir).read_bytes() for workdir in (tmp_path / "run", whole)]
  assert recipes[0] == recipes[1]
  assert not list((tmp_path / "run").rglob("*.partial"))
