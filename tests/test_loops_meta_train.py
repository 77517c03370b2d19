"""The direct learner with an objective and a mixture that change over the run: resumed bit for bit, then followed."""

import json

import jax
import numpy as np
import pytest
import tiny_config

from mftjax import config as config_lib
from mftjax import recipe, tracking
from mftjax.data import mixture
from mftjax.loops import finetune, meta_train, predict
from mftjax.loops import task as task_lib
from tests.interrupted import cut_off


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The config, a workdir of a whole run and one of a run that was cut off after step 5 and started again."""
  config = tiny_config.get_config()
  config.update_from_flattened_dict(
    {"objective.name": "group_dro", "objective.step_size": 50.0, "mixture.knots": 3, "meta.mixture_learning_rate": 0.5}
  )
  config.meta.method = "first_order"  # compiles sooner
  config_lib.check(config)
  folder = tmp_path_factory.mktemp("runs")
  network, _ = task_lib.build_network(config)
  outer_step = meta_train.build_outer_step(config, network)
  unpure = task_lib.unpure
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(meta_train, "build_outer_step", lambda *_: outer_step)  # compiled once,
    # which arrays that a checkpoint has put onto a device would undo
    to_numpy = lambda arrays: jax.tree.map(np.asarray, arrays)
    patch.setattr(task_lib, "unpure", lambda like, arrays: unpure(like, to_numpy(arrays)))
    meta_train.meta_train(config, folder / "whole")
    with cut_off(5):
      meta_train.meta_train(config, folder / "cut")
    assert meta_train.restore(config, network, folder / "cut")[0] == 4
    meta_train.meta_train(config, folder / "cut")
  return config, network, folder / "whole", folder / "cut"


def test_a_run_with_group_dro_and_a_curriculum_resumes_bit_for_bit(run):
  config, network, whole, cut = run
  (step, state, data), (other_step, other, other_data) = (
    meta_train.restore(config, network, path) for path in (whole, cut)
  )
  assert step == other_step == 8 and data == other_data
  jax.tree.map(np.testing.assert_array_equal, task_lib.pure(state), task_lib.pure(other))
  lines, others = ([line for line in tracking.read(path / "metrics.jsonl")] for path in (whole, cut))
  clocks = ("time_seconds", "machine")
  plain = lambda found: [{key: value for key, value in line.items() if key not in clocks} for line in found]
  assert plain(lines) == plain(others)
  # The weights have moved by what the lines say, all of it.
  losses = np.asarray([list(line["ability_loss"].values()) for line in lines])
  log_weights = np.log(0.5) + 50.0 * losses.sum(axis=0)
  want = np.exp(log_weights - np.logaddexp.reduce(log_weights))
  np.testing.assert_allclose(list(lines[-1]["group_dro_weight"].values()), want, rtol=1e-3)
  assert abs(want[0] - 0.5) > 1e-2


def test_the_recipe_holds_the_schedule_and_finetune_draws_by_it(run, monkeypatch):
  config, network, _, workdir = run
  found = recipe.load(predict.predict(config, workdir))
  _, state, _ = meta_train.restore(config, network, workdir)
  logits = np.asarray(state.meta_params["mixture_logits"])
  assert logits.shape == (3, 3) and np.ptp(logits, axis=0).max() > 1e-2  # the knots have parted
  np.testing.assert_allclose(
    [list(knot["mixture"].values()) for knot in found["mixture_schedule"]], jax.nn.softmax(logits), rtol=1e-5
  )
  drawn = []
  draw = mixture.Stream.next
  monkeypatch.setattr(mixture.Stream, "next", lambda self, proposal: drawn.append(proposal) or draw(self, proposal))
  finetune.finetune(config, workdir, "")
  assert len(drawn) == 12
  np.testing.assert_allclose(drawn[0], list(found["mixture_schedule"][0]["mixture"].values()), rtol=1e-6)
  np.testing.assert_allclose(drawn[-1], list(found["mixture_schedule"][-1]["mixture"].values()), rtol=1e-6)
  np.testing.assert_allclose(np.mean(drawn, axis=0), list(found["mixture"].values()), rtol=1e-2)


def test_a_reference_that_cannot_be_read_leaves_the_workdir_as_it_was(tmp_path):
  config = tiny_config.get_config()
  config.update_from_flattened_dict({"objective.name": "excess", "objective.reference": str(tmp_path / "no.json")})
  config_lib.check(config)
  with pytest.raises(ValueError, match=r"no.json' cannot be read"):
    meta_train.meta_train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_the_lora_of_a_recipe_keeps_its_alpha_by_rank():
  config = tiny_config.get_config()
  config.lora.rank, config.lora.alpha = 8, 32.0
  values = predict.default_recipe(config)["hyperparameters"]
  assert (values["lora_rank"], values["lora_alpha"]) == (8, 32.0)
  # The config's own LoRA: nothing to mask, nothing to scale.
  inner = finetune.inner_hyperparameters(config, values)
  assert not {"lora_rank", "lora_alpha", "num_steps", "batch_size", "stop_fraction"} & set(inner)
  assert inner["lora_scale"] == 1.0
  assert predict.adapter(config, {"lora_rank": 2}) == {"lora_rank": 2, "lora_alpha": 8.0}
  assert finetune.inner_hyperparameters(config, {"lora_rank": 2, "lora_alpha": 8.0}) == {"lora_rank": 2}
  other = finetune.inner_hyperparameters(config, {"lora_rank": 2, "lora_alpha": 2.0, "lora_scale": 3.0})
  assert other == {"lora_rank": 2, "lora_scale": pytest.approx(0.75)}
  config.lora.rank = 0
  assert "lora_rank" not in json.loads(json.dumps(predict.default_recipe(config)))["hyperparameters"]
