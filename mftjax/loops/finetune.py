"""Fine-tuning by a recipe, with the step that meta-training differentiates."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from mftjax import checkpoint, errors, hosts, metagrad, models, recipe, run_folder, sft, tracking
from mftjax import config as config_lib
from mftjax.data import mixture
from mftjax.loops import curriculum, meta_train, predict
from mftjax.loops import task as task_lib

_OF_THE_RUN = ("num_steps", "lora_alpha")  # hyperparameters that `sft` does not read itself


def read_recipe(config: ml_collections.ConfigDict, workdir: pathlib.Path, given: str) -> tuple[str, dict[str, Any]]:
  """The name of the run and its recipe.

  Args:
    given: `default`, or the path of a recipe; empty is the workdir's own `recipe.json`.

  Raises:
    InputError: no such recipe, one that names other sources or hyperparameters, or a higher rank than the LoRA has.
  """
  if given == "default":
    return "default", predict.default_recipe(config)
  path = pathlib.Path(given) if given else workdir / "recipe.json"
  if not given and not path.exists():
    raise errors.InputError(f"{path} does not exist: run experiments.predict there first, or give --recipe.")
  found = recipe.load(path)
  for name in found["mixture"]:
    if name not in config.sources:
      raise errors.unknown_name(f"source in {path}", name, config.sources)
  for name in found["hyperparameters"]:
    if name not in (*sft.NAMES, *_OF_THE_RUN):
      raise errors.unknown_name(f"hyperparameter in {path}", name, (*sft.NAMES, *_OF_THE_RUN))
  rank = found["hyperparameters"].get("lora_rank", 0)
  if rank > config.lora.rank:
    raise errors.InputError(f"lora_rank = {rank} in {path} is above config.lora.rank = {config.lora.rank}.")
  return ("learnt" if path == workdir / "recipe.json" else path.stem), found


def run_length(config: ml_collections.ConfigDict, hyperparameters: Mapping[str, float]) -> tuple[int, int, int]:
  """`(batch_size, num_steps, micro_batches)` of a recipe's run.

  The batch size is rounded to whole rows. `num_steps` of the recipe, or else those of `config.budget_tokens` at that
  batch size, are cut to `stop_fraction`. A micro-batch has no more rows than with the config's own batch size.
  """
  batch_size = max(round(hyperparameters.get("batch_size", config.batch_size)), 1)
  whole = int(hyperparameters.get("num_steps", config_lib.num_steps(config, batch_size)))
  # 1e-3: 0.7 is not quite 0.7 in f32, nor is 0.7 * 10 quite 7.
  num_steps = max(int(whole * hyperparameters.get("stop_fraction", 1.0) + 1e-3), 1)
  rows = config.batch_size // config.micro_batches
  fewest = -(-batch_size // rows)
  return batch_size, num_steps, next(n for n in range(fewest, batch_size + 1) if batch_size % n == 0)


def inner_hyperparameters(config: ml_collections.ConfigDict, hyperparameters: Mapping[str, float]) -> dict[str, float]:
  """The hyperparameters of a recipe that the inner step reads, for the LoRA that the config has.

  A rank that is the LoRA's own is left out. The recipe's alpha / rank becomes a part of `lora_scale`, unless it is the
  config's.
  """
  values = dict(hyperparameters)
  for name in ("batch_size", "num_steps", "stop_fraction"):
    values.pop(name, None)
  rank, alpha = values.get("lora_rank", config.lora.rank), values.pop("lora_alpha", None)
  if alpha is not None and config.lora.rank:
    ratio = alpha / rank / (config.lora.alpha / config.lora.rank)
    if abs(ratio - 1) > 1e-6:
      values["lora_scale"] = values.get("lora_scale", 1.0) * ratio
  if rank == config.lora.rank:
    values.pop("lora_rank", None)
  return values


def proposal(found: Mapping[str, Any], names: Sequence[str], step: int, num_steps: int) -> np.ndarray:
  """`[num_sources]` probabilities of the sources at a step of a recipe's run: its mixture there."""
  weights = recipe.mixture_at(found, float(curriculum.progress(np.asarray(step), num_steps)))
  return mixture.proposal(np.asarray([weights.get(name, 0.0) for name in names], np.float64), 0.0)


