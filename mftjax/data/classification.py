"""The text-classification tasks that continual learning of language models is measured on, and their orders.

Nothing of the data is in here: `read` takes it from the hub or from a folder.

Sources: the five tasks are Zhang et al. (2015)'s datasets as de Masson d'Autume et al. (2019) made a benchmark of them;
the fifteen are Razdaibiedina et al. (2023, Progressive Prompts)'s, who add tasks of GLUE, SuperGLUE, and IMDB. Label
words, instructions and the form `instruction, Option: ..., text, Answer:` are those of O-LoRA (Wang et al., 2023,
appendix; repository cmnfriend/O-LoRA); the instruction for COPA, which has none there, and the captions of the columns
within the text are ours.
"""

import dataclasses
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from mftjax import errors
from mftjax.data import sources

SPLITS = ("train", "test")
_ENDINGS = ("jsonl", "parquet", "csv")

_TOPIC = "What is the topic of the following paragraph? Choose one from the option."
_SENTIMENT = "What is the sentiment of the following paragraph? Choose one from the option."
_RELATION = (
  'What is the logical relationship between the "sentence 1" and the "sentence 2"? Choose one from the option.'
)
_STARS = ("very negative", "negative", "neutral", "positive", "very positive")
_ENTAILMENT = "sentence 1: {premise}\nsentence 2: {hypothesis}"


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Where a task's data is and how an example of it reads."""

  hub: str  # the dataset's id
  instruction: str  # may name columns in braces, as `text` does
  text: str
  labels: tuple[str, ...]  # the words to be answered, in the order of the hub's numbers
  subset: str | None = None
  test_split: str = "test"  # the hub's split with labels that nothing is trained on
  label_column: str = "label"
  first_label: int = 0  # the number of the first word
  hub_labels: tuple[str, ...] = ()  # the dataset's own words for the labels, where they differ


def _glue(subset: str, test_split: str = "validation", **fields) -> Dataset:
  return Dataset(hub="nyu-mll/glue", subset=subset, test_split=test_split, **fields)


def _super_glue(subset: str, **fields) -> Dataset:
  return Dataset(hub="aps/super_glue", subset=subset, test_split="validation", **fields)


