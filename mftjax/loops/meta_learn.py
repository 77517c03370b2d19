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

from mftjax import checkpoint, command, features, metalearner, tracking
from mftjax import config as config_lib
from mftjax.data import meta_tasks
from mftjax.loops import many_tasks
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
  shape = meta_tasks.Shape(config.tasks.max_sources, config.tasks.max_abilities, config.tasks.min_budget)
  tasks = meta_tasks.sample(setting.pools, families, num_tasks, seed, shape, config.tasks.planted_fraction)
  return TaskSet(tasks, setting_lib.probe_tasks(setting, tasks, seed))


def init_learner(config: ml_collections.ConfigDict, setting: setting_lib.Setting, found: TaskSet) -> tuple[Any, Any]:
  """`(graphdef, state)` of an untrained meta-learner whose normalisers fit these tasks."""
  initial = setting.space.init(config_lib.initial_hyperparameters(config))
  learner = metalearner.MetaLearner(
    initial, config_lib.shared(config), config.learner.width, rngs=nnx.Rngs(config.seed)
  )
  learner.fit_normaliser(found.features)
  return nnx.split(learner)


def predict(graphdef: Any, state: Any, task_features: features.Features) -> metalearner.Prediction:
  """Predictions for `[num_tasks, ...]` features."""
  return jax.vmap(lambda one: nnx.merge(graphdef, state)(one))(task_features)


def recipes(prediction: metalearner.Prediction) -> dict[str, Any]:
  """The meta-parameters of the tasks that a prediction stands for."""
  return {"hyperparameters": prediction.hyperparameters, "mixture_logits": prediction.mixture_logits}


def outer_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """Adam on the meta-learner's weights, falling to a tenth by a cosine; its normalisers stay."""
  rate = optax.cosine_decay_schedule(config.learner.learning_rate, config.meta.outer_steps, alpha=0.1)
  labels = lambda state: nnx.map_state(
    lambda _, leaf: "fixed" if isinstance(leaf, metalearner.Normaliser) else "train", state
  )
  return optax.partition({"train": optax.adam(rate, b1=0.9, b2=0.99), "fixed": optax.set_to_zero()}, labels)


def recipe_gradients(config: ml_collections.ConfigDict, setting: setting_lib.Setting):
  """`(recipes, tasks, keys) -> (objective, gradient, ability losses)`, `[num_tasks, ...]`, each gradient clipped.

  Clipping by task keeps one unstable run from ruling the others.
  """
  differentiate = many_tasks.value_and_grad(
    setting.model, setting.run, setting.space, setting.fixed, setting.pools, config.meta.method
  )

  def one(recipe, task, key):
    scale = setting_lib.task_scale(setting.validation, task)
    objective = setting_lib.build_objective(scale, task.ability_weight, config.objective.name)
    loss, grad, losses = differentiate(recipe, task, objective, key)
    norm = optax.global_norm(grad)
    factor = jnp.minimum(1.0, config.meta.clip_norm / jnp.maximum(norm, 1e-12))
    return loss, jax.tree.map(lambda g: factor * g, grad), losses

  return jax.vmap(one)


def build_outer_step(config: ml_collections.ConfigDict, setting: setting_lib.Setting, graphdef: Any):
  """`(state, TaskSet [tasks_per_step, ...], key) -> (state, metrics)`, jitted.

  The recipes' meta-gradients and the outcome head's likelihood go back through the meta-learner together.
  """
  optimizer, gradients = outer_optimizer(config), recipe_gradients(config, setting)

  @jax.jit
  def outer_step(state, batch, key):
    weight = batch.tasks.ability_weight
    prediction = predict(graphdef, state.learner, batch.features)
    loss, grad, losses = gradients(recipes(prediction), batch.tasks, jax.random.split(key, len(weight)))
    scale = jax.vmap(functools.partial(setting_lib.task_scale, setting.validation))(batch.tasks)
    log_ratio = jnp.log(jnp.maximum(losses, 1e-6) / jnp.maximum(scale.base, 1e-6))

    def surrogate(learner):
      # Its gradient in the recipes is the meta-gradient, whatever its value.
      again = predict(graphdef, learner, batch.features)
      inner = jax.tree.map(lambda x, g: jnp.vdot(x, g), recipes(again), jax.lax.stop_gradient(grad))
      fit = jax.vmap(metalearner.outcome_loss)(again, log_ratio, weight).mean()
      return sum(jax.tree.leaves(inner)) / len(weight) + config.learner.outcome_weight * fit, fit

    learner_grad, fit = jax.grad(surrogate, has_aux=True)(state.learner)
    updates, opt_state = optimizer.update(learner_grad, state.opt_state, state.learner)
    after = LearnerState(optax.apply_updates(state.learner, updates), opt_state)
    metrics = {"objective": loss.mean(), "outcome_loss": fit, "grad_norm": optax.global_norm(learner_grad)}
    return after, metrics

  return outer_step


