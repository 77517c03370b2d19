"""Programs that fine-tune a model on one task after another, for many runs at once, in steps that can be resumed."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mftjax import metagrad, sft, types
from mftjax.baselines import continual
from mftjax.data import sequences

_MOST_LOGITS, _MOST_TOKENS = 2**26, 2**15  # that are held at once for each run, while it is measured


@flax.struct.dataclass
class State:
  """A run between two steps."""

  inner: metagrad.State  # of the task that is learnt now
  carry: Any  # what the method keeps from task to task


@dataclasses.dataclass(frozen=True)
class Run:
  """What all runs have in common."""

  num_steps: int  # of each task
  batch_size: int  # rows


@flax.struct.dataclass
class Measured:
  """What a model does on the tasks of its sequence, and on the base model's own data."""

  accuracy: jax.Array  # [num_tasks] part of the test examples that are answered exactly
  loss: jax.Array  # [num_tasks] nats per target token
  base_loss: jax.Array  # scalar, nats per target token


@dataclasses.dataclass(frozen=True)
class Programs:
  """The parts of a method's runs, each jitted and over many runs at once; `values` and `order` are theirs.

  `order` is `[num_runs, num_tasks]` pools in the order in which each run learns them, `keys` `[num_runs]`.
  """

  start: Callable  # (values) -> state; values only say how many runs there are
  begin: Callable  # (state, values, order, number, keys) -> state
  advance: Callable  # (state, values, order, number, keys, steps [n]) -> (state, losses [num_runs, n])
  end: Callable  # (state, values, order, number) -> state
  measure: Callable  # (state, values, order) -> Measured


def build(setup: continual.Setup, method: continual.Method, stream: sequences.Stream, run: Run) -> Programs:
  """The programs of a method on the tasks of a stream.

  Each step's batch is drawn by the run's key, the task's number and the step alone, so that a run that is resumed goes
  on as it would have gone on.
  """
  total = run.num_steps * (setup.num_tasks if method.is_joint else 1)
  num_targets = most_targets(stream)

  # As arguments: as constants, a large model's arrays would be copied into every program.
  own = {name: getattr(setup, name) for name in ("params", "held", "frozen", "background")}
  rows = {"train": stream.train, "test": stream.test, "base": stream.base}

  def compiled(fn, *axes):
    over_runs = lambda own, rows, *args: jax.vmap(
      lambda *args: fn(dataclasses.replace(setup, **own), dataclasses.replace(stream, **rows), *args), axes
    )(*args)
    program = jax.jit(over_runs)
    return lambda *args: program(own, rows, *args)

  def problem(setup, values):
    def loss(params, carry, batch, rng):
      return method.loss(setup, params, carry, batch, values)

    return metagrad.Problem(
      loss, loss, lambda _: sft.optimizer(continual.of_sft(values), total, largest_batch=run.batch_size)
    )

  def start(setup, stream, values):
    inner = metagrad.init(problem(setup, values), None, setup.params)
    return State(inner, method.init(setup))

  def begin(setup, stream, state, values, order, number, key):
    task = continual.Task(number, task_rows(stream, order[number]))
    key = jax.random.fold_in(jax.random.fold_in(key, number), total)
    params, carry = method.begin(setup, state.inner.params, state.carry, task, values, key)
    return State(metagrad.init(problem(setup, values), None, params), carry)

  def advance(setup, stream, state, values, order, number, key, steps):
    built = problem(setup, values)
    key = jax.random.fold_in(key, number)

    def body(inner, step):
      row_key, past_key, loss_key = jax.random.split(jax.random.fold_in(key, step), 3)
      batch = draw(stream, method, order, number, values, run.batch_size, row_key)
      loss, grads = metagrad.problem.gradient(built, inner.params, state.carry, batch, loss_key)
      if method.adjust is not None:
        past = draw_past(stream, order, number, method.stored_fraction, run.batch_size, past_key)
        _, past_grads = metagrad.problem.gradient(built, inner.params, state.carry, past, loss_key)
        adjusted = method.adjust(grads, past_grads)
        grads = jax.tree.map(lambda new, old: jnp.where(number > 0, new, old), adjusted, grads)
      return metagrad.problem.update(built, None, inner, grads), loss

    inner, losses = jax.lax.scan(body, state.inner, steps)
    return state.replace(inner=inner), losses

  def end(setup, stream, state, values, order, number):
    task = continual.Task(number, task_rows(stream, order[number]))
    params, carry = method.end(setup, state.inner.params, state.carry, task, values)
    return State(state.inner.replace(params=params), carry)

  def measure(setup, stream, state, values, order):
    return measured(setup, method.final(state.inner.params, state.carry, values), stream, order, num_targets)

  return Programs(
    compiled(start, 0),
    compiled(begin, 0, 0, 0, None, 0),
    compiled(advance, 0, 0, 0, None, 0, None),
    compiled(end, 0, 0, 0, None),
    compiled(measure, 0, 0, 0),
  )


def most_targets(stream: sequences.Stream) -> dict[str, int]:
  """Targets of the row that has the most, of the stream's `test` and `base` rows."""
  flat = lambda values: values.reshape(-1, values.shape[-1])
  of = lambda rows: as_batch({name: flat(rows[name]) for name in ("tokens", "segment_ids", "loss_mask", "positions")})
  most = lambda rows: int(sft.target_mask(of(rows)).sum(axis=1).max())
  return {"test": most(stream.test), "base": most(stream.base)}


