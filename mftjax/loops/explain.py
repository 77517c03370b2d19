"""Why a recipe was predicted, and what other preferences would have led to; for the report."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mftjax import attribution, baselines, features
from mftjax.loops import case as case_lib
from mftjax.loops import learnt, many_tasks

_LEAST = 0.02  # weight of an ability on the front, as in meta-training


def nearest(known: learnt.Known, probed: features.Features, count: int = 3) -> dict[str, Any]:
  """The known tasks of the nearest features, as `baselines.NearestTask` measures it, with what is predicted for them.

  Returns:
    `{"typical_distance", "tasks"}`: the median distance of a known task from its nearest other, over the first 256;
    and `{"distance", "abilities": {name: weight}, "hyperparameters", "mixture": {source: weight}}` of each of the
    `count` nearest.
  """
  candidates = [
    baselines.Candidate({name: float(v[i]) for name, v in known.hyperparameters.items()}, w / w.sum())
    for i, w in enumerate(np.asarray(known.weights, np.float64))
  ]
  mask = np.asarray(known.features.source_mask) > 0
  vectors = features.summaries(known.features)
  method = baselines.NearestTask(vectors, candidates, np.asarray(known.features.source), mask)
  distances = method.distances(features.summaries(jax.tree.map(lambda x: x[None], probed))[0])
  found = []
  for index in np.argsort(distances, kind="stable")[:count]:
    abilities = zip(known.abilities[index], np.asarray(known.features.ability_weight)[index], strict=True)
    mixture = zip(known.sources[index], known.weights[index], strict=True)
    found.append(
      {
        "distance": float(distances[index]),
        "abilities": {str(name): float(weight) for name, weight in abilities if name},
        "hyperparameters": dict(candidates[index].hyperparameters),
        "mixture": {str(name): float(weight) for name, weight in mixture if name},
      }
    )
  to_others = [np.delete(method.distances(vector), i).min() for i, vector in enumerate(vectors[:256])]
  return {"typical_distance": float(np.median(to_others)), "tasks": found}


def attributions(case: case_lib.Case, probed: features.Features, count: int = 8) -> list[dict[str, Any]]:
  """What moved each source's logit, and the logarithm of the learning rate, from where the mean task has them.

  A logit counts from the mean of the task's logits, since the mixture depends on no more.

  Returns:
    `{"output", "value", "mean_task", "features": [{"feature", "value", "attribution"}]}` of each, the features of the
    `count` largest attributions; see `attribution.integrated_gradients`.
  """
  mask, space, kept = probed.source_mask, case.setting.space, case.kept
  has_rate = "learning_rate" in space.spaces

  def outputs(inputs):
    prediction = kept.predict(dataclasses.replace(probed, **inputs))
    logits = jnp.where(mask > 0, prediction.mixture_logits, 0.0)
    logits = (logits - logits.sum() / mask.sum())[: len(case.sources)]
    if not has_rate:
      return logits
    return jnp.append(logits, jnp.log(space.constrain(prediction.hyperparameters)["learning_rate"]))

  take = lambda task: {name: getattr(task, name) for name in attribution.FIELDS}
  integrate = jax.jit(lambda inputs, start: attribution.integrated_gradients(outputs, inputs, start))
  found, at_task, at_mean = integrate(take(probed), take(attribution.mean_task(kept.known.features, probed)))
  labels = attribution.labels(case.sources, case.abilities)
  titles = [f"logit of {name}" for name in case.sources] + ["log learning_rate"] * has_rate
  return [
    {
      "output": title,
      "value": float(at_task[number]),
      "mean_task": float(at_mean[number]),
      "features": attribution.largest({k: v[number] for k, v in found.items()}, take(probed), labels, count),
    }
    for number, title in enumerate(titles)
  ]


def front(case: case_lib.Case, most: int = 21) -> dict[str, Any] | None:
  """Expected losses along a grid of preferences, at most so many; None for one ability, or for no preference.

  An ability keeps a little weight throughout, as in meta-training.

  Returns:
    `{"abilities", "preferences", "expected", "low", "high": [n, num_abilities], "mixtures": [n, num_sources],
    "probe_tokens"}`.
  """
  present = np.flatnonzero(np.asarray(case.task.ability_weight) > 0)
  grid = preferences(len(present), most)
  if len(present) < 2 or not len(grid):
    return None
  weights = np.zeros((len(grid), len(case.base)), np.float32)
  weights[:, present] = _LEAST + (1 - len(present) * _LEAST) * grid
  probed = case.probe(weights)
  prediction = jax.vmap(case.kept.predict)(probed)
  mix = jax.vmap(many_tasks.mixture, in_axes=(0, None))
  mixtures = mix(prediction.mixture_logits, jnp.asarray(case.task.source_mask))
  return {
    "abilities": [case.abilities[i] for i in present],
    "preferences": weights[:, present].tolist(),
    **{name: values[:, present].tolist() for name, values in case.expected(prediction).items()},
    "mixtures": np.asarray(mixtures)[:, : len(case.sources)].tolist(),
    "probe_tokens": int(probed.tokens.sum()),
  }


def preferences(num_abilities: int, most: int) -> np.ndarray:
  """`[n, num_abilities]` the finest regular grid on the simplex with at most `most` points."""
  grid = np.zeros((0, num_abilities))
  for pieces in range(1, most if num_abilities > 1 else 2):
    axes = np.meshgrid(*[np.arange(pieces + 1)] * num_abilities, indexing="ij")
    whole = np.stack(axes, axis=-1).reshape(-1, num_abilities)
    found = whole[whole.sum(axis=1) == pieces] / pieces
    if len(found) > most:
      break
    grid = found
  return grid
