"""Every wrong field of a config is named, with what is allowed."""

import jax.numpy as jnp
import ml_collections
import pytest

from configs import compare as compare_config
from mftjax import config as config_lib
from mftjax import errors, recipe
from mftjax.loops import evaluate, finetune, meta_train, predict, windows


def make_config():
  config = config_lib.default()
  config.sources = ml_collections.ConfigDict({"a": {"suite": "copying"}, "b": {"suite": "copying"}})
  config.abilities = ml_collections.ConfigDict({"a": {"suite": "copying"}})
  return config


def test_the_default_is_right():
  config_lib.check(make_config())


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("batch_size", 0, "config.batch_size = 0 is out of its range: at least 1"),
    ("meta.mixture_learning_rate", float("nan"), "config.meta.mixture_learning_rate = nan"),
    ("meta.method", "mixd", "one of mixed, reverse, forward"),
    ("model.dtype", "float8", "one of float32, bfloat16"),
    ("budget_tokens", 100, "fewer than config.meta.unroll_length"),
    ("hyperparameters.learning_rate.value", 5.0, "learning_rate = 5.0 is out of its range"),
  ],
)
def test_values_out_of_range(field, value, message):
  config = make_config()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(errors.InputError, match=message):
    config_lib.check(config)


def test_unknown_names_show_the_nearest():
  config = make_config()
  config.meta.outer_stepz = 3
  with pytest.raises(errors.InputError, match=r"'meta.outer_stepz'. Did you mean 'meta.outer_steps'"):
    config_lib.check(config)
  config = make_config()
  config.hyperparameters.learning_rat = ml_collections.ConfigDict({"value": 1.0})
  with pytest.raises(errors.InputError, match="Did you mean 'learning_rate'"):
    config_lib.check(config)


@pytest.mark.parametrize(
  "command",
  [
    meta_train.meta_train,
    predict.predict,
    windows.measure,
    evaluate.evaluate,
    lambda config, workdir: finetune.finetune(config, workdir, "default"),
    lambda config, workdir: finetune.finetune(config, workdir, ""),
  ],
)
def test_a_config_without_sources_is_refused_by_what_needs_them(command, tmp_path):
  config = compare_config.get_config("tiny")
  config_lib.check(config)
  with pytest.raises(errors.InputError, match=r"config.sources is empty"):
    command(config, tmp_path / "untouched")
  assert not (tmp_path / "untouched").exists()


def test_empty_sources_and_weights():
  config = make_config()
  config.sources = ml_collections.ConfigDict()
  with pytest.raises(errors.InputError, match=r"config.sources is empty"):
    config_lib.check(config)
  config = make_config()
  config.abilities.a.weight = 0.0
  with pytest.raises(errors.InputError, match="sum to 0"):
    config_lib.check(config)


def test_help_lists_every_field():
  text = config_lib.help_text()
  for name, field in config_lib.FIELDS.items():
    assert f"--config.{name}=" in text and field.help in text


def with_hyperparameter(name, **spec):
  config = make_config()
  config.lora.rank = 8
  config.micro_batches = 2
  config.hyperparameters[name] = ml_collections.ConfigDict(spec)
  return config


@pytest.mark.parametrize(
  ("name", "spec", "message"),
  [
    ("batch_size", {"value": 8, "values": (2, 4), "scale": "ordered", "learn": True}, "must be config.batch_size = 8"),
    ("batch_size", {"value": 8, "low": 1, "high": 8, "learn": True}, "low = 1 is out of its range: 2 to 8"),
    ("batch_size", {"value": 16}, "value = 16 is out of its range: 2 to 8"),
    ("batch_size", {"value": 4, "values": (8, 4), "scale": "ordered", "learn": True}, "batch_size: .*ascending"),
    ("batch_size", {"value": 4, "low": 2, "high": 8, "scale": "ordered", "learn": True}, "values is missing"),
    ("lora_rank", {"value": 4, "values": (2, 16), "scale": "ordered", "learn": True}, "high = 16.0 .*: 1 to 8"),
    ("eps", {"value": 1e-8, "low": 1e-9, "learn": True}, "eps.high is missing"),
    ("eps", {"value": 1e-8, "low": 1e-9, "high": 1e-3, "values": (1, 2), "learn": True}, "values has no meaning"),
    ("eps", {"value": 1e-8, "conditioned": "no"}, "conditioned = 'no' must be True or False"),
    ("eps", {"low": 1e-8}, "eps.value is missing"),
    ("stop_fraction", {"value": 0.5, "low": 0.1, "high": 2.0, "learn": True}, "high = 2.0 is out of its range"),
    ("label_smoothing", {"value": -0.1}, "value = -0.1 is out of its range: 0 to 0.999"),
    ("lora_rnk", {"value": 1}, "Did you mean 'lora_rank'"),
    ("eps", {"value": 1e-8, "conditionned": True}, "Did you mean 'conditioned'"),
  ],
)
def test_hyperparameters_out_of_range(name, spec, message):
  with pytest.raises(errors.InputError, match=message):
    config_lib.check(with_hyperparameter(name, **spec))


def test_lora_hyperparameters_need_lora():
  config = with_hyperparameter("lora_scale", value=1.0)
  config.lora.rank = 0
  with pytest.raises(errors.InputError, match="lora_scale has no meaning without LoRA"):
    config_lib.check(config)


def test_shared_hyperparameters():
  config = with_hyperparameter("eps", value=1e-8, low=1e-9, high=1e-3, learn=True, conditioned=False)
  config_lib.check(config)
  assert config_lib.shared(config) == ("eps",)
  config.hyperparameters.eps.learn = False
  assert config_lib.shared(config) == ()


def test_a_learned_batch_size_is_read_as_a_recipe():
  config = with_hyperparameter("batch_size", value=4.2, values=(2, 4, 8), scale="ordered", learn=True)
  config.budget_tokens = 12 * 8 * config.length
  config_lib.check(config)
  meta_params = {
    "hyperparameters": config_lib.space(config).init(config_lib.initial_hyperparameters(config)),
    "mixture_logits": jnp.zeros(2),
  }
  values, _ = meta_train.readable(config, meta_params)
  assert values["batch_size"] == 4.0
  assert values["num_steps"] == 24.0
  assert meta_train.horizon(config, meta_params) == 23  # 12 * 8 / 4.2 = 22.9
  assert finetune.run_length(config, values) == (4, 24, 1)
  assert finetune.run_length(config, {"batch_size": 7.6, "stop_fraction": 0.75}) == (8, 9, 2)
  assert finetune.run_length(config, {"batch_size": 9}) == (9, 10, 3)
  assert finetune.run_length(config, {}) == (8, 12, 2)


def test_a_recipe_with_a_higher_rank_than_the_lora_is_refused(tmp_path):
  config = make_config()
  config.lora.rank = 4
  made = recipe.default(["a", "b"], {"lora_rank": 8.0}, task="task", model="random", provenance={})
  recipe.save(made, tmp_path / "other.json")
  with pytest.raises(errors.InputError, match=r"lora_rank = 8.0 in .* is above config.lora.rank = 4"):
    finetune.read_recipe(config, tmp_path, str(tmp_path / "other.json"))
