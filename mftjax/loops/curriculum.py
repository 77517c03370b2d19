"""The mixture that is learned: one for the whole run, or one at each of some moments of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mftjax import sft, types
from mftjax.data import mixture
from mftjax.loops import task as task_lib


def init(config: ml_collections.ConfigDict) -> jax.Array:
  """Logits of uniform mixtures: `[num_sources]`, or `[knots, num_sources]` with more than one knot."""
  knots, count = config.mixture.knots, len(config.sources)
  return jnp.zeros((knots, count) if knots > 1 else (count,), jnp.float32)


def progress(steps: np.ndarray, num_steps: int) -> np.ndarray:
  """Part of a run of `num_steps` that is over at each step: 0 at its first, 1 at its last."""
  return np.minimum(steps / max(num_steps - 1, 1), 1.0)


def weights(mixture_logits: jax.Array, steps: np.ndarray, num_steps: int) -> np.ndarray:
  """`[len(steps), num_sources]` f64 mixtures at these steps of a run of `num_steps`."""
  at = sft.mixture_at(mixture_logits, jnp.asarray(progress(steps, num_steps), jnp.float32))
  return np.asarray(jax.nn.softmax(at), np.float64)


def average(mixture_logits: jax.Array, num_steps: int) -> np.ndarray:
  """`[num_sources]` f64 mixture over a whole run of `num_steps`."""
  found = weights(mixture_logits, np.arange(num_steps if mixture_logits.ndim > 1 else 1), num_steps).mean(axis=0)
  return found / found.sum()


def schedule(config: ml_collections.ConfigDict, mixture_logits: jax.Array) -> list[dict[str, Any]] | None:
  """The recipe's `mixture_schedule`; None for a mixture that stays the same."""
  if mixture_logits.ndim == 1:
    return None
  names, knots = task_lib.names(config.sources), np.asarray(jax.nn.softmax(mixture_logits), np.float64)
  return [
    {
      "progress": knot / (len(knots) - 1),
      "mixture": dict(zip(names, map(float, row / row.sum()), strict=True)),
    }
    for knot, row in enumerate(knots)
  ]


def draw(
  config: ml_collections.ConfigDict,
  stream: mixture.Stream,
  mixture_logits: jax.Array,
  first_step: int,
  length: int,
  num_steps: int,
) -> types.Batch:
  """Batches `[length, batch_size, ...]` of the steps from `first_step` on, of a run of `num_steps`.

  Each is drawn by its step's mixture, blended with `config.meta.uniform_fraction` of the uniform one. Their
  `progress` counts as a constant, also where a hyperparameter that is learned sets `num_steps`.
  """
  steps = np.arange(first_step, first_step + length)
  batches = []
  for over, row in zip(progress(steps, num_steps), weights(mixture_logits, steps, num_steps), strict=True):
    batch = stream.next(mixture.proposal(row, config.meta.uniform_fraction))
    if mixture_logits.ndim > 1:
      batch = dataclasses.replace(batch, progress=np.full(len(batch.source), over, np.float32))
    batches.append(batch)
  return task_lib.stack(batches)
