"""Recipes are read back as written, refused when wrong, and understood by the trainers."""

import dataclasses
import json

import hypothesis
import hypothesis.strategies as st
import pytest
import transformers
import yaml

from mftjax import recipe
from mftjax.errors import InputError


def _recipe(**changes):
  made = recipe.default(
    ["maths", "code"],
    {"learning_rate": 1e-5, "weight_decay": 0.1, "b1": 0.9, "batch_size": 7.6, "warmup_fraction": 0.05},
    task="both",
    model="some/model",
    provenance={"seed": 3},
  )
  made["mixture"] = {"maths": 0.75, "code": 0.25}
  return made | changes


def test_default_mixes_uniformly():
  made = recipe.default(["a", "b", "c", "d"], {"learning_rate": 0.1})
  assert made["mixture"] == {name: 0.25 for name in "abcd"}
  assert made["format"] == "mftjax-recipe/1"
  assert made["provenance"]["versions"]["jax"]
  with pytest.raises(InputError, match="at least one source"):
    recipe.default([], {})
  with pytest.raises(InputError, match="once"):
    recipe.default(["a", "a"], {})


@hypothesis.given(
  st.dictionaries(st.text(max_size=8), st.floats(1e-3, 1.0), min_size=1, max_size=6),
  st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False, allow_infinity=False), max_size=4),
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_round_trip(tmp_path_factory, weights, hyperparameters):
  total = sum(weights.values())
  made = _recipe(mixture={name: w / total for name, w in weights.items()}, hyperparameters=hyperparameters)
  path = tmp_path_factory.mktemp("r") / "new" / "recipe.json"
  recipe.save(made, path)
  assert recipe.load(path) == made


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"format": "mftjax-recipe/2"}, "mftjax-recipe/2.*reads 'mftjax-recipe/1'"),
    ({"mixture": {"a": 1.5, "b": -0.5}}, "mixture.b is negative"),
    ({"mixture": {"a": float("nan"), "b": 1.0}}, "mixture.a must be a finite number"),
    ({"mixture": {"a": 0.0, "b": 0.0}}, "sum to 0;"),
    ({"mixture": {"a": 0.5, "b": 0.502}}, "sum to 1.002"),
    ({"mixture": {}}, "no source"),
    ({"mixture": [1.0]}, "mixture must be an object"),
    ({"mixture": {"a": "1"}}, "mixture.a must be a finite number, got '1'"),
    ({"hyperparameters": {"learning_rate": float("inf")}}, "hyperparameters.learning_rate"),
    ({"hyperparameters": {"learning_rate": True}}, "hyperparameters.learning_rate"),
  ],
)
def test_refuses(tmp_path, change, message):
  path = tmp_path / "recipe.json"
  path.write_text(json.dumps(_recipe(**change)))
  with pytest.raises(InputError, match=message) as caught:
    recipe.load(path)
  assert str(path) in str(caught.value)


def knot(progress, maths):
  return {"progress": progress, "mixture": {"maths": maths, "code": 1 - maths}}


def test_a_schedule_is_linear_in_the_logarithms(tmp_path):
  made = _recipe(mixture_schedule=[knot(0, 0.8), knot(0.25, 0.5), knot(1.0, 0.2)])
  recipe.save(made, tmp_path / "recipe.json")
  made = recipe.load(tmp_path / "recipe.json")
  for progress, maths in ((-1, 0.8), (0, 0.8), (0.25, 0.5), (1, 0.2), (2, 0.2)):
    assert recipe.mixture_at(made, progress) == pytest.approx({"maths": maths, "code": 1 - maths})
  # Halfway, the odds are the geometric mean: sqrt(4 x 1) and sqrt(1 / 4).
  assert recipe.mixture_at(made, 0.125)["maths"] == pytest.approx(2 / 3)
  assert recipe.mixture_at(made, 0.625)["maths"] == pytest.approx(1 / 3)
  assert recipe.mixture_at(_recipe(), 0.3) == {"maths": 0.75, "code": 0.25}
  ends = _recipe(mixture_schedule=[knot(0, 1.0), knot(1, 0.0)])
  assert recipe.mixture_at(ends, 1e-3)["maths"] == pytest.approx(1.0)
  assert recipe.mixture_at(ends, 0.5)["maths"] == pytest.approx(0.5)


