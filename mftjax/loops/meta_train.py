"""Meta-training of the direct learner: one task's own hyperparameters, mixture logits and memory slots."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import logging

from mftjax import checkpoint, errors, metagrad, run_folder, sft, tracking
from mftjax import config as config_lib
from mftjax.data import mixture
from mftjax.loops import curriculum, outer_gradient, outer_objective
from mftjax.loops import task as task_lib


@flax.struct.dataclass
class OuterState:
  """All that an outer step changes on the device."""

  meta_params: dict[str, Any]  # hyperparameters {name: f32}, mixture_logits as of `curriculum.init`, memory
  opt_state: Any  # of the outer optimiser
  inner: metagrad.State  # the inner run that windows are cut from
  objective: outer_objective.ObjectiveState  # what the objective carries


def build_problem(
  config: ml_collections.ConfigDict,
  network: task_lib.Network,
  frozen: Any,
  objective: Callable[[jax.Array], jax.Array],
) -> metagrad.Problem:
  """The bilevel problem of one task: SFT inside, the objective over the abilities outside.

  Batches have `config.batch_size` rows; a learned batch size counts the first ones of them.

  Args:
    objective: `[num_abilities]` losses in nats -> scalar, e.g. `outer_objective.loss` with its state.
  """
  space = config_lib.space(config)
  fixed = config_lib.default_hyperparameters(config)
  apply = functools.partial(network.apply, frozen)
  num_abilities = len(config.abilities)
  hyperparameters = lambda meta_params: {**fixed, **space.constrain(meta_params["hyperparameters"])}

  def inner_loss(params, meta_params, batch, rng):
    return sft.inner_loss(apply, params, meta_params, batch, hyperparameters(meta_params), config.batch_size)

  def outer_loss(params, meta_params, batch, rng):
    params = sft.adapted(params, hyperparameters(meta_params))
    losses, _ = sft.row_losses(apply(params, meta_params["memory"], batch), batch)
    by_ability = sft.source_means(losses, batch, num_abilities)
    return objective(by_ability), by_ability

  return task_lib.problem(
    config,
    inner_loss=inner_loss,
    outer_loss=outer_loss,
    hyperparameters=hyperparameters,
    num_steps=config_lib.num_steps(config),
  )


def init_meta_params(config: ml_collections.ConfigDict, network: task_lib.Network) -> dict[str, Any]:
  """Uniform mixture, common hyperparameters, a memory that is the identity."""
  return {
    "hyperparameters": config_lib.space(config).init(config_lib.initial_hyperparameters(config)),
    "mixture_logits": curriculum.init(config),
    "memory": network.memory,
  }


def outer_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """Adam after clipping, with a learning rate for each kind of meta-parameter; all fall to a tenth by a cosine.

  The fall averages the noise of single windows out of what the last steps leave.
  """
  rates = {
    "mixture_logits": config.meta.mixture_learning_rate,
    "hyperparameters": config.meta.hyperparameter_learning_rate,
    "memory": config.meta.memory_learning_rate,
  }
  return optax.chain(optax.clip_by_global_norm(config.meta.clip_norm), falling_adams(rates, config.meta.outer_steps))


def falling_adams(rates: Mapping[str, float], num_steps: int) -> optax.GradientTransformation:
  """Adam with a learning rate for each entry of the meta-parameters, which falls to a tenth by a cosine."""
  decay = lambda rate: optax.cosine_decay_schedule(rate, num_steps, alpha=0.1)
  adams = {name: optax.adam(decay(rate), b1=0.9, b2=0.99) for name, rate in rates.items()}
  labels = lambda meta_params: jax.tree.map_with_path(lambda path, _: path[0].key, meta_params)
  return optax.partition(adams, labels)


def build_outer_step(config: ml_collections.ConfigDict, network: task_lib.Network):
  """`(frozen, state, fresh_params, is_fresh, inner_batches, outer_batch, rng) -> (state, metrics)`, jitted.

  A step whose loss or meta-gradient is not finite leaves all but the start of a fresh inner run as it was. The state
  that is given is used up: the new one takes its memory.
  """
  outer = outer_optimizer(config)
  options = config_lib.method_options(config)

  @functools.partial(jax.jit, donate_argnums=1)
  def outer_step(frozen, state, fresh_params, is_fresh, inner_batches, outer_batch, rng):
    build = functools.partial(build_problem, config, network, frozen)
    problem = build(functools.partial(outer_objective.loss, config, state.objective))
    fresh = network.layout.pin(metagrad.init(problem, state.meta_params, fresh_params, config.meta.method, **options))
    inner = jax.tree.map(lambda new, old: jnp.where(is_fresh, new, old), fresh, state.inner)
    window = (inner, inner_batches, outer_batch, rng)
    out = outer_gradient.value_and_grad(config, build, state.objective)(state.meta_params, *window)
    updates, opt_state = outer.update(out.grad, state.opt_state, state.meta_params)
    meta_params = optax.apply_updates(state.meta_params, updates)
    is_famo = config.objective.balancing == "famo"
    losses_after = outer_gradient.losses_after(problem, meta_params, *window) if is_famo else None
    objective = outer_objective.update(config, state.objective, out.metrics["aux"], losses_after)
    after = OuterState(meta_params, opt_state, out.state, objective)
    # FAMO looks at losses after the step, which may be the first that are not.
    is_finite = out.metrics["is_finite"] & jnp.isfinite(optax.global_norm(objective))
    after = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), after, state.replace(inner=inner))
    after = network.layout.pin(after)
    metrics = {
      "outer_loss": out.loss,
      "inner_loss": jnp.mean(out.metrics["inner_loss"]),
      "grad_norm": optax.global_norm(out.grad),
      "ability_loss": out.metrics["aux"],
      "alignment": out.metrics.get("alignment"),
      "is_finite": is_finite,
      "finite": out.metrics.get("finite", {}),
    }
    return after, network.layout.pin(metrics)

  return outer_step


def readable(config: ml_collections.ConfigDict, meta_params: Any) -> tuple[dict[str, float], dict[str, float]]:
  """The hyperparameters and the mixture, averaged over the run, that the meta-parameters stand for, by name.

  Ordered hyperparameters are rounded to an allowed value, a batch size to whole rows, and with a learned batch size
  `num_steps` is there too: the steps in which it uses the whole budget.
  """
  space = config_lib.space(config)
  values = space.rounded({name: float(x) for name, x in space.constrain(meta_params["hyperparameters"]).items()})
  if "batch_size" in values:
    values["batch_size"] = float(round(values["batch_size"]))
    values["num_steps"] = float(config_lib.num_steps(config, round(values["batch_size"])))
  weights = curriculum.average(meta_params["mixture_logits"], horizon(config, meta_params))
  return values, dict(zip(task_lib.names(config.sources), map(float, weights), strict=True))


def horizon(config: ml_collections.ConfigDict, meta_params: Any) -> int:
  """Inner steps of a whole run at these meta-parameters: more with a smaller batch, fewer where it stops early."""
  values = config_lib.default_hyperparameters(config)
  values |= {n: float(x) for n, x in config_lib.space(config).constrain(meta_params["hyperparameters"]).items()}
  size = values.get("batch_size", config.batch_size)
  return math.ceil(config_lib.num_steps(config) * values["stop_fraction"] * config.batch_size / size - 1e-3)


def draw_run_length(config: ml_collections.ConfigDict, step: int, num_steps: int) -> int:
  """Inner steps after which a run that starts at this outer step makes way for a fresh one.

  Random between half and all of the horizon: fresh starts come at random moments, and windows see the late parts of
  a run nearly as often as the early ones.

  Args:
    num_steps: of a whole run, as of `horizon`.
  """
  num_steps = max(num_steps, config.meta.unroll_length)
  low = max(num_steps // 2, config.meta.unroll_length)
  return int(np.random.default_rng([config.seed, step]).integers(low, num_steps, endpoint=True))


def init_state(config: ml_collections.ConfigDict, network: task_lib.Network) -> OuterState:
  """The state before the first outer step, but for the losses that `outer_objective.start` finds."""
  meta_params = init_meta_params(config, network)
  problem = build_problem(config, network, network.frozen, jnp.mean)  # its optimiser only
  options = config_lib.method_options(config)
  inner = metagrad.init(problem, meta_params, network.params, config.meta.method, **options)
  state = OuterState(meta_params, outer_optimizer(config).init(meta_params), inner, outer_objective.init(config))
  # A copy, since the network's own params start the next inner run when this one's memory has been given away.
  return network.layout.place(jax.tree.map(jnp.copy, state))


def restore(config: ml_collections.ConfigDict, network: task_lib.Network, workdir: pathlib.Path):
  """`(step, OuterState, data)` of the newest whole checkpoint, or None if there is none."""
  if not (workdir / "checkpoints").is_dir():
    return None
  state = init_state(config, network)
  with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
    found = checkpoints.restore(task_lib.pure(state))
  return found and (found[0], task_lib.unpure(state, found[1]), found[2])


def meta_train(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Run the outer steps that are still to do; writes checkpoints and `metrics.jsonl` into the workdir.

  Raises:
    InputError: data, model or workdir do not fit; before anything is written.
    MftError: `meta.max_skipped` outer steps in a row were not finite; the batch that did it is in the workdir.
  """
  run_folder.reclaim(config, workdir)
  if config.meta.check and jax.process_count() > 1:
    raise errors.InputError("config.meta.check = True runs on one host only.")
  network, tokenizer = task_lib.build_network(config)
  rows = task_lib.source_rows(config, tokenizer)
  held_out = task_lib.ability_rows(config, tokenizer)
  num_abilities, length = len(config.abilities), config.meta.unroll_length
  stream = mixture.Stream(rows, config.batch_size, config.seed)
  ability_stream = mixture.Stream(held_out, num_abilities * config.meta.ability_rows, config.seed + 1)
  uniform = np.full(num_abilities, 1 / num_abilities)
  found = restore(config, network, workdir)
  objective = found[1].objective if found else outer_objective.start(config, network, held_out)
  run_folder.claim(config, workdir)

  state, start = dataclasses.replace(init_state(config, network), objective=objective), 0
  run_length = draw_run_length(config, 0, horizon(config, state.meta_params))
  if found:
    start, state, data = found
    stream.restore(data["stream"])
    ability_stream.restore(data["ability_stream"])
    run_length = data["run_length"]
    logging.warning("Going on from outer step %d in %s.", start, workdir)
  outer_step = build_outer_step(config, network)
  inner_steps_done, skipped = int(state.inner.step), 0
  tokens_per_step = length * config.batch_size * config.length
  tracker = tracking.Tracker(
    workdir,
    config.meta.outer_steps,
    title="meta-train",
    name="meta_train",
    start_step=start,
    tokens_per_step=tokens_per_step,
    flops_per_step=network.outer_flops(config),
    num_devices=network.layout.mesh.size,
  )
  with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints, tracker:
    for step in tracker.steps():
      num_steps = horizon(config, state.meta_params)
      is_fresh = inner_steps_done + length > run_length
      if is_fresh:
        inner_steps_done, run_length = 0, draw_run_length(config, step, num_steps)
      with tracker.input():
        logits = state.meta_params["mixture_logits"]
        batches = curriculum.draw(config, stream, logits, inner_steps_done, length, num_steps)
        outer_batch = ability_stream.next(uniform)
        placed = network.layout.place_rows(batches, axis=1), network.layout.place_rows(outer_batch)
      key = jax.random.fold_in(jax.random.key(config.seed), step)
      if config.meta.check and step == 0:
        _check(config, network, state, batches, outer_batch, key)
      state, metrics = outer_step(network.frozen, state, network.params, is_fresh, *placed, key)
      inner_steps_done = int(state.inner.step)
      skipped = 0 if bool(metrics["is_finite"]) else skipped + 1
      if skipped:
        logging.warning("Outer step %d is not finite and was skipped: %s.", step, _non_finite_terms(metrics["finite"]))
      tracker.log(step + 1, _line(config, state, metrics, skipped))
      task_lib.stop_if_skipped(config, workdir, skipped, {"inner": batches, "outer": outer_batch})
      if checkpoints.is_due(step + 1, config.meta.outer_steps, config.checkpoint_every):
        data = {"stream": stream.state(), "ability_stream": ability_stream.state(), "run_length": run_length}
        checkpoints.save(step + 1, task_lib.pure(state), data)


