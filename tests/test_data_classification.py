"""The benchmark of text classification: its orders, prompts and labels, and what a folder must hold."""

import csv
import json

import datasets
import pytest

from mftjax import errors
from mftjax.data import classification

TEXTS = {
  "ag": [{"text": f"news {i}", "label": i % 4} for i in range(12)],
  "amazon": [{"class_index": i % 5 + 1, "review_title": f"t{i}", "review_text": f"r{i}"} for i in range(12)],
}


def write(folder, name, split, rows, ending="jsonl"):
  path = folder / name / f"{split}.{ending}"
  path.parent.mkdir(exist_ok=True)
  if ending == "jsonl":
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  elif ending == "parquet":
    datasets.Dataset.from_list(rows).to_parquet(path)
  else:
    with path.open("w", newline="", encoding="utf-8") as file:
      writer = csv.DictWriter(file, rows[0])
      writer.writeheader()
      writer.writerows(rows)
  return folder


def read_one(folder, name, row):
  return classification.read(name, "test", None, 0, str(write(folder, name, "test", [row])))[0]


def test_the_orders_are_of_the_sizes_of_the_papers_and_each_is_another():
  five = {"ag", "amazon", "yelp", "dbpedia", "yahoo"}
  tasks = {"standard": five - {"yelp"}, "five": five, "long": set(classification.DATASETS)}
  assert [len(names) for names in tasks.values()] == [4, 5, 15]
  for name, order in classification.ORDERS.items():
    assert len(order) == len(set(order)) and set(order) == tasks[name.split("_")[0]]
  assert len(set(classification.ORDERS.values())) == len(classification.ORDERS) == 9
  # The last tasks, from O-LoRA's table (orders 1 to 6) and de Masson d'Autume et al. (orders i to iii).
  assert [order[-1] for order in classification.ORDERS.values()] == (
    ["ag", "yahoo", "dbpedia", "yahoo", "yelp", "ag", "yahoo", "yahoo", "wic"]
  )


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_files_of_every_kind_read_the_same(tmp_path, ending):
  folder = write(tmp_path, "amazon", "train", TEXTS["amazon"], ending)
  found = classification.read("amazon", "train", None, 0, str(folder))
  words = classification.DATASETS["amazon"].labels
  expected = {f"Title: t{i}\nText: r{i}": words[i % 5] for i in range(12)}
  assert {e["prompt"].removesuffix("\nAnswer:").split("\n", 2)[2]: e["completion"] for e in found} == expected


def test_a_prompt_holds_the_instruction_the_options_and_the_text(tmp_path):
  row = {"premise": "It rained.", "choice1": "I ran.", "choice2": "I sat.", "question": "effect", "label": 1, "idx": 7}
  assert read_one(tmp_path, "copa", row) == {
    "prompt": 'Which sentence is the effect of "It rained."? Choose one from the option.\nOption: A, B\n'
    "A: I ran.\nB: I sat.\nAnswer:",
    "completion": "B",
  }


@pytest.mark.parametrize(
  ("name", "label", "word"),
  [
    ("ag", 3, "Science or Technology"),
    ("ag", "3", "Science or Technology"),
    ("ag", "Sci/Tech", "Science or Technology"),
    ("rte", "not_entailment", "contradiction"),
    ("rte", 0, "entailment"),
    ("boolqa", True, "True"),
    ("dbpedia", "EducationalInstitution", "Educational Institution"),
    ("amazon", 1, "very negative"),
  ],
)
def test_labels_are_numbers_or_words(tmp_path, name, label, word):
  dataset = classification.DATASETS[name]
  row = {column: "x" for column in classification._columns(dataset)} | {dataset.label_column: label}
  assert read_one(tmp_path, name, row)["completion"] == word


