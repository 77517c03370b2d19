"""Meta-training of the meta-learner over many tasks: the gradient of each task's whole run flows into one network."""

import dataclasses
import functools
import pathlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import logging
from flax import nnx

from mftjax import checkpoint, features, metalearner, run_folder, tracking
from mftjax.data import meta_tasks
from mftjax.loops import learnt, many_tasks
from mftjax.loops import setting as setting_lib
from mftjax.loops import task as task_lib


@flax.struct.dataclass
class LearnerState:
  """What an outer step changes."""

  learner: Any  # the meta-learner's params and normalisers
  opt_state: Any


@flax.struct.dataclass
class TaskSet:
  """Meta-tasks with their features, `[num_tasks, ...]`."""

  tasks: meta_tasks.MetaTask
  features: features.Features


def sample_tasks(
  config: ml_collections.ConfigDict, setting: setting_lib.Setting, families: str, num_tasks: int, seed: int
) -> TaskSet:
  """Random tasks of a split of the families, probed."""
  shape, planted = setting_lib.task_shape(config), config.tasks.planted_fraction
  tasks = meta_tasks.sample(setting.pools, families, num_tasks, seed, shape, planted)
  return TaskSet(tasks, setting_lib.probe_tasks(setting, tasks, seed))


def init_learner(
  config: ml_collections.ConfigDict, setting: setting_lib.Setting, found: TaskSet
) -> tuple[Any, LearnerState]:
  """`(graphdef, state)` of an untrained meta-learner whose normalisers fit these tasks."""
  learner = learnt.build(config)
  learner.fit_normaliser(found.features)
  graphdef, state = nnx.split(learner)
  return graphdef, LearnerState(state, outer_optimizer(config).init(state))


@functools.partial(jax.jit, static_argnums=0)
def predict(graphdef: Any, state: Any, task_features: features.Features) -> metalearner.Prediction:
  """Predictions for `[num_tasks, ...]` features."""
  return jax.vmap(lambda one: nnx.merge(graphdef, state)(one))(task_features)


def outer_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """Adam on the meta-learner's weights, falling to a tenth by a cosine; its normalisers stay."""
  rate = optax.cosine_decay_schedule(config.learner.learning_rate, config.meta.outer_steps, alpha=0.1)
  labels = lambda state: nnx.map_state(
    lambda _, leaf: "fixed" if isinstance(leaf, metalearner.Normaliser) else "train", state
  )
  return optax.partition({"train": optax.adam(rate, b1=0.9, b2=0.99), "fixed": optax.set_to_zero()}, labels)


def build_outer_step(config: ml_collections.ConfigDict, setting: setting_lib.Setting, graphdef: Any):
  """`(state, TaskSet [tasks_per_step, ...], key) -> (state, metrics)`, of compiled programs.

  The recipes' meta-gradients and the outcome head's likelihood go back through the meta-learner together. A task whose
  run is not finite is left out; a step without any other, or whose gradient is not finite, leaves the state as it was.
  """
  optimizer, at_once = outer_optimizer(config), min(setting.at_once, config.learner.tasks_per_step)

  @jax.jit
  def update(state, batch, loss, grad, losses, is_run_finite):
    weight, base = batch.tasks.ability_weight, setting_lib.task_scale(setting.scale["validation"], batch.tasks).base
    prediction, pull = jax.vjp(lambda learner: predict(graphdef, learner, batch.features), state.learner)
    mean = lambda values: jnp.where(is_run_finite, values, 0.0).sum() / is_run_finite.sum()
    # Masked before any arithmetic: a NaN that is masked after it comes back in the gradient.
    observed = jnp.where(is_run_finite[:, None], metalearner.log_ratio(losses, base), 0.0)
    outcome_loss = lambda prediction: mean(jax.vmap(metalearner.outcome_loss)(prediction, observed, weight))
    fit, pulled = jax.value_and_grad(outcome_loss)(prediction)
    pulled = jax.tree.map(lambda g: config.learner.outcome_weight * g, pulled)
    pulled = pulled.replace(**jax.tree.map(lambda g: g / is_run_finite.sum(), grad))
    (learner_grad,) = pull(pulled)
    updates, opt_state = optimizer.update(learner_grad, state.opt_state, state.learner)
    after = LearnerState(optax.apply_updates(state.learner, updates), opt_state)
    is_finite = is_run_finite.any() & jnp.isfinite(optax.global_norm(learner_grad))
    metrics = {
      "objective": mean(loss),
      "outcome_loss": fit,
      "grad_norm": optax.global_norm(learner_grad),
      "non_finite_tasks": (~is_run_finite).sum(),
      "is_finite": is_finite,
    }
    return jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), after, state), metrics

  def outer_step(state, batch, key):
    keys = jax.random.split(key, len(batch.tasks.budget))
    recipe = predict(graphdef, state.learner, batch.features).recipe
    return update(state, batch, *many_tasks.in_batches(setting.gradients, (recipe, batch.tasks, keys), at_once))

  return outer_step


