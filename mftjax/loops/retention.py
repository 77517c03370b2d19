"""Meta-training of a memory over sequences of tasks, and the same memory trained without an outer loop."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import logging
from flax import nnx

from mftjax import checkpoint, metagrad, models, sft, tracking
from mftjax import config as config_lib
from mftjax.baselines import continual
from mftjax.data import sequences
from mftjax.loops import addressing, episode, sequence
from mftjax.loops import meta_train as direct
from mftjax.loops import task as task_lib


def init_meta_params(config: ml_collections.ConfigDict, setup: continual.Setup) -> dict[str, Any]:
  """A new memory, the config's hyperparameters, and the mixture's logits where rows are stored: see `episode`."""
  memory, _ = nnx.split_state(setup.held, models.MemoryParam, ...)
  space = config_lib.space(config)
  found = {"memory": memory, "hyperparameters": space.init(config_lib.initial_hyperparameters(config))}
  if config.retention.stored_fraction:
    _, bounds = continual.replay.REPLAYED
    share = sum(bounds) / 2  # as in the first trial of those who tune it
    found["mixture_logits"] = jnp.log(jnp.asarray([1 - share, share]))
  return found


def outer_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """Adam whose rate falls to a tenth by a cosine; hyperparameters and mixture have rates of their own."""
  rates = {
    "memory": config.retention.learning_rate,
    "hyperparameters": config.meta.hyperparameter_learning_rate,
    "mixture_logits": config.meta.mixture_learning_rate,
  }
  return direct.falling_adams(rates, config.retention.outer_steps)


def meta_train(
  config: ml_collections.ConfigDict, setup: continual.Setup, stream: sequences.Stream, workdir: pathlib.Path
) -> dict[str, Any]:
  """Meta-parameters after `config.retention.outer_steps` steps, going on from the workdir's last checkpoint.

  Args:
    setup: of a memory that is trained, open to as many slots as an episode writes.
    stream: sequences of `config.retention.tasks_per_episode` tasks, that no other part of an experiment sees;
      whole, or cut by `answering`.

  Raises:
    MftError: `meta.max_skipped` outer steps in a row were not finite.
  """
  options, outer = config.retention, outer_optimizer(config)

  @jax.jit
  def outer_step(frozen, rows, meta_params, opt_state, key):
    draw_key, base_key, run_key = jax.random.split(key, 3)
    # Others in each step: a memory learns a few rows by heart, and reads tasks' slots for the rest.
    pool = len(rows["base"]["tokens"])
    base = jax.random.choice(base_key, pool, (min(options.base_rows, pool),), replace=False)
    rows = {**rows, "base": {name: values[base] for name, values in rows["base"].items()}}
    one = functools.partial(
      episode.value_and_grad,
      config,
      dataclasses.replace(setup, frozen=frozen),
      dataclasses.replace(stream, **rows),
      meta_params,
    )
    drawn = jax.random.choice(draw_key, len(stream.order), (options.episodes,), replace=False)
    losses, grads, metrics = jax.vmap(one)(stream.order[drawn], jax.random.split(run_key, options.episodes))
    count = jnp.maximum(jnp.sum(metrics["is_finite"]), 1)
    grad = jax.tree.map(lambda g: jnp.sum(g, axis=0) / count, grads)
    updates, opt_state = outer.update(grad, opt_state, meta_params)
    mean = lambda x: jnp.sum(jnp.where(_like(metrics["is_finite"], x), x, 0.0), axis=0) / count
    figures = {"loss": mean(losses), "tasks": mean(metrics["tasks"]), "base": mean(metrics["base"]), "finite": count}
    return optax.apply_updates(meta_params, updates), opt_state, figures | {"grad_norm": optax.global_norm(grad)}

  meta_params = init_meta_params(config, setup)
  state, start, skipped = (meta_params, outer.init(meta_params)), 0, 0
  rows = {"train": stream.train, "test": stream.test, "base": stream.base}
  tokens = options.episodes * options.tasks_per_episode * options.steps_per_task * config.batch_size * config.length
  with checkpoint.Checkpoints(workdir / "retention") as checkpoints:
    found = checkpoints.restore(task_lib.pure(state))
    if found:
      start, state = found[0], task_lib.unpure(state, found[1])
      logging.warning("Going on from outer step %d in %s.", start, workdir)
    elif options.matching_steps:
      state = {**meta_params, "memory": addressing.learned(config, setup, stream)}, state[1]
    tracker = tracking.Tracker(
      workdir, options.outer_steps, title="meta-train", name="retention", start_step=start, tokens_per_step=tokens
    )
    with tracker:
      for step in tracker.steps():
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        *state, figures = outer_step(setup.frozen, rows, *state, key)
        skipped = skipped + 1 if float(figures["grad_norm"]) == 0.0 else 0
        values = {name: float(x) for name, x in episode.hyperparameters(config, state[0]).items()}
        line = {name: np.asarray(x).tolist() for name, x in figures.items()}
        learned = {name: values[name] for name in (*config_lib.space(config).spaces, "replayed") if name in values}
        tracker.log(step + 1, line | {"hyperparameters": learned})
        task_lib.stop_if_skipped(config, workdir, skipped, figures)
        if checkpoints.is_due(step + 1, options.outer_steps, config.checkpoint_every):
          checkpoints.save(step + 1, task_lib.pure(tuple(state)), {})
  return state[0]


def _like(flags: jax.Array, values: jax.Array) -> jax.Array:
  """Flags `[n]` with as many axes as the values `[n, ...]`."""
  return flags.reshape(-1, *[1] * (values.ndim - 1))


def train_without(
  config: ml_collections.ConfigDict, setup: continual.Setup, stream: sequences.Stream, learning_rate: float
) -> Any:
  """The memory after ordinary training on the same tasks all at once, with as many rows as meta-training sees.

  What is trained is what meta-training trains of the memory, without an outer loop: keys, queries and values.
  """
  options = config.retention
  memory, opened = nnx.split_state(setup.held, models.MemoryParam, ...)
  num_steps = options.outer_steps * options.episodes * options.tasks_per_episode * options.steps_per_task

  @jax.jit
  def run(frozen, rows, memory, key):
    own = dataclasses.replace(setup, frozen=frozen)
    values = {"learning_rate": jnp.float32(learning_rate), "weight_decay": 0.0}
    loss = lambda memory, _, batch, rng: continual.sft_loss(
      own, (own.params, nnx.merge_state(memory, opened)), batch, values
    )
    problem = metagrad.Problem(loss, loss, lambda _: sft.optimizer(values, num_steps))

    def body(state, key):
      pool_key, row_key = jax.random.split(key)
      pool = jax.random.choice(pool_key, stream.order.reshape(-1), (config.batch_size,))
      row = jax.random.randint(row_key, (config.batch_size,), 0, rows["tokens"].shape[1])
      state, _, loss = metagrad.inner_step(problem, None, state, sequence.taken(rows, pool, row), key)
      return state, loss

    state, losses = jax.lax.scan(body, metagrad.init(problem, None, memory), jax.random.split(key, num_steps))
    return state.params, losses

  trained, losses = run(setup.frozen, stream.train, memory, jax.random.key(config.seed))
  logging.warning("Memory without an outer loop: loss %.3f to %.3f.", float(losses[0]), float(losses[-100:].mean()))
  return trained
