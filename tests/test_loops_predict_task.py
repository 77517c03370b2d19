"""A recipe for a task of one's own: what it says, that it can be trained by, and what is refused."""

import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import own_task
import pytest
from flax import nnx
from pages import ROOT

from mftjax import config as config_lib
from mftjax import errors, feature_cache, models, recipe, report
from mftjax.data import sources, tokens
from mftjax.loops import explain, finetune, learnt, predict_task, refine, setting

PREFERENCE = (0.2, 0.8)
ABILITIES = ("copying", "modular")


def files_of(folder):
  return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def predicted(meta_trained):
  """The path of the recipe, and the recipe."""
  path = predict_task.predict_task(*meta_trained, own_task.get_config(), PREFERENCE, refine_steps=1)
  return path, recipe.load(path)


def test_what_was_kept_is_read_back(meta_trained):
  config, workdir = meta_trained
  kept = learnt.load(config, workdir)
  said = json.loads((workdir / "meta_learner.json").read_text())
  assert said["model_digest"] == kept.digest == feature_cache.digest(kept.model.params)
  assert kept.spread_factor == 1.7
  # The recipes that stand beside the known tasks are those that this very meta-learner predicts.
  prediction = kept.predict(jax.tree.map(lambda x: x[3], kept.known.features))
  space = config_lib.space(config)
  for name, value in space.constrain(prediction.hyperparameters).items():
    assert kept.known.hyperparameters[name][3] == pytest.approx(float(value), rel=1e-4)
  is_there = kept.known.sources[3] != ""
  weights = jax.nn.softmax(jnp.where(is_there, prediction.mixture_logits, -jnp.inf))
  np.testing.assert_allclose(kept.known.weights[3], weights, atol=1e-5)
  assert all("/" in name for name in kept.known.sources[3][is_there])


def test_losses_and_intervals(meta_trained, predicted):
  config, workdir = meta_trained
  said = predicted[1]["predicted"]
  kept = learnt.load(config, workdir)
  for name, base in said["base_loss"].items():
    spec = {"suite": name, "num_examples": 30, "suite_split": "validation"}
    rows = sources.load_rows(spec, tokens.char_tokenizer(), 32, where="test")
    kept_rows = np.arange(16) * len(rows.tokens) // 16 if len(rows.tokens) > 16 else np.arange(16) % len(rows.tokens)
    assert base == pytest.approx(plain_loss(kept, rows, kept_rows), rel=1e-4)
  assert said["ability_weight"] == pytest.approx(dict(zip(ABILITIES, PREFERENCE, strict=True)))
  (file,) = [path for path in (workdir / "features").glob("*.npz") if np.load(path)["source"].shape[0] == 1]
  probed = jax.tree.map(lambda x: x[0], feature_cache.load(file, kept.digest))
  prediction = kept.predict(probed)
  for number, name in enumerate(ABILITIES):
    expected, (low, high) = said["ability_loss"][name], said["ability_loss_interval"][name]
    assert expected / said["base_loss"][name] == pytest.approx(float(jnp.exp(prediction.loss_ratio[number])), rel=1e-5)
    half = 1.7 * float(jnp.exp(prediction.log_spread[number]))
    assert np.log(high / expected) == pytest.approx(half, rel=1e-4)
    assert np.log(expected / low) == pytest.approx(half, rel=1e-4)
  assert said["probe_tokens"] == int(probed.tokens) > 0
  assert (said["refine_steps"], said["refine_tokens"]) == (1, 8 * 8 * 32)


def plain_loss(kept, rows, index):
  """Mean over rows of the mean cross-entropy of their targets, position by position."""
  model = kept.model
  fields = [jnp.asarray(getattr(rows, name)[index]) for name in ("tokens", "segment_ids", "positions")]
  batch = types.SimpleNamespace(**dict(zip(("tokens", "segment_ids", "positions"), fields, strict=True)))
  log_probs = np.asarray(jax.nn.log_softmax(model.apply(model.params, batch)), np.float64)
  losses = []
  for row, at in enumerate(index):
    places = np.flatnonzero(rows.loss_mask[at])
    losses.append(-np.mean([log_probs[row, place - 1, rows.tokens[at, place]] for place in places]))
  return np.mean(losses)