@pytest.mark.parametrize(
  ("schedule", "message"),
  [
    ({}, "mixture_schedule must be a list of two or more"),
    ([knot(0, 0.5)], "mixture_schedule must be a list of two or more"),
    ([knot(0, 0.5), {"progress": 1}], "mixture_schedule must be a list"),
    ([knot(0, 0.5), knot(0.5, 0.5)], r"progress must rise from 0 to 1, got \[0, 0.5\]"),
    ([knot(0, 0.5), knot(0.7, 0.5), knot(0.7, 0.5), knot(1, 0.5)], "progress must rise"),
    ([knot("0", 0.5), knot(1, 0.5)], r"mixture_schedule\[0\].progress must be a finite number"),
    ([knot(0, 0.5), knot(1, 1.5)], r"mixture_schedule\[1\].mixture.code is negative"),
    (
      [knot(0, 0.5), {"progress": 1, "mixture": {"maths": 1.0}}],
      r"\[1\].mixture must name the sources of mixture: maths",
    ),
    ([knot(0, 0.5), {"progress": 1, "mixture": [1.0]}], r"\[1\].mixture must be an object"),
  ],
)
def test_refuses_schedules(schedule, message):
  with pytest.raises(InputError, match=message):
    recipe.check(_recipe(mixture_schedule=schedule), "here")


def test_tolerates_rounded_weights():
  recipe.check(_recipe(mixture={"a": 0.333, "b": 0.333, "c": 0.3335}), "here")


def test_refuses_files(tmp_path):
  path = tmp_path / "recipe.json"
  with pytest.raises(InputError, match="No such file"):
    recipe.load(path)
  path.write_text("{\n  oops")
  with pytest.raises(InputError, match=r"recipe.json:2: not JSON"):
    recipe.load(path)
  path.write_text("[]")
  with pytest.raises(InputError, match="is list"):
    recipe.load(path)
  path.write_text(json.dumps({key: value for key, value in _recipe().items() if key != "mixture"}))
  with pytest.raises(InputError, match="missing mixture"):
    recipe.load(path)
  path.write_bytes(b"\xff\xfe")
  with pytest.raises(InputError, match="UTF-8"):
    recipe.load(path)


def test_refused_save_leaves_the_file(tmp_path):
  path = tmp_path / "recipe.json"
  recipe.save(_recipe(), path)
  before = path.read_bytes()
  with pytest.raises(InputError):
    recipe.save(_recipe(mixture={"a": -1.0, "b": 2.0}), path)
  with pytest.raises(TypeError):
    recipe.save(_recipe(predicted={"loss": object()}), path)
  assert path.read_bytes() == before
  assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.json"]


def test_trl_fields_are_training_arguments(tmp_path):
  torch = pytest.importorskip("torch")
  # SFTConfig extends transformers.TrainingArguments by max_length and the like.
  made = _recipe()
  made["hyperparameters"] |= {"b2": 0.95, "eps": 1e-8, "clip_norm": 1.0, "num_steps": 100, "own_thing": 2.0}
  made["hyperparameters"] |= {"final_fraction": 0.25}
  left_out = recipe.export(made, tmp_path / "trl.json", format="trl")
  config = json.loads((tmp_path / "trl.json").read_text())
  known = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
  assert set(config["sft_config"]) <= known
  assert left_out == {"own_thing": 2.0}
  arguments = transformers.TrainingArguments(output_dir=str(tmp_path / "o"), **config["sft_config"])
  assert arguments.learning_rate == 1e-5
  assert arguments.adam_beta2 == 0.95
  assert arguments.per_device_train_batch_size == 8
  assert arguments.get_warmup_steps(200) == 10
  parameter = torch.nn.Parameter(torch.zeros(1))
  optimizer = torch.optim.AdamW([parameter], lr=arguments.learning_rate)
  schedule = transformers.get_scheduler(
    arguments.lr_scheduler_type,
    optimizer,
    num_warmup_steps=arguments.get_warmup_steps(200),
    num_training_steps=200,
    scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
  )
  rates = []
  for _ in range(200):
    rates.append(schedule.get_last_lr()[0])
    optimizer.step()
    schedule.step()
  assert max(rates) == pytest.approx(1e-5)
  assert schedule.get_last_lr()[0] == pytest.approx(0.25e-5)
  assert config["datasets"] == ["maths", "code"]
  assert config["interleave_datasets"]["probabilities"] == [0.75, 0.25]


