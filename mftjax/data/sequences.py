"""Sequences of procedural tasks to learn one after another: rules under new names, new codes, new facts.

All of them map letters to letters, so that a tiny model learns one from a few hundred rows, and learning the next
with the same weights erases it. What tasks share is the form of prompts and answers, and a small number of rules, which
the base model knows under names of its own.
"""

import dataclasses
import functools
import itertools
import string
from collections.abc import Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mftjax import errors
from mftjax.data import meta_tasks, sources, tokens

LETTERS = tuple("abcdefgh")
NUM_RULES = 4  # letter maps that the base model knows, and that tasks use under new tags
SPLITS = ("train", "validation", "unseen")
KINDS = ("rule", "code", "facts")  # a known map under a new tag; a new map; single answers to be stored
FORMS = {  # letters in the prompt -> places of those that are answered
  "single": (1, (0,)),
  "last": (2, (1,)),
  "first": (2, (0,)),
}
_TAG_LETTERS = string.ascii_uppercase[:20]
_NUM_TAGS = {"base": 96, "other": 64, "validation": 32, "unseen": 56}  # all others are to train on
_NUM_ENTITIES = {"base": 96, "other": 32}  # names that facts are about; the splits share all others
FACTS_PER_TASK = 16


@dataclasses.dataclass(frozen=True)
class Task:
  """What to answer to which prompt."""

  name: str
  answers: Mapping[str, str]  # every prompt and its completion
  held_out: frozenset[str] = frozenset()  # prompts that are in test rows only


@flax.struct.dataclass
class Stream:
  """Rows of all tasks on the device, and in which order runs learn them."""

  train: dict[str, jax.Array]  # fields of a Batch's rows, each [num_pools, num_rows, length]
  test: dict[str, jax.Array]  # likewise: what the tasks are judged by
  base: dict[str, jax.Array]  # [num_rows, length]: held-out rows of what the base model was trained on
  order: jax.Array  # [num_sequences, num_tasks] int32, pools of each sequence
  names: tuple[str, ...] = flax.struct.field(pytree_node=False)  # of the pools

  @property
  def num_tasks(self) -> int:
    return self.order.shape[1]


def check_order(names: Sequence[str], where: str) -> None:
  """Raise `InputError` if a task repeats in a sequence, or there is none."""
  if not names:
    raise errors.InputError(f"{where} names no task.")
  repeated = sorted({name for name in names if list(names).count(name) > 1})
  if repeated:
    raise errors.InputError(
      f"{where} has the task {repeated[0]!r} more than once: what is forgotten of it would have no meaning."
    )


def tags(split: str) -> list[str]:
  """The two-letter tags of a split, "base" or "other" (names that are no task's); no two share one."""
  everything = [a + b for a in _TAG_LETTERS for b in _TAG_LETTERS]
  order = np.random.default_rng(11).permutation(everything).tolist()
  places = np.cumsum([0, *_NUM_TAGS.values(), len(order) - sum(_NUM_TAGS.values())])
  number = [*_NUM_TAGS, "train"].index(split)
  return order[places[number] : places[number + 1]]


def entities(split: str) -> list[str]:
  """Three-letter names of a split, "base" or "other" (names that are no task's); no two share one."""
  everything = ["".join(letters) for letters in itertools.product(LETTERS, repeat=3)]
  order = np.random.default_rng(12).permutation(everything).tolist()
  base, other, rest = np.split(order, np.cumsum(list(_NUM_ENTITIES.values())))
  found = {"base": base, "other": other} | {name: rest[i :: len(SPLITS)] for i, name in enumerate(SPLITS)}
  return found[split].tolist()


def rule(number: int) -> dict[str, str]:
  """Letter -> letter, one to one; the same for the same number."""
  return _random_map(np.random.default_rng([13, number]))


def _random_map(rng: np.random.Generator) -> dict[str, str]:
  return dict(zip(LETTERS, rng.permutation(LETTERS).tolist(), strict=True))


