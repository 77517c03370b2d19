"""Learning how a memory is addressed: queries by which what is asked of a task finds the slots of that task.

A memory whose tasks write slots of their own forgets, and disturbs the base model, only where a token reads slots of
another task, or of none. That needs no inner step to be learnt: in each step some tasks are drawn, keys are placed at
tokens of their training rows and of the base model's data, and tokens of their test rows, and others of that data,
have to read their own. So it is done first, in steps that cost little beside an episode.

Source: neighbourhood components analysis (Goldberger et al., 2004, equations 1 to 4), with episodes of tasks as in
Matching Networks (Vinyals et al., 2016, Section 2.2); what is no task's as a class of its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from absl import logging
from flax import nnx

from mftjax import models
from mftjax.baselines import continual
from mftjax.data import sequences
from mftjax.loops import sequence

_ASKED, _ASKED_OF_BASE = 50, 500  # tokens of each task, and of the base model's data, that a step is judged by
_LEAST = 1e-4  # part of a read that counts as none


def learned(config: ml_collections.ConfigDict, setup: continual.Setup, stream: sequences.Stream) -> Any:
  """The state of the setup's `MemoryParam` after `config.retention.matching_steps` steps, shared keys placed anew.

  Args:
    setup: of a model with memories.
    stream: the tasks to learn it on; its order does not matter.

  Raises:
    InputError: a memory with product keys, which cannot be placed.
  """
  model = setup.merge((setup.params, setup.held))
  for number in range(len(model.memories())):
    _learn_one(config, model, number, setup, stream)
  nnx.jit(continual.memory.place_shared)(model, setup.background)
  return nnx.state(model, models.MemoryParam)


def _learn_one(
  config: ml_collections.ConfigDict,
  model: models.Decoder,
  number: int,
  setup: continual.Setup,
  stream: sequences.Stream,
) -> None:
  """Changes one of the model's memories, in place."""
  options, memory, size = config.retention, model.memories()[number], config.continual.written_rows
  tokens = nnx.jit(lambda model, rows: _tokens(model, number, rows))
  flat = lambda rows: {name: x.reshape(-1, *x.shape[2:]) for name, x in rows.items()}
  pools = lambda rows: jax.tree.map(lambda x: x.reshape(len(stream.names), -1, *x.shape[1:]), rows)
  train, test = (pools(tokens(model, sequence.as_batch(flat(rows)))) for rows in (stream.train, stream.test))
  background = tokens(model, setup.background)
  num_tasks, num_pools = min(setup.num_tasks, len(stream.names)), len(stream.names)
  parts: Any = nnx.split(memory, models.MemoryParam, ...)
  graphdef, params, rest = parts

  def loss_fn(params, rest, data, key):
    train, test, background = data
    keys = iter(jax.random.split(key, 6))
    chosen = jax.random.choice(next(keys), num_pools, (num_tasks,), replace=False)
    of_each = lambda tokens, count, key: jax.vmap(lambda pool, key: _drawn(tokens, count, key, pool))(
      chosen, jax.random.split(key, num_tasks)
    )
    placed, asked = of_each(train, size, next(keys)), of_each(test, _ASKED, next(keys))
    # One half is what keys are at, the other what is asked, in turns: no token is asked that a key is at.
    halves = jax.tree.map(lambda x: x[: len(x) // 2 * 2].reshape(2, -1, *x.shape[1:]), background)
    first = jax.random.bernoulli(next(keys)).astype(jnp.int32)
    # As many as there will be: among fewer, keys are farther apart, and queries learn to need no more than that.
    shared = _both(halves, memory.num_shared, next(keys), first)
    others = _both(halves, _ASKED_OF_BASE, next(keys), 1 - first)

    found = nnx.merge(graphdef, params, rest, copy=True)
    inputs = jnp.concatenate([placed.reshape(-1, placed.shape[-1]), shared])
    found.keys = models.MemoryParam(found.queries(inputs))
    found.num_slots, found.num_shared, found.top_k = len(inputs), len(shared), None  # all keys pull, not the best alone
    weights = found.block_weights(jnp.concatenate([asked.reshape(-1, asked.shape[-1]), others]), size, num_tasks)
    of_tasks, of_base = jnp.split(weights, [num_tasks * _ASKED])
    own = of_tasks.reshape(num_tasks, _ASKED, num_tasks)[jnp.arange(num_tasks), :, jnp.arange(num_tasks)]
    surprise = lambda part: -jnp.log(part + _LEAST).mean()
    loss = surprise(own) + options.matching_base_weight * surprise(1 - of_base.sum(axis=-1))
    return loss, {"own": own.mean(), "of base": of_base.sum(axis=-1).mean()}

  rate = optax.cosine_decay_schedule(options.matching_learning_rate, options.matching_steps, alpha=0.1)
  outer = optax.adam(rate, b2=0.99)

  @jax.jit
  def step_fn(params, opt_state, rest, data, key):
    (_, figures), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, rest, data, key)
    updates, opt_state = outer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, figures

  opt_state, data = outer.init(params), (train, test, background)
  for step in range(options.matching_steps):
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    params, opt_state, figures = step_fn(params, opt_state, rest, data, key)
    if step in (0, options.matching_steps - 1):
      parts = ", ".join(f"{name} {float(x):.4f}" for name, x in figures.items())
      logging.warning("Memory %d, matching step %d: part of the reads that tasks have: %s.", number, step + 1, parts)
  nnx.update(memory, params)


def _tokens(model: models.Decoder, number: int, rows: Any) -> tuple[jax.Array, jax.Array]:
  """What the memory is read with, `[num_rows, layers * length, dim]`, and masks `[num_rows, 2, ...]` of `read_with`."""
  by_row = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
  inputs, *masks = map(by_row, continual.memory.read_with(model, number, rows))
  return inputs, jnp.stack(masks, axis=1)


def _both(tokens: tuple[jax.Array, jax.Array], count: int, key: jax.Array, pool: jax.Array) -> jax.Array:
  """`[count, dim]` inputs of tokens that answer, and of others, in the proportion of shared slots."""
  keys, counts = jax.random.split(key), continual.memory.shared_of(count)
  return jnp.concatenate([_drawn(tokens, n, keys[kind], pool, kind) for kind, n in enumerate(counts)])


def _drawn(
  tokens: tuple[jax.Array, jax.Array], count: int, key: jax.Array, pool: jax.Array, kind: int = 0
) -> jax.Array:
  """`[count, dim]` inputs of any tokens of one pool of `_tokens` that answer, or, with kind 1, that do not."""
  inputs, mask = (x[pool] for x in tokens)
  mask = mask[:, kind]
  place = jax.random.choice(key, mask.size, (count,), p=mask.reshape(-1) / mask.sum())
  return inputs.reshape(-1, inputs.shape[-1])[place]