def test_the_features_are_kept(meta_trained, predicted, monkeypatch):
  config, workdir = meta_trained

  def never(self):
    raise AssertionError("probed again")

  monkeypatch.setattr(setting.Setting, "probing", property(never))
  path, found = predicted
  again = recipe.load(predict_task.predict_task(config, workdir, own_task.get_config(), PREFERENCE))
  assert path.parent.name == again["task"] == "own"
  assert again["predicted"]["ability_loss"] == found["predicted"]["ability_loss"]
  assert again["mixture"] != found["mixture"]  # that one was refined
  recipe.save(found, path)


def test_the_recipe_is_one_to_finetune_by(meta_trained, predicted, tmp_path):
  _, workdir = meta_trained
  task = own_task.get_config()
  task.model.path = str(workdir / "base_model")
  folder = finetune.finetune(task, tmp_path / "run", str(predicted[0]))
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert len(lines) == predicted[1]["hyperparameters"]["num_steps"] == 6
  base, tuned = (models.load(path)[0] for path in (task.model.path, folder))
  assert not np.array_equal(base.embedding[...], tuned.embedding[...])
  assert predicted[1]["model"] == task.model.path


def test_refining_goes_down_the_gradient():
  """On a quadratic in place of a run, whose minimum is known."""
  target = {"x": jnp.asarray([1.0, -2.0])}

  def gradients(recipes, tasks, keys):
    grad = jax.tree.map(lambda x, t: x - t, recipes, target)
    return None, grad, 0.5 * grad["x"][:, None] ** 2, jnp.asarray([True, True])

  fake = types.SimpleNamespace(single_gradients=gradients)
  start = {"x": jnp.zeros(2)}
  keys = lambda step: jax.random.split(jax.random.key(step), 2)
  found, losses = refine.descend(fake, jnp.zeros(2), keys, start, 200, 0.1, batch_size=2)
  np.testing.assert_allclose(found["x"], target["x"], atol=0.01)
  assert losses.shape == (200, 2, 1)
  np.testing.assert_allclose(losses[0, :, 0], [0.5, 2.0])
  unmoved, none = refine.descend(fake, jnp.zeros(2), keys, start, 0, 0.1)
  assert unmoved is start and len(none) == 0


def test_a_step_averages_runs_with_seeds_of_their_own():
  """What a run gives is drawn by its key alone; Adam's first step shows the sign of the mean."""
  seen = []

  def gradients(recipes, tasks, keys):
    drawn = jax.vmap(jax.random.normal)(keys)
    seen.append(np.asarray(drawn))
    return None, {"x": jnp.sign(drawn) * 1e3 + drawn}, drawn[:, None], drawn < 10

  keys = lambda step: jax.random.split(jax.random.key(step), 64)
  fake, start = types.SimpleNamespace(single_gradients=gradients), {"x": jnp.zeros(64)}
  found, losses = refine.descend(fake, jnp.zeros(64), keys, start, 1, 0.1, num_runs=3, batch_size=64)
  assert len(seen) == 3 and len(np.unique(np.round(seen, 6))) == 3 * 64
  np.testing.assert_allclose(losses[0, :, 0], np.mean(seen, axis=0), rtol=1e-5)
  mean = np.mean([1e3 * np.sign(drawn) + drawn for drawn in seen], axis=0)
  np.testing.assert_allclose(found["x"], -0.1 * np.sign(mean), rtol=1e-4)
  alone, _ = refine.descend(fake, jnp.zeros(64), keys, start, 1, 0.1, batch_size=64)
  np.testing.assert_array_equal(seen[3], seen[0])  # one run takes the very key
  assert not np.array_equal(alone["x"], found["x"])


