"""Every wrong field of a config is named, with what is allowed."""

import ml_collections
import pytest

from mftjax import config as config_lib
from mftjax import errors


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
