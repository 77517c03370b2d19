"""Methods against forgetting, compared: how they are tuned, runs that are killed or diverge, and the command."""

import dataclasses
import functools
import json
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import ROOT

from configs import continual as continual_config
from mftjax import errors, files, metrics, models, sft
from mftjax.loops import (
  continual,
  continual_methods,
  continual_runs,
  continual_tuning,
  episode,
  retention,
  sequence,
)
from tests.test_loops_sequence import tiny_setting

SPACE = {"learning_rate": ("log", (1e-4, 1e-2)), "replayed": ("linear", (0.1, 0.8)), "decay": ("linear", (-1.0, 0.0))}


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(0, 1000))
def test_trials_start_in_the_middle_stay_within_bounds_and_are_the_same_again(count, seed):
  found = continual_tuning.trials(SPACE, count, seed)
  assert found[0] == pytest.approx({"learning_rate": 1e-3, "replayed": 0.45, "decay": -0.5})
  assert found == continual_tuning.trials(SPACE, count, seed) and len(found) == count
  for values in found:
    assert all(low <= values[name] <= high for name, (_, (low, high)) in SPACE.items())


def test_trials_are_spread_evenly_in_the_scale():
  found = continual_tuning.trials(SPACE, 65, seed=1)[1:]
  assert found != continual_tuning.trials(SPACE, 65, seed=2)[1:]
  parts = np.asarray(
    [[np.log10(v["learning_rate"]) / 2 + 2, (v["replayed"] - 0.1) / 0.7, v["decay"] + 1] for v in found]
  )
  for column in parts.T:
    counts = np.histogram(column, bins=4, range=(0, 1))[0]
    assert counts.min() >= 13 and counts.sum() == 64


@functools.cache
def tiny_entry(name):
  return continual_runs.entry(tiny_setting(), name, {})


def fake_runs(accuracy, loss):
  last = sequence.Measured(jnp.asarray(accuracy), jnp.asarray(loss), jnp.zeros(len(loss)))
  return continual_runs.Runs(last, [last], [], None)


@pytest.mark.parametrize(
  ("accuracy", "loss", "best"),
  [
    ([0.2, 0.6, 0.5, 0.1], [1.0, 3.0, 1.0, 0.5], 1),
    ([0.2, 0.5, 0.5, 0.1], [1.0, 3.0, 2.0, 0.5], 2),  # of equals, the lowest loss
    ([0.2, 0.9, 0.5, 0.1], [1.0, np.nan, 2.0, 0.5], 2),  # one that diverged is never the best
    ([0.0, 0.0, 0.0, 0.0], [np.nan, np.nan, 2.0, np.inf], 2),
  ],
)
def test_tuning_takes_the_trial_of_the_best_accuracy(monkeypatch, accuracy, loss, best):
  setting = tiny_setting()
  config = setting.config.copy_and_resolve_references()
  config.continual.num_trials = 4
  validation = jnp.asarray([[7, 8, 6], [8, 6, 7]])
  setting = dataclasses.replace(setting, config=config, validation=validation)
  seen = []

  def in_groups(setting, found, values, order, keys, is_measured):
    seen.append((values, order, keys))
    of_each = lambda x: np.repeat(np.asarray(x)[:, None], 2, axis=1).reshape(-1)[:, None] + np.asarray([-0.05, 0, 0.05])
    return fake_runs(of_each(accuracy), of_each(loss))

  monkeypatch.setattr(continual_runs, "in_groups", in_groups)
  found = tiny_entry("memory")
  first, *others = continual_tuning.tuned(setting, found, 3)
  assert first["values"] == continual_tuning.trials(found.space, 4, 3)[best] and len(others) == 3
  assert first["accuracy"] == pytest.approx(accuracy[best]) and first["loss"] == pytest.approx(loss[best])
  json.dumps(others, allow_nan=False)
  ((values, order, keys),) = seen
  np.testing.assert_array_equal(order, jnp.tile(validation, (4, 1)))
  trial_of = [one["learning_rate"] for one in values]
  assert trial_of == [trial["learning_rate"] for trial in continual_tuning.trials(found.space, 4, 3) for _ in range(2)]
  # All trials of a sequence draw the same batches.
  drawn = np.asarray(jax.random.key_data(keys)).reshape(4, 2, -1)
  assert (drawn == drawn[0]).all() and (drawn[0, 0] != drawn[0, 1]).any()


