"""The config's objective over the abilities, and what it carries from one outer step to the next."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mftjax import balancing, errors, objectives, sft
from mftjax import config as config_lib
from mftjax.data import mixture, tokens
from mftjax.loops import task as task_lib


@flax.struct.dataclass
class ObjectiveState:
  """What the objective knows besides the losses; None is what it does not need."""

  base: jax.Array | None = None  # [num_abilities] f32, losses of the base model, nats
  reference: jax.Array | None = None  # [num_abilities] f32, losses that the abilities are measured against, nats
  group_dro: objectives.GroupDroState | None = None
  multipliers: jax.Array | None = None  # [num_abilities] f32, prices of what an ability loses, at least 0
  famo: balancing.FamoState | None = None


def init(config: ml_collections.ConfigDict, base: Any = 0.0, reference: Any = 0.0) -> ObjectiveState:
  """The state before the first outer step.

  Args:
    base, reference: `[num_abilities]` nats, as from `start`; the default gives the structure only.
  """
  name, count = config.objective.name, len(config.abilities)
  losses = lambda values: jnp.broadcast_to(jnp.asarray(values, jnp.float32), (count,))
  return ObjectiveState(
    base=losses(base) if name in objectives.NEED_BASE else None,
    reference=losses(reference) if name in objectives.NEED_REFERENCE else None,
    group_dro=objectives.group_dro_init(count) if name == "group_dro" else None,
    multipliers=jnp.zeros(count, jnp.float32) if name == "retention" else None,
    famo=balancing.famo_init(count) if config.objective.balancing == "famo" else None,
  )


def start(config: ml_collections.ConfigDict, network: task_lib.Network, held_out: Sequence[tokens.Rows]):
  """The `ObjectiveState` of a new run: reads the reference and measures the base model, where the objective needs them.

  Args:
    held_out: rows of each ability; the first `config.evaluate.num_rows` of them are taken.

  Raises:
    InputError: what `read_reference` finds.
  """
  name = config.objective.name
  reference = read_reference(config) if name in objectives.NEED_REFERENCE else 0.0
  return init(config, _base_losses(config, network, held_out) if name in objectives.NEED_BASE else 0.0, reference)


def read_reference(config: ml_collections.ConfigDict) -> np.ndarray:
  """`[num_abilities]` nats: each ability's own `reference`, or else its lowest loss in `config.objective.reference`.

  Raises:
    InputError: the file is not an evaluation, or lacks an ability that counts.
  """
  path = config.objective.reference
  table = _evaluated(path) if path else {}
  found = []
  for (name, spec), weight in zip(task_lib.named(config.abilities), task_lib.ability_weights(config), strict=True):
    if "reference" not in spec and weight > 0 and name not in table:
      raise errors.unknown_name(f"ability in config.objective.reference = {path!r}", name, table)
    found.append(spec.get("reference", table.get(name, 0.0)))
  return np.asarray(found, np.float32)


def _evaluated(path: str) -> dict[str, float]:
  """Ability -> its lowest loss over the rows of an `evaluation.json`."""
  where = f"config.objective.reference = {path!r}"
  try:
    rows = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))["rows"]
    pairs = [(name, float(loss)) for row in rows for name, loss in row["loss"].items()]
    if not np.all(np.isfinite([loss for _, loss in pairs])):
      raise ValueError("a loss is not finite")
  except OSError as error:
    raise errors.InputError(f"{where} cannot be read: {error.strerror}.") from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise errors.InputError(f"{where} is not an evaluation.json of experiments.evaluate: {error!r}.") from error
  return {name: min(loss for other, loss in pairs if other == name) for name, _ in pairs}


def _base_losses(config: ml_collections.ConfigDict, network: task_lib.Network, held_out: Sequence[tokens.Rows]):
  """`[num_abilities]` mean over rows, as the outer loss is, before any inner step."""

  @jax.jit
  def row_losses(frozen, params, memory, batch):
    return sft.row_losses(network.apply(frozen, params, memory, batch), batch)[0]

  means = []
  for rows in held_out:
    count = min(len(rows.tokens), config.evaluate.num_rows)
    batches = mixture.batches(rows, config.batch_size, source=0)[: -(-count // config.batch_size)]
    losses = [np.asarray(row_losses(network.frozen, network.params, network.memory, batch)) for batch in batches]
    means.append(np.concatenate(losses)[:count].mean(dtype=np.float64))
  return np.asarray(means, np.float32)


def loss(config: ml_collections.ConfigDict, state: ObjectiveState, losses: jax.Array) -> jax.Array:
  """The number that the outer step lowers.

  Args:
    losses: `[num_abilities]` nats. An ability of weight 0 does not count, but `retention` still watches it.

  Returns:
    Scalar: see docs/meta_train.md for the formula of each name. The weights of group DRO and FAMO have no gradient.
  """
  weights = jnp.asarray(task_lib.ability_weights(config))
  name, options = config.objective.name, config_lib.objective_options(config)
  if state.famo is not None:
    return objectives.weighted_mean(losses, balancing.famo_weights(state.famo, losses, weights))
  if state.group_dro is not None:
    updated = objectives.group_dro_update(state.group_dro, losses, options["step_size"], weights)
    return objectives.group_dro(updated, losses, weights)
  if state.multipliers is not None:
    mean = objectives.weighted_mean(losses, weights)
    violation = objectives.retention_violation(losses, state.base, options["tolerance"])
    if options["penalty"] == 0:
      return objectives.lagrangian(mean, violation, state.multipliers)
    return objectives.augmented_lagrangian(mean, violation, state.multipliers, options["penalty"])
  nothing = jnp.zeros_like(weights)
  base, reference = (nothing if known is None else known for known in (state.base, state.reference))
  return objectives.build(name, **options)(losses, objectives.Context(weights, base, reference))


def update(
  config: ml_collections.ConfigDict, state: ObjectiveState, losses: jax.Array, losses_after: jax.Array | None = None
) -> ObjectiveState:
  """The state after an outer step.

  Args:
    losses: `[num_abilities]` nats, those that the step's loss was taken of.
    losses_after: the same window's under the meta-parameters after the step; FAMO's logits need them.
  """
  weights = jnp.asarray(task_lib.ability_weights(config))
  options = config_lib.objective_options(config)
  if state.famo is not None:
    rate = options["step_size"]
    return dataclasses.replace(state, famo=balancing.famo_update(state.famo, losses, losses_after, rate, weights))
  if state.group_dro is not None:
    return dataclasses.replace(
      state, group_dro=objectives.group_dro_update(state.group_dro, losses, options["step_size"], weights)
    )
  if state.multipliers is not None:
    violation = objectives.retention_violation(losses, state.base, options["tolerance"])
    return dataclasses.replace(
      state, multipliers=objectives.update_multipliers(state.multipliers, violation, options["step_size"])
    )
  return state


def readable(config: ml_collections.ConfigDict, state: ObjectiveState) -> dict[str, dict[str, float]]:
  """What the objective carries, by ability, for a line of the metrics."""
  found = {}
  if state.group_dro is not None:
    found["group_dro_weight"] = jnp.exp(state.group_dro.log_weights)
  if state.multipliers is not None:
    found["multiplier"] = state.multipliers
  if state.famo is not None:
    found["famo_share"] = jax.nn.softmax(state.famo.logits)
  names = task_lib.names(config.abilities)
  return {key: dict(zip(names, map(float, values), strict=True)) for key, values in found.items()}
