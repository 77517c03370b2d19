"""Transfer to other widths and budgets: where the best rates are known, and as a user starts it."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pages import ROOT

from mftjax import errors, features
from mftjax import transfer as transfer_lib
from mftjax.data import meta_tasks
from mftjax.loops import compare, learnt, meta_learn, transfer
from mftjax.loops import setting as setting_lib

BASE_WIDTH, BEST = 16, 4e-3  # the best rate of hidden matrices there, at the largest budget


@dataclasses.dataclass(frozen=True)
class Planned(setting_lib.Setting):
  """A setting whose runs end at losses of a closed form: 1 at the best rate of the width and the budget, more else."""

  width: int = BASE_WIDTH

  def outcome(self, part, values, weights, tasks, keys, fraction=1.0, index=None):
    hidden = values["learning_rate"] * values["learning_rate_mlp"]
    best = BEST * BASE_WIDTH / self.width * (self.run.num_steps / 8) ** -0.5
    loss = 1 + np.log(hidden / best) ** 2
    return jnp.broadcast_to(jnp.asarray(loss)[:, None], tasks.ability_weight.shape)


@dataclasses.dataclass(frozen=True)
class Guess(transfer.Run):
  """Predicts the best rate of the base width and the largest budget, times a factor, for every task."""

  factor: float = 1.0

  def predict(self, setting, tasks):
    values = {"learning_rate": BEST * self.factor} | transfer_lib.width_multipliers(1, 1)
    return transfer.Recipes(compare.repeated(values, len(tasks.seeds)), compare.equal_weights(tasks))


@pytest.fixture(scope="module")
def kept(meta_trained):
  return learnt.load(*meta_trained)


@pytest.fixture(scope="module")
def planned(meta_trained, kept):
  """`(setting, tasks)` of three tasks with two seeds."""
  config, _ = meta_trained
  pools = meta_tasks.build_pools(config.length, config.tasks.pool_rows, config.seed)
  count = len(pools.ability_names)
  scale = setting_lib.Scale(jnp.full(count, 3.0), jnp.ones(count))
  made = setting_lib.assemble(config, kept.model, pools, {"validation": scale, "test": scale})
  setting = Planned(**{field.name: getattr(made, field.name) for field in dataclasses.fields(setting_lib.Setting)})
  tasks = meta_tasks.sample(pools, "unseen", 3, seed=0)
  found = meta_learn.TaskSet(tasks, jax.tree.map(lambda x: x[:3], kept.known.features))
  return setting, compare.repeat(found, 2)


def rows_of(found):
  return {(row["name"], row["way"]): row for row in found["rows"]}


def test_the_width_rule_is_right_where_the_best_rate_obeys_it(planned):
  setting, tasks = planned
  run = Guess(None, num_seeds=2, num_rates=8)
  base = transfer.of_width(run, setting, tasks, BASE_WIDTH, BASE_WIDTH, run.predict(setting, tasks))
  assert set(rows_of(base)) == {("predicted", "one rate"), ("best of the grid", "one rate")}

  wide = dataclasses.replace(setting, width=4 * BASE_WIDTH)
  found = transfer.of_width(run, wide, tasks, 4 * BASE_WIDTH, BASE_WIDTH, run.predict(setting, tasks))
  rows = rows_of(found)
  for name in ("predicted", "predicted at the base width"):
    plain, ruled = rows[name, "one rate"], rows[name, "width rule"]
    assert plain["rate"] == pytest.approx(BEST) == ruled["rate"]
    assert (plain["hidden_rate"], ruled["hidden_rate"]) == pytest.approx((BEST, BEST / 4))
    assert (plain["ratio"], ruled["ratio"]) == pytest.approx((4, 1), rel=1e-4)  # the grids' parabolas are exact
    # Each ability has 1 - (loss - 1) / 2, of losses 1 + log(4)^2 and 1.
    assert plain["improvement"] == pytest.approx(1 - math.log(4) ** 2 / 2, abs=1e-5)
    assert ruled["improvement"] == pytest.approx(1.0, abs=1e-5)
    assert (plain["minus_best"], ruled["minus_best"]) == pytest.approx((-(math.log(4) ** 2) / 2, 0), abs=1e-5)
  for way, hidden in (("one rate", 1), ("width rule", 4)):
    best = rows["best of the grid", way]
    assert best["ratio"] == pytest.approx(1.0) and best["minus_best"] == 0
    assert best["rate"] == pytest.approx(BEST / 4 * hidden, rel=1e-4)
    assert found["grids"][way]["at_the_end"] == 0


def test_a_grid_grows_towards_the_best_and_says_so_where_it_is_not_reached(planned):
  setting, tasks = planned
  for factor in (transfer.RATIO**4, transfer.RATIO**-4):
    run = Guess(None, num_seeds=2, num_rates=5, factor=factor)
    grid = transfer.scan(run, setting, tasks, run.predict(setting, tasks))
    np.testing.assert_allclose(grid.best, BEST, rtol=1e-4)
    np.testing.assert_allclose(grid.rates[1:] / grid.rates[:-1], transfer.RATIO)
    assert len(grid.rates) == 5 + 3 and grid.gains.shape == (8, 3)  # 2 steps to the best, 1 beyond
  run = Guess(None, num_seeds=2, num_rates=5, factor=100.0)
  grid = transfer.scan(run, setting, tasks, run.predict(setting, tasks))
  assert len(grid.rates) == 10 and grid.best[0] == grid.rates[0]
  assert transfer._shown(grid)["at_the_end"] == 1


def test_the_best_of_a_grid_at_its_ends_and_on_a_plateau():
  rates = 1e-3 * transfer.RATIO ** np.arange(4)
  gains = np.asarray([[3.0, 0.0, 0.0, 0.0], [2.0, 0.5, 1.0, 1.0], [1.0, 0.4, 1.0, -9.0], [0.0, 0.9, 0.0, 0.0]])
  # Falling, rising in the end, two alike: half way; one that diverged: away from it, though never past the middle.
  best = np.log(transfer.Grid(rates, gains).best / 1e-3) / math.log(transfer.RATIO)
  np.testing.assert_allclose(best, [0.0, 3.0, 1.5, 1 - 0.5 * 9 / 11], atol=1e-9)


def test_a_law_that_holds_beyond_the_budgets_that_it_was_fitted_on(planned):
  setting, tasks = planned
  run, most = Guess(None, num_seeds=2, num_rates=8), 8 * 8 * 32
  budgets = np.asarray([most / 2, most / 1.5, most])
  law = transfer_lib.fit_budget_law(BEST * (budgets / most) ** -0.5, budgets)
  found = transfer.of_budget(run, setting, tasks, law)
  rows = {name: row for (name, _), row in rows_of(found).items()}
  assert found["checked_tokens"] == 2 * most and found["exponent"] == pytest.approx(-0.5)
  for name in ("carried by the law", "the law alone"):
    assert rows[name]["improvement"] == pytest.approx(1.0, abs=1e-5)
    assert rows[name]["rate"] == pytest.approx(BEST * 2**-0.5)
  worse = 1 - (0.5 * math.log(2)) ** 2 / 2
  assert rows["predicted at the largest budget"]["improvement"] == pytest.approx(worse, abs=1e-5)
  assert found["observed_exponent"] == pytest.approx(-0.5, abs=1e-3)
  json.dumps(found, allow_nan=False)


def test_budgets_are_those_of_the_features(kept):
  tokens = transfer.budgets(transfer.with_budget(kept.known.features, 12345.0))
  np.testing.assert_allclose(tokens, 12345.0, rtol=1e-6)
  told = transfer.with_budget(kept.known.features, 10.0).ability
  place = features.ABILITY_FEATURES.index("task_log_budget")
  is_there = np.asarray(kept.known.features.ability_weight) > 0
  np.testing.assert_allclose(told[..., place], np.where(is_there, math.log(10.0), 0.0), rtol=1e-6)
  others = np.arange(told.shape[-1]) != place
  np.testing.assert_array_equal(told[..., others], kept.known.features.ability[..., others])


def test_a_shift_of_the_features_is_told_in_spreads(kept):
  known = kept.known.features
  assert transfer.feature_shift(known, known)["feature_shift"] == pytest.approx(0, abs=1e-6)
  spread = features.summaries(known).std(axis=0)[0]
  is_there = np.asarray(known.source_mask)
  moved = dataclasses.replace(known, source=known.source.at[..., 0].add(-3 * spread * is_there))
  found = transfer.feature_shift(known, moved)
  name, distance = found["moved"][0]
  assert name == f"source {features.SOURCE_FEATURES[0]}" and distance == pytest.approx(-3, abs=1e-3)
  assert found["feature_shift"] == pytest.approx(3 / features.summaries(known).shape[1], abs=1e-3)


def changed(config, **fields):
  config = config.copy_and_resolve_references()
  with config.unlocked():
    for name, value in fields.items():
      config.update_from_flattened_dict({name.replace("__", "."): value})
  return config


@pytest.mark.parametrize(
  ("fields", "arguments", "expected"),
  [
    ({"learner__kind": "direct"}, {}, "learner.kind = 'meta'"),
    ({"model__path": "some/model"}, {}, "config.model.path"),
    ({"lora__rank": 4}, {}, "config.lora.rank = 0"),
    ({"hyperparameters__learning_rate__learn": False}, {}, "learning_rate is not learned"),
    ({}, {"widths": []}, "widths is empty"),
    ({}, {"widths": [16, 20]}, "width = 20 must be a multiple of 8"),
    ({}, {"widths": [0]}, "width = 0 must be a multiple"),
    ({}, {"num_tasks": 0}, "num_tasks = 0 must be 1 to config.compare.num_tasks = 4"),
    ({}, {"num_tasks": 5}, "num_tasks = 5 must be"),
    ({}, {"num_seeds": 0}, "num_seeds = 0 must be at least 1"),
    ({}, {"num_rates": 2}, "num_rates = 2 must be at least 3"),
    ({"seed": 3}, {}, "belongs to another config"),
  ],
)
def test_bad_input(meta_trained, fields, arguments, expected):
  config, workdir = meta_trained
  before = sorted(path.name for path in workdir.iterdir())
  with pytest.raises(errors.InputError, match=expected):
    transfer.transfer(changed(config, **fields), workdir, **({"widths": [16], "num_tasks": 2} | arguments))
  assert sorted(path.name for path in workdir.iterdir()) == before


def command(workdir, *flags):
  start = [sys.executable, "-m", "experiments.transfer", "--config=configs/compare.py:tiny", f"--workdir={workdir}"]
  return subprocess.run([*start, *flags], capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize(
  ("flags", "expected"),
  [
    (["--widths=16"], "meta-train there first"),
    ([], "Give --widths"),
    (["--widths=16,big"], "'big' is not a whole number"),
  ],
)
def test_bad_flags_exit_with_2(flags, expected, tmp_path):
  done = command(tmp_path / "none", *flags, "--num_tasks=2")
  assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr
  assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_the_transfer_as_a_user_starts_it(meta_trained, tmp_path):
  workdir = shutil.copytree(meta_trained[1], tmp_path / "run")
  done = command(workdir, "--widths=24", "--num_tasks=2", "--num_seeds=1", "--num_rates=3")
  assert done.returncode == 0, done.stderr
  assert "carried by the law" in done.stdout and (workdir / "transfer.html").exists()
  found = json.loads((workdir / "transfer.json").read_text())
  assert [entry["width"] for entry in found["widths"]] == [16, 24]
  assert [entry["num_heads"] for entry in found["widths"]] == [2, 3]
  base, wide = map(rows_of, found["widths"])
  assert found["widths"][0]["num_parameters"] < found["widths"][1]["num_parameters"]
  for name in ("predicted", "predicted at the base width"):
    plain, ruled = wide[name, "one rate"], wide[name, "width rule"]
    assert plain["rate"] == ruled["rate"] and ruled["hidden_rate"] == pytest.approx(plain["hidden_rate"] * 16 / 24)
  at_base = wide["predicted at the base width", "one rate"]["rate"]
  assert at_base == pytest.approx(base["predicted", "one rate"]["rate"])
  assert wide["predicted", "one rate"]["rate"] != pytest.approx(at_base, rel=1e-6)  # another model, another probe
  for row in [*base.values(), *wide.values(), *found["budget"]["rows"]]:
    assert row["low"] <= row["improvement"] <= row["high"]
    assert row["ratio_interval"][0] <= row["ratio"] * 1.000001 and row["ratio"] <= row["ratio_interval"][1] * 1.000001
  assert found["budget"]["num_tasks"] == 8 and found["budget"]["checked_tokens"] == 2 * 8 * 8 * 32

  # Through Ray a width is the same.
  (one,) = (workdir / "transfer").rglob("width_24.json")
  one.unlink()
  by_ray = ("--config.engine=ray", "--config.ray.workers=2")
  done = command(workdir, "--widths=24", "--num_tasks=2", "--num_seeds=1", "--num_rates=3", *by_ray)
  assert done.returncode == 0 and "width 24 is done" in done.stderr, done.stderr
  assert json.loads((workdir / "transfer.json").read_text()) == found