def measured(
  setup: continual.Setup, weights: Any, stream: sequences.Stream, order: jax.Array, num_targets: Mapping[str, int]
) -> Measured:
  """What the model with these weights does on the tasks `order` `[num_tasks]` and on the base model's data.

  Args:
    num_targets: `most_targets` of the stream. Logits are computed for so many tokens of a row only, those that answer:
      of a small model with a large vocabulary they cost as much as all the rest.
  """
  model = setup.merge(weights)

  def judge_part(rows, num_targets):
    batch = as_batch(rows)
    mask = sft.target_mask(batch)
    place = jnp.argsort(mask == 0, axis=1)[:, :num_targets]  # where the next token is a target, and others
    at_place = lambda values: jnp.take_along_axis(values, place, axis=1)
    hidden = continual.last_hidden(model, batch)
    logits = model.logits(jnp.take_along_axis(hidden, place[..., None], axis=1))
    targets = at_place(batch.tokens[:, 1:])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets) * at_place(mask)
    is_right = jnp.argmax(logits, axis=-1) == targets
    is_right = jnp.put_along_axis(jnp.zeros(mask.shape, bool), place, is_right, axis=1, inplace=False)
    return *sft.whole_examples(is_right, batch), losses, mask

  def judge(rows, num_targets):
    num_rows, length = rows["tokens"].shape
    at_once = min(_MOST_LOGITS // (num_targets * model.config.vocab_size), _MOST_TOKENS // length, num_rows)
    num_parts = -(-num_rows // max(at_once, 1))
    missing = -num_rows % num_parts  # rows of padding, in which nothing counts
    in_parts = lambda x: jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))).reshape(num_parts, -1, *x.shape[1:])
    parts = {name: in_parts(values) for name, values in rows.items()}
    found = jax.lax.map(lambda part: judge_part(part, num_targets), parts)
    right, examples, losses, counts = (x.sum() for x in found)
    return right / examples, losses / counts

  of_task = lambda pool: judge({name: values[pool] for name, values in stream.test.items()}, num_targets["test"])
  accuracy, loss = jax.lax.map(of_task, order)
  return Measured(accuracy, loss, judge(stream.base, num_targets["base"])[1])


def as_batch(rows: Mapping[str, jax.Array]) -> types.Batch:
  """Rows `[num_rows, length]` as a batch that is all of one source."""
  count = len(rows["tokens"])
  return types.Batch(**rows, source=jnp.zeros(count, jnp.int32), proposal=jnp.ones(count))


def taken(rows: Mapping[str, jax.Array], pool: jax.Array, row: jax.Array) -> types.Batch:
  """The batch of these rows `[size]`, each of its pool, out of `[num_pools, num_rows, length]`."""
  return as_batch({name: found[pool, row] for name, found in rows.items()})


def task_rows(stream: sequences.Stream, pool: jax.Array) -> types.Batch:
  """All training rows of a task."""
  return as_batch({name: values[pool] for name, values in stream.train.items()})


def draw(
  stream: sequences.Stream,
  method: continual.Method,
  order: jax.Array,
  number: jax.Array,
  values: Mapping[str, Any],
  size: int,
  key: jax.Array,
) -> types.Batch:
  """A batch of the task, with the method's part of stored rows; of all tasks, if the method learns them at once."""
  pool_key, row_key, past_key = jax.random.split(key, 3)
  num_rows = stream.train["tokens"].shape[1]
  row = jax.random.randint(row_key, (size,), 0, num_rows)
  if method.is_joint:
    pool = order[jax.random.randint(pool_key, (size,), 0, len(order))]
  else:
    pool = jnp.full(size, order[number])
  if method.is_replaying:
    task, past_row = past(number, method.stored_fraction, num_rows, size, past_key)
    is_past = is_of_past(number, values["replayed"], size, pool_key)
    pool, row = jnp.where(is_past, order[task], pool), jnp.where(is_past, past_row, row)
  return taken(stream.train, pool, row)


def draw_past(
  stream: sequences.Stream, order: jax.Array, number: jax.Array, stored_fraction: float, size: int, key: jax.Array
) -> types.Batch:
  """A batch of stored rows of the tasks before this one (of the first task, where there is none before)."""
  task, row = past(number, stored_fraction, stream.train["tokens"].shape[1], size, key)
  return taken(stream.train, order[task], row)


def stored_rows(stored_fraction: float, num_rows: int) -> int:
  """Rows that are kept of each task: the fraction, but one at least; 0 if nothing is to be kept."""
  return max(1, round(stored_fraction * num_rows)) if stored_fraction else 0


def is_of_past(number: jax.Array, share: jax.typing.ArrayLike, size: int, key: jax.Array) -> jax.Array:
  """`[size]` bool, which rows of a batch are stored ones of earlier tasks: their share, never a row off."""
  points = (jnp.arange(size) + jax.random.uniform(key)) / size  # systematic
  return (points < share) & (number > 0)


def past(
  number: jax.Array, stored_fraction: float, num_rows: int, size: int, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Earlier tasks' numbers and stored rows `[size]`; a task's rows stand in random order, so that the first are any."""
  task_key, row_key = jax.random.split(key)
  task = jax.random.randint(task_key, (size,), 0, jnp.maximum(number, 1))
  row = jax.random.randint(row_key, (size,), 0, stored_rows(stored_fraction, num_rows))
  return task, row
