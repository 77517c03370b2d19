"""Sequences of procedural tasks: what their splits share, what they ask and answer, and the rows made of them."""

import collections
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mftjax import errors
from mftjax.data import sequences, tokens

KINDS = ("rule", "facts", "code", "rule")


def pairs(row):
  """Prompt and completion of each segment of a row, decoded."""
  tokenizer = tokens.char_tokenizer()
  found = []
  for segment in range(1, int(row["segment_ids"].max()) + 1):
    is_own = row["segment_ids"] == segment
    own, mask = row["tokens"][is_own], row["loss_mask"][is_own] > 0
    assert own[-1] == tokenizer.eos_token_id and mask[-1]
    found.append((tokenizer.decode(own[~mask]), tokenizer.decode(own[mask][:-1])))
  return found


def rows_of(fields, *place):
  return [
    {name: np.asarray(values)[(*place, i)] for name, values in fields.items()}
    for i in range(np.asarray(fields["tokens"])[place].shape[0])
  ]


def starts(split, seeds=range(12)):
  """What the prompts of many sampled tasks are about: tags, and entities."""
  found = [task for seed in seeds for task in sequences.sample(split, KINDS, seed)]
  prompts = [prompt for task in found for prompt in task.answers]
  return {p[:4] if p.startswith("?") else p[:2] for p in prompts}


def test_no_two_splits_share_a_tag_or_an_entity():
  names = {split: set(sequences.tags(split)) for split in ("base", "other", *sequences.SPLITS)}
  assert sum(map(len, names.values())) == len(set().union(*names.values())) == 20**2
  base = {prompt[:4] for prompt in sequences.base_tasks()[-1].answers} | names["base"]
  asked = {"base": base, **{split: starts(split) for split in sequences.SPLITS}}
  for one, other in itertools.combinations(asked.values(), 2):
    assert not one & other
  for split in sequences.SPLITS:
    assert {start for start in asked[split] if not start.startswith("?")} <= names[split]


@pytest.mark.parametrize("form", sequences.FORMS)
def test_the_answer_to_a_prompt_is_the_tables(form):
  table = sequences.rule(1)
  assert set(table) == set(table.values()) == set("abcdefgh")
  task = sequences.mapping_task("name", "QX", form, table)
  size, place = {"single": (1, 0), "first": (2, 0), "last": (2, 1)}[form]
  asked = ["".join(letters) for letters in itertools.product("abcdefgh", repeat=size)]
  assert dict(task.answers) == {f"QX{letters}:": table[letters[place]] for letters in asked}


def letter_map(task):
  """The one map that is right for all answers of a task, in some form."""
  for place in (0, 1):
    found = collections.defaultdict(set)
    for prompt, answer in task.answers.items():
      found[prompt[2:-1][place : place + 1]].add(answer)
    if "" not in found and all(len(answers) == 1 for answers in found.values()):
      return {letter: answers.pop() for letter, answers in found.items()}
  raise AssertionError(f"no map of {task.name}")


def test_rules_repeat_under_new_tags_and_codes_do_not():
  found = [task for seed in range(12) for task in sequences.sample("train", ("rule", "code") * 4, seed)]
  rules, codes = collections.defaultdict(list), []
  for task in found:
    (tag,) = {prompt[:2] for prompt in task.answers}
    if task.name.startswith("code"):
      codes.append(tuple(sorted(letter_map(task).items())))
    else:
      rules[task.name.split(" as ")[0]].append((tag, tuple(sorted(letter_map(task).items()))))
  assert set(rules) == {f"rule {number}" for number in range(sequences.NUM_RULES)}
  known = {tuple(sorted(letter_map(task).items())) for task in sequences.base_tasks()[:-1]}
  for number, uses in enumerate(rules[name] for name in sorted(rules)):
    assert {table for _, table in uses} == {tuple(sorted(sequences.rule(number).items()))} <= known
    assert len({tag for tag, _ in uses}) > 3
  assert len(set(codes)) == len(codes) and not set(codes) & known


def test_no_tag_or_entity_stands_twice_in_a_sequence():
  for seed in range(8):
    prompts = [prompt for task in sequences.sample("unseen", KINDS * 2, seed) for prompt in task.answers]
    assert len(prompts) == len(set(prompts))
    tags = [next(iter(task.answers))[:2] for task in sequences.sample("unseen", ("rule", "code") * 4, seed)]
    assert len(tags) == len(set(tags))


def test_the_last_tasks_that_conflict_stand_under_tags_of_the_base_model():
  base = set(sequences.tags("base"))
  for seed in range(8):
    found = sequences.sample("unseen", ("rule", "code", "facts", "code"), seed, num_conflicts=2)
    tags = [next(iter(task.answers))[:2] for task in found]
    assert [tag in base for tag in tags] == [False, True, False, True] and tags[1] != tags[3]
    for task in (found[1], found[3]):  # the same prompts, other answers
      known = next(one for one in sequences.base_tasks() if one.name == f"base {next(iter(task.answers))[:2]}")
      assert set(known.answers) == set(task.answers) and known.answers != task.answers


def test_the_same_seed_the_same_sequence():
  assert sequences.sample("train", KINDS, 3) == sequences.sample("train", KINDS, 3)
  assert sequences.sample("train", KINDS, 3) != sequences.sample("train", KINDS, 4)
  assert [task.name.split()[0] for task in sequences.sample("train", KINDS, 3)] == ["rule", "facts", "code", "rule"]


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (("trian", ("rule",), 0), "train"),
    (("train", ("rul",), 0), "rule"),
    (("validation", ("code",) * 33, 0), "33 tasks are more"),
    (("validation", ("facts",) * 12, 0), "12 tasks are more"),
    (("train", ("rule", "facts"), 0, 2), "from 0 to 1"),
  ],
)
def test_what_cannot_be_sampled_is_named(args, words):
  with pytest.raises(errors.InputError, match=words):
    sequences.sample(*args)


