"""Each hyperparameter goes to the field that the other trainer has for it, or is named as left out."""

import dataclasses
import json
import logging

import numpy as np
import optax
import pytest
import transformers
import yaml

from mftjax import config as config_lib
from mftjax import exporters, recipe, sft
from mftjax.loops import predict


def made(**hyperparameters):
  """A recipe with every hyperparameter of the SFT step, as `predict` writes it, and these."""
  names = {**sft.DEFAULTS, "batch_size": 8, "num_steps": 100}
  found = recipe.default(["maths", "code"], {**names, **hyperparameters}, task="both", model="some/model")
  found["mixture"] = {"maths": 0.75, "code": 0.25}
  return found


def exported(found, name):
  config, left_out, notes = exporters.build(found, name)
  return config, left_out, notes


@pytest.mark.parametrize("name", sorted(recipe.FORMATS))
def test_the_default_recipe_leaves_nothing_out(name):
  config, left_out, notes = exported(made(), name)
  assert left_out == {} and notes == []
  assert "stop_fraction" not in json.dumps(config)


@pytest.mark.parametrize("name", sorted(recipe.FORMATS))
def test_every_hyperparameter_has_a_field_or_is_named(name):
  changed = {key: value * 0.5 + 0.25 for key, value in sft.DEFAULTS.items()}
  _, left_out, notes = exported(made(**changed, lora_rank=4.0, lora_alpha=16.0), name)
  without = {
    "trl": {"decay_power", "learning_rate_embedding", "learning_rate_attention", "learning_rate_mlp"},
    "axolotl": {"decay_power", "label_smoothing"},
    "llamafactory": {"decay_power", "learning_rate_embedding", "learning_rate_attention", "learning_rate_mlp"},
    "tunix": {"label_smoothing", "learning_rate_embedding", "learning_rate_attention", "learning_rate_mlp"},
  }[name]
  assert set(left_out) == without | {"prompt_loss_weight", "learning_rate_norm", "learning_rate_memory"}
  assert notes == ["the modules that the LoRA is on"]


def test_steps_are_those_of_finetune():
  found = made(stop_fraction=float(np.float32(0.7)), num_steps=10)
  steps = {
    "trl": lambda config: config["sft_config"]["max_steps"],
    "axolotl": lambda config: config["max_steps"],
    "llamafactory": lambda config: config["max_steps"],
    "tunix": lambda config: config["training_config"]["max_steps"],
  }
  for name, read in steps.items():
    assert read(exported(found, name)[0]) == 7, name
  del found["hyperparameters"]["num_steps"]
  assert set(exported(found, "trl")[1]) == {"stop_fraction"}


def test_loss_on_whole_prompts():
  assert exported(made(prompt_loss_weight=1.0), "trl")[0]["sft_config"]["completion_only_loss"] is False
  assert exported(made(prompt_loss_weight=1.0), "axolotl")[0]["train_on_inputs"] is True
  assert exported(made(prompt_loss_weight=1.0), "llamafactory")[0]["train_on_prompt"] is True
  assert exported(made(prompt_loss_weight=1.0), "tunix")[1] == {"prompt_loss_weight": 1.0}
  assert exported(made(prompt_loss_weight=0.5), "trl")[1] == {"prompt_loss_weight": 0.5}


def test_lora_keeps_its_scale():
  # The output is multiplied by 16 / 3.6 times 1.5; a rank of 4 takes the alpha that makes it so.
  found = made(lora_rank=3.6, lora_alpha=16.0, lora_scale=1.5)
  ranks = {
    "trl": lambda config: (config["lora_config"]["r"], config["lora_config"]["lora_alpha"]),
    "axolotl": lambda config: (config["lora_r"], config["lora_alpha"]),
    "llamafactory": lambda config: (config["lora_rank"], config["lora_alpha"]),
    "tunix": lambda config: tuple(config["model_config"]["lora_config"][name] for name in ("rank", "alpha")),
  }
  for name, read in ranks.items():
    config, left_out, _ = exported(found, name)
    rank, alpha = read(config)
    assert rank == 4 and alpha / rank == pytest.approx(16 / 3.6 * 1.5) and left_out == {}, name
  assert exported(found, "llamafactory")[0]["finetuning_type"] == "lora"
  assert exported(found, "axolotl")[0]["adapter"] == "lora"
  assert exported(found, "trl")[0]["lora_config"]["task_type"] == "CAUSAL_LM"
  del found["hyperparameters"]["lora_alpha"]
  assert exported(found, "trl")[1] == {"lora_scale": 1.5}


def test_a_recipe_learned_with_lora_is_not_exported_as_full_fine_tuning():
  config = config_lib.default()
  config.sources.a = {"suite": "copying"}
  config.lora.rank, config.lora.alpha = 8, 16.0
  found = predict.default_recipe(config)
  assert exported(found, "llamafactory")[0]["finetuning_type"] == "lora"
  assert exported(found, "axolotl")[0] | {"lora_r": 8, "lora_alpha": 16.0} == exported(found, "axolotl")[0]


def test_axolotl_takes_learning_rates_by_module():
  found = made(learning_rate=1e-4, learning_rate_embedding=0.1, learning_rate_mlp=3.0, learning_rate_norm=2.0)
  config, left_out, _ = exported(found, "axolotl")
  assert config["embedding_lr_scale"] == 0.1
  (group,) = config["lr_groups"]
  assert group["name"] == "mlp" and group["lr"] == pytest.approx(3e-4)
  assert group["modules"] == ["gate_proj", "up_proj", "down_proj"]
  assert left_out == {"learning_rate_norm": 2.0}


def test_trl_smoothing_and_batch_size_are_training_arguments(tmp_path):
  pytest.importorskip("torch")
  fields = exported(made(label_smoothing=0.1, batch_size=3.6), "trl")[0]["sft_config"]
  assert set(fields) <= {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
  arguments = transformers.TrainingArguments(output_dir=str(tmp_path), **fields)
  assert (arguments.label_smoothing_factor, arguments.per_device_train_batch_size, arguments.max_steps) == (0.1, 4, 100)


def test_the_schedule_of_tunix_is_ours():
  found = made(learning_rate=1e-3, warmup_fraction=0.2, final_fraction=0.3, decay_power=2.0, num_steps=50)
  config, left_out, _ = exported(found, "tunix")
  assert left_out == {}
  # Tunix hands these fields to optax's function of that name.
  names = ("init_value", "peak_value", "warmup_steps", "decay_steps", "end_value", "exponent")
  theirs = optax.schedules.warmup_cosine_decay_schedule(**{name: config["optimizer_config"][name] for name in names})
  ours = sft.schedule(found["hyperparameters"], 50, largest_batch=8)
  steps = np.arange(50)
  np.testing.assert_allclose(
    [theirs(step + 1) for step in steps], [1e-3 * ours(step) for step in steps], rtol=1e-4, atol=1e-9
  )


def test_a_curriculum_is_exported_as_its_average_and_named_once(tmp_path, caplog):
  found = made()
  found["mixture_schedule"] = [
    {"progress": 0.0, "mixture": {"maths": 1.0, "code": 0.0}},
    {"progress": 1.0, "mixture": {"maths": 0.5, "code": 0.5}},
  ]
  with caplog.at_level(logging.WARNING):
    assert recipe.export(found, tmp_path / "c.yaml", format="trl") == {}
  assert sum("mixture_schedule" in message for message in caplog.messages) == 1
  text = (tmp_path / "c.yaml").read_text()
  assert text.count("# not exported: mixture_schedule") == 1
  assert yaml.safe_load(text)["interleave_datasets"]["probabilities"] == [0.75, 0.25]
