"""Which of a task's features moved a prediction: integrated gradients from the mean task."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mftjax import features

FIELDS = (*features.NAMES, "match")  # of `features.Features`, that a prediction is attributed to


def integrated_gradients(
  fn: Callable[[Any], jax.Array], inputs: Any, baseline: Any, num_points: int = 64
) -> tuple[Any, jax.Array, jax.Array]:
  """Parts of `fn(inputs) - fn(baseline)` that fall to each input.

  Args:
    fn: pytree -> `[num_outputs]`.
    inputs: pytree of floating arrays.
    baseline: likewise, where the path starts.
    num_points: of the straight path, at the middles of equal pieces.

  Returns:
    attributions like `inputs` with a leading axis `[num_outputs]`, and `fn` at `inputs` and at the baseline. An
    input's is `(x - b) * mean over the path of d fn / d x`; they sum to the difference up to the quadrature.

  Source: Sundararajan, Taly and Yan, Axiomatic Attribution for Deep Networks (2017), equation 1; the sum is their
  axiom of completeness.
  """
  difference = jax.tree.map(lambda x, b: x - b, inputs, baseline)
  slope = jax.jacrev(fn)
  along = lambda part: slope(jax.tree.map(lambda b, d: b + part * d, baseline, difference))
  slopes = jax.lax.map(along, (jnp.arange(num_points) + 0.5) / num_points)
  found = jax.tree.map(lambda s, d: s.mean(axis=0) * d, slopes, difference)
  return found, fn(inputs), fn(baseline)


def mean_task(known: features.Features, task: features.Features) -> features.Features:
  """The task with every feature at its mean over the present entries of known tasks, its sources matching alike.

  Args:
    known: `[num_tasks, ...]`, for example those of meta-training.
    task: whose sources and abilities are there.
  """
  known_present, present = features.present(known), features.present(task)
  means: dict[str, Any] = {}
  for name, has in present.items():
    mean = np.asarray(getattr(known, name))[known_present[name]].mean(axis=0)
    means[name] = jnp.asarray(np.where(has[..., None], mean, 0.0), jnp.float32)
  has_source = present["source"]
  means["match"] = jnp.asarray(has_source / max(has_source.sum(), 1), jnp.float32)
  return dataclasses.replace(task, **means)


def labels(sources: Sequence[str], abilities: Sequence[str]) -> dict[str, np.ndarray]:
  """What each entry of the attributed features is called, in their shapes; entries of absent ones have no name.

  Args:
    sources, abilities: names of those that are there, in the order of the features.
  """
  groups = {
    "source": np.asarray([f"{s}: " for s in sources]),
    "ability": np.asarray([f"{a}: " for a in abilities]),
    "pair": np.asarray([[f"{s} for {a}: " for a in abilities] for s in sources]),
  }
  found = {name: np.char.add(group[..., None], np.asarray(features.NAMES[name])) for name, group in groups.items()}
  return {**found, "match": np.char.add(groups["source"], "gradient matching")}


def largest(
  attributions: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray], names: Mapping[str, np.ndarray], count: int
) -> list[dict[str, Any]]:
  """The entries of the largest attributions, by size.

  Args:
    attributions: of one output, by field.
    values: of the task's features, by field.
    names: of `labels`.
    count: how many, at most.

  Returns:
    `{"feature", "value", "attribution"}` of each.
  """
  entries: list[dict[str, Any]] = []
  for field, called in names.items():
    part = tuple(slice(size) for size in called.shape)
    for place in np.ndindex(called.shape):
      number = float(np.asarray(attributions[field])[part][place])
      value = float(np.asarray(values[field])[part][place])
      entries.append({"feature": str(called[place]), "value": value, "attribution": number})
  return sorted(entries, key=lambda entry: -abs(entry["attribution"]))[:count]
