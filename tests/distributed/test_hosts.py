"""Two processes that run one command together, as two hosts would, against one process with as many devices."""

import signal

import numpy as np
import psutil
import pytest

from mftjax import models, tracking
from tests.commands import run, started

FLAGS = ("--config.batch_size=8", "--config.meta.ability_rows=4", f"--config.budget_tokens={12 * 8 * 48}")
FLAGS += ("--config.meta.method=first_order", "--config.parallel.data=2", "--config.parallel.fsdp=2")


TWO = ("launch/local.sh", "2")


def start_two(script, workdir, *extra, lines=0):
  return started(script, workdir, *FLAGS, "--config.cpu_devices=2", *extra, lines=lines, prefix=TWO)


def lines(workdir, name="outer_loss", phase="meta_train"):
  return [line[name] for line in tracking.read(workdir / "metrics.jsonl") if line["phase"] == phase]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
  """The workdir of one process with four devices, meta-trained and fine-tuned."""
  workdir = tmp_path_factory.mktemp("hosts") / "one"
  for script in ("meta_train", "predict", "finetune"):
    done = run(script, workdir, *FLAGS, "--config.cpu_devices=4")
    assert done.returncode == 0, done.stderr
  return workdir


def test_two_processes_equal_one_and_stop_and_go_on_together(one, tmp_path):
  process = start_two("meta_train", tmp_path / "two", lines=3)
  psutil.Process(process.pid).children()[1].send_signal(signal.SIGTERM)  # one is asked, and both stop
  _, said = process.communicate()
  assert process.returncode == 0 and said.count("Give the same command to go on") == 2, said
  done = len(lines(tmp_path / "two"))
  assert 3 <= done < 8
  process = start_two("meta_train", tmp_path / "two")
  _, said = process.communicate()
  assert process.returncode == 0 and f"from outer step {done}" in said, said
  for name in ("outer_loss", "inner_loss", "grad_norm"):
    found, want = lines(tmp_path / "two", name), lines(one, name)
    np.testing.assert_allclose(found[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(found, want, rtol=2e-3)  # Adam enlarges what rounding leaves of gradients near 0
  # One process reads the checkpoint of two; two fine-tune and export.
  assert run("predict", tmp_path / "two", *FLAGS, "--config.cpu_devices=4").returncode == 0
  process = start_two("finetune", tmp_path / "two")
  _, said = process.communicate()
  assert process.returncode == 0, said
  found, want = (models.load(path / "finetune" / "learnt" / "model")[0] for path in (tmp_path / "two", one))
  np.testing.assert_allclose(found.layers.q_proj[...], want.layers.q_proj[...], atol=1e-4)


def test_what_the_first_process_refuses_ends_all(tmp_path):
  (tmp_path / "file").write_text("")
  process = start_two("meta_train", tmp_path / "file")
  _, said = process.communicate()
  assert process.returncode == 2 and "cannot be written" in said and "The first process gave up" in said, said
  assert "Traceback" not in said


def test_what_several_processes_cannot_do_is_refused(tmp_path):
  process = start_two("meta_train", tmp_path / "run", "--config.meta.check=True")
  _, said = process.communicate()
  assert process.returncode == 2 and "config.meta.check" in said and not (tmp_path / "run").exists(), said
  done = run("meta_train", tmp_path / "run", config="configs/compare.py:tiny", prefix=TWO)
  assert done.returncode == 2 and "learner.kind = 'direct' alone" in done.stderr, done.stderr


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["--num_processes=2", "--process_id=2", "--coordinator=localhost:1"], "process_id must be 0 .. num_processes - 1"),
    (["--num_processes=2"], "Several hosts were asked for"),
    (["--hosts"], "Several hosts were asked for"),
  ],
)
def test_flags_that_do_not_say_enough_are_refused(tmp_path, words, said):
  done = run("meta_train", tmp_path / "run", *words)
  assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
  assert not (tmp_path / "run").exists()
