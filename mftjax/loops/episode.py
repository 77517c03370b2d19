"""The meta-gradient through one sequence of tasks, by which a memory learns how to be addressed and written.

An episode is a short sequence of tasks, learnt one after another with the very steps of `sequence`; the outer loss is
that on all of them at its end, and on the base model's own data. Its gradient flows back through the whole episode to
keys, queries, gates, temperatures and values of the slots, and to the hyperparameters, so that writing the next task is
learnt not to disturb the last ones. No data of an earlier task is seen again, unless `retention.stored_fraction` keeps
rows of it: then the mixture of a task's own rows and stored ones is learnt by the same gradient.

Source: the objective of online-aware meta-learning (Javed & White, 2019, "Meta-Learning Representations for Continual
Learning", equation 2), with the slots' values in place of its prediction network.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx

from mftjax import config as config_lib
from mftjax import metagrad, models, sft, types
from mftjax.baselines import continual
from mftjax.data import sequences
from mftjax.loops import many_tasks, sequence


def restarting(
  optimizer: optax.GradientTransformation, every: int, block: int | None = None
) -> optax.GradientTransformation:
  """The optimiser, whose state is made anew every so many steps, as at the start of each task.

  Args:
    block: rows (of the first axis of every parameter) that a task moves: the first so many in the first `every` steps,
      then the next, and so on; None: all rows always. This stands here and not in the loss, where a gradient that is
      stopped would make the loss's second derivative one that is not symmetric, which forward over reverse needs.
  """

  def init(params):
    return jnp.zeros((), jnp.int32), optimizer.init(params)

  def update(updates, state, params=None):
    count, inner = state
    inner = jax.tree.map(lambda new, old: jnp.where(count % every == 0, new, old), optimizer.init(params), inner)
    if block is not None:
      is_own = lambda x: (jnp.arange(len(x)) // block == count // every).reshape(-1, *[1] * (x.ndim - 1))
      updates = jax.tree.map(lambda x: jnp.where(is_own(x), x, 0.0), updates)
    updates, inner = optimizer.update(updates, inner, params)
    return updates, (count + 1, inner)

  return optax.GradientTransformation(init, update)


def hyperparameters(config: ml_collections.ConfigDict, meta_params: Any) -> dict[str, Any]:
  """The constrained hyperparameters of the inner steps, those that are learned and those that are not."""
  space = config_lib.space(config)
  # At the learning rates of a memory, the common weight decay would undo each write within a step.
  fixed = config_lib.default_hyperparameters(config) | {"weight_decay": 0.0}
  found = {**fixed, **space.constrain(meta_params["hyperparameters"])}
  if "mixture_logits" in meta_params:
    found["replayed"] = jax.nn.softmax(meta_params["mixture_logits"])[1]
  return found


def held(setup: continual.Setup, memory: Any) -> Any:
  """The setup's held state with this memory in place of its own."""
  _, written = nnx.split_state(setup.held, models.MemoryParam, ...)
  return nnx.merge_state(memory, written)


def num_open(config: ml_collections.ConfigDict) -> int:
  """Slots that an episode's memory is open to, by the rule of writing: those of all its tasks together."""
  rule, written = config.continual.write_rule, config.continual.written_rows
  by_rule = {"new": config.retention.tasks_per_episode * written, "sparse": config.retention.written_rows, "frozen": 1}
  return min(by_rule.get(rule, config.memory.num_slots), config.memory.num_slots)