def calibrate(
  config: ml_collections.ConfigDict, setting: setting_lib.Setting, graphdef: Any, state: Any, found: TaskSet, seed: int
) -> float:
  """Factor on the predicted spreads, from runs with the predicted recipes on held-out tasks; see `conformal_scale`."""
  prediction = predict(graphdef, state, found.features)
  log_ratio = outcomes(setting, prediction.recipe, found.tasks, seed)
  return metalearner.conformal_scale(prediction, log_ratio, np.asarray(found.tasks.ability_weight))


def outcomes(setting: setting_lib.Setting, found: Any, tasks: meta_tasks.MetaTask, seed: int) -> np.ndarray:
  """`[num_tasks, max_abilities]` log(test loss after a run by the recipe / test loss of the base model)."""
  keys = jax.random.split(jax.random.key(seed), len(tasks.budget))
  losses = setting.outcome("test", *setting_lib.constrained(setting, found, tasks), tasks, keys)
  return np.asarray(metalearner.log_ratio(losses, setting_lib.task_scale(setting.scale["test"], tasks).base))


@dataclasses.dataclass(frozen=True)
class Learnt:
  """A trained meta-learner, with what it stands on."""

  setting: setting_lib.Setting
  graphdef: Any
  state: Any
  spread_factor: float  # on its predicted spreads, for 90 % intervals

  def predict(self, task_features: features.Features) -> metalearner.Prediction:
    return predict(self.graphdef, self.state, task_features)


def meta_learn(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Learnt:
  """Runs the outer steps that are still to do and calibrates; checkpoints and `metrics.jsonl` go into the workdir.

  Raises:
    InputError: config or workdir do not fit; before anything is written.
    MftError: `meta.max_skipped` outer steps in a row were not finite; the tasks that did it are in the workdir.
  """
  run_folder.check(config, workdir)
  setting = setting_lib.build(config)
  held_out = sample_tasks(config, setting, "validation", config.tasks.num_validation, config.seed + 1)
  run_folder.claim(config, workdir)
  graphdef, state = init_learner(config, setting, held_out)  # a state to restore into
  with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
    resumed = checkpoints.restore(task_lib.pure(state))
    start = resumed[0] if resumed else 0
    if start < config.meta.outer_steps:
      found = sample_tasks(config, setting, "train", config.tasks.num_train, config.seed)
    if resumed:
      state = task_lib.unpure(state, resumed[1])
      logging.warning("Going on from outer step %d in %s.", start, workdir)
    else:
      _, state = init_learner(config, setting, found)
    outer_step, skipped = build_outer_step(config, setting, graphdef), 0
    tracker = tracking.Tracker(
      workdir,
      config.meta.outer_steps,
      title="meta-learn",
      name="meta_learn",
      start_step=start,
      tokens_per_step=config.learner.tasks_per_step * setting.run.num_steps * config.batch_size * config.length,
    )
    with tracker:
      for step in tracker.steps():
        rng = np.random.default_rng([config.seed, step])
        index = rng.choice(config.tasks.num_train, config.learner.tasks_per_step, replace=False)
        batch = jax.tree.map(lambda x: x[index], found)  # noqa: B023 (used at once)
        state, measured = outer_step(state, batch, jax.random.fold_in(jax.random.key(config.seed), step))
        skipped = 0 if measured.pop("is_finite") else skipped + 1
        line = {name: float(value) for name, value in measured.items()}
        tracker.log(step + 1, {"loss": line["objective"], **line, "skipped": skipped})
        task_lib.stop_if_skipped(config, workdir, skipped, batch)
        if checkpoints.is_due(step + 1, config.meta.outer_steps, config.checkpoint_every):
          checkpoints.save(step + 1, task_lib.pure(state), {})
  factor = calibrate(config, setting, graphdef, state.learner, held_out, config.seed + 1)
  if not (workdir / learnt.FILE).exists():
    if start >= config.meta.outer_steps:
      found = sample_tasks(config, setting, "train", config.tasks.num_train, config.seed)
    prediction = predict(graphdef, state.learner, found.features)
    learnt.keep(config, workdir, setting, state.learner, factor, found.tasks, found.features, prediction)
  return Learnt(setting, graphdef, state.learner, factor)
