"""The tasks of a comparison from a user's files or the benchmark: what is judged, tuned on, kept apart, and refused."""

import json
import subprocess
import sys

import families
import jax
import numpy as np
import pytest
from pages import ROOT

from configs import continual as continual_config
from configs import continual_real
from mftjax import config as config_lib
from mftjax import errors
from mftjax.data import abilities, classification, sequences, tokens
from mftjax.loops import continual, continual_methods, continual_setting, continual_tasks
from tests.test_data_task_streams import SHARED, benchmark_folder, needs_shared

TOKENIZER = tokens.char_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return families.write(tmp_path_factory.mktemp("families"))


def paths(folder, *names):
  return tuple(str(folder / f"{name}.jsonl") for name in names)


def tiny(folder, **options):
  """A config of three tasks, with three others to meta-train on."""
  config = continual_config.get_config("tiny")
  config.continual.update(source="files", files=paths(folder, "alpha", "beta", "gamma"), base_rows=4, background_rows=6)
  config.continual.base_path = str(folder / "zeta.jsonl")
  config.retention.files = paths(folder, "delta", "epsilon")
  for name, value in options.items():
    section, _, field = name.partition("__")
    config[section][field] = value
  config_lib.check(config)
  return config


def texts(rows):
  """What stands in `[..., length]` rows, each example once."""
  found = set()
  for row, segments in zip(*(np.asarray(rows[n]).reshape(-1, 28) for n in ("tokens", "segment_ids")), strict=True):
    found |= {TOKENIZER.decode(row[segments == s]).removesuffix("<eos>") for s in range(1, segments.max() + 1)}
  return found


def part(name, *wanted):
  return {e["prompt"] + e["completion"] for e in families.examples(name) if abilities.split_of(e["prompt"]) in wanted}


def test_files_are_tasks_and_nothing_that_is_judged_is_seen_before(folder):
  found = continual_tasks.read(tiny(folder), TOKENIZER)
  names = ("alpha", "beta", "gamma")
  assert found.stream.names == names * 2
  pool = lambda rows, number: {field: values[number] for field, values in rows.items()}
  for number, name in enumerate(names):
    assert texts(pool(found.stream.test, number)) == part(name, "test")
    assert texts(pool(found.stream.test, number + 3)) == part(name, "validation")
    for own in (number, number + 3):
      assert texts(pool(found.stream.train, own)) <= part(name, "train")
  judged, tuned_on = found.stream.order.tolist(), np.asarray(found.validation).tolist()
  assert len(judged) == 2 and len(tuned_on) == 1
  assert all(sorted(order) == [0, 1, 2] for order in judged) and sorted(tuned_on[0]) == [3, 4, 5]
  assert [place - 3 for place in tuned_on[0]] not in judged
  base, background = texts(found.stream.base), texts(vars(found.background))
  assert base and background and not base & background and base | background <= part("zeta", *abilities.SPLITS)
  assert found.training.names == ("delta", "epsilon") and found.training.order.shape == (4, 2)
  outer = texts(found.training.base)
  assert outer and not outer & (base | background) and outer <= part("zeta", *abilities.SPLITS)


def test_given_orders_are_the_sequences(folder):
  config = tiny(folder, continual__orders=(("gamma", "alpha", "beta"), (1, 0, 2), ("beta", "gamma", "alpha")))
  assert continual_tasks.read(config, TOKENIZER).stream.order.tolist() == [[2, 0, 1], [1, 0, 2], [1, 2, 0]]


def test_without_other_tasks_no_method_is_compared_that_needs_them(folder):
  config = tiny(folder, retention__files=())
  names = continual_methods.chosen(config)
  assert "memory" in names and "joint" in names and not any("meta-learned" in name for name in names)
  assert continual_tasks.read(config, TOKENIZER).training is None
  assert continual_methods.chosen(tiny(folder)) == continual_methods.METHODS


def test_a_benchmark_from_a_folder_has_its_orders(tmp_path):
  (tmp_path / "benchmark").mkdir()
  config = tiny(
    families.write(tmp_path),
    continual__source="benchmark",
    continual__orders=("standard_2", "standard_3"),
    continual__benchmark_folder=benchmark_folder(tmp_path / "benchmark"),
    continual__train_examples=30,
    continual__test_examples=10,
  )
  found = continual_tasks.read(config, TOKENIZER)
  for order, name in zip(found.stream.order, ("standard_2", "standard_3"), strict=True):
    assert tuple(found.stream.names[place] for place in order) == classification.ORDERS[name]
  assert sorted(np.asarray(found.validation[0]).tolist()) == [4, 5, 6, 7]