def finetune(config: ml_collections.ConfigDict, workdir: pathlib.Path, given: str) -> pathlib.Path:
  """Train by a recipe and export the model; returns `WORKDIR/finetune/NAME/model`.

  Raises:
    InputError: recipe, data, model, devices or workdir do not fit; before anything is written.
    MftError: the training loss is not finite, or the parameters at the end.
  """
  config_lib.need_sources(config)
  run_folder.reclaim(config, workdir)
  name, found = read_recipe(config, workdir, given)
  network, tokenizer = task_lib.build_network(config)
  rows = task_lib.source_rows(config, tokenizer)
  names = task_lib.names(config.sources)
  batch_size, num_steps, micro_batches = run_length(config, found["hyperparameters"])
  network.layout.check_rows("The recipe's batch_size / micro_batches", batch_size // micro_batches)
  values = inner_hyperparameters(config, found["hyperparameters"])
  stream = mixture.Stream(rows, batch_size, config.seed + 2)
  learned = meta_train.restore(config, network, workdir) if name == "learnt" and network.memory is not None else None
  memory = learned[1].meta_params["memory"] if learned else network.memory
  run_folder.claim(config, workdir)
  folder = workdir / "finetune" / name
  hosts.first_does(lambda: recipe.save(found, folder / "recipe.json"))

  # Rows are drawn from the mixture itself: equal logits over a uniform proposal give every one the weight 1.
  meta_params = {
    "hyperparameters": {key: jnp.float32(value) for key, value in values.items()},
    "mixture_logits": jnp.zeros(len(names), jnp.float32),
    "memory": memory,
  }

  def build_problem(frozen):
    apply = functools.partial(network.apply, frozen)
    loss = lambda params, meta_params, batch, rng: sft.inner_loss(apply, params, meta_params, batch, values)
    outer_loss = lambda *args: (loss(*args), None)
    hyperparameters = lambda meta_params: meta_params["hyperparameters"]
    built = task_lib.problem(config, loss, outer_loss, hyperparameters, num_steps)
    return dataclasses.replace(built, micro_batches=micro_batches)

  @functools.partial(jax.jit, donate_argnums=2)
  def train_step(frozen, meta_params, state, batch, rng):
    state, _, loss = metagrad.inner_step(build_problem(frozen), meta_params, state, batch, rng)
    return network.layout.pin(state), loss

  state, start = metagrad.init(build_problem(network.frozen), meta_params, network.params), 0
  state = network.layout.place(state)
  with checkpoint.Checkpoints(folder / "checkpoints") as checkpoints:
    resumed = checkpoints.restore(task_lib.pure(state))
    if resumed:
      start, state = resumed[0], task_lib.unpure(state, resumed[1])
      stream.restore(resumed[2]["stream"])
      logging.warning("Going on from step %d in %s.", start, folder)
    tracker = tracking.Tracker(
      workdir,
      num_steps,
      title=f"fine-tune ({name})",
      name=f"finetune/{name}",
      start_step=start,
      tokens_per_step=batch_size * config.length,
      flops_per_step=network.flops(config.length, batch_size * config.length),
      num_devices=network.layout.mesh.size,
    )
    with tracker:
      unread: list[tuple[int, jax.Array]] = []  # steps and their losses
      for step in tracker.steps():
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        with tracker.input():
          batch = stream.next(proposal(found, names, step, num_steps))
          batch = dataclasses.replace(batch, proposal=np.full_like(batch.proposal, 1 / len(names)))
          batch = network.layout.place_rows(batch)
        state, loss = train_step(network.frozen, meta_params, state, batch, key)
        unread.append((step, loss))
        is_due = checkpoints.is_due(step + 1, num_steps, config.checkpoint_every)
        # But for what is saved, a loss is read while the next step runs: the devices never wait for the host.
        while len(unread) > (0 if is_due else 1):
          _log(tracker, workdir, *unread.pop(0))
        if is_due:
          checkpoints.save(step + 1, task_lib.pure(state), {"stream": stream.state()})
  params = sft.adapted(metagrad.read_params(build_problem(network.frozen), state), values)
  whole = hosts.whole((network.frozen, params, memory))
  if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(whole[1])):  # the last step's have no loss to show it
    raise errors.MftError(f"The parameters after the last fine-tuning step, {num_steps - 1}, are not finite.")
  hosts.first_does(lambda: models.save(network.merge(*whole), tokenizer, folder / "model"))
  return folder / "model"


def _log(tracker: tracking.Tracker, workdir: pathlib.Path, step: int, loss: jax.Array) -> None:
  """Writes the loss of a step.

  Raises:
    MftError: it is not finite.
  """
  if not np.isfinite(float(loss)):
    raise errors.MftError(f"The loss of fine-tuning step {step} is {float(loss)}; see {workdir}/metrics.jsonl.")
  tracker.log(step + 1, {"loss": float(loss)})