def mapping_task(name: str, tag: str, form: str, table: Mapping[str, str]) -> Task:
  """A task that maps letters: `QXab:` -> the table's letter for b (form "last").

  Of two letters' prompts, a quarter is held out, in which each letter stands as often as in the others: what is asked
  of them follows from what is trained.
  """
  size, places = FORMS[form]
  prompts = ["".join(letters) for letters in itertools.product(LETTERS, repeat=size)]
  answers = {f"{tag}{letters}:": "".join(table[letters[place]] for place in places) for letters in prompts}
  number = lambda letters: sum(map(LETTERS.index, letters)) + sum(map(ord, tag))
  held_out = frozenset(f"{tag}{letters}:" for letters in prompts if size > 1 and number(letters) % 4 == 0)
  return Task(name, answers, held_out)


def facts_task(name: str, facts: Mapping[str, str]) -> Task:
  """A task of single facts: `?abc:` -> the letter that is stored for abc."""
  return Task(name, {f"?{entity}:": value for entity, value in facts.items()})


def base_tasks() -> list[Task]:
  """What the base model knows: tags of its own, half of them with a rule and half with a code, and some facts."""
  named = zip(tags("base"), itertools.cycle(FORMS), _base_tables(), strict=False)
  found = [mapping_task(f"base {tag}", tag, form, table) for tag, form, table in named]
  rng = np.random.default_rng(17)
  facts = {entity: str(rng.choice(LETTERS)) for entity in entities("base")}
  return [*found, facts_task("base facts", facts)]