def test_preferences_are_a_grid_on_the_simplex():
  np.testing.assert_allclose(explain.preferences(2, 21)[:, 0], np.arange(21) / 20)
  for num_abilities, count in ((3, 21), (4, 20)):
    grid = explain.preferences(num_abilities, 21)
    assert grid.shape == (count, num_abilities) and len(np.unique(grid, axis=0)) == count
    np.testing.assert_allclose(grid.sum(axis=1), 1)
  assert len(explain.preferences(2, 0)) == 0


def test_a_known_task_is_its_own_nearest(meta_trained):
  known = learnt.load(*meta_trained).known
  shown = explain.nearest(known, jax.tree.map(lambda x: x[5], known.features))
  found = shown["tasks"]
  assert shown["typical_distance"] > 0
  assert found[0]["distance"] == 0 < found[1]["distance"] <= found[2]["distance"]
  assert sum(found[0]["mixture"].values()) == pytest.approx(1, abs=1e-5)
  assert list(found[0]["abilities"]) == [name for name in known.abilities[5] if name]


def test_front_and_attributions(meta_trained, predicted):
  path, found = predicted
  shown = json.loads((path.parent / "prediction.json").read_text())
  front = shown["front"]
  assert front["abilities"] == list(ABILITIES) and len(front["preferences"]) == 21
  np.testing.assert_allclose(np.sum(front["preferences"], axis=1), 1, rtol=1e-6)
  assert np.min(front["preferences"]) == pytest.approx(0.02)
  assert front["probe_tokens"] == 21 * found["predicted"]["probe_tokens"]
  # The recipe's preference lies between two of the grid, and so does what is expected.
  weights = np.asarray(front["preferences"])[:, 0]
  at = np.argmin(np.abs(weights - PREFERENCE[0]))
  assert abs(np.log(front["expected"][at][0] / found["predicted"]["ability_loss"]["copying"])) < 0.1
  outputs = [output["output"] for output in shown["attributions"]]
  assert outputs == ["logit of copying", "logit of modular", "logit of wrong", "log learning_rate"]
  assert all(len(output["features"]) == 8 for output in shown["attributions"])
  assert sum(output["value"] for output in shown["attributions"][:3]) == pytest.approx(0, abs=1e-4)


def test_the_page(meta_trained, predicted):
  path, found = predicted
  page = report.write_task(path.parent).read_text()
  for name, loss in found["predicted"]["ability_loss"].items():
    assert name in page and f"{loss:.3f}" in page and f"{found['predicted']['base_loss'][name]:.3f}" in page
  for said in ("Sundararajan", "Nearest meta-tasks", "Other preferences", "copying against modular"):
    assert said in page
  (path.parent / "none").mkdir()
  recipe.save(found, path.parent / "none" / "recipe.json")
  with pytest.raises(errors.InputError, match=r"prediction\.json"):
    report.write_task(path.parent / "none")