def test_each_method_has_its_hyperparameters_and_memories_their_own():
  fixed = {name: tiny_entry(name).fixed for name in ("memory", "A-GEM", "sequential full")}
  options = tiny_setting().config.continual
  assert fixed["memory"]["weight_decay"] == 0
  # The eps that memories are written with would make AdamW of other weights a very slow SGD.
  for name in ("A-GEM", "sequential full"):
    assert fixed[name] == sft.DEFAULTS | {"learning_rate": fixed[name]["learning_rate"]}
  assert tiny_entry("sequential full").space["learning_rate"] == ("log", options.full_learning_rates)
  assert set(tiny_entry("replay 5 %").space) == {"learning_rate", "replayed"}
  learnt = {"meta": retention.init_meta_params(tiny_setting().config, tiny_entry("memory").setup)["memory"]}
  values = sft.DEFAULTS | {"learning_rate": 20.0, "eps": 3.0, "weight_decay": 0.0}
  ours = continual_runs.entry(tiny_setting(), "memory, meta-learned, replay 5 %", {**learnt, "values": values})
  assert ours.fixed["eps"] == 3.0 and ours.space["learning_rate"] == ("log", (5.0, 80.0))
  assert ours.method.stored_fraction == 0.05 and ours.method.trained == "memory"


def test_a_mixture_that_is_learnt_is_not_tuned():
  config = tiny_setting().config.copy_and_resolve_references()
  config.retention.stored_fraction = 0.1
  meta_params = retention.init_meta_params(config, tiny_entry("memory").setup)
  values = episode.hyperparameters(config, meta_params)
  assert float(values["replayed"]) == pytest.approx(0.45)  # the middle of what is tuned
  memories = {"meta": meta_params["memory"], "values": {name: float(x) for name, x in values.items()}}
  ours = continual_runs.entry(tiny_setting(), "memory, meta-learned, replay 5 %", memories)
  assert set(ours.space) == {"learning_rate"} and ours.fixed["replayed"] == values["replayed"]
  assert "memory, meta-learned" not in continual_methods.chosen(config)
  config.continual.methods = ("memory, meta-learned",)
  with pytest.raises(errors.InputError, match="stored_fraction = 0"):
    continual_methods.chosen(config)


VALUES = {"learning_rate": 0.03}


def run(entry, folder=None, order=None, values=VALUES, setting=None):
  setting = setting or tiny_setting()
  order = setting.stream.order if order is None else order
  keys = jax.vmap(jax.random.key)(jnp.arange(2))
  return continual_runs.run(setting, entry, [{**entry.fixed, **values}] * 2, order, keys, folder)


@functools.cache
def whole_run():
  """Two runs of the memory over three tasks, not interrupted; for other files too."""
  return run(tiny_entry("memory"))


@pytest.fixture(scope="module")
def whole():
  return whole_run()


def test_a_run_has_a_matrix_and_what_each_task_wrote(whole):
  assert whole.matrix("loss").shape == whole.matrix("accuracy").shape == (2, 3, 3)
  assert len(whole.written) == 3 and all(0 < len(slots) <= 8 for slots in whole.written)
  # A task's own loss falls when it is learnt.
  before = np.asarray(whole.before.loss)
  assert whole.matrix("loss")[:, 0, 0].mean() < before[:, 0].mean()


def test_the_model_that_is_kept_is_the_one_that_was_judged(whole, tmp_path):
  setting, entry = tiny_setting(), tiny_entry("memory")
  models.save(continual_runs.first_model(entry, whole, entry.fixed | VALUES), None, tmp_path / "model")
  kept, _ = models.load(tmp_path / "model")
  for rows, wanted in (
    (setting.stream.base, whole.after[-1].base_loss[0]),
    ({name: x[setting.stream.order[0, 0]] for name, x in setting.stream.test.items()}, whole.after[-1].loss[0, 0]),
  ):
    batch = sequence.as_batch(rows)
    mask = sft.target_mask(batch)
    logits = kept(batch.tokens, batch.segment_ids, batch.positions)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, 1:])
    assert float((losses * mask).sum() / mask.sum()) == pytest.approx(float(wanted), rel=1e-4)


