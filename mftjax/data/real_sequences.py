"""Sequences of real tasks as arrays: their orders, those to tune on among them, and rows of equal number."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mftjax import errors
from mftjax.data import meta_tasks, sequences, task_streams, tokens

Order = tuple[int, ...]  # places among the tasks


def places(orders: Sequence[Any], names: Sequence[str], where: str) -> list[Order]:
  """Orders of tasks as places.

  Args:
    orders: each a sequence of names or of places; all equally long.
    names: of the tasks there are.
    where: where the orders stand; begins every error.

  Raises:
    InputError: an unknown task, one that repeats in an order, or orders of different lengths.
  """
  found: list[Order] = []
  for number, order in enumerate(orders):
    if isinstance(order, str | int):
      raise errors.InputError(f"{where}: each order is a tuple of tasks; {order!r} is not. Write ((...), (...),).")
    order = [_place(task, names, f"{where}, order {number + 1}") for task in order]
    sequences.check_order([names[place] for place in order], f"{where}, order {number + 1}")
    if len(order) != len(found[0] if found else order):
      raise errors.InputError(f"{where}: order 1 has {len(found[0])} tasks and order {number + 1} has {len(order)}.")
    found.append(tuple(order))
  return found


def _place(task: Any, names: Sequence[str], where: str) -> int:
  if isinstance(task, int):
    if not 0 <= task < len(names):
      raise errors.InputError(f"{where}: there is no task {task}; they are 0 to {len(names) - 1}.")
    return task
  if task not in names:
    raise errors.unknown_name(f"task in {where}", str(task), names)
  return list(names).index(task)


def drawn(tasks: Sequence[Sequence[int]], count: int, seed: int, but: Sequence[Order] = ()) -> list[Order]:
  """Random orders, all different.

  Args:
    tasks: the i-th order is one of the tasks in the i-th of these, or from the first again.
    count: how many.
    seed: at least 0.
    but: orders that are not to be drawn.

  Raises:
    InputError: there are not so many.
  """
  own = [set(tasks[number % len(tasks)]) for number in range(count)]
  taken = set(but)
  for tasks_of in own:
    left = math.factorial(len(tasks_of)) - sum(set(order) == tasks_of for order in taken)
    if left < own.count(tasks_of):
      raise errors.InputError(
        f"{len(tasks_of)} tasks have {math.factorial(len(tasks_of))} orders, too few for the sequences to judge on and "
        "others to tune on: take fewer, or more tasks."
      )
  rng = np.random.default_rng([17, seed])
  found: list[Order] = []
  while len(found) < count:
    order = tuple(rng.permutation(sorted(own[len(found)])).tolist())
    if order not in taken:
      found.append(order)
      taken.add(order)
  return found


def build(
  tasks: task_streams.TaskStream,
  orders: Sequence[Order],
  validation: Sequence[Order],
  base: dict[str, jax.Array],
  train_rows: int,
  test_rows: int,
) -> tuple[sequences.Stream, jax.Array]:
  """The rows of the sequences to judge on, and of those to tune on.

  A task is two pools with the same training rows. What the second one is judged by are the task's validation rows, so
  that tuning on an order of second pools sees no test row.

  Args:
    tasks: of all orders.
    orders: `[num_sequences][num_tasks]` places, to judge on.
    validation: likewise, to tune on.
    base: held-out rows of what the model can do already.
    train_rows, test_rows: rows of each task; a task with fewer repeats its training rows, and is judged by fewer.

  Returns:
    The stream, and `[num_validation, num_tasks]` pools of the sequences to tune on.
  """
  train = _stacked(tasks, tasks.train, train_rows)
  test, held_out = (
    _stacked(tasks, [_padded(rows, test_rows) for rows in part], test_rows) for part in (tasks.test, tasks.validation)
  )
  both = lambda first, second: {name: jnp.concatenate([first[name], second[name]]) for name in first}
  stream = sequences.Stream(
    train=both(train, train),
    test=both(test, held_out),
    base=base,
    order=jnp.asarray(orders, jnp.int32),
    names=tasks.names * 2,
  )
  return stream, jnp.asarray(validation, jnp.int32) + len(tasks.names)


def sampled(
  tasks: task_streams.TaskStream,
  num_sequences: int,
  num_tasks: int,
  seed: int,
  base: dict[str, jax.Array],
  train_rows: int,
  test_rows: int,
) -> sequences.Stream:
  """Random sequences of some of the tasks, with repetition of sequences where there are few tasks.

  Args:
    num_sequences, num_tasks: how many, and of how many tasks each.
    seed: at least 0.
    base, train_rows, test_rows: as of `build`; a task with fewer test rows repeats its own.
  """
  rng = np.random.default_rng([18, seed])
  orders = [rng.permutation(len(tasks.names))[:num_tasks] for _ in range(num_sequences)]
  return sequences.Stream(
    train=_stacked(tasks, tasks.train, train_rows),
    test=_stacked(tasks, tasks.test, test_rows),
    base=base,
    order=jnp.asarray(np.stack(orders), jnp.int32),
    names=tasks.names,
  )


def arrays(rows: tokens.Rows) -> dict[str, jax.Array]:
  """The fields of a Batch's rows, each `[num_rows, length]`."""
  return {name: values[0] for name, values in meta_tasks.stack_rows({"": rows}, len(rows.tokens)).items()}


def _stacked(tasks: task_streams.TaskStream, rows: Sequence[tokens.Rows], num_rows: int) -> dict[str, jax.Array]:
  return meta_tasks.stack_rows(dict(zip(tasks.names, rows, strict=True)), num_rows)


def _padded(rows: tokens.Rows, num_rows: int) -> tokens.Rows:
  """At least `num_rows` rows, the last of which may be empty: repeated ones would count twice."""
  missing = max(num_rows - len(rows.tokens), 0)
  pad = lambda values: np.pad(values, ((0, missing), (0, 0)))
  return tokens.Rows(pad(rows.tokens), pad(rows.loss_mask), pad(rows.segment_ids), pad(rows.positions), rows.truncated)
