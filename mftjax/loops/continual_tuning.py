"""Tuning a method on sequences of its own, with as many trials as every other method."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from mftjax.loops import continual_runs
from mftjax.loops.continual_setting import Setting


def trials(space: Mapping[str, tuple[str, tuple[float, float]]], count: int, seed: int) -> list[dict[str, float]]:
  """Evenly spread settings of the hyperparameters, the first in the middle of each.

  Source: scrambled Halton points, as `scipy.stats.qmc.Halton` draws them.
  """
  points = scipy.stats.qmc.Halton(len(space), rng=np.random.default_rng(seed)).random(count)
  points[0] = 0.5
  found = []
  for point in points:
    values = {}
    for part, (name, (scale, (low, high))) in zip(point, space.items(), strict=True):
      values[name] = float(low * (high / low) ** part if scale == "log" else low + (high - low) * part)
    found.append(values)
  return found


def tuned(setting: Setting, found: continual_runs.Entry, seed: int) -> dict[str, float]:
  """The trial of the highest average accuracy over the validation sequences; of equals, that of the lowest loss."""
  asked = trials(found.space, setting.config.continual.num_trials, seed)
  count = len(setting.validation)
  values = [{**found.fixed, **one} for one in asked for _ in range(count)]
  order = jnp.tile(setting.validation, (len(asked), 1))
  keys = jax.vmap(jax.random.key)(1000 + jnp.tile(jnp.arange(count), len(asked)))
  last = continual_runs.in_groups(setting, found, values, order, keys, is_measured=False).after[-1]
  mean = lambda x: np.nan_to_num(np.asarray(x).reshape(len(asked), -1).mean(axis=1), nan=np.inf)
  accuracy, loss = np.where(np.isinf(mean(last.loss)), 0.0, mean(last.accuracy)), mean(last.loss)
  return asked[int(np.lexsort((loss, -accuracy))[0])]