class Killed(Exception):
  pass


@pytest.mark.parametrize("count", [2, 3], ids=["between tasks", "inside a task"])
def test_a_run_that_is_killed_goes_on_to_the_same_matrices(whole, tmp_path, count):
  entry, calls = tiny_entry("memory"), []

  def advance(state, values, order, number, keys, steps):
    if len(calls) == count:
      raise Killed
    calls.append((int(number), *map(int, steps)))
    return entry.programs.advance(state, values, order, number, keys, steps)

  counting = dataclasses.replace(entry, programs=dataclasses.replace(entry.programs, advance=advance))
  with pytest.raises(Killed):
    run(counting, tmp_path)
  assert len(calls) == count
  count, done = 99, calls.copy()
  resumed = run(counting, tmp_path)
  # Nothing is done twice.
  assert calls == [(task, *steps) for task in range(3) for steps in ((0, 1), (2, 3))] and calls[: len(done)] == done
  for name in ("accuracy", "loss"):
    np.testing.assert_array_equal(resumed.matrix(name), whole.matrix(name))
  for found, wanted in zip(resumed.written, whole.written, strict=True):
    np.testing.assert_array_equal(found, wanted)
  for found, wanted in zip(jax.tree.leaves(resumed.final), jax.tree.leaves(whole.final), strict=True):
    np.testing.assert_array_equal(found, wanted)
  again = run(counting, tmp_path)
  assert len(calls) == 6
  np.testing.assert_array_equal(again.matrix("loss"), whole.matrix("loss"))


def test_filling_up_a_group_changes_nothing(whole):
  """Three runs, two at once: the first two as before, and the third like the first, whose it repeats."""
  setting, entry = tiny_setting(), tiny_entry("memory")
  order = jnp.concatenate([setting.stream.order, setting.stream.order[:1]])
  keys = jax.vmap(jax.random.key)(jnp.asarray([0, 1, 0]))
  found = continual_runs.in_groups(setting, entry, [{**entry.fixed, **VALUES}] * 3, order, keys)
  np.testing.assert_array_equal(found.matrix("loss")[:2], whole.matrix("loss"))
  np.testing.assert_array_equal(found.matrix("loss")[2], whole.matrix("loss")[0])
  np.testing.assert_array_equal(found.before.loss[2], whole.before.loss[0])


def test_the_row_of_a_method_sums_up_its_matrices(whole, tmp_path):
  entry = tiny_entry("memory")
  files.write_json(tmp_path / "trials.json", [{"values": VALUES}])
  found = continual._row(tiny_setting(), entry, 0, tmp_path)
  losses, row = whole.matrix("loss"), found["row"]
  each = [metrics.continual_loss(one, start) for one, start in zip(losses, np.asarray(whole.before.loss), strict=True)]
  for name in ("average_loss", "backward_transfer", "forgetting"):
    assert row["loss"][name][0] == pytest.approx(np.mean([one[name] for one in each]), rel=1e-6)
  np.testing.assert_allclose(row["matrix"]["loss"], losses.mean(axis=0), rtol=1e-6)
  change = np.asarray(whole.after[-1].base_loss) / np.asarray(whole.before.base_loss) - 1
  assert row["base_loss_change"][0] == pytest.approx(change.mean(), rel=1e-5)
  assert row["trained_parameters"] == 8 * 16 and row["stored_rows"] == 0 and row["values"] == VALUES
  assert found["memory"]["num_slots"] == 64


def test_a_method_that_diverges_has_a_row_with_finite_accuracies(tmp_path):
  entry = tiny_entry("memory")
  files.write_json(tmp_path / "trials.json", [{"values": {"learning_rate": 3e38, "eps": 1e-8}}])
  found = continual._row(tiny_setting(), entry, 0, tmp_path)
  row = found["row"]
  assert row["base_loss_change"] is None and "not finite" in continual._summary(row)
  assert all(np.isfinite(x).all() for x in row["accuracy"].values())
  assert all(np.isfinite(x).all() for x in row["loss"].values())
  assert row["matrix"]["loss"][2][0] is None and row["base_loss"][3] is None and row["base_loss"][0] > 0
  json.dumps(found, allow_nan=False)  # what other readers of JSON do not know