def value_and_grad(
  config: ml_collections.ConfigDict,
  setup: continual.Setup,
  stream: sequences.Stream,
  meta_params: Any,
  order: jax.Array,
  key: jax.Array,
) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
  """Outer loss, its clipped gradient and figures of one sequence.

  Args:
    setup: of a memory that is open to `num_open` slots.
    meta_params: `memory`, the state of its `MemoryParam`; `hyperparameters`, unconstrained; and with
      `config.retention.stored_fraction` the `mixture_logits` `[2]` of a task's own rows and of stored ones.
    order: `[num_tasks]` pools of the stream.
    key: of the rows that are drawn.

  Returns:
    Scalar loss; gradient like meta_params, 0 if it is not finite; `tasks` `[num_tasks]` and `base`, losses in nats, and
    `is_finite`.
  """
  options, num_tasks = config.retention, len(order)
  length = num_tasks * options.steps_per_task
  data_key, run_key = jax.random.split(key)
  number = jnp.repeat(jnp.arange(num_tasks), options.steps_per_task)
  task = jnp.repeat(number[:, None], config.batch_size, axis=1)
  row = jax.random.randint(data_key, (length, config.batch_size), 0, stream.train["tokens"].shape[1])
  if options.stored_fraction:
    task, row = _with_past(options.stored_fraction, number, task, row, stream.train["tokens"].shape[1], data_key)
  batches = jax.vmap(sequence.taken, (None, 0, 0))(stream.train, order[task], row), number, task, row

  # What the tasks write stands one behind the other: slots in blocks, or an adapter for each.
  has_adapters = config.memory.placement == "adapters"
  num_rows = 1 if has_adapters else config.continual.written_rows
  start = setup.params
  if has_adapters:
    start = jax.tree.map(lambda x: jnp.zeros((num_tasks, *x.shape), x.dtype), start)

  # Slots are chosen once, and adapters for each row, so the gradient goes through these choices apart from the steps.
  opening = lambda memory: _opened(config, setup, stream, memory, order)
  (memory, reads), pull, written = jax.vjp(opening, meta_params["memory"], has_aux=True)

  def weights(params, meta_params, number):
    found = params, nnx.merge_state(meta_params["memory"], written)
    return _as_of(setup, found, number, config.continual.written_rows) if _is_new(config) else found

  def inner_loss(params, meta_params, batch, rng):
    rows, number, task, row = batch
    if has_adapters:
      rows = rows.replace(reads=_reads_of(meta_params["reads"], number, task, row))
    logits = None
    if options.stored_fraction:
      has_past = number > 0
      rows = rows.replace(source=(task != number).astype(jnp.int32), proposal=jnp.where(has_past, 0.5, rows.proposal))
      logits = sft.masked_logits(meta_params["mixture_logits"], jnp.stack([True, has_past]))
    values = hyperparameters(config, meta_params)
    return continual.sft_loss(setup, weights(params, meta_params, number), rows, values, logits)

  def outer_loss(params, meta_params, batch, rng):
    tested, base = batch
    if has_adapters:
      reads = meta_params["reads"]
      tested, base = tested.replace(reads=reads["test"]), base.replace(reads=reads["base"])
    last = weights(params, meta_params, num_tasks - 1)
    mean = lambda rows: sft.row_losses(setup.logits(last, rows), rows)[0]
    by_task = mean(tested).reshape(num_tasks, -1).mean(axis=1)
    base_loss = mean(base).mean()
    return by_task.mean() + options.base_weight * base_loss, {"tasks": by_task, "base": base_loss}

  def optimizer(meta_params):
    values = hyperparameters(config, meta_params)
    block = num_rows if _is_new(config) else None
    return restarting(sft.optimizer(values, options.steps_per_task), options.steps_per_task, block)

  problem = metagrad.Problem(inner_loss, outer_loss, optimizer, has_aux=True)
  outer = _of_tasks(stream.test, order), sequence.as_batch(stream.base)
  opened = {**meta_params, "memory": memory, "reads": reads}
  state = metagrad.init(problem, opened, start)
  step = metagrad.value_and_grad(problem, config.meta.method, **config_lib.method_options(config))
  out = step(opened, state, batches, outer, run_key)
  is_finite = out.metrics["is_finite"]
  grad = {**out.grad, "memory": pull((out.grad["memory"], out.grad["reads"]))[0]}
  del grad["reads"]
  grad = jax.tree.map(lambda g: jnp.where(is_finite, g, 0.0), grad)
  return out.loss, many_tasks.clipped(grad, config.meta.clip_norm), {**out.metrics["aux"], "is_finite": is_finite}


