"""What goes wrong with the files and streams of a run: what was there before stays, and the message says what it is."""

import contextlib
import errno
import os
import pathlib
import resource
import shutil
import subprocess
import tempfile

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from pages import ROOT

from mftjax import command, errors, events, files, models, report, run_folder
from mftjax.loops import predict
from tests.commands import command as command_of
from tests.commands import numbers
from tests.test_models_decoder import make


@pytest.fixture
def config():
  return tiny_config.get_config()


@contextlib.contextmanager
def full_disk(num_bytes=0):
  """Files cannot grow past so many bytes: the system says so as it does of a full disk."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def content(folder):
  return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def fails_for_room(folder):
  """What is done in it finds the disk full, is told as such, and leaves the folder as it was."""
  before = content(folder)
  with pytest.raises(Exception) as caught, full_disk(100):
    yield
  assert command._is_no_room(caught.value)
  assert content(folder) == before


def test_a_disk_that_is_full_at_the_start(tmp_path, config):
  with pytest.raises(OSError) as caught, full_disk():
    run_folder.claim(config, tmp_path / "run")
  assert command._is_no_room(caught.value) and not (tmp_path / "run" / "config.json").exists()


def test_a_disk_that_is_full_at_the_export_leaves_the_model_before(tmp_path):
  model = make()
  model.attach_memory(models.Memory(4, 32, 6, 2, rngs=nnx.Rngs(1)), [1])
  models.save(model, None, tmp_path)
  model.final_norm[...] += 1
  with fails_for_room(tmp_path):
    models.save(model, None, tmp_path)
  assert models.load(tmp_path)[0].final_norm[0] == 1


def test_a_disk_that_is_full_leaves_report_and_recipe_before(tmp_path, config):
  files.write_json(tmp_path / "recipe.json", predict.default_recipe(config))
  report.write(tmp_path)
  with fails_for_room(tmp_path):
    files.write_json(tmp_path / "recipe.json", predict.default_recipe(config) | {"task": "another"})
  files.write_json(tmp_path / "config.json", {"more": "to show"})
  with fails_for_room(tmp_path):
    report.write(tmp_path)


def test_a_disk_that_is_full_at_the_scalars_is_no_hang(tmp_path):
  scalars = events.Events(tmp_path)
  scalars.write(1, [("loss", 0.5)])
  for _ in range(20):  # more than a queue would hold
    with pytest.raises(OSError) as caught, full_disk():
      scalars.write(2, [("loss", 0.5)])
    assert command._is_no_room(caught.value)


def test_what_a_killed_process_has_half_written_is_removed(tmp_path, config):
  for path in (tmp_path / ".recipe.json.7.partial", tmp_path / "finetune" / "learnt" / ".model.safetensors.7.partial"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{")
  (tmp_path / "partial").write_text("mine")
  run_folder.claim(config, tmp_path)
  assert {path.name for path in content(tmp_path)} == {"config.json", "held_by.json", ".lock", "partial"}


@pytest.fixture
def closed_folder(config):
  """A workdir with a run in it that this process may read and not write, and not even read its `config.json`."""
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder) / "run"
    run_folder.claim(config, workdir)
    run_folder.release()
    pathlib.Path(folder).chmod(0o755)
    user = os.geteuid()
    if user == 0:  # whom no permission stops
      os.seteuid(65534)
    try:
      yield workdir
    finally:
      os.seteuid(user)


@pytest.mark.parametrize("does", [run_folder.claim, run_folder.reclaim])
def test_a_workdir_that_may_only_be_read(closed_folder, config, does):
  before = content(closed_folder)
  with pytest.raises(errors.InputError, match=r"run cannot be written: Permission denied. Give another --workdir"):
    does(config, closed_folder)
  assert content(closed_folder) == before


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENAMETOOLONG])
def test_a_workdir_on_a_file_system_that_takes_no_file(tmp_path, config, monkeypatch, code):
  def refuse(*_, **__):
    raise OSError(code, os.strerror(code))

  monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
  with pytest.raises(errors.InputError, match=f"cannot be written: {os.strerror(code)}"):
    run_folder.claim(config, tmp_path)


def test_a_config_that_may_not_be_read(closed_folder, config):
  user = os.geteuid()
  os.seteuid(os.getuid())
  (closed_folder / "config.json").chmod(0)
  os.seteuid(user)
  with pytest.raises(errors.InputError, match=r"config.json cannot be read: Permission denied"):
    run_folder.check(config, closed_folder)


def test_a_reader_that_goes_does_not_end_the_run():
  reader, writer = os.pipe()
  with os.fdopen(writer, "w") as stream, command._unheard(stream) as heard:
    print("heard", file=heard)
    assert os.read(reader, 99) == b"heard\n"
    os.close(reader)
    print("lost", file=heard)
    heard.flush()
  with open("/dev/full", "w") as stream, pytest.raises(OSError, match="No space"), command._unheard(stream) as heard:
    print("a full disk is no reader that went", file=heard)


@pytest.mark.slow
def test_a_run_into_a_pipe_that_closes_goes_on_to_its_end(tmp_path):
  words = command_of("meta_train", tmp_path / "run")
  done = subprocess.run(["bash", "-c", 'set -o pipefail; "$@" 2>&1 | head -1', "bash", *words], cwd=ROOT, check=False)
  assert done.returncode == 0 and len(numbers(tmp_path / "run")) == 8


def cut_programs(cache):
  for path in cache.iterdir():
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def put_a_file_there(cache):
  shutil.rmtree(cache)
  cache.write_text("")


@pytest.fixture
def cache(tmp_path):
  """The folder that compiled programs are kept in, also short ones."""
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = [getattr(jax.config, name) for name in names]
  jax.config.update(names[0], str(tmp_path / "cache"))
  jax.config.update(names[1], 0.0)
  compilation_cache.reset_cache()
  yield tmp_path / "cache"
  for name, value in zip(names, before, strict=True):
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.mark.parametrize("does", [cut_programs, put_a_file_there])
def test_compiled_programs_that_cannot_be_read_or_kept_are_compiled_again(cache, does):
  compute = lambda: np.asarray(jax.jit(lambda x: jnp.sin(x) @ x.T)(np.arange(6.0).reshape(2, 3)))
  before = compute()
  assert list(cache.iterdir())
  does(cache)
  compilation_cache.reset_cache()
  with pytest.warns(UserWarning, match="cache"):
    np.testing.assert_array_equal(compute(), before)