@pytest.mark.slow
def test_beside_a_frozen_memory_that_is_new_a_lora_learns_what_it_learns_without():
  config = tiny_setting().config.copy_and_resolve_references()
  config.continual.write_rule = "frozen"
  setting = dataclasses.replace(tiny_setting(), config=config)
  entry = continual_runs.entry(setting, "memory", {})
  plain = tiny_entry("sequential LoRA")
  assert entry.space == plain.space and entry.fixed == plain.fixed
  found, wanted = run(entry, setting=setting), run(plain)
  np.testing.assert_allclose(found.matrix("loss"), wanted.matrix("loss"), rtol=1e-5)
  assert [slots.size for slots in found.written] == [0, 0, 0]
  before = entry.setup.merge((entry.setup.params, entry.setup.held)).memories()[0]
  after = continual_runs.first_model(entry, found, VALUES).memories()[0]
  for name in ("keys", "values", "delta"):
    np.testing.assert_array_equal(getattr(after, name)[...], getattr(before, name)[...])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sequential full", "sequential LoRA", "L2-SP", "EWC", "LwF", "O-LoRA", "merging"])
def test_every_method_learns_the_first_task(name):
  entry = tiny_entry(name)
  low = {key: bounds[0] for key, (_, bounds) in entry.space.items()}
  found = run(entry, values=low | {"learning_rate": 0.05} | ({"merge_scale": 1.0} if name == "merging" else {}))
  losses, before = found.matrix("loss"), np.asarray(found.before.loss)
  assert np.isfinite(losses).all() and (losses[:, 0, 0] < before[:, 0] - 0.01).all()
  if "stack" in found.final.carry:  # each task has left adapters of its own
    for stack in jax.tree.leaves(found.final.carry["stack"]):
      assert np.any(np.asarray(stack[:, :2]), axis=(2, 3, 4)).all()


CONFIG = "configs/continual.py:tiny"
SMALL = ("--config.lora.targets=('q_proj',)", "--config.continual.methods=('joint', 'memory')")


def command(workdir, *extra):
  return subprocess.run(
    [sys.executable, "-m", "experiments.continual", f"--config={CONFIG}", f"--workdir={workdir}", *extra],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
  )


ADAPTERS = (
  "--config.memory.placement=adapters",
  "--config.memory.context=True",
  "--config.memory.num_slots=30",
  "--config.memory.num_shared=6",
  "--config.memory.null_cosine=0.0",
)


@pytest.mark.slow
def test_a_memory_of_adapters_as_a_user_starts_it(tmp_path):
  methods = "--config.continual.methods=('memory', 'memory, meta-learned', 'sequential LoRA')"
  keep = "--config.continual.keep_models=True"
  done = command(tmp_path / "run", "--config.continual.base_steps=2", *ADAPTERS, methods, keep)
  assert done.returncode == 0, done.stderr
  kept = {path.parent.name: models.load(path)[0] for path in (tmp_path / "run" / "methods").glob("*/model")}
  assert {name: model.adapters is not None for name, model in kept.items()} == {
    **{"memory": True, "memory__meta_learned": True, "sequential_LoRA": False}
  }
  result = json.loads((tmp_path / "run" / "continual.json").read_text())
  rows = {row["name"]: row for row in result["rows"]}
  # What a task writes is as large as the LoRA that other methods train.
  assert rows["memory"]["trained_parameters"] == rows["sequential LoRA"]["trained_parameters"]
  assert rows["memory, meta-learned"]["values"] != rows["memory"]["values"] and result["meta_training"]
  assert result["memory"]["slots_by_task"] == [8, 8, 8]