def _check(config: ml_collections.ConfigDict, network: task_lib.Network, state, inner_batches, outer_batch, key):
  """Logs how far the method is from f64 reverse mode on a few steps and rows of this run."""
  build = functools.partial(metagrad.value_and_grad, method=config.meta.method, **config_lib.method_options(config))
  objective = functools.partial(outer_objective.loss, config, state.objective)
  problem = dataclasses.replace(build_problem(config, network, network.frozen, objective), micro_batches=1)
  report = metagrad.check(
    problem, build, state.meta_params, network.params, inner_batches, outer_batch, key, num_rows=2, tolerance=1e-3
  )
  logging.warning("Method %s against f64 reverse mode:\n%s", config.meta.method, report.table())


def _non_finite_terms(finite: dict[str, Any]) -> str:
  """The terms that were not finite, and the inner steps in which they were not, in words."""
  steps = {name: np.flatnonzero(~np.atleast_1d(np.asarray(value))) for name, value in finite.items()}
  found = [f"{name} (inner steps {where.min()} to {where.max()})" for name, where in steps.items() if where.size]
  return ", ".join(found) or "the meta-gradient"


def _line(config: ml_collections.ConfigDict, state: OuterState, metrics: Any, skipped: int) -> dict[str, Any]:
  hyperparameters, weights = readable(config, state.meta_params)
  by_ability = lambda values: dict(zip(task_lib.names(config.abilities), map(float, values), strict=True))
  more: dict[str, Any] = dict(outer_objective.readable(config, state.objective))
  if metrics["alignment"] is not None:
    more["alignment"] = by_ability(metrics["alignment"])
  schedule = curriculum.schedule(config, state.meta_params["mixture_logits"])
  if schedule is not None:
    more["mixture_schedule"] = [knot["mixture"] for knot in schedule]
  return {
    "loss": float(metrics["outer_loss"]),
    "outer_loss": float(metrics["outer_loss"]),
    "inner_loss": float(metrics["inner_loss"]),
    "grad_norm": float(metrics["grad_norm"]),
    "inner_step": int(state.inner.step),
    "skipped": skipped,
    "hyperparameters": hyperparameters,
    "mixture": weights,
    "ability_loss": by_ability(metrics["ability_loss"]),
    **more,
  }
