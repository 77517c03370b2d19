"""Meta-gradient steps on the recipes of single tasks, from wherever they come."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from mftjax.data import meta_tasks
from mftjax.loops import many_tasks
from mftjax.loops import setting as setting_lib


def optimizer(num_steps: int, rate: float) -> optax.GradientTransformation:
  """Adam, whose rate falls to a hundredth by a cosine: what is left of a step's noise stays in the recipe."""
  return optax.adam(optax.cosine_decay_schedule(rate, max(num_steps, 1), alpha=0.01), b1=0.8, b2=0.95)


def descend(
  setting: setting_lib.Setting,
  tasks: meta_tasks.MetaTask,
  keys: Callable[[int], jax.Array],
  start: Any,
  num_steps: int,
  rate: float,
  num_runs: int = 1,
  batch_size: int | None = None,
) -> tuple[Any, np.ndarray]:
  """`num_steps` of Adam on each task's own recipe, along its meta-gradient; the rate falls by a cosine.

  Args:
    tasks: `[num_tasks, ...]`.
    keys: number of the step -> a key for each task.
    start: recipes `{hyperparameters, mixture_logits}`, unconstrained, `[num_tasks, ...]`.
    num_runs: runs with seeds of their own, whose clipped gradients are averaged in a step.
    batch_size: tasks that a program runs at once, by default the setting's.

  Returns:
    The recipes, and `[num_steps, num_tasks, max_abilities]` validation losses of the runs that were differentiated,
    nats, means over a step's runs. Where a run is not finite its gradient counts as 0, and the losses are NaN.
  """
  adam, fold = optimizer(num_steps, rate), jax.vmap(jax.random.fold_in, in_axes=(0, None))
  recipe, opt_state, seen = start, adam.init(start), []
  for number in range(num_steps):
    first, grads, losses = keys(number), [], []
    for run in range(num_runs):
      args = (recipe, tasks, fold(first, run) if run else first)
      _, grad, loss, is_finite = many_tasks.in_batches(setting.single_gradients, args, batch_size or setting.at_once)
      grads.append(grad)
      losses.append(np.where(np.asarray(is_finite)[:, None], loss, np.nan))
    mean_grad = jax.tree.map(lambda *leaves: sum(leaves) / num_runs, *grads)
    updates, opt_state = adam.update(mean_grad, opt_state)
    recipe = optax.apply_updates(recipe, updates)
    seen.append(np.mean(losses, axis=0))
  return recipe, np.asarray(seen)
