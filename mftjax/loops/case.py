"""A task of one's own before a trained meta-learner: its pools, its probe, and the losses that are expected of it."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mftjax import feature_cache, features, metalearner, objectives
from mftjax.data import meta_tasks
from mftjax.loops import learnt, many_tasks
from mftjax.loops import setting as setting_lib
from mftjax.loops import task as task_lib


@dataclasses.dataclass(frozen=True)
class Case:
  """The task, and what is needed to predict for it."""

  kept: learnt.Kept
  setting: setting_lib.Setting  # with the task's own pools; without a scale
  task: meta_tasks.MetaTask
  base: np.ndarray  # [max_abilities] held-out loss of the base model, nats
  workdir: pathlib.Path  # keeps the features

  @property
  def sources(self) -> tuple[str, ...]:
    return self.setting.pools.names

  @property
  def abilities(self) -> tuple[str, ...]:
    return self.setting.pools.ability_names

  def by_ability(self, values: Any) -> dict[str, Any]:
    """Values `[max_abilities, ...]` of the abilities that are there, by name."""
    there = zip(self.abilities, np.asarray(values).tolist(), np.asarray(self.task.ability_weight), strict=False)
    return {name: value for name, value, weight in there if weight > 0}

  def probe(self, weights: np.ndarray) -> features.Features:
    """Features `[n, ...]` of the task with each of the abilities' weights `[n, max_abilities]`, kept in the workdir.

    The same rows are read for each, so that only the weights tell them apart.
    """
    weights = np.asarray(weights, np.float32)

    def compute():
      tasks = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[None], len(weights), axis=0), self.task)
      keys = jnp.repeat(jax.random.key(self.kept.config.seed)[None], len(weights))
      tasks = dataclasses.replace(tasks, ability_weight=jnp.asarray(weights))
      return many_tasks.in_batches(self.setting.probing, (tasks, keys), batch_size=1)

    what: dict[str, bytes | str | np.ndarray] = {
      "model": self.kept.digest,
      "task": feature_cache.digest(self.task),
      "weights": weights,
      "sources": feature_cache.digest(self.setting.pools.train),
      "abilities": feature_cache.digest(self.setting.pools.validation),
      "probe": repr((self.setting.probe, self.setting.run)),
      "seed": str(self.kept.config.seed),
    }
    return feature_cache.cached(self.workdir, what, compute)

  def expected(self, prediction: metalearner.Prediction) -> dict[str, np.ndarray]:
    """`expected`, `low` and `high` loss of each ability, `[..., max_abilities]` nats, of the 90 % interval."""
    half = self.kept.spread_factor * np.exp(np.asarray(prediction.log_spread))
    ratio = np.asarray(prediction.loss_ratio)
    return {name: self.base * np.exp(ratio + sign * half) for name, sign in (("expected", 0), ("low", -1), ("high", 1))}


def read(
  kept: learnt.Kept, workdir: pathlib.Path, task: ml_collections.ConfigDict, preference: Sequence[float] | None
) -> Case:
  """The case of a config's sources and abilities.

  Args:
    preference: weights of the abilities in the order of their names, sum 1; by default those of the config.

  Raises:
    InputError: the data cannot be read, or does not fit the meta-learner; before anything is compiled.
  """
  config, names = kept.config, task_lib.names(task.abilities)
  weights = task_lib.ability_weights(task)
  if preference is not None:
    weights = np.asarray(objectives.check_preference(list(preference), len(names)))
  source_rows, ability_rows = task_lib.source_rows(task, kept.tokenizer), task_lib.ability_rows(task, kept.tokenizer)
  pools, one = meta_tasks.from_rows(
    list(zip(task_lib.names(task.sources), source_rows, strict=True)),
    list(zip(names, ability_rows, strict=True)),
    weights,
    setting_lib.task_shape(config),
    config.tasks.pool_rows,
    task.budget_tokens / config.budget_tokens,
  )
  measure = kept.model.compile(lambda model: many_tasks.measure(model, pools.validation, config.tasks.pool_rows))
  base = np.asarray(measure(kept.model.params, one))
  return Case(kept, setting_lib.assemble(config, kept.model, pools, {}), one, base, workdir)