BAD = {
  "a task twice": ({"continual__orders": (("alpha", "beta", "alpha"),)}, "orders, order 1 has the task 'alpha' more"),
  "unknown task": ({"continual__orders": (("alpha", "betta"),)}, "Unknown task in config.continual.orders, order 1"),
  "no task": ({"continual__files": ()}, "config.continual.files: .*at least one file"),
  "one order there is": ({"continual__orders": ((0,),)}, "1 tasks have 1 orders, too few"),
  "no base": ({"continual__base_path": ""}, "config.continual.base_path is empty"),
  "small base": (
    {"continual__base_rows": 500},
    r"zeta\.jsonl makes \d+ rows of 28 tokens, fewer than .* = 500 \+ 6 \+ 8\.",
  ),
  "unknown method": ({"continual__methods": ("EWCC",)}, "Did you mean 'EWC'"),
  "no tasks to meta-train on": (
    {"continual__methods": ("joint", "memory, meta-learned"), "retention__files": ()},
    "'memory, meta-learned' in config.continual.methods .* config.retention.files",
  ),
  "few tasks to meta-train on": ({"retention__tasks_per_episode": 3}, "has 2 tasks, fewer than"),
  "unknown template": ({"continual__templates": (("beta", "y"),)}, r"Unknown template in .*beta\.jsonl: 'y'"),
  "template of no task": ({"continual__templates": (("eta", "x"),)}, "Unknown task in templates: 'eta'"),
  "template of no other task": ({"retention__templates": (("eta", "x"),)}, "config.retention.files: Unknown task"),
  "no benchmark order": ({"continual__source": "benchmark"}, "config.continual.orders is empty: name at least one of"),
  "unknown benchmark order": (
    {"continual__source": "benchmark", "continual__orders": ("standart_1",)},
    "Unknown order in config.continual.orders: 'standart_1'. Did you mean 'standard_1'",
  ),
  "orders of other tasks": (
    {"continual__source": "benchmark", "continual__orders": ("standard_1", "five_1")},
    "'standard_1' and 'five_1' are not orders of the same tasks",
  ),
  "a model for made tasks": (
    {"continual__source": "procedural", "model__path": "somewhere"},
    "config.model.path = 'somewhere' has no meaning",
  ),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_tasks_say_what_is_wrong(folder, name):
  options, message = BAD[name]
  with pytest.raises(errors.InputError, match=message):
    continual_tasks.read(tiny(folder, **options), TOKENIZER)


def test_meta_training_must_not_see_what_is_judged(folder, tmp_path):
  link = tmp_path / "other.jsonl"
  link.symlink_to(folder / "beta.jsonl")
  for file in (folder / "alpha.jsonl", folder / "zeta.jsonl", link):
    with pytest.raises(errors.InputError, match=rf"config\.retention\.files: {file} is in config\.continual too"):
      continual_tasks.read(tiny(folder, retention__files=(*paths(folder, "delta"), str(file))), TOKENIZER)
  with pytest.raises(errors.InputError, match=r"base_path: .*alpha\.jsonl is a task in config\.continual\.files too"):
    continual_tasks.read(tiny(folder, continual__base_path=str(folder / "alpha.jsonl")), TOKENIZER)


def test_a_task_without_validation_examples_is_refused(folder, tmp_path):
  lines = (folder / "alpha.jsonl").read_text().splitlines()
  kept = [line for line in lines if abilities.split_of(json.loads(line)["prompt"]) != "validation"]
  (tmp_path / "alpha.jsonl").write_text("\n".join(kept))
  with pytest.raises(errors.InputError, match="the task 'alpha' has no examples for validation"):
    continual_tasks.read(tiny(folder, continual__files=paths(tmp_path, "alpha")), TOKENIZER)


@pytest.mark.parametrize(
  ("section", "field", "value"),
  [
    ("continual", "source", "file"),
    ("continual", "templates", ("a", "b")),
    ("retention", "files", (1,)),
  ],
)
def test_a_field_out_of_its_range_is_named(section, field, value):
  config = continual_config.get_config("tiny")
  config[section][field] = value
  with pytest.raises(errors.InputError, match=rf"config\.{section}\.{field} = .* is out of its range"):
    config_lib.check(config)


def test_a_bad_memory_or_lora_is_refused_before_a_base_model_is_trained(folder, monkeypatch):
  monkeypatch.setattr(continual_setting, "_trained", None)
  for options, message in (
    ({"memory__top_k": 65}, "top_k = 65"),
    ({"memory__num_slots": 0}, "config.memory.num_slots = 0"),
    ({"lora__rank": 0}, "LoRA rank = 0"),
    ({"lora__targets": ("q_prj",)}, "Did you mean 'q_proj'"),
  ):
    with pytest.raises(errors.InputError, match=message):
      continual_setting.build(tiny(folder, continual__source="procedural", **options))


def test_the_base_model_of_real_tasks_is_not_trained(folder, monkeypatch):
  monkeypatch.setattr(continual_setting, "_trained", None)
  setting = continual_setting.build(tiny(folder, retention__files=()))
  for trained in ("full", "lora"):
    setup = setting.setup(trained)
    # Nothing but what is trained is a run's own: neither copied for each run nor written into checkpoints.
    frozen = {} if trained == "full" else setup.frozen
    assert sum(x.size for x in jax.tree.leaves(frozen)) == (0 if trained == "full" else setting_size(setting))
    assert not jax.tree.leaves(setup.held)


def setting_size(setting):
  return sum(x.size for x in jax.tree.leaves(setting.base[1]))


def test_there_are_names_for_sequences_of_facts_alone():
  kinds = continual_config.get_config("facts").continual.kinds
  for split in sequences.SPLITS:
    answers = [prompt for task in sequences.sample(split, kinds, 0) for prompt in task.answers]
    assert len(set(answers)) == len(answers) == 8 * sequences.FACTS_PER_TASK
  with pytest.raises(ValueError, match="there are: small, full, facts, values, frozen, tiny"):
    continual_config.get_config("fact")


@pytest.mark.parametrize("variant", ["smollm2", *classification.ORDERS])
def test_variants_are_whole_configs(variant):
  config = continual_real.get_config(variant)
  config_lib.check(config)
  assert "memory" in continual_methods.chosen(config)
  num_tasks = len(classification.ORDERS.get(variant, config.continual.files))
  assert config.memory.num_slots - config.memory.num_shared == num_tasks * config.continual.written_rows
  with pytest.raises(ValueError, match=r"No variant 'long_4'.*long_3"):
    continual_real.get_config("long_4")


@needs_shared
def test_the_tasks_of_the_small_comparison_are_of_many_kinds_of_text():
  config = continual_real.get_config("smollm2")
  config.continual.base_path = str(SHARED / "gsm8k" / "test.jsonl")  # of fewer lines
  config.length, config.budget_tokens = 600, 4 * 600
  found = continual_tasks.read(config, TOKENIZER)
  assert len(set(found.stream.names)) == 8 and found.stream.order.shape == (3, 8) and found.validation.shape == (1, 8)
  assert np.asarray(found.stream.test["loss_mask"]).sum(axis=-1).max(axis=-1).min() > 1
  assert len(found.training.names) == 12 and set(found.training.names).isdisjoint(found.stream.names)


def flags(files, base_path, workdir):
  return [
    "--config=configs/continual.py:tiny",
    f"--workdir={workdir}",
    "--config.continual.source=files",
    f"--config.continual.files={tuple(map(str, files))}",
    f"--config.continual.base_path={base_path}",
    "--config.continual.base_rows=4",
    "--config.continual.background_rows=4",
    "--config.lora.targets=('q_proj',)",
    "--config.continual.methods=('sequential LoRA',)",
    "--config.continual.num_trials=1",
  ]


def command(*args):
  return subprocess.run(
    [sys.executable, "-m", "experiments.continual", *args], capture_output=True, text=True, cwd=ROOT, check=False
  )


@needs_shared
@pytest.mark.slow
def test_files_as_a_user_names_them(tmp_path):
  files = [SHARED / "bbh" / "boolean_expressions.jsonl", SHARED / "p3" / "quartz.jsonl"]
  done = command(
    *flags(files, SHARED / "p3" / "common_gen.jsonl", tmp_path / "run"),
    "--config.continual.templates=(('quartz', 'quartz_paragraph_question_plain_concat'),)",
    "--config.continual.orders=(('quartz', 0),)",
  )
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "run" / "continual.json").read_text())
  assert result["task_names"] == ["quartz", "boolean_expressions"] and result["num_sequences"] == 1
  (row,) = result["rows"]
  assert np.isfinite(row["matrix"]["loss"]).all() and row["name"] == "sequential LoRA"


@pytest.mark.slow
def test_a_wrong_file_is_one_message_and_exit_2(folder, tmp_path):
  done = command(*flags(["alpa.jsonl", "beta.jsonl"], folder / "zeta.jsonl", tmp_path / "untouched"))
  assert done.returncode == 2, done.stderr
  assert "config.continual.files" in done.stderr and done.stderr.count("error:") == 1
  assert "Traceback" not in done.stderr and not (tmp_path / "untouched").exists()


def test_a_finished_comparison_is_read_and_not_run_again(folder, tmp_path, monkeypatch):
  config = tiny(folder, continual__methods=("joint",))
  (tmp_path / "methods").mkdir()
  (tmp_path / "methods" / "joint.json").write_text("{}")
  (tmp_path / "continual.json").write_text('{"rows": []}')
  monkeypatch.setattr(continual_setting, "build", None)
  assert continual.compare(config, tmp_path) == {"rows": []}
  (tmp_path / "methods" / "joint.json").unlink()
  with pytest.raises(TypeError):
    continual.compare(config, tmp_path)