def calibrate(
  config: ml_collections.ConfigDict, setting: setting_lib.Setting, graphdef: Any, state: Any, found: TaskSet, seed: int
) -> float:
  """Factor on the predicted spreads, from runs with the predicted recipes on held-out tasks; see `conformal_scale`."""
  prediction = predict(graphdef, state, found.features)
  log_ratio = outcomes(setting, recipes(prediction), found.tasks, seed)
  return metalearner.conformal_scale(prediction, log_ratio, np.asarray(found.tasks.ability_weight))


def outcomes(setting: setting_lib.Setting, found: Any, tasks: meta_tasks.MetaTask, seed: int) -> np.ndarray:
  """`[num_tasks, max_abilities]` log(test loss after a run by the recipe / test loss of the base model)."""
  values = jax.vmap(setting.space.constrain)(found["hyperparameters"])
  weights = jax.vmap(many_tasks.mixture)(found["mixture_logits"], tasks.source_mask)
  run = many_tasks.outcome(
    setting.model, setting.run, setting.fixed, setting.pools, setting.pools.test, setting.run.test_rows
  )
  keys = jax.random.split(jax.random.key(seed), len(tasks.budget))
  losses = many_tasks.mapped(run, 16)(values, weights, tasks, keys)
  scale = jax.vmap(functools.partial(setting_lib.task_scale, setting.test))(tasks)
  return np.log(np.maximum(losses, 1e-6) / np.maximum(scale.base, 1e-6))


@dataclasses.dataclass(frozen=True)
class Learnt:
  """A trained meta-learner, with what it stands on."""

  setting: setting_lib.Setting
  graphdef: Any
  state: Any
  spread_factor: float  # on its predicted spreads, for 90 % intervals

  def predict(self, task_features: features.Features) -> metalearner.Prediction:
    return predict(self.graphdef, self.state, task_features)


def default_recipes(config: ml_collections.ConfigDict, setting: setting_lib.Setting, count: int) -> dict[str, Any]:
  """`[count]` recipes of the default hyperparameters and equal weights."""
  initial = setting.space.init(config_lib.initial_hyperparameters(config))
  return {
    "hyperparameters": {name: jnp.repeat(value[None], count, axis=0) for name, value in initial.items()},
    "mixture_logits": jnp.zeros((count, config.tasks.max_sources)),
  }


def meta_learn(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Learnt:
  """Runs the outer steps that are still to do and calibrates; checkpoints and `metrics.jsonl` go into the workdir."""
  command.check_workdir(config, workdir)
  setting = setting_lib.build(config)
  found = sample_tasks(config, setting, "train", config.tasks.num_train, config.seed)
  command.claim_workdir(config, workdir)
  graphdef, learner = init_learner(config, setting, found)
  state, start = LearnerState(learner, outer_optimizer(config).init(learner)), 0
  outer_step = build_outer_step(config, setting, graphdef)
  with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
    resumed = checkpoints.restore(task_lib.pure(state))
    if resumed:
      start, state = resumed[0], task_lib.unpure(state, resumed[1])
      logging.warning("Going on from outer step %d in %s.", start, workdir)
    tracking.truncate(workdir / "metrics.jsonl", "meta_learn", start)
    tokens_per_step = config.learner.tasks_per_step * setting.run.num_steps * config.batch_size * config.length
    tracker = tracking.Tracker(
      workdir,
      config.meta.outer_steps,
      title="meta-learn",
      name="meta_learn",
      start_step=start,
      tokens_per_step=tokens_per_step,
    )
    with tracker:
      for step in range(start, config.meta.outer_steps):
        rng = np.random.default_rng([config.seed, step])
        index = rng.choice(config.tasks.num_train, config.learner.tasks_per_step, replace=False)
        batch = jax.tree.map(lambda x: x[index], found)  # noqa: B023 (used at once)
        state, measured = outer_step(state, batch, jax.random.fold_in(jax.random.key(config.seed), step))
        line = {name: float(value) for name, value in measured.items()}
        tracker.log(step + 1, {"loss": line["objective"], **line})
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.meta.outer_steps:
          checkpoints.save(step + 1, task_lib.pure(state), {})
  held_out = sample_tasks(config, setting, "validation", config.tasks.num_validation, config.seed + 1)
  factor = calibrate(config, setting, graphdef, state.learner, held_out, config.seed + 1)
  return Learnt(setting, graphdef, state.learner, factor)
