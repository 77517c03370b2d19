"""Sequences of real tasks as arrays: orders by name or place, orders to tune on, and which rows they are judged by."""

import itertools

import families
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mftjax import errors
from mftjax.data import real_sequences, task_streams, tokens

NAMES = ("alpha", "beta", "gamma")
FIELDS = ("tokens", "loss_mask", "segment_ids", "positions")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
  folder = families.write(tmp_path_factory.mktemp("families"), NAMES)
  return task_streams.from_files([folder / f"{name}.jsonl" for name in NAMES], tokens.char_tokenizer(), 24, 0)


def test_orders_are_of_names_or_places():
  found = real_sequences.places([("gamma", "alpha"), [0, 1]], NAMES, "orders")
  assert found == [(2, 0), (0, 1)]


@pytest.mark.parametrize(
  ("orders", "message"),
  [
    ([("alpha", "betta")], r"Unknown task in here, order 1: 'betta'\. Did you mean 'beta'"),
    ([("alpha", "beta"), (0, 3)], r"here, order 2: there is no task 3; they are 0 to 2"),
    ([("alpha", "beta", 0)], r"here, order 1 has the task 'alpha' more than once"),
    ([("alpha",), ("alpha", "beta")], r"here: order 1 has 1 tasks and order 2 has 2"),
    ([()], r"here, order 1 names no task"),
    (["alpha", "beta"], r"here: each order is a tuple of tasks; 'alpha' is not"),
  ],
)
def test_wrong_orders_say_which_and_why(orders, message):
  with pytest.raises(errors.InputError, match=message):
    real_sequences.places(orders, NAMES, "here")


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 6), st.integers(1, 3), st.integers(0, 100))
def test_drawn_orders_are_new_ones_of_the_same_tasks(num_tasks, count, seed):
  every = list(itertools.permutations(range(num_tasks)))
  but = every[: max(len(every) - count, 0)]
  if len(every) - len(but) < count:
    with pytest.raises(errors.InputError, match="too few for the sequences to judge on"):
      real_sequences.drawn([range(num_tasks)], count, seed, but)
    return
  found = real_sequences.drawn([range(num_tasks)], count, seed, but)
  assert sorted(found) == every[len(but) :]
  assert found == real_sequences.drawn([range(num_tasks)], count, seed, but)


def test_an_order_is_drawn_for_each_set_of_tasks():
  first, second, third = real_sequences.drawn([(0, 1, 2), (5, 4, 3)], 3, 0, [(3, 4, 5)])
  assert set(first) == set(third) == {0, 1, 2} and set(second) == {3, 4, 5} and first != third and second != (3, 4, 5)


def test_sequences_to_tune_on_are_judged_by_validation_rows(tasks):
  base = {name: np.zeros((2, 24)) for name in FIELDS}
  stream, validation = real_sequences.build(tasks, [(2, 0), (0, 1)], [(1, 0)], base, 5, 3)
  assert stream.order.tolist() == [[2, 0], [0, 1]] and validation.tolist() == [[4, 3]]
  assert stream.names == (*NAMES, *NAMES)
  for place in range(3):
    for name in FIELDS:
      train, test, held_out = (getattr(getattr(tasks, part)[place], name) for part in ("train", "test", "validation"))
      for pool in (place, place + 3):
        np.testing.assert_array_equal(stream.train[name][pool], train[:5])
      np.testing.assert_array_equal(stream.test[name][place][: len(test)], test[:3])
      np.testing.assert_array_equal(stream.test[name][place + 3][: len(held_out)], held_out[:3])


def test_a_small_task_repeats_rows_to_train_on_and_is_judged_by_each_once(tasks):
  num_train, num_test = len(tasks.train[0].tokens), len(tasks.test[0].tokens)
  stream, _ = real_sequences.build(tasks, [(0, 1)], [], {}, num_train + 2, num_test + 4)
  np.testing.assert_array_equal(stream.train["tokens"][0][num_train:], tasks.train[0].tokens[:2])
  np.testing.assert_array_equal(stream.test["tokens"][0][:num_test], tasks.test[0].tokens)
  assert not np.any(stream.test["segment_ids"][0][num_test:]) and not np.any(stream.test["loss_mask"][0][num_test:])


def test_sampled_sequences_have_each_task_once_at_most(tasks):
  stream = real_sequences.sampled(tasks, 7, 2, 3, {}, 4, 2)
  assert stream.order.shape == (7, 2) and all(len(set(order)) == 2 for order in stream.order.tolist())
  assert set(np.asarray(stream.order).ravel().tolist()) == {0, 1, 2}
