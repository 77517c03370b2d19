"""Sequences of real tasks: no prompt in two parts, the order as given, and errors that name the file."""

import json
import pathlib

import families
import numpy as np
import pytest

from mftjax import errors
from mftjax.data import abilities, classification, task_streams, tokens

SHARED = pathlib.Path(__file__).parents[1] / ".." / "shared" / "data"
LENGTH = 24
TOKENIZER = tokens.char_tokenizer()
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not there")


def files(folder, names=families.NAMES, count=80):
  families.write(folder, names, count)
  return [folder / f"{name}.jsonl" for name in names]


def build(paths, seed=0, **options):
  return task_streams.from_files(paths, TOKENIZER, LENGTH, seed, **options)


def texts(rows):
  """What stands in the rows, in order: prompt and completion of each example."""
  found = []
  for row, segments in zip(rows.tokens, rows.segment_ids, strict=True):
    found += [TOKENIZER.decode(row[segments == s]).removesuffix("<eos>") for s in range(1, segments.max() + 1)]
  return found


def write_lines(path, rows):
  path.parent.mkdir(exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  return path


def test_every_example_is_in_one_part_by_its_prompt_and_the_test_rows_are_the_examples(tmp_path):
  stream = build(files(tmp_path))
  assert stream.names == families.NAMES
  for number, name in enumerate(stream.names):
    whole = {e["prompt"] + e["completion"]: abilities.split_of(e["prompt"]) for e in families.examples(name)}
    for part in abilities.SPLITS:
      assert set(texts(getattr(stream, part)[number])) == {text for text, own in whole.items() if own == part}
    assert sorted(texts(stream.test[number])) == sorted(e["prompt"] + e["completion"] for e in stream.examples[number])


def test_a_prompt_that_repeats_is_never_in_two_parts(tmp_path):
  rows = [{"prompt": f"ask {i % 40}?", "completion": str(i)} for i in range(80)]
  stream = build([write_lines(tmp_path / "a.jsonl", rows)])
  prompts = [{text.split("?")[0] for text in texts(getattr(stream, part)[0])} for part in abilities.SPLITS]
  assert sum(map(len, prompts)) == len(set().union(*prompts)) == 40
  assert sum(len(texts(getattr(stream, part)[0])) for part in abilities.SPLITS) == 80


def test_the_seed_changes_the_order_and_not_the_parts(tmp_path):
  paths = files(tmp_path, ("alpha",))
  first, second = (texts(build(paths, seed).train[0]) for seed in (0, 1))
  assert first != second and sorted(first) == sorted(second)
  assert first == texts(build(paths, 0).train[0])


def test_tasks_come_in_the_order_of_the_files_and_do_not_depend_on_each_other(tmp_path):
  paths = files(tmp_path)
  some, all_of_them = build([paths[3], paths[1]]), build(paths)
  assert some.names == ("delta", "beta")
  np.testing.assert_array_equal(some.train[1].tokens, all_of_them.train[1].tokens)


def test_files_of_one_name_are_called_by_their_folders_too(tmp_path):
  examples = families.examples("alpha")
  paths = [write_lines(tmp_path / folder / "train.jsonl", examples) for folder in ("x", "y")]
  assert build([*paths, *files(tmp_path, ("beta",))]).names == ("x/train", "y/train", "beta")


def test_items_in_two_templates_are_taken_in_one_of_them(tmp_path):
  rows = [
    {"prompt": f"{wording} {i}?", "completion": "yes", "template": wording}
    for wording in ("is it", "do you")
    for i in range(60)
  ]
  path = write_lines(tmp_path / "a.jsonl", rows)
  for templates, wording in ((None, "is it"), ({"a": "do you"}, "do you")):
    stream = build([path], templates=templates)
    found = [text for part in abilities.SPLITS for text in texts(getattr(stream, part)[0])]
    assert len(found) == 60 and all(text.startswith(wording) for text in found)
  with pytest.raises(errors.InputError, match=r"Unknown template in .*a\.jsonl: 'do yo'\. Did you mean 'do you'"):
    build([path], templates={"a": "do yo"})
  with pytest.raises(errors.InputError, match="Unknown task in templates: 'b'"):
    build([path], templates={"b": "do you"})


def test_the_side_on_which_prompts_are_cut_is_heard(tmp_path):
  rows = [{"prompt": f"{i:02d} {'x' * 40} {i:02d}?", "completion": "y"} for i in range(60)]
  path = write_lines(tmp_path / "a.jsonl", rows)
  for side, is_start in (("left", False), ("right", True)):
    stream = build([path], truncate_side=side)
    assert stream.train[0].truncated == len(stream.train[0].tokens)
    assert all(text[0].isdigit() is is_start for text in texts(stream.train[0]))


@pytest.mark.parametrize(
  ("prepare", "message"),
  [
    (lambda folder: [], "needs at least one file"),
    (lambda folder: [*files(folder), folder / "beta.jsonl"], "has the task '.*/beta' twice: .*beta.jsonl and"),
    (lambda folder: [*files(folder), folder / "betta.jsonl"], r"no file .*betta\.jsonl\. Did you mean .*beta\.jsonl"),
    (lambda folder: [folder], "is a folder"),
    (lambda folder: files(folder, ("alpha",), 3), r"alpha\.jsonl: the task 'alpha' has no examples for "),
    (lambda folder: [write_lines(folder / "a.jsonl", [{"text": "x"}])], r"a\.jsonl.*column.*'prompt'"),
    (lambda folder: [write_lines(folder / "a.jsonl", [])], "is empty"),
    (lambda folder: [write_lines(folder / "a.json", [{"prompt": "x", "completion": "y"}])], r"must end in \.jsonl"),
  ],
)
def test_wrong_files_say_what_is_wrong(prepare, message, tmp_path):
  with pytest.raises(errors.InputError, match=message):
    build(prepare(tmp_path))


@needs_shared
def test_no_item_of_real_data_is_in_two_parts():
  paths = [SHARED / "p3" / "paws_labeled_final.jsonl", SHARED / "bbh" / "boolean_expressions.jsonl"]
  stream = task_streams.from_files(paths, TOKENIZER, 600, 0)
  assert {e["completion"] for e in stream.examples[0]} == {"Yes", "No"}
  parts = [texts(getattr(stream, part)[0]) for part in abilities.SPLITS]
  sentences = [{text.split("\n")[0] for text in part} for part in parts]
  assert sum(map(len, parts)) == 200 and sum(map(len, sentences)) == len(set().union(*sentences))


def benchmark_folder(folder, num_train=60, num_test=20):
  """All the datasets, each text saying its dataset and number; the first training examples are test examples too."""
  for name, dataset in classification.DATASETS.items():
    for split, numbers in (("train", range(num_train)), ("test", range(num_train - 5, num_train - 5 + num_test))):
      rows = [
        {column: f"{name}{i}." for column in classification._columns(dataset)}
        | {dataset.label_column: dataset.first_label + i % len(dataset.labels)}
        for i in numbers
      ]
      write_lines(folder / name / f"{split}.jsonl", rows)
  return str(folder)


@pytest.mark.parametrize("order", ["standard_1", "long_3"])
def test_a_benchmark_comes_in_its_order_with_no_prompt_in_two_parts(tmp_path, order):
  folder = benchmark_folder(tmp_path)
  sizes = {"num_train": 30, "num_validation": 10, "num_test": 15}
  stream = task_streams.from_benchmark(order, TOKENIZER, 700, seed=3, folder=folder, **sizes)
  assert stream.names == classification.ORDERS[order]
  for number, name in enumerate(stream.names):
    parts = [texts(getattr(stream, part)[number]) for part in abilities.SPLITS]
    assert sum(map(len, parts)) == len(set().union(*parts))  # the answer is a function of the prompt here
    assert all(f"{name}" in text for part in parts for text in part)
    assert len(parts[2]) == len(stream.examples[number]) == 15
    assert 25 <= len(parts[0]) + len(parts[1]) <= 40 and len(parts[0]) >= 2 * len(parts[1])


def test_a_small_dataset_is_shared_between_train_and_validation(tmp_path):
  folder = benchmark_folder(tmp_path, num_train=20)
  stream = task_streams.from_benchmark("standard_2", TOKENIZER, 700, folder=folder)
  for number in range(4):  # 20 of which 5 are test examples: 10 and 5, as 1,000 to 500
    assert [len(texts(rows[number])) for rows in (stream.train, stream.validation, stream.test)] == [10, 5, 20]


def test_an_unknown_order_names_those_there_are():
  with pytest.raises(errors.InputError, match=r"Unknown order of tasks: 'order_4'.*Known: five_1.*long_3.*standard_1"):
    task_streams.from_benchmark("order_4", TOKENIZER, 64)