@pytest.mark.parametrize("name", classification.DATASETS)
def test_every_dataset_makes_a_prompt_with_all_its_columns(tmp_path, name):
  dataset = classification.DATASETS[name]
  columns = classification._columns(dataset)
  for number, word in enumerate(dataset.labels):
    row = {column: f"<{column}>" for column in columns} | {dataset.label_column: number + dataset.first_label}
    example = read_one(tmp_path, name, row)
    assert example["completion"] == word
    assert all(f"<{column}>" in example["prompt"] for column in columns if column != dataset.label_column)
    assert f"\nOption: {', '.join(dataset.labels)}\n" in example["prompt"] and "{" not in example["prompt"]
  assert len({classification._plain(w) for w in dataset.labels}) == len(dataset.labels)
  assert not dataset.hub_labels or len(dataset.hub_labels) == len(dataset.labels)


def test_a_draw_is_without_replacement_by_its_seed_and_grows_with_the_number(tmp_path):
  folder = str(write(tmp_path, "ag", "train", TEXTS["ag"]))
  draw = lambda count, seed: [e["prompt"] for e in classification.read("ag", "train", count, seed, folder)]
  assert draw(5, 0) == draw(8, 0)[:5] and draw(8, 0) != draw(8, 1)
  assert len(set(draw(100, 0))) == 12 and draw(None, 0) == draw(100, 0)


def test_the_hub_is_asked_for_the_split_with_labels_and_few_rows_are_taken(monkeypatch):
  asked = []

  def load_dataset(path, subset, *, split):
    asked.append((path, subset, split))
    return datasets.Dataset.from_list([{"sentence": f"s{i}", "label": i % 2} for i in range(50)])

  monkeypatch.setattr(classification.datasets, "load_dataset", load_dataset)
  found = classification.read("sst2", "test", 3, 0)
  assert asked == [("nyu-mll/glue", "sst2", "validation")]
  assert len(found) == 3 and {e["completion"] for e in found} <= {"Bad", "Good"}


def test_a_hub_that_cannot_be_read_is_told_with_what_serves_as_well(monkeypatch):
  def load_dataset(*_, **__):
    raise ConnectionError("no network")

  monkeypatch.setattr(classification.datasets, "load_dataset", load_dataset)
  with pytest.raises(errors.InputError, match=r"fancyzhx/ag_news\) failed: no network.*ag/train\.jsonl.*text, label"):
    classification.read("ag", "train", 3, 0)


@pytest.mark.parametrize(
  ("name", "split", "rows", "message"),
  [
    ("sst-2", "train", [], "Unknown classification dataset: 'sst-2'. Did you mean 'sst2'"),
    ("ag", "validation", [], "Unknown split of ag: 'validation'"),
    ("yelp", "train", None, r"no file .*yelp/train\.jsonl, \.parquet or \.csv, with the columns text, label"),
    ("ag", "train", [], r"ag/train\.jsonl has no examples"),
    ("ag", "train", [{"txt": "a", "label": 0}], r"Unknown column in .*example 1: 'text'\. Did you mean 'txt'"),
    (
      "ag",
      "train",
      [{"text": "a", "label": 4}],
      r"Unknown label in .*example 1 \(a number from 0 to 3, or a word\): '4'",
    ),
    ("ag", "train", [{"text": "a", "label": -1}], "Unknown label"),
    ("ag", "train", [{"text": "a", "label": "Sport"}], "Unknown label.*Did you mean 'Sports'"),
    ("ag", "train", [{"text": "a", "label": 1.5}], "Unknown label"),
    ("ag", "train", [{"text": "a", "label": None}], "Unknown label"),
  ],
)
def test_wrong_input_says_what_is_wrong(tmp_path, name, split, rows, message):
  if rows is not None:
    write(tmp_path, name, split, rows)
  with pytest.raises(errors.InputError, match=message):
    classification.read(name, split, None, 0, str(tmp_path))


def test_a_number_below_one_is_refused(tmp_path):
  with pytest.raises(errors.InputError, match="num_examples = 0 of ag must be at least 1"):
    classification.read("ag", "train", 0, 0, str(tmp_path))