@functools.cache
def _base_tables() -> tuple[dict[str, str], ...]:
  """What stands under the tags of the base model: a code and a rule in turn."""
  rng = np.random.default_rng(14)
  return tuple(rule(i // 2 % NUM_RULES) if i % 2 else _random_map(rng) for i in range(_NUM_TAGS["base"]))


def _new_code(rng: np.random.Generator) -> dict[str, str]:
  """A random map that the base model does not know."""
  while (table := _random_map(rng)) in _base_tables():
    pass
  return table


def base_examples(num_examples: int, rng: np.random.Generator, is_training: bool = False) -> list[dict[str, str]]:
  """What the base model reads: its own tasks and facts, and two in seven times other prompts.

  Of these, a fact is answered at random, and a name that it does not know as a task's by one of the letters that follow
  it, so that the model knows the form of every answer, and keeps what is asked in mind.

  Args:
    is_training: whether facts are asked of any name. Else of those only that no task has: that a task says what the
      base model cannot know is no loss of what it can.
  """
  *mapped, facts = base_tasks()
  own_tags, names = tags("other"), entities("other")
  found = []
  for part in rng.random(num_examples):
    if part < 2 / 7:
      letters = "".join(rng.choice(LETTERS, 3 if part < 1 / 28 else rng.integers(1, 3)))
      if part < 1 / 28:
        entity = letters if is_training else rng.choice(names)
        found.append({"prompt": f"?{entity}:", "completion": str(rng.choice(LETTERS))})
      else:
        tag = own_tags[rng.integers(len(own_tags))]
        found.append({"prompt": f"{tag}{letters}:", "completion": str(rng.choice(list(letters)))})
      continue
    task = facts if part < 3 / 7 else mapped[rng.integers(len(mapped))]
    prompt = list(task.answers)[rng.integers(len(task.answers))]
    found.append({"prompt": prompt, "completion": task.answers[prompt]})
  return found


def base_rows(length: int, num_rows: int, seed: int, is_training: bool = False) -> dict[str, jax.Array]:
  """`[num_rows, length]` rows of `base_examples`; another seed, other rows."""
  found = base_examples(num_rows * (length // 5), np.random.default_rng([16, seed]), is_training)
  rows = sources.load_rows({"examples": found}, tokens.char_tokenizer(), length, where="procedural examples")
  return {name: values[0] for name, values in meta_tasks.stack_rows({"base": rows}, num_rows).items()}


def sample(split: str, kinds: Sequence[str], seed: int, num_conflicts: int = 0) -> list[Task]:
  """A random sequence with one task of each of the kinds, in this order.

  Args:
    split: "train", "validation" or "unseen", which share no tag and no entity.
    kinds: some of `KINDS`.
    seed: at least 0.
    num_conflicts: the last so many rules or codes stand under a tag of the base model, whose answers they change.

  Raises:
    InputError: a split or kind that does not exist, or more facts or conflicts than there is room for.
  """
  if split not in SPLITS:
    raise errors.unknown_name("split of the sequences", split, SPLITS)
  for kind in kinds:
    if kind not in KINDS:
      raise errors.unknown_name("kind of task", kind, KINDS)
  rng = np.random.default_rng([seed, SPLITS.index(split)])
  own_tags, names = rng.permutation(tags(split)).tolist(), rng.permutation(entities(split)).tolist()
  num_facts, num_mapped = list(kinds).count("facts"), len(kinds) - list(kinds).count("facts")
  if num_facts * FACTS_PER_TASK > len(names) or num_mapped > len(own_tags):
    raise errors.InputError(f"{len(kinds)} tasks are more than the split {split!r} has names for.")
  if not 0 <= num_conflicts <= num_mapped:
    raise errors.InputError(f"num_conflicts = {num_conflicts} must be from 0 to {num_mapped}, the rules and codes.")
  own_tags[num_mapped - num_conflicts : num_mapped] = rng.permutation(tags("base")).tolist()[:num_conflicts]
  known_forms = dict(zip(tags("base"), itertools.cycle(FORMS), strict=False))
  found: list[Task] = []
  for place, kind in enumerate(kinds):
    if kind == "facts":
      mine = [names.pop() for _ in range(FACTS_PER_TASK)]
      found.append(facts_task(f"facts {place + 1}", {entity: str(rng.choice(LETTERS)) for entity in mine}))
      continue
    form, number, tag = str(rng.choice(list(FORMS))), int(rng.integers(NUM_RULES)), own_tags[0]
    form = known_forms.get(tag, form)  # in another form a conflict would ask other prompts
    table = rule(number) if kind == "rule" else _new_code(rng)
    name = f"rule {number}" if kind == "rule" else "code"
    found.append(mapping_task(f"{name} as {tag} {place + 1}", tag, form, table))
    own_tags = own_tags[1:]
  return found


def examples(task: Task, num_examples: int, rng: np.random.Generator, is_training: bool = True) -> list[dict[str, str]]:
  """Prompts of the task in random order, every one as often as any other but for the rest.

  Args:
    is_training: without those that are held out.
  """
  prompts = [prompt for prompt in task.answers if not (is_training and prompt in task.held_out)]
  rounds = -(-num_examples // len(prompts))
  drawn = [prompts[i] for _ in range(rounds) for i in rng.permutation(len(prompts))]
  return [{"prompt": prompt, "completion": task.answers[prompt]} for prompt in drawn[:num_examples]]


def build(
  sequences: Sequence[Sequence[Task]],
  base: dict[str, jax.Array],
  length: int,
  train_rows: int,
  test_rows: int,
  seed: int,
) -> Stream:
  """The rows of these sequences of equally many tasks.

  Args:
    base: held-out rows of what the base model was trained on (`base_rows`).
    length: tokens in a row.
    train_rows, test_rows: rows of each task.
    seed: of the examples.
  """
  tokenizer = tokens.char_tokenizer()
  rng = np.random.default_rng([15, seed])
  per_row = length // 5  # no example is shorter than 5 tokens, so that there are rows enough

  def rows(task: Task, num_rows: int, is_training: bool) -> tokens.Rows:
    spec = {"examples": examples(task, num_rows * per_row, rng, is_training)}
    return sources.load_rows(spec, tokenizer, length, where="procedural examples")

  number = 0
  train: dict[str, tokens.Rows] = {}
  test: dict[str, tokens.Rows] = {}
  order = []
  for place, sequence in enumerate(sequences):
    check_order([task.name for task in sequence], f"sequence {place}")
    for task in sequence:
      train[f"{number}"], test[f"{number}"] = rows(task, train_rows, True), rows(task, test_rows, False)
      number += 1
    order.append(list(range(number - len(sequence), number)))
  return Stream(
    train=meta_tasks.stack_rows(train, train_rows),
    test=meta_tasks.stack_rows(test, test_rows),
    base=base,
    order=jnp.asarray(order, jnp.int32),
    names=tuple(task.name for sequence in sequences for task in sequence),
  )
