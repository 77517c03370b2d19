"""The comparison as a user starts it, and what is done with the folder it leaves."""

import json
import subprocess
import sys

import pytest
from pages import ROOT

from mftjax.loops import compare


@pytest.mark.slow
def test_the_comparison_as_a_user_starts_it(tmp_path):
  command = [
    sys.executable,
    "-m",
    "experiments.compare",
    "--config=configs/compare.py:tiny",
    f"--workdir={tmp_path}/run",
  ]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
  assert done.returncode == 0, done.stderr
  table = json.loads((tmp_path / "run" / "compare.json").read_text())
  rows = {row["name"]: row for row in table["rows"]}
  assert {"uniform, default", "TPE", "ASHA", "random search", "predicted", "predicted, refined", "direct"} <= set(rows)
  assert rows["TPE"]["runs"] == rows["random search"]["runs"] == 12 >= rows["ASHA"]["runs"] > 11
  assert 0 < rows["predicted"]["runs"] < rows["predicted, refined"]["runs"]
  assert all(row["low"] <= row["improvement"] <= row["high"] for row in table["rows"])
  assert 0 <= table["coverage"] <= 1
  assert "TPE" in done.stdout
  assert (tmp_path / "run" / "compare.html").exists()

  # What it leaves predicts for a task of one's own, and agrees with itself about the base model.
  command[2], command[-1:] = "experiments.predict", [command[-1], "--task=tests/own_task.py", "--front=0"]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / "run" / "tasks" / "own" / "recipe.json").read_text())
  assert set(found["mixture"]) == {"copying", "modular", "wrong"}
  kept = json.loads((tmp_path / "run" / "meta_learner.json").read_text())
  assert found["provenance"]["model_digest"] == kept["model_digest"]
  assert "expected" in done.stdout and (tmp_path / "run" / "tasks" / "own" / "report.html").exists()

  # What each method chose is kept; what is missing is the same through Ray.
  choices = tmp_path / "run" / "choices"
  assert len(list(choices.glob("*.npz"))) == len(compare.METHODS)
  for name in ("TPE", "direct"):
    (choices / f"{name}.npz").unlink()
  command[2], command[5:] = "experiments.compare", ["--config.engine=ray", "--config.ray.workers=2"]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
  assert done.returncode == 0, done.stderr
  assert "direct is done" in done.stderr and len(list(choices.glob("*.npz"))) == len(compare.METHODS)
  assert json.loads((tmp_path / "run" / "compare.json").read_text()) == table