DATASETS: dict[str, Dataset] = {
  "ag": Dataset(
    hub="fancyzhx/ag_news",
    instruction=_TOPIC,
    text="{text}",
    labels=("World", "Sports", "Business", "Science or Technology"),
    hub_labels=("World", "Sports", "Business", "Sci/Tech"),
  ),
  "amazon": Dataset(
    hub="yassiracharki/Amazon_Reviews_for_Sentiment_Analysis_fine_grained_5_classes",
    instruction=_SENTIMENT,
    text="Title: {review_title}\nText: {review_text}",
    labels=_STARS,
    label_column="class_index",
    first_label=1,
  ),
  "yelp": Dataset(hub="Yelp/yelp_review_full", instruction=_SENTIMENT, text="{text}", labels=_STARS),
  "dbpedia": Dataset(
    hub="fancyzhx/dbpedia_14",
    instruction=_TOPIC,
    text="Title: {title}\nText: {content}",
    labels=(
      *("Company", "Educational Institution", "Artist", "Athlete", "Office Holder", "Mean of Transportation"),
      *("Building", "Natural Place", "Village", "Animal", "Plant", "Album", "Film", "Written Work"),
    ),
  ),
  "yahoo": Dataset(
    hub="community-datasets/yahoo_answers_topics",
    instruction=_TOPIC,
    text="Question: {question_title} {question_content}\nAnswer: {best_answer}",
    labels=(
      *("Society & Culture", "Science & Mathematics", "Health", "Education & Reference", "Computers & Internet"),
      *("Sports", "Business & Finance", "Entertainment & Music", "Family & Relationships", "Politics & Government"),
    ),
    label_column="topic",
  ),
  "mnli": _glue(
    "mnli",
    "validation_matched",
    instruction=_RELATION,
    text=_ENTAILMENT,
    labels=("entailment", "neutral", "contradiction"),
  ),
  "qqp": _glue(
    "qqp",
    instruction='Whether the "first sentence" and the "second sentence" have the same meaning? '
    "Choose one from the option.",
    text="first sentence: {question1}\nsecond sentence: {question2}",
    labels=("False", "True"),
    hub_labels=("not_duplicate", "duplicate"),
  ),
  "rte": _glue(
    "rte",
    instruction=_RELATION,
    text="sentence 1: {sentence1}\nsentence 2: {sentence2}",
    labels=("entailment", "contradiction"),
    hub_labels=("entailment", "not_entailment"),
  ),
  "sst2": _glue(
    "sst2",
    instruction=_SENTIMENT,
    text="{sentence}",
    labels=("Bad", "Good"),
    hub_labels=("negative", "positive"),
  ),
  "wic": _super_glue(
    "wic",
    instruction="Given a word and two sentences, whether the word is used with the same sense in both sentence? "
    "Choose one from the option.",
    text="word: {word}\nsentence 1: {sentence1}\nsentence 2: {sentence2}",
    labels=("False", "True"),
  ),
  "cb": _super_glue("cb", instruction=_RELATION, text=_ENTAILMENT, labels=("entailment", "contradiction", "neutral")),
  "copa": _super_glue(
    "copa",
    instruction='Which sentence is the {question} of "{premise}"? Choose one from the option.',
    text="A: {choice1}\nB: {choice2}",
    labels=("A", "B"),
    hub_labels=("choice1", "choice2"),
  ),
  "boolqa": _super_glue(
    "boolq",
    instruction="According to the following passage, is the question true or false? Choose one from the option.",
    text="passage: {passage}\nquestion: {question}",
    labels=("False", "True"),
  ),
  "multirc": _super_glue(
    "multirc",
    instruction="According to the following passage and question, is the candidate answer true or false? "
    "Choose one from the option.",
    text="passage: {paragraph}\nquestion: {question}\ncandidate answer: {answer}",
    labels=("False", "True"),
  ),
  "imdb": Dataset(
    hub="stanfordnlp/imdb", instruction=_SENTIMENT, text="{text}", labels=("Bad", "Good"), hub_labels=("neg", "pos")
  ),
}

ORDERS: dict[str, tuple[str, ...]] = {
  name: tuple(order.split())
  for name, order in {
    # O-LoRA's orders 1 to 3: its "standard" benchmark has four tasks, without Yelp.
    "standard_1": "dbpedia amazon yahoo ag",
    "standard_2": "dbpedia amazon ag yahoo",
    "standard_3": "yahoo amazon ag dbpedia",
    # The first three of de Masson d'Autume et al.'s four orders of all five.
    "five_1": "yelp ag dbpedia amazon yahoo",
    "five_2": "dbpedia yahoo ag amazon yelp",
    "five_3": "yelp yahoo amazon dbpedia ag",
    # O-LoRA's orders 4 to 6.
    "long_1": "mnli cb wic copa qqp boolqa rte imdb yelp amazon sst2 dbpedia ag multirc yahoo",
    "long_2": "multirc boolqa wic mnli cb copa qqp rte imdb sst2 dbpedia ag yelp amazon yahoo",
    "long_3": "yelp amazon mnli cb copa qqp rte imdb sst2 dbpedia ag yahoo multirc boolqa wic",
  }.items()
}


