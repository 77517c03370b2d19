"""Metasmoothness of a small training run, and what the choices that are said to raise it do to it.

python -m benchmarks.smoothness [--num_seeds=10] [--step_size=0.3] [--json=FILE]

A ReLU net (16-64-64-4) learns the classes of a random teacher from 8 sources, half of them with random labels, in 60
steps of Adam (`sft.optimizer`) on batches of 32, with a moderate and with a too high learning rate. Meta-parameters:
the 8 mixture logits. Each row adds one choice to the baseline, the last two all of them and all but normalisation.
Columns: metasmoothness along random unit directions with that step size; the slope of the measured on the predicted
change of the held-out loss (1: the meta-gradient predicts it); the held-out loss after training. Means over seeds (net,
teacher, data and directions differ) with their standard errors. About a minute on 2 CPU cores, mostly compilation.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mftjax import files, metagrad, sft
from mftjax.metagrad import smoothness

NUM_SOURCES, NUM_STEPS, ROWS, HELD_OUT = 8, 60, 32, 512
SIZES = (16, 64, 64, 4)
NUM_DIRECTIONS = 8
LEARNING_RATES = {"moderate": 3e-3, "too high": 3e-2}
# clip_norm: out of the way; with inf itself optax's clipping has a NaN for a derivative.
BASELINE = {"weight_decay": 0.0, "clip_norm": 1e9, "warmup_fraction": 0.0, "final_fraction": 1.0, "eps": 1e-8}
WARMUP, EPS = {"warmup_fraction": 0.25}, {"eps": 1e-2}
# name -> hyperparameters that differ from the baseline, is_normalised, is_averaged
CHOICES: dict[str, tuple[dict[str, float], bool, bool]] = {
  "baseline": ({}, False, False),
  "+ warm-up 0.25": (WARMUP, False, False),
  "+ eps 1e-4": ({"eps": 1e-4}, False, False),
  "+ eps 1e-2": (EPS, False, False),
  "+ normalisation": ({}, True, False),
  "+ averaging 0.9": ({}, False, True),
  "all (eps 1e-2)": (WARMUP | EPS, True, True),
  "all but normal.": (WARMUP | EPS, False, True),
}


def logits(params, inputs):
  for weight in params[:-1]:
    inputs = jax.nn.relu(inputs @ weight)
  return inputs @ params[-1]


def draw_net(key):
  keys = jax.random.split(key, len(SIZES) - 1)
  return [
    jax.random.normal(k, (fan_in, fan_out)) * jnp.sqrt(2 / fan_in)
    for k, fan_in, fan_out in zip(keys, SIZES, SIZES[1:], strict=False)
  ]


def draw_task(key):
  """Params to start from, inner batches of (inputs, labels, source) and a held-out batch of (inputs, labels)."""
  keys = jax.random.split(key, 6)
  teacher = draw_net(keys[0])
  inputs = jax.random.normal(keys[1], (NUM_STEPS, ROWS, SIZES[0]))
  source = jax.random.randint(keys[2], inputs.shape[:2], 0, NUM_SOURCES)
  noise = jax.random.randint(keys[3], source.shape, 0, SIZES[-1])
  labels = jnp.where(source < NUM_SOURCES // 2, jnp.argmax(logits(teacher, inputs), axis=-1), noise)
  held_out = jax.random.normal(keys[4], (HELD_OUT, SIZES[0]))
  return draw_net(keys[5]), (inputs, labels, source), (held_out, jnp.argmax(logits(teacher, held_out), axis=-1))


def inner_loss(params, mixture_logits, batch, rng):
  inputs, labels, source = batch
  losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, inputs), labels)
  return jnp.mean(jax.nn.softmax(mixture_logits)[source] * NUM_SOURCES * losses)


def outer_loss(params, mixture_logits, batch, rng):
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, batch[0]), batch[1]))


@functools.partial(jax.jit, static_argnames=("is_normalised", "is_averaged"))
def measure(hyperparameters, step_size, keys, is_normalised: bool, is_averaged: bool) -> smoothness.Smoothness:
  """The measures of each seed; leaves `[num_seeds, ...]`."""

  def optimizer(mixture_logits):
    chain = sft.optimizer(hyperparameters, NUM_STEPS)
    if is_normalised:
      chain = optax.chain(optax.normalize_by_update_norm(), chain)
    return smoothness.averaged(chain, 0.9) if is_averaged else chain

  readout = {"readout": smoothness.averaged_params} if is_averaged else {}
  problem = metagrad.Problem(inner_loss, outer_loss, optimizer, **readout)
  mixture_logits = jnp.zeros(NUM_SOURCES)

  def one_seed(key):
    params, inner, outer = draw_task(key)
    state = metagrad.init(problem, mixture_logits, params)
    return smoothness.metasmoothness(
      problem, mixture_logits, state, inner, outer, key, step_size=step_size, num_directions=NUM_DIRECTIONS
    )

  return jax.vmap(one_seed)(keys)


def mean_and_error(values: jax.Array) -> tuple[float, float]:
  """Mean over seeds and its standard error."""
  values = np.asarray(values, np.float64)
  return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--num_seeds", type=int, default=10, help="nets, teachers and data sets, at least 2")
  parser.add_argument("--step_size", type=float, default=0.3, help="h, length of the steps in the mixture logits")
  parser.add_argument("--json", help="file to write the figures to")
  arguments = parser.parse_args()
  start = time.perf_counter()
  keys = jax.random.split(jax.random.key(0), arguments.num_seeds)
  figures = []
  print(f"{'learning rate':17s} {'choice':16s} {'metasmoothness':>15s} {'gradient slope':>17s} {'held-out loss':>15s}")
  for rate_name, learning_rate in LEARNING_RATES.items():
    for name, (changes, is_normalised, is_averaged) in CHOICES.items():
      hyperparameters = BASELINE | {"learning_rate": learning_rate} | changes
      found = measure(hyperparameters, arguments.step_size, keys, is_normalised, is_averaged)
      row = {
        "smoothness": mean_and_error(found.smoothness),
        "objective_agreement": mean_and_error(found.objective_agreement),
        "loss": mean_and_error(found.loss),
      }
      figures.append({"learning_rate": learning_rate, "choice": name, **row})
      cells = [f"{mean:.3f} ± {error:.3f}" for mean, error in row.values()]
      print(f"{rate_name:8s} {learning_rate:8g} {name:16s} {cells[0]:>15s} {cells[1]:>17s} {cells[2]:>15s}")
  print(f"{arguments.num_seeds} seeds, {time.perf_counter() - start:.0f} s")
  if arguments.json:
    files.write_json(arguments.json, figures)


if __name__ == "__main__":
  main()