def test_as_many_tasks_as_there_are_names_for():
  assert len(sequences.sample("validation", ("code",) * 32, 0)) == 32


@pytest.mark.parametrize(("names", "words"), [((), "no task"), (("a", "b", "a"), "'a' more than once")])
def test_a_sequence_names_each_task_once(names, words):
  with pytest.raises(errors.InputError, match=f"here.*{words}"):
    sequences.check_order(names, "here")


def test_rows_of_a_sequence_with_a_task_twice_are_not_built():
  task, *_ = sequences.sample("train", KINDS, 0)
  with pytest.raises(errors.InputError, match="sequence 0"):
    sequences.build([[task, task]], {}, 28, 4, 2, seed=0)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 200), st.integers(0, 100))
def test_every_prompt_is_asked_as_often_as_any_other(num_examples, seed):
  task = sequences.mapping_task("name", "QX", "single", sequences.rule(0))
  found = sequences.examples(task, num_examples, np.random.default_rng(seed))
  counts = collections.Counter(example["prompt"] for example in found)
  assert len(found) == num_examples
  assert max(counts.values()) - min(counts[prompt] for prompt in task.answers) <= 1
  assert all(task.answers[example["prompt"]] == example["completion"] for example in found)


def test_rows_hold_prompts_of_their_task_with_the_right_answers():
  found = [sequences.sample("unseen", KINDS, seed) for seed in (0, 1)]
  base = sequences.base_rows(28, 6, seed=1)
  stream = sequences.build(found, base, 28, train_rows=20, test_rows=5, seed=0)
  assert stream.num_tasks == 4
  np.testing.assert_array_equal(stream.order, [[0, 1, 2, 3], [4, 5, 6, 7]])
  tasks = [task for sequence in found for task in sequence]
  assert stream.names == tuple(task.name for task in tasks)
  for fields, num_rows in ((stream.train, 20), (stream.test, 5)):
    for pool, task in enumerate(tasks):
      rows = rows_of(fields, pool)
      assert len(rows) == num_rows
      seen = [pair for row in rows for pair in pairs(row)]
      assert all(task.answers[prompt] == answer for prompt, answer in seen) and len(seen) >= 2 * num_rows
  covered = {prompt for row in rows_of(stream.train, 1) for prompt, _ in pairs(row)}
  assert covered == set(tasks[1].answers)  # 16 facts
  assert any(not np.array_equal(stream.train[name][:, :5], stream.test[name]) for name in stream.test)


def test_base_rows_hold_what_the_base_model_knows_and_letters_of_other_prompts():
  rows = sequences.base_rows(28, 40, seed=1)
  assert all(values.shape == (40, 28) for values in rows.values())
  jax.tree.map(np.testing.assert_array_equal, rows, sequences.base_rows(28, 40, seed=1))
  assert not np.array_equal(rows["tokens"], sequences.base_rows(28, 40, seed=2)["tokens"])
  known = {prompt: answer for task in sequences.base_tasks() for prompt, answer in task.answers.items()}
  seen = [pair for row in rows_of(rows) for pair in pairs(row)]
  own = [answer == known[prompt] for prompt, answer in seen if prompt in known]
  others = {prompt: answer for prompt, answer in seen if prompt not in known}
  assert 0.15 < sum(prompt in others for prompt, _ in seen) / len(seen) < 0.4
  assert all(own) and len(own) > 100
  named = [(prompt, answer) for prompt, answer in others.items() if prompt[0] != "?"]
  assert {prompt[:2] for prompt, _ in named} <= set(sequences.tags("other"))  # no task will have these names
  assert all(answer in prompt[2:-1] for prompt, answer in named)


@pytest.mark.parametrize("is_training", [False, True])
def test_only_the_base_model_s_training_asks_for_facts_that_a_task_may_teach(is_training):
  rows = sequences.base_rows(28, 400, 1, is_training)
  known = {f"?{entity}:" for split in ("base", "other") for entity in sequences.entities(split)}
  asked = {prompt for row in rows_of(rows) for prompt, _ in pairs(row) if prompt[0] == "?"}
  assert len(asked & known) > 40 and bool(asked - known) == is_training
  taught = {prompt for task in sequences.sample("unseen", ["facts"] * 8, 0) for prompt in task.answers}
  assert len(taught) == 128 and taught.isdisjoint(known)


def test_a_quarter_of_two_letters_prompts_is_in_test_rows_only():
  task = sequences.mapping_task("x", "QX", "last", sequences.rule(0))
  assert len(task.held_out) == 16 and task.held_out < set(task.answers)
  for place in (2, 3):  # each letter stands in as many of them as any other
    assert sorted(prompt[place] for prompt in task.held_out) == sorted(2 * list(sequences.LETTERS))
  rng = np.random.default_rng(0)
  prompts = lambda is_training: {x["prompt"] for x in sequences.examples(task, 64, rng, is_training)}
  assert prompts(True) == set(task.answers) - task.held_out
  assert prompts(False) == set(task.answers)
  assert not sequences.mapping_task("x", "QX", "single", sequences.rule(0)).held_out