def read(name: str, split: str, num_examples: int | None, seed: int, folder: str = "") -> list[dict[str, str]]:
  """Examples of a dataset, drawn at random without replacement.

  Args:
    name: in `DATASETS`.
    split: "train" or "test"; where the hub's test labels are hidden (GLUE, SuperGLUE), "test" is its validation split,
      as in the papers.
    num_examples: how many; all of them where there are fewer, or for None. A larger number draws the same and more.
    seed: at least 0.
    folder: where `NAME/SPLIT.jsonl`, `.parquet` or `.csv` is, with the columns of the hub's dataset; the label is its
      number or a word. "" reads from the hub.

  Returns:
    `{"prompt", "completion"}` of each, the completion being one of the dataset's `labels`.

  Raises:
    InputError: an unknown name, split, column or label, no such file, an empty one, or the hub cannot be read.
  """
  if name not in DATASETS:
    raise errors.unknown_name("classification dataset", name, DATASETS)
  if split not in SPLITS:
    raise errors.unknown_name(f"split of {name}", split, SPLITS)
  if num_examples is not None and num_examples < 1:
    raise errors.InputError(f"num_examples = {num_examples} of {name} must be at least 1.")
  dataset = DATASETS[name]
  rows, where = _from_folder(folder, name, split) if folder else (_from_hub(name, split), f"{dataset.hub}, {split}")
  if not len(rows):
    raise errors.InputError(f"{where} has no examples.")
  order = np.random.default_rng([seed, SPLITS.index(split), *name.encode()]).permutation(len(rows))
  return [_example(dataset, rows[int(i)], f"{where}, example {i + 1}") for i in order[:num_examples]]


def _from_folder(folder: str, name: str, split: str) -> tuple[Sequence[Mapping[str, Any]], str]:
  base = pathlib.Path(folder).expanduser() / name
  for ending in _ENDINGS:
    path = base / f"{split}.{ending}"
    if path.is_file():
      rows = sources.json_lines(path) if ending == "jsonl" else sources.read_table(path, name)
      return rows, str(path)
  raise errors.InputError(
    f"There is no file {base}/{split}.jsonl, .parquet or .csv, with the columns {', '.join(_columns(DATASETS[name]))}."
  )


def _from_hub(name: str, split: str) -> Any:
  """Not a list: of the millions of examples of some datasets few are drawn."""
  dataset = DATASETS[name]
  try:
    return datasets.load_dataset(dataset.hub, dataset.subset, split=dataset.test_split if split == "test" else split)
  except Exception as error:  # the hub's libraries raise a dozen kinds
    raise errors.InputError(
      f"Reading {name} from the hub ({dataset.hub}) failed: {sources.last_words(error)} A folder with "
      f"{name}/{split}.jsonl, .parquet or .csv serves as well: columns {', '.join(_columns(dataset))}."
    ) from error


def _columns(dataset: Dataset) -> list[str]:
  named = (field for _, field, _, _ in string.Formatter().parse(dataset.instruction + dataset.text))
  return [*(field for field in named if field), dataset.label_column]


def _example(dataset: Dataset, row: Mapping[str, Any], where: str) -> dict[str, str]:
  for column in _columns(dataset):
    if column not in row:
      raise errors.unknown_name(f"column in {where}", column, map(str, row))
  values = {column: "" if row[column] is None else row[column] for column in _columns(dataset)}
  instruction, text = (part.format_map(values).strip() for part in (dataset.instruction, dataset.text))
  prompt = f"{instruction}\nOption: {', '.join(dataset.labels)}\n{text}\nAnswer:"
  return {"prompt": prompt, "completion": _label(dataset, row[dataset.label_column], where)}


def _label(dataset: Dataset, value: Any, where: str) -> str:
  """The word for a label that is a number, a truth value, one of our words or one of the dataset's own."""
  words = {_plain(word): i for own in (dataset.hub_labels, dataset.labels) for i, word in enumerate(own)}
  index = words.get(_plain(str(value)))
  if index is None:
    try:
      index = int(str(value)) - dataset.first_label
    except ValueError:
      index = -1
  if not 0 <= index < len(dataset.labels):
    numbers = f"a number from {dataset.first_label} to {dataset.first_label + len(dataset.labels) - 1}, or a word"
    raise errors.unknown_name(f"label in {where} ({numbers})", str(value), dataset.labels)
  return dataset.labels[index]


def _plain(word: str) -> str:
  """Without case and spelling: the hub writes `EducationalInstitution`."""
  return "".join(character for character in word.lower() if character.isalnum())
