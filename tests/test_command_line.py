"""The commands as a user types them: the whole path, resuming after kill -9, and bad input."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = "tests/tiny_config.py"


def command(script, workdir, *extra, config=CONFIG):
  return [sys.executable, "-m", f"experiments.{script}", f"--config={config}", f"--workdir={workdir}", *extra]


def run(script, workdir, *extra, config=CONFIG):
  return subprocess.run(
    command(script, workdir, *extra, config=config), capture_output=True, text=True, cwd=ROOT, check=False
  )


def run_path(workdir, config=CONFIG):
  for script, *extra in (
    ("meta_train",),
    ("predict", "--export=trl,axolotl"),
    ("finetune", "--recipe=default"),
    ("finetune",),
    ("evaluate",),
  ):
    done = run(script, workdir, *extra, config=config)
    assert done.returncode == 0, done.stderr
  return done


def numbers(workdir):
  """The metrics without their clock."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  clocks = ("time_seconds", "tokens_per_second")
  return [{key: value for key, value in line.items() if key not in clocks} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  return workdir, run_path(workdir)


@pytest.mark.slow
def test_the_whole_path(finished):
  workdir, done = finished
  recipe = json.loads((workdir / "recipe.json").read_text())
  assert recipe["format"] == "mftjax-recipe/1"
  assert set(recipe["mixture"]) == {"copying", "reversal", "wrong"}
  assert sum(recipe["mixture"].values()) == pytest.approx(1)
  assert (workdir / "recipe.trl").exists() and (workdir / "recipe.axolotl").exists()
  table = json.loads((workdir / "evaluation.json").read_text())
  rows = {row["name"]: row for row in table["rows"]}
  assert set(rows) == {"base", "default", "learnt"}
  assert rows["default"]["tokens"] == rows["learnt"]["tokens"] == 12 * 4 * 48
  assert rows["default"]["mean_loss"] < rows["base"]["mean_loss"]
  assert "learnt" in done.stdout and "report.html" in done.stdout
  page = (workdir / "report.html").read_text()
  assert "reversal" in page and "learning_rate" in page
  assert [line["step"] for line in numbers(workdir) if line["phase"] == "meta_train"] == list(range(1, 9))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["meta_train", "finetune"])
def test_kill_and_run_again_ends_at_the_same_numbers(finished, script, tmp_path):
  whole, _ = finished
  workdir = tmp_path / "killed"
  extra = [] if script == "meta_train" else [f"--recipe={whole / 'recipe.json'}"]
  phase = "meta_train" if script == "meta_train" else "finetune/recipe"
  lines_of = lambda path: [line for line in numbers(path) if line["phase"] == phase]
  process = subprocess.Popen(
    command(script, workdir, *extra), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  metrics = workdir / "metrics.jsonl"
  deadline = time.monotonic() + 300
  while time.monotonic() < deadline and process.poll() is None:
    if metrics.exists() and len(metrics.read_text().splitlines()) >= 5:
      break
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  process.wait()
  again = run(script, workdir, *extra)
  assert again.returncode == 0, again.stderr
  if script == "meta_train":
    assert lines_of(workdir) == lines_of(whole)
  else:
    undisturbed = tmp_path / "undisturbed"
    assert run(script, undisturbed, *extra).returncode == 0
    assert lines_of(workdir) == lines_of(undisturbed)
    weights = "finetune/recipe/model/model.safetensors"
    assert (workdir / weights).read_bytes() == (undisturbed / weights).read_bytes()


@pytest.mark.slow
def test_memory_and_lora_go_through_the_path(tmp_path):
  run_path(tmp_path / "memory", config=f"{CONFIG}:memory")
  folder = tmp_path / "memory" / "finetune"
  import safetensors.numpy

  memory = safetensors.numpy.load_file(folder / "learnt" / "model" / "memory.safetensors")
  # A new memory's values are zero: the meta-gradient has written into them.
  assert any(np.abs(value).max() > 0 for value in memory.values())
  fresh = safetensors.numpy.load_file(folder / "default" / "model" / "memory.safetensors")
  assert any(not np.array_equal(memory[name], fresh[name]) for name in memory)


BAD_INPUT = {
  "missing file": (["--config.sources.copying.suite=copyin"], "copying"),
  "unknown field": (["--config.meta.outer_stepz=3"], "outer_steps"),
  "out of range": (["--config.meta.outer_steps=0"], "config.meta.outer_steps = 0"),
  "model folder without weights": (["--config.model.path=tests"], "tests"),
  "heads do not divide": (["--config.model.num_heads=3"], "does not divide"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_message_and_exit_2(name, tmp_path):
  flags, expected = BAD_INPUT[name]
  workdir = tmp_path / "untouched"
  done = run("meta_train", workdir, *flags)
  assert done.returncode == 2, done.stderr
  assert expected in done.stderr and "Traceback" not in done.stderr
  assert not workdir.exists()


@pytest.mark.slow
def test_a_workdir_of_another_config_is_left_as_it_was(finished):
  workdir, _ = finished
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
  done = run("meta_train", workdir, "--config.seed=7")
  assert done.returncode == 2 and "seed is 0 there and 7 here" in done.stderr
  assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


@pytest.mark.slow
def test_a_recipe_that_does_not_fit(finished, tmp_path):
  workdir, _ = finished
  recipe = json.loads((workdir / "recipe.json").read_text())
  for change, expected in (
    ({"format": "mftjax-recipe/9"}, "mftjax-recipe/9"),
    ({"mixture": {"copyin": 1.0}}, "Did you mean 'copying'"),
    ({"mixture": {"copying": -1.0, "wrong": 2.0}}, "copying"),
  ):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({**recipe, **change}))
    done = run("finetune", tmp_path / "untouched", f"--recipe={path}")
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "untouched").exists()


def test_help_lists_the_fields_and_exits_0():
  done = subprocess.run(
    [sys.executable, "-m", "experiments.finetune", "--help"],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
    env=dict(os.environ),
  )
  assert done.returncode == 0
  assert "--config.meta.outer_steps=100" in done.stdout and "--recipe" in done.stdout
