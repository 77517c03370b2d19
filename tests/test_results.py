"""Results in a second place: what is copied, where from the command line, and what is refused."""

import pytest
from etils import epath

from mftjax import errors, results
from tests.commands import run


def test_all_but_what_is_the_runs_own_is_copied_and_replaced(tmp_path):
  workdir, target = tmp_path / "run", tmp_path / "shared" / "run"
  kept = ("recipe.json", "methods/memory.json", "base_model/model.safetensors")
  others = (
    ".lock",
    "held_by.json",
    "checkpoints/1/data",
    "methods/memory/runs_0/checkpoints/3/x",
    "tensorboard/events",
  )
  for name in (*kept, *others):
    (workdir / name).parent.mkdir(parents=True, exist_ok=True)
    (workdir / name).write_text(name)
  for text in ("old", "new"):
    (workdir / "recipe.json").write_text(text)
    results.copy(workdir, results.destination(str(target)))
    assert (target / "recipe.json").read_text() == text
  assert {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()} == set(kept)


def test_a_place_that_cannot_be_written_is_said_to_be(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.InputError, match=r"--results=.*/file/run cannot be written: .*Not a directory"):
    results.destination(str(tmp_path / "file" / "run"))

  def no_backend(*_, **__):
    raise ImportError("Please install gcsfs to access Google Storage")

  monkeypatch.setattr(type(epath.Path()), "mkdir", no_backend)
  with pytest.raises(errors.InputError, match="--results=gs://bucket/run cannot be written: Please install gcsfs"):
    results.destination("gs://bucket/run")


def test_a_workdir_that_is_a_bucket_is_refused(tmp_path):
  done = run("meta_train", "gs://bucket/run")
  assert done.returncode == 2 and "--results=gs://bucket/run" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_results_as_a_user_has_them_copied(tmp_path):
  workdir, shared = tmp_path / "run", tmp_path / "shared"
  flags = ("--config.meta.outer_steps=1", "--config.checkpoint_every=1")
  done = run("meta_train", workdir, *flags, f"--results={shared}")
  assert done.returncode == 0, done.stderr
  assert (shared / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()
  assert (workdir / "checkpoints").exists() and not (shared / "checkpoints").exists()
