"""A run that is cut off on one mesh and goes on, on another, to the numbers of one device."""

import numpy as np
import tiny_config

from mftjax import config as config_lib
from mftjax import run_folder, tracking
from mftjax.loops import meta_train
from tests.interrupted import cut_off


def config_of(**parallel):
  config = tiny_config.get_config()
  config.batch_size, config.meta.ability_rows, config.meta.outer_steps = 8, 4, 6
  config.budget_tokens = 12 * 8 * config.length
  config.meta.method = "first_order"  # compiles sooner
  config.parallel.update(parallel)
  config_lib.check(config)
  return config


def test_a_run_goes_on_on_another_mesh(tmp_path):
  meta_train.meta_train(config_of(), tmp_path / "one")
  with cut_off(3):
    meta_train.meta_train(config_of(fsdp=8), tmp_path / "moved")
  run_folder.release()
  meta_train.meta_train(config_of(data=2, tensor=2), tmp_path / "moved")
  lines = [tracking.read(tmp_path / name / "metrics.jsonl") for name in ("one", "moved")]
  assert [line["step"] for line in lines[1]] == [1, 2, 3, 4, 5, 6]
  for name in ("outer_loss", "inner_loss", "grad_norm"):
    one, moved = ([line[name] for line in run] for run in lines)
    np.testing.assert_allclose(moved, one, rtol=1e-4)