def test_trl_interleaves_by_the_mixture(tmp_path):
  import datasets

  made = _recipe(mixture={"maths": 0.7501, "code": 0.2504})  # off by less than the tolerance
  recipe.export(made, tmp_path / "trl.yaml", format="trl")
  config = yaml.safe_load((tmp_path / "trl.yaml").read_text())
  pools = [datasets.Dataset.from_dict({"source": [name] * 2000}) for name in config["datasets"]]
  mixed = datasets.interleave_datasets(pools, **config["interleave_datasets"])["source"]
  assert list(mixed).count("maths") / len(mixed) == pytest.approx(0.75, abs=0.03)


def test_yaml_keeps_numbers(tmp_path):
  for name in recipe.FORMATS:
    recipe.export(_recipe(), tmp_path / "c.yaml", format=name)
    config = yaml.safe_load((tmp_path / "c.yaml").read_text())
    found = {"trl": ["sft_config"], "tunix": ["optimizer_config"]}.get(name, [])
    for key in found:
      config = config[key]
    assert config["learning_rate"] == 1e-5, name  # YAML 1.1 reads a bare 1e-05 as a string


def test_llamafactory(tmp_path):
  recipe.export(_recipe(), tmp_path / "c.yaml", format="llamafactory")
  config = yaml.safe_load((tmp_path / "c.yaml").read_text())
  assert config["dataset"] == "maths,code"
  assert config["mix_strategy"] == "interleave_over"
  assert [float(weight) for weight in config["interleave_probs"].split(",")] == [0.75, 0.25]
  assert config["finetuning_type"] == "full"
  with pytest.raises(InputError, match="commas"):
    recipe.export(_recipe(mixture={"a,b": 1.0}), tmp_path / "d.yaml", format="llamafactory")
  assert not (tmp_path / "d.yaml").exists()


def test_axolotl_cuts_sources_to_the_mixture(tmp_path):
  made = _recipe(mixture={"maths": 0.75, "code": 0.25, "none": 0.0})
  made["hyperparameters"]["lora_rank"] = 8.0
  made["hyperparameters"]["final_fraction"] = 0.1
  sizes = {"maths": 300, "code": 1000}
  recipe.export(made, tmp_path / "c.yaml", format="axolotl", num_examples=sizes)
  config = yaml.safe_load((tmp_path / "c.yaml").read_text())
  assert {entry["path"]: entry["split"] for entry in config["datasets"]} == {
    "maths": "train[:300]",
    "code": "train[:100]",
  }
  assert (config["lr_scheduler"], config["cosine_min_lr_ratio"]) == ("cosine", 0.1)
  assert (config["adapter"], config["lora_r"], config["micro_batch_size"]) == ("lora", 8, 8)
  recipe.export(made, tmp_path / "d.yaml", format="axolotl")
  config = yaml.safe_load((tmp_path / "d.yaml").read_text())
  assert [entry["split"] for entry in config["datasets"]] == ["train[:100%]", "train[:33%]"]
  with pytest.raises(InputError, match="'code'"):
    recipe.export(made, tmp_path / "c.yaml", format="axolotl", num_examples={"maths": 3})


def test_tunix(tmp_path):
  recipe.export(_recipe(), tmp_path / "c.yaml", format="tunix")
  config = yaml.safe_load((tmp_path / "c.yaml").read_text())
  optimizer = config["optimizer_config"]
  assert optimizer["opt_type"] == "adamw"
  assert (optimizer["peak_value"], optimizer["warmup_ratio"], optimizer["b1"]) == (1e-5, 0.05, 0.9)
  assert config["batch_size"] == 8
  made = _recipe()
  made["hyperparameters"]["final_fraction"] = 0.5
  recipe.export(made, tmp_path / "c.yaml", format="tunix")
  optimizer = yaml.safe_load((tmp_path / "c.yaml").read_text())["optimizer_config"]
  assert optimizer["end_value"] == 0.5e-5
  assert "final_fraction" not in optimizer
  assert config["data_mixture"] == {"datasets": ["maths", "code"], "weights": [0.75, 0.25]}


def test_unknown_format_and_hostile_names(tmp_path):
  with pytest.raises(InputError, match="Did you mean 'axolotl'"):
    recipe.export(_recipe(), tmp_path / "c.yaml", format="axolot")
  made = _recipe(task="a\nevil: 1", hyperparameters={"x\ny: 2": 1.0})
  recipe.export(made, tmp_path / "c.yaml", format="axolotl")
  config = yaml.safe_load((tmp_path / "c.yaml").read_text())
  assert "evil" not in config
  assert "y" not in config