def _with_past(
  stored_fraction: float, number: jax.Array, task: jax.Array, row: jax.Array, num_rows: int, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Tasks and rows `[num_steps, batch_size]` of an episode's batches, half of each now of rows stored of earlier tasks.

  Half is the proposal alone; what they weigh is the mixture's.
  """

  def of_step(number, task, row, key):
    place_key, past_key = jax.random.split(key)
    past_task, past_row = sequence.past(number, stored_fraction, num_rows, len(row), past_key)
    is_past = sequence.is_of_past(number, 0.5, len(row), place_key)
    return jnp.where(is_past, past_task, task), jnp.where(is_past, past_row, row)

  keys = jax.vmap(lambda step: jax.random.fold_in(key, step))(jnp.arange(len(number)))
  return jax.vmap(of_step)(number, task, row, keys)


def _is_new(config: ml_collections.ConfigDict) -> bool:
  return config.continual.write_rule == "new"


def _of_tasks(rows: dict[str, jax.Array], order: jax.Array) -> types.Batch:
  """The rows of an episode's tasks, one behind the other, out of a stream's `train` or `test`."""
  return sequence.as_batch({name: values[order].reshape(-1, *values.shape[2:]) for name, values in rows.items()})


def _opened(
  config: ml_collections.ConfigDict, setup: continual.Setup, stream: sequences.Stream, memory: Any, order: jax.Array
) -> tuple[tuple[Any, dict[str, jax.Array]], Any]:
  """The memory as the episode's tasks find it, with `_reads` where it has adapters, and which slots they write.

  All tasks' slots are chosen before the first step, which changes nothing: neither hidden states nor queries move
  within an episode. With the rule `sparse` they are chosen for all tasks together, so that shapes stay the same.
  """
  carry = {"held": held(setup, memory)}
  reads: dict[str, jax.Array] = {}
  if _is_new(config):
    model = setup.merge((setup.params, carry["held"]))
    for number, pool in enumerate(order):
      for place, found in enumerate(model.memories()):
        rows = continual.memory.block(found, config.continual.written_rows, number)
        continual.memory.place(model, place, rows, sequence.task_rows(stream, pool))
    carry = {"held": nnx.state(model, continual.memory.HELD)}
    if model.adapters is not None:
      reads = _reads(config, model, stream, order)
  elif config.continual.write_rule == "sparse":
    task = continual.Task(jnp.zeros((), jnp.int32), _of_tasks(stream.train, order))
    _, carry = continual.memory.choose(setup, setup.params, carry, task, None, None)
  memory, written = nnx.split_state(carry["held"], models.MemoryParam, ...)
  return (memory, reads), written


def _reads(
  config: ml_collections.ConfigDict, model: models.Decoder, stream: sequences.Stream, order: jax.Array
) -> dict[str, jax.Array]:
  """`block_weights` of an episode's rows, which no inner step changes, by a model in which all its tasks have keys.

  Returns:
    `train` `[num_tasks, rows, length, num_blocks]`, each while its task is learnt; where rows are stored, `past`
    `[num_tasks, num_tasks * stored, ...]`, those of all tasks while each is learnt; `test` `[num_tasks * rows, ...]`
    and `base` `[rows, ...]`, after the last.
  """
  memory, num_rows = model.memories()[0], config.continual.written_rows
  all_keys = memory.keys[...]

  def weights(rows, number):
    memory.keys[...] = _keys_as_of(memory, all_keys, number, num_rows)
    return model.block_weights(continual.memory.read_with(model, 0, rows)[0][0])

  last = len(order) - 1
  found = {
    "train": jnp.stack([weights(sequence.task_rows(stream, pool), number) for number, pool in enumerate(order)]),
    "test": weights(_of_tasks(stream.test, order), last),
    "base": weights(sequence.as_batch(stream.base), last),
  }
  if config.retention.stored_fraction:
    stored = sequence.stored_rows(config.retention.stored_fraction, stream.train["tokens"].shape[1])
    rows = _of_tasks({name: values[:, :stored] for name, values in stream.train.items()}, order)
    found["past"] = jnp.stack([weights(rows, number) for number in range(len(order))])
  return found


def _reads_of(reads: dict[str, jax.Array], number: jax.Array, task: jax.Array, row: jax.Array) -> jax.Array:
  """`[batch, length, num_blocks]` reads of rows `[batch]` of tasks `[batch]` while the task `number` is learnt."""
  own = reads["train"][number, row]
  if "past" not in reads:
    return own
  stored = reads["past"].shape[1] // len(reads["past"])
  past = reads["past"][number, task * stored + jnp.minimum(row, stored - 1)]
  return jnp.where((task == number)[:, None, None], own, past)


def _keys_as_of(memory: models.Memory, keys: jax.Array, number: jax.Array | int, num_rows: int) -> jax.Array:
  """The keys while the episode's task `number` is learnt: later tasks' slots have none yet."""
  slot = jnp.arange(memory.num_slots)
  is_there = (slot // num_rows <= number) | (slot >= continual.memory.num_in_blocks(memory, num_rows))
  return jnp.where(is_there[:, None], keys, 0.0)


def _as_of(setup: continual.Setup, weights: Any, number: jax.Array | int, num_rows: int) -> Any:
  """The weights while the episode's task `number` is learnt."""
  model = setup.merge(weights)
  for memory in model.memories():
    memory.keys[...] = _keys_as_of(memory, memory.keys[...], number, num_rows)
  if model.adapters is not None:
    model.adapters.hold(number)
  return nnx.state(model, models.MemoryWrite), nnx.state(model, continual.memory.HELD)
