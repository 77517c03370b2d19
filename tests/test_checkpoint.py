"""Checkpoints come back bit for bit, and damage to the newest one costs no more than that one."""

import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mftjax.checkpoint import Checkpoints
from mftjax.errors import InputError


def _arrays(seed):
  rng = np.random.default_rng(seed)
  odd = np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)
  return {
    "f32": jnp.asarray(rng.normal(size=(5, 3)).astype(np.float32)),
    "large": jnp.asarray(rng.normal(size=(64, 33)).astype(np.float32)),  # beyond what is stored inline
    "odd": jnp.asarray(odd),
    "nested": [jnp.asarray(rng.integers(-9, 9, (7,)), jnp.int32), jnp.asarray(rng.normal(size=8), jnp.bfloat16)],
    "key": jax.random.key_data(jax.random.key(seed)),
    "count": jnp.int32(seed),
  }


def _same(left, right):
  pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
  return all(a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def test_round_trip_is_exact(tmp_path):
  data = {"cursor": [1, 2], "seed": 5, "name": "ä"}
  with Checkpoints(tmp_path / "c") as checkpoints:
    assert checkpoints.restore(_arrays(0)) is None
    checkpoints.save(3, _arrays(3), data)
  with Checkpoints(tmp_path / "c") as checkpoints:
    step, arrays, restored = checkpoints.restore(_arrays(0))
  assert step == 3
  assert restored == data
  assert jax.tree.structure(arrays) == jax.tree.structure(_arrays(0))
  assert _same(arrays, _arrays(3))
  assert not _same(arrays, _arrays(4))


def test_keeps_the_newest(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, _arrays(step), {"step": step})
    checkpoints.save(3, _arrays(9), {"step": 9})  # there already: left as it is
    step, arrays, data = checkpoints.restore(_arrays(0))
    assert checkpoints.steps == [2, 3]
    assert (step, data) == (3, {"step": 3})
    assert _same(arrays, _arrays(3))
    step, arrays, _ = checkpoints.restore(_arrays(0), step=2)
    assert step == 2
    assert _same(arrays, _arrays(2))
    with pytest.raises(InputError, match=r"no checkpoint of step 7; there are: \[3, 2\]"):
      checkpoints.restore(_arrays(0), step=7)


def test_any_damaged_file_is_survived(tmp_path, caplog):
  whole = tmp_path / "whole"
  with Checkpoints(whole) as checkpoints:
    checkpoints.save(1, _arrays(1), {"step": 1})
    checkpoints.save(2, _arrays(2), {"step": 2})
  files = sorted(path.relative_to(whole) for path in (whole / "2").rglob("*") if path.is_file())
  assert len(files) > 3
  num_fallbacks = 0
  for index, file in enumerate(files):
    for damage in ("delete", "half", "empty"):
      folder = tmp_path / f"{damage}{index}"
      shutil.copytree(whole, folder)
      content = (folder / file).read_bytes()
      if damage == "delete":
        (folder / file).unlink()
      else:
        (folder / file).write_bytes(content[: len(content) // 2 if damage == "half" else 0])
      caplog.clear()
      with Checkpoints(folder) as checkpoints:
        step, arrays, data = checkpoints.restore(_arrays(0))
        # Either the damage did not matter, or the one before is used; never a mix.
        assert data == {"step": step}, (file, damage)
        assert _same(arrays, _arrays(step)), (file, damage)
        if step == 1:
          num_fallbacks += 1
          assert "step 2" in caplog.text, (file, damage)
          assert "torn" in caplog.text
          checkpoints.save(2, _arrays(5), {"step": 2})  # the run goes on and writes that step again
          _, arrays, _ = checkpoints.restore(_arrays(0))
          assert _same(arrays, _arrays(5)), (file, damage)
  assert num_fallbacks >= 4


def test_what_is_half_written_is_gone_once_the_folder_is_open(tmp_path):
  for number in range(200):
    half_written = tmp_path / f"{number}.orbax-checkpoint-tmp" / "arrays"
    half_written.mkdir(parents=True)
    (half_written / "shard").write_text("half")
  for _ in range(2):  # at once one after another, as a command reads first and then goes on
    checkpoints = Checkpoints(tmp_path)
    assert not list(tmp_path.glob("*-tmp"))
    checkpoints.close()


def test_saves_leave_nothing_in_memory(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    sizes = []
    for last in (5, 10):
      for step in range(last - 4, last + 1):
        checkpoints.save(step, _arrays(0), {})
      checkpoints._checkpoints.wait_until_finished()
      gc.collect()
      sizes.append(sum(isinstance(found, list) for found in gc.get_objects()))
  assert sizes[1] - sizes[0] < 20


def test_restores_into_shapes_and_numpy(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, _arrays(1), {})
    shapes = jax.eval_shape(lambda: _arrays(0))
    assert _same(checkpoints.restore(shapes)[1], _arrays(1))
    assert _same(checkpoints.restore(jax.tree.map(np.asarray, _arrays(0)))[1], _arrays(1))


def test_nothing_whole_is_an_error(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, _arrays(1), {})
    checkpoints.restore(_arrays(0))
    with pytest.raises(InputError, match="no checkpoint"):
      checkpoints.restore({"other": jnp.zeros(3)})
    assert checkpoints.steps == [1]  # what does not fit is not thrown away
    wrong = _arrays(0) | {"f32": jnp.zeros((2, 2))}
    with pytest.raises(InputError, match="no checkpoint"):
      checkpoints.restore(wrong)
  with pytest.raises(InputError, match="keep"):
    Checkpoints(tmp_path, keep=0)
