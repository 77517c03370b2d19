"""The commands as a user types them: the whole path, resuming after kill -9, and bad input."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import yaml
from pages import ROOT, blocks

from mftjax import command as command_lib
from mftjax import config as config_lib
from mftjax import stopping
from tests.commands import CONFIG, numbers, run, started


def run_readme(workdir, config=CONFIG):
  """The five commands as README gives them, with another config and workdir."""
  (path,) = [block for block in blocks(ROOT / "README.md", "bash") if "experiments.evaluate" in block]
  for old, new in (("configs/quickstart.py", config), ("runs/quickstart", str(workdir))):
    assert old in path
    path = path.replace(old, new)
  base, path = path.split("\n\n")  # the tiny model needs no base
  assert "configs/base.py" in base and path.count("python -m") == 5
  environment = {**os.environ, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
  done = subprocess.run(["bash", "-ec", path], capture_output=True, text=True, cwd=ROOT, check=False, env=environment)
  assert done.returncode == 0, done.stderr
  return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  return workdir, run_readme(workdir)


@pytest.mark.slow
def test_the_whole_path(finished):
  workdir, done = finished
  recipe = json.loads((workdir / "recipe.json").read_text())
  assert recipe["format"] == "mftjax-recipe/1"
  assert set(recipe["mixture"]) == {"copying", "reversal", "wrong"}
  assert sum(recipe["mixture"].values()) == pytest.approx(1)
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
  lines_of = lambda path: numbers(path, phase)
  process = started(script, workdir, *extra, lines=5)
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
  run_readme(tmp_path / "memory", config=f"{CONFIG}:memory")
  folder = tmp_path / "memory" / "finetune"
  memory = safetensors.numpy.load_file(folder / "learnt" / "model" / "memory.safetensors")
  # A new memory's values are zero: the meta-gradient has written into them.
  assert any(np.abs(value).max() > 0 for value in memory.values())
  fresh = safetensors.numpy.load_file(folder / "default" / "model" / "memory.safetensors")
  assert any(not np.array_equal(memory[name], fresh[name]) for name in memory)


@pytest.mark.slow
def test_predict_exports_for_other_trainers(finished):
  workdir, _ = finished
  assert run("predict", workdir, "--export=trl,axolotl").returncode == 0
  learning_rate = json.loads((workdir / "recipe.json").read_text())["hyperparameters"]["learning_rate"]
  trl, axolotl = (yaml.safe_load((workdir / f"recipe.{name}").read_text()) for name in ("trl", "axolotl"))
  assert trl["sft_config"]["learning_rate"] == axolotl["learning_rate"] == pytest.approx(learning_rate)


BAD_FILES = {
  "missing file": (None, "there is no file missing.jsonl"),
  "not JSON": ('{"prompt": "a", "completion": "b"}\n{oops\n', "data.jsonl:2"),
  "missing column": ('{"prompt": "a", "completio": "b"}\n', "completion"),
  "empty source": ("", "empty"),
  "empty completion": ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n', "example 2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_message_and_exit_2(name, tmp_path):
  text, expected = BAD_FILES[name]
  flags = []
  if text is not None:
    (tmp_path / "data.jsonl").write_text(text)
    flags = [f"--config.sources.copying.path={tmp_path / 'data.jsonl'}"]
  refused("meta_train", tmp_path / "untouched", *flags, config=f"{CONFIG}:files", expected=expected)


BAD_FLAGS = {
  "unknown suite": (["--config.sources.copying.suite=copyin"], "Did you mean 'copying'"),
  "unknown field": (["--config.meta.outer_stepz=3"], "outer_steps"),
  "out of range": (["--config.meta.outer_steps=0"], "config.meta.outer_steps = 0"),
  "model folder without weights": (["--config.model.path=tests"], "tests"),
  "heads do not divide": (["--config.model.num_heads=3"], "does not divide"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_bad_flag_is_one_message_and_exit_2(name, tmp_path):
  flags, expected = BAD_FLAGS[name]
  refused("meta_train", tmp_path / "untouched", *flags, expected=expected)


@pytest.mark.slow
def test_finetune_before_predict_names_predict(tmp_path):
  refused("finetune", tmp_path / "untouched", expected="experiments.predict")


def refused(script, workdir, *extra, expected, config=CONFIG):
  done = run(script, workdir, *extra, config=config)
  assert done.returncode == 2, done.stderr
  assert expected in done.stderr and "Traceback" not in done.stderr
  assert not workdir.exists()


@pytest.mark.slow
def test_a_model_whose_shapes_do_not_fit(finished, tmp_path):
  workdir, _ = finished
  folder = tmp_path / "model"
  shutil.copytree(workdir / "finetune" / "learnt" / "model", folder)
  values = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps({**values, "intermediate_size": 8}))
  refused("meta_train", tmp_path / "untouched", f"--config.model.path={folder}", expected="(64, 16)")


@pytest.mark.slow
def test_cut_prompts_are_counted(tmp_path):
  (tmp_path / "data.jsonl").write_text(f'{{"prompt": "{"a" * 100}", "completion": "b"}}\n' * 3)
  flags = [f"--config.sources.copying.path={tmp_path / 'data.jsonl'}", "--config.meta.outer_steps=1"]
  done = run("meta_train", tmp_path / "run", *flags, config=f"{CONFIG}:files")
  assert done.returncode == 0, done.stderr
  assert "config.sources.copying: 3 prompts do not fit 48 tokens and were cut on the left" in done.stderr


@pytest.mark.slow
def test_non_finite_steps_are_skipped_and_stop_the_run(tmp_path):
  flags = [f"--config.hyperparameters.learning_rate.{name}" for name in ("high=1e38", "value=1e37")]
  done = run("meta_train", tmp_path / "run", *flags, "--config.meta.max_skipped=3")
  assert done.returncode == 1 and "3 outer steps in a row" in done.stderr and "Traceback" not in done.stderr
  assert (tmp_path / "run" / "non_finite_batch.npz").exists()
  lines = numbers(tmp_path / "run")
  assert [line["skipped"] for line in lines[-3:]] == [1, 2, 3]
  # What was skipped changed nothing.
  assert lines[-1]["mixture"] == lines[-3]["mixture"]


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
    refused("finetune", tmp_path / "untouched", f"--recipe={path}", expected=expected)


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


def test_a_command_computes_in_the_precision_of_its_config(monkeypatch):
  config = config_lib.default()
  config.compilation_cache, config.model.matmul_precision = "", "high"
  monkeypatch.setattr(stopping, "listen", lambda: None)
  monkeypatch.setattr(command_lib, "_parse", lambda: (config, None, None))
  monkeypatch.setattr(sys, "argv", ["prog"])
  seen, before = [], jax.config.jax_default_matmul_precision
  try:
    command_lib.run(lambda *_: seen.append(jax.config.jax_default_matmul_precision), "")
  finally:
    jax.config.update("jax_default_matmul_precision", before)
  assert seen == ["high"] and config_lib.default().model.matmul_precision == "highest"