BAD = {
  "no ability": ("no_ability", {}, {}, "abilities is empty"),
  "one source": ("one_source", {}, {}, "one source only, 'copying'"),
  "too many sources": ("many_sources", {}, {}, "7 sources; the meta-learner is for at most 6"),
  "too many abilities": ("many_abilities", {}, {}, "4 abilities; the meta-learner is for at most 3"),
  "another length": ("", {"length": 48}, {}, "length = 48, but the meta-learner is for rows of 32"),
  "too large a budget": ("", {"budget_tokens": 100 * 8 * 32}, {}, "budget is 12.5 times the largest"),
  "too small a budget": ("", {"budget_tokens": 2 * 8 * 32}, {}, "budget is 0.25 times the largest"),
  "no such file": ("", {"sources.wrong": {"path": "none.jsonl"}}, {}, "no file none.jsonl"),
  "an unsafe name": ("", {"task": "../own"}, {}, "task = '../own'"),
  "not on the simplex": ("", {}, {"preference": (0.5, 0.6)}, "sum 1.1"),
  "negative preference": ("", {}, {"preference": (-0.5, 1.5)}, "place 0"),
  "preference of another length": ("", {}, {"preference": (1.0,)}, "2 finite, non-negative numbers"),
  "negative refine": ("", {}, {"refine_steps": -1}, "--refine = -1"),
  "negative front": ("", {}, {"num_preferences": -1}, "--front = -1"),
  "no model there": ("", {"model.path": "tests"}, {}, "tests has no config.json"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, meta_trained, monkeypatch):
  config, workdir = meta_trained
  variant, fields, options, expected = BAD[name]
  task = own_task.get_config(variant)
  for field, value in fields.items():
    if isinstance(value, dict):
      task.sources[field.split(".")[1]] = ml_collections.ConfigDict(value)
    else:
      task.update_from_flattened_dict({field: value})
  before = files_of(workdir)
  monkeypatch.setattr(jax, "jit", lambda *_, **__: pytest.fail("compiled"))
  with pytest.raises(errors.InputError, match=expected.replace("(", r"\(")) as raised:
    predict_task.predict_task(config, workdir, task, **options)
  assert "\n" not in str(raised.value)
  assert files_of(workdir) == before


def test_another_base_model_is_refused(meta_trained, tmp_path):
  config, workdir = meta_trained
  kept = learnt.load(config, workdir)
  other = jax.tree.map(lambda x: x + 1e-3, kept.model.params)
  models.save(nnx.merge(kept.model.graphdef, other), kept.tokenizer, tmp_path / "other")
  task = own_task.get_config()
  task.model.path = str(tmp_path / "other")
  before = files_of(workdir)
  with pytest.raises(errors.InputError, match="another base model"):
    predict_task.predict_task(config, workdir, task)
  assert files_of(workdir) == before
  task.model.path = str(workdir / "base_model")  # the right one by its name
  assert learnt.load(config, workdir, task.model.path).digest == kept.digest


def test_a_workdir_without_a_meta_learner_or_with_a_damaged_one(meta_trained, tmp_path):
  config, workdir = meta_trained
  with pytest.raises(errors.InputError, match="meta-train there first"):
    predict_task.predict_task(config, tmp_path / "none", own_task.get_config())
  assert not (tmp_path / "none").exists()
  for name in ("meta_learner.json", "meta_learner.npz"):
    (tmp_path / name).write_bytes((workdir / name).read_bytes())
  (tmp_path / "meta_learner.npz").write_bytes(b"torn")
  with pytest.raises(errors.InputError, match="cannot read the meta-learner"):
    learnt.load(config, tmp_path)
  said = json.loads((workdir / "meta_learner.json").read_text())
  (tmp_path / "meta_learner.npz").write_bytes((workdir / "meta_learner.npz").read_bytes())
  (tmp_path / "meta_learner.json").write_text(json.dumps({**said, "features": {}}))
  with pytest.raises(errors.InputError, match="another version of mftjax"):
    learnt.load(config, tmp_path)


def test_a_direct_learner_predicts_for_no_other_task(meta_trained):
  direct = own_task.get_config()
  with pytest.raises(errors.InputError, match="needs a meta-learner"):
    predict_task.predict_task(direct, meta_trained[1], own_task.get_config())


@pytest.mark.slow
@pytest.mark.parametrize(
  ("extra", "expected"),
  [
    ([], "give --task"),
    (["--task=tests/none.py"], "none.py"),
    (["--task=tests/own_task.py", "--preference=1,x"], "'x' is not a number"),
  ],
)
def test_bad_flags_exit_with_2(extra, expected, meta_trained):
  _, workdir = meta_trained
  before = files_of(workdir)
  command = [sys.executable, "-m", "experiments.predict", "--config=configs/compare.py:tiny", f"--workdir={workdir}"]
  done = subprocess.run([*command, *extra], capture_output=True, text=True, cwd=ROOT, check=False)
  assert done.returncode == 2, done.stderr
  assert expected in done.stderr and "Traceback" not in done.stderr
  assert files_of(workdir) == before
