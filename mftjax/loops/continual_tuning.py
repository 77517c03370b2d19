"""Tuning a method on sequences of its own, with as many trials as every other method."""

from collections.abc import Mapping
from typing import Any

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


def tuned(setting: Setting, found: continual_runs.Entry, seed: int) -> list[dict[str, Any]]:
  """The trials and what each came to over the validation sequences, the one to take first.

  That is the one of the highest average accuracy, and of equals that of the lowest loss.

  Returns:
    For each its `values`, and `accuracy`, `loss` and `base_loss`, means after the last task; None is not finite.
  """
  asked = trials(found.space, setting.config.continual.num_trials, seed)
  count = len(setting.validation)
  values = [{**found.fixed, **one} for one in asked for _ in range(count)]
  order = jnp.tile(setting.validation, (len(asked), 1))
  keys = jax.vmap(jax.random.key)(1000 + jnp.tile(jnp.arange(count), len(asked)))
  last = continual_runs.in_groups(setting, found, values, order, keys, is_measured=False).after[-1]
  figures = {
    name: np.asarray(getattr(last, name)).reshape(len(asked), -1).mean(axis=1)
    for name in ("accuracy", "loss", "base_loss")
  }
  accuracy, loss = (np.nan_to_num(figures[name], nan=np.inf) for name in ("accuracy", "loss"))
  accuracy = np.where(np.isinf(loss), 0.0, accuracy)
  number = lambda x: float(x) if np.isfinite(x) else None
  return [
    {"values": asked[i], **{name: number(x[i]) for name, x in figures.items()}} for i in np.lexsort((loss, -accuracy))
  ]
