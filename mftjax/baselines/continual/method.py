"""What a method of learning one task after another consists of: pure functions around the one SFT step."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from mftjax import models, sft, types

Values = Mapping[str, jax.Array]  # hyperparameters, those of `sft` and the method's own
Weights = tuple[Any, Any]  # what is trained, and the rest of what a run has of its own: together what a model reads


@flax.struct.dataclass
class Task:
  """The task that is learnt now."""

  number: jax.Array  # int32, its place in the sequence
  rows: types.Batch  # all of its training rows, `[num_rows, ...]`


@dataclasses.dataclass(frozen=True)
class Setup:
  """A model taken apart, and what else the runs of a method have in common."""

  graphdef: Any
  params: Any  # what is trained, before the first task
  held: Any  # what a run has of its own beside that, such as the slots of a memory; may be empty
  frozen: Any  # the same in all runs
  num_tasks: int  # of a sequence
  background: types.Batch  # rows `[num_rows, ...]` of what the base model was trained on

  def merge(self, weights: Weights) -> models.Decoder:
    """The model with these weights."""
    return nnx.merge(self.graphdef, *weights, self.frozen, copy=True)

  def logits(self, weights: Weights, batch: types.Batch) -> jax.Array:
    """`[batch, length, vocab]`."""
    model = self.merge(weights)
    return model.logits(last_hidden(model, batch))


def last_hidden(model: models.Decoder, batch: types.Batch) -> jax.Array:
  """`[batch, length, hidden_size]` last hidden states of a batch, from its `states` or `reads` where it has them."""
  if batch.states is not None and model.adapters is None:
    return model.from_last_mlp(batch.states)
  reads = batch.reads
  if reads is None and batch.states is not None:
    reads = model.block_weights(batch.states)
  return model.hidden(batch.tokens, batch.segment_ids, batch.positions, reads)


def sft_loss(
  setup: Setup, weights: Weights, batch: types.Batch, values: Values, mixture_logits: jax.Array | None = None
) -> jax.Array:
  """The ordinary training loss of a batch, nats; all rows weigh the same without `mixture_logits` `[num_sources]`."""
  apply = lambda weights, memory, batch: setup.logits(weights, batch)
  if mixture_logits is None:
    mixture_logits = jnp.zeros(1)
    batch = dataclasses.replace(batch, source=jnp.zeros_like(batch.source), proposal=jnp.ones_like(batch.proposal))
  meta_params = {"mixture_logits": mixture_logits, "memory": None}
  return sft.inner_loss(apply, weights, meta_params, batch, of_sft(values))


def of_sft(values: Values) -> dict[str, jax.Array]:
  """The hyperparameters of the loss and the optimiser, without the method's own."""
  return {name: values[name] for name in sft.NAMES if name in values}


def _init(setup: Setup) -> dict[str, Any]:
  return {"held": setup.held}


def _begin(setup, params, carry, task, values, key):
  return params, carry


def _read(params, carry):
  return params, carry["held"]


def _final(params, carry, values):
  return params, carry["held"]


def _penalty(setup, params, carry, batch, values):
  return 0.0


def _end(setup, params, carry, task, values):
  return params, carry


@dataclasses.dataclass(frozen=True)
class Method:
  """A way of learning tasks one after another.

  All functions are pure and know one run; many runs go through them at once. `carry` is a dict of what a method keeps
  from task to task, whose entry `held` is the run's own part of the model that no gradient trains.

  Attributes:
    trained: what the inner steps train, "full", "lora" or "memory".
    hyperparameters: of its own, name -> (scale, (low, high)) to be tuned; the learning rate is tuned for all.
    init: `(setup) -> carry` before the first task.
    begin: `(setup, params, carry, task, values, key) -> (params, carry)` before each task.
    read: `(params, carry) -> weights` that are trained with.
    final: `(params, carry, values) -> weights` that the model has after a task's `end`.
    penalty: `(setup, params, carry, batch, values) -> scalar` that is added to the loss.
    adjust: `(grads, past_grads) -> grads`, given the gradient on as many stored rows of earlier tasks; None: no need.
    end: `(setup, params, carry, task, values) -> (params, carry)` after each task.
    stored_fraction: part of each task's rows that is kept, and drawn from later.
    is_joint: whether it learns all tasks at once, in as many steps, and not one after another.
  """

  trained: str = "lora"
  hyperparameters: Mapping[str, tuple[str, tuple[float, float]]] = dataclasses.field(default_factory=dict)
  init: Callable[..., Any] = _init
  begin: Callable[..., Any] = _begin
  read: Callable[..., Any] = _read
  final: Callable[..., Any] = _final
  penalty: Callable[..., Any] = _penalty
  adjust: Callable[..., Any] | None = None
  end: Callable[..., Any] = _end
  stored_fraction: float = 0.0
  is_joint: bool = False

  @property
  def is_replaying(self) -> bool:
    """Whether a part of each batch is of earlier tasks: the hyperparameter `replayed`."""
    return "replayed" in self.hyperparameters

  def loss(self, setup: Setup, params: Any, carry: Any, batch: types.Batch, values: Values) -> jax.Array:
    """What an inner step lowers, nats."""
    return sft_loss(setup, self.read(params, carry), batch, values) + self.penalty(setup, params, carry, batch, values)