@pytest.mark.slow
def test_the_comparison_as_a_user_starts_it(tmp_path):
  workdir = tmp_path / "run"
  done = command(workdir, *SMALL)
  assert done.returncode == 0, done.stderr
  result = json.loads((workdir / "continual.json").read_text())
  assert [row["name"] for row in result["rows"]] == ["joint", "memory"]
  assert all(word in done.stdout for word in ("memory", "joint", "continual.json", "continual.html"))
  assert result["num_tasks"] == len(result["task_names"]) == 3 and result["tokens_per_task"] == 4 * 8 * 28
  groups = {row["name"]: row["group"] for row in result["rows"]}
  assert groups == {"joint": "upper bound", "memory": "ours"}
  assert "joint" in (workdir / "continual.html").read_text()
  kept = {path: path.stat().st_mtime_ns for path in (workdir / "methods").rglob("*") if path.is_file()}
  again = command(workdir, *SMALL)
  assert again.returncode == 0, again.stderr
  assert {path: path.stat().st_mtime_ns for path in (workdir / "methods").rglob("*") if path.is_file()} == kept
  assert json.loads((workdir / "continual.json").read_text()) == result

  # Through Ray it is the same.
  by_ray = command(tmp_path / "by_ray", *SMALL, "--config.engine=ray", "--config.ray.workers=2")
  assert by_ray.returncode == 0 and "memory is done" in by_ray.stderr, by_ray.stderr
  without_clock = lambda found: found | {"rows": [row | {"seconds": 0} for row in found["rows"]]}
  assert without_clock(json.loads((tmp_path / "by_ray" / "continual.json").read_text())) == without_clock(result)


def test_other_processes_have_the_same_setting_and_memories():
  setting = tiny_setting()
  memory = retention.init_meta_params(setting.config, tiny_entry("memory").setup)["memory"]
  meta, joint = (jax.tree.map(lambda x, sign=sign: x + sign, memory) for sign in (1, -1))
  values = sft.DEFAULTS | {"learning_rate": 20.0}
  sent = pickle.dumps(continual._portable(setting, {"meta": meta, "values": values, "joint": joint}))
  found, memories = continual._build(setting.config, *pickle.loads(sent))
  assert list(memories) == ["meta", "values", "joint"] and memories["values"] == values
  for tree, like in ((found.base[1], setting.base[1]), (memories["meta"], meta), (memories["joint"], joint)):
    jax.tree.map(np.testing.assert_array_equal, tree, like)
  np.testing.assert_array_equal(found.stream.order, setting.stream.order)


BAD = {
  "unknown method": (["--config.continual.methods=('EWCC',)"], "Did you mean 'EWC'"),
  "slots are no square": (
    [f"--config.memory.{field}" for field in ("product_keys=True", "qk_norm=False", "null_cosine=0.0", "num_slots=60")],
    "num_slots = 60",
  ),
  "more reads than slots": (["--config.memory.top_k=65"], "top_k = 65"),
  "adapters that write values": (
    [*ADAPTERS, "--config.continual.write_rule=sparse", "--config.continual.methods=('memory',)"],
    "write_rule = 'sparse'",
  ),
  "adapters without values to train": (
    [*ADAPTERS, "--config.continual.methods=('memory, no outer loop',)"],
    "does not have",
  ),
  "unknown kind": (["--config.continual.kinds=('rule', 'code', 'fact')"], "Did you mean 'facts'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_a_bad_flag_is_one_message_and_exit_2(name, tmp_path):
  flags, expected = BAD[name]
  done = command(tmp_path / "untouched", "--config.continual.base_steps=1", *flags)
  assert done.returncode == 2, done.stderr
  assert expected in done.stderr and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
  assert not (tmp_path / "untouched").exists()


def test_an_unknown_method_is_named_before_anything_is_written(tmp_path):
  config = continual_config.get_config("tiny")
  config.continual.methods = ("joint", "sequential LORA")
  with pytest.raises(errors.InputError, match="Did you mean 'sequential LoRA'"):
    continual.compare(config, tmp_path / "untouched")
  assert not (tmp_path / "untouched").exists()


def test_methods_have_files_of_their_own():
  names = [files.named(name) for name in continual_methods.METHODS]
  assert len(set(names)) == len(names) and "replay_5_percent" in names
