"""Programs that fine-tune a model on several meta-tasks at once, and differentiate those runs."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx

from mftjax import metagrad, models, parallel, sft, spaces, types
from mftjax.data import meta_tasks


@dataclasses.dataclass(frozen=True)
class Run:
  """What all fine-tuning runs have in common."""

  num_steps: int  # at the largest budget
  batch_size: int  # rows, of the largest batch
  validation_rows: int  # held-out rows of each ability that a recipe is chosen by
  test_rows: int  # and judged by
  uniform_fraction: float = 0.5  # of the proposal, when a run is differentiated
  smallest_batch: float | None = None  # rows, where runs may have smaller batches, and more of them for their budget

  @property
  def most_steps(self) -> int:
    """Batches that are drawn: what the smallest ones need to use the largest budget."""
    if self.smallest_batch is None:
      return self.num_steps
    return math.ceil(self.num_steps * self.batch_size / self.smallest_batch - 1e-3)


@dataclasses.dataclass(frozen=True)
class Model:
  """A model taken apart: `apply(params, batch) -> logits`. Each run has params of its own, all share what is frozen."""

  graphdef: Any
  params: Any  # what the runs train: LoRA, or everything
  frozen: Any = dataclasses.field(default_factory=lambda: nnx.State({}))  # everything else

  layout: parallel.Layout = dataclasses.field(default_factory=parallel.single)

  @classmethod
  def of(cls, decoder: models.Decoder, lora: ml_collections.ConfigDict, seed: int, layout: parallel.Layout) -> "Model":
    """The decoder with the config's new LoRA, if its rank is above 0, of which then nothing else is trained.

    Raises:
      InputError: the decoder does not divide over the devices.
    """
    if lora.rank:
      models.lora.add(decoder, lora.rank, lora.alpha, tuple(lora.targets), rngs=nnx.Rngs(seed))
    layout.split(decoder)
    if not lora.rank:
      graphdef, params = nnx.split(decoder)
      return cls(graphdef, params, layout=layout)
    parts: Any = nnx.split(decoder, models.lora.LoRAParam, ...)
    graphdef, params, frozen = parts
    return cls(graphdef, params, frozen, layout)

  def merge(self, params: Any) -> models.Decoder:
    """The model with these parameters."""
    return nnx.merge(self.graphdef, params, self.frozen)

  def apply(self, params: Any, batch: types.Batch) -> jax.Array:
    return self.merge(params)(batch.tokens, batch.segment_ids, batch.positions)

  def embed(self, params: Any, batch: types.Batch) -> jax.Array:
    return self.merge(params).embed(batch.tokens)

  def compile(self, build: Callable[["Model"], Callable]) -> Callable:
    """`build(model)`, jitted. The frozen weights go in as an argument: a constant would be copied into each program."""
    program = jax.jit(lambda frozen, *args: build(dataclasses.replace(self, frozen=frozen))(*args))
    return lambda *args: program(self.frozen, *args)

  def over_tasks(self, build: Callable[["Model"], Callable]) -> Callable:
    """`build(model)` over the leading axis of all arguments, compiled, the tasks split over the layout's devices."""

    def one(shared, *args):
      params, frozen = shared
      return build(dataclasses.replace(self, params=params, frozen=frozen))(*args)

    run = self.layout.over_tasks(one)
    return lambda *args: run(self._shared, *args)

  @functools.cached_property
  def _shared(self) -> Any:
    """Params and frozen weights on the devices of all tasks: one copy for all programs."""
    return self.layout.share((self.params, self.frozen))


def mixture(mixture_logits: jax.Array, source_mask: jax.Array) -> jax.Array:
  """`[max_sources]` weights, 0 for absent sources."""
  weights = jax.nn.softmax(sft.masked_logits(mixture_logits, source_mask)) * source_mask
  return weights / weights.sum()


def draw(
  pools: meta_tasks.Pools, task: meta_tasks.MetaTask, proposal: jax.Array, key: jax.Array, num_steps: int, size: int
) -> types.Batch:
  """Batches `[num_steps, size, ...]` of the task's sources, each source's count nearest to the proposal's."""
  offset_key, row_key, order_key = jax.random.split(key, 3)
  ends = jnp.cumsum(proposal) / proposal.sum()
  # Systematic resampling over the whole run: counts of a batch are never a row or more away from their mean.
  points = (jnp.arange(size) + jax.random.uniform(offset_key, (num_steps, 1))) / size
  source = jnp.minimum(jnp.searchsorted(ends, points, side="right"), len(ends) - 1)
  source = jax.random.permutation(order_key, source, axis=1, independent=True)
  pool = task.source[source]
  row = jax.random.randint(row_key, pool.shape, 0, pools.train["tokens"].shape[1])
  fields = {name: values[pool, row] for name, values in pools.train.items()}
  return types.Batch(**fields, source=source.astype(jnp.int32), proposal=proposal[source])


def held_out(rows: Mapping[str, jax.Array], task: meta_tasks.MetaTask, num_rows: int) -> types.Batch:
  """`[max_abilities * num_rows, ...]` rows, `num_rows` of each ability in the very proportions of its pools."""
  ends = jnp.cumsum(task.ability, axis=1)
  points = (jnp.arange(num_rows) + 0.5) / num_rows
  pool = jax.vmap(lambda end: jnp.searchsorted(end, points * end[-1]))(ends)  # [max_abilities, num_rows]
  pool = jnp.minimum(pool, task.ability.shape[1] - 1)
  row = jnp.arange(num_rows) % rows["tokens"].shape[1]
  fields = {name: values[pool, row].reshape(-1, values.shape[-1]) for name, values in rows.items()}
  ability = jnp.repeat(jnp.arange(len(pool)), num_rows)
  return types.Batch(**fields, source=ability, proposal=jnp.ones(ability.shape))


def ability_losses(model: Model, params: Any, batch: types.Batch, num_abilities: int) -> jax.Array:
  """`[num_abilities]` mean over the rows of each, nats per target token."""
  losses, _ = sft.row_losses(model.apply(params, batch), batch)
  return sft.source_means(losses, batch, num_abilities)


def problem(
  model: Model,
  run: Run,
  space: spaces.Space,
  fixed: Mapping[str, float],
  task: meta_tasks.MetaTask,
  objective: Callable,
) -> metagrad.Problem:
  """A meta-task's bilevel problem: its meta-parameters are a recipe, `{hyperparameters, mixture_logits}` unconstrained.

  A `batch_size` counts the first rows of a batch, and the run ends when its part of the budget is used. Both losses are
  those of the LoRA at its `lora_rank` and `lora_scale`.

  Args:
    objective: `[max_abilities]` losses -> scalar.
  """
  apply = lambda params, memory, batch: model.apply(params, batch)
  hyperparameters = lambda recipe: {**fixed, **space.constrain(recipe["hyperparameters"])}

  def inner_loss(params, recipe, batch, rng):
    logits = sft.masked_logits(recipe["mixture_logits"], task.source_mask)
    values = {"mixture_logits": logits, "memory": None}
    return sft.inner_loss(apply, params, values, batch, hyperparameters(recipe), run.batch_size)

  def outer_loss(params, recipe, batch, rng):
    params = sft.adapted(params, hyperparameters(recipe))
    losses = ability_losses(model, params, batch, len(task.ability_weight))
    return objective(losses), losses

  def optimizer(recipe):
    values = _within_budget(hyperparameters(recipe), task)
    return sft.optimizer(values, run.num_steps, largest_batch=run.batch_size)

  return metagrad.Problem(inner_loss, outer_loss, optimizer, has_aux=True)


def _within_budget(values: Mapping[str, Any], task: meta_tasks.MetaTask) -> dict[str, Any]:
  """The hyperparameters of a run that stops at a part of the task's budget."""
  return {**values, "stop_fraction": values.get("stop_fraction", 1.0) * task.budget}


def value_and_grad(
  model: Model,
  run: Run,
  space: spaces.Space,
  fixed: Mapping[str, float],
  pools: meta_tasks.Pools,
  method: str = "mixed",
  **options: Any,
) -> Callable:
  """`(recipe, task, objective, key) -> (loss, grad, ability losses, is_finite)` of one run of the base model.

  The run is differentiated over its whole horizon, so nothing is truncated. Where it is not finite, the gradient is 0.

  Args:
    options: of the method, see `metagrad.value_and_grad`.
  """

  def call(recipe, task, objective, key):
    built = problem(model, run, space, fixed, task, objective)
    data_key, run_key = jax.random.split(key)
    weights = jax.lax.stop_gradient(mixture(recipe["mixture_logits"], task.source_mask))
    uniform = task.source_mask / task.source_mask.sum()
    proposal = (1 - run.uniform_fraction) * weights + run.uniform_fraction * uniform
    batches = draw(pools, task, proposal, data_key, run.most_steps, run.batch_size)
    outer = held_out(pools.validation, task, run.validation_rows)
    state = metagrad.init(built, recipe, model.params)
    out = metagrad.value_and_grad(built, method, **options)(recipe, state, batches, outer, run_key)
    grad = jax.tree.map(lambda g: jnp.where(out.metrics["is_finite"], g, 0.0), out.grad)
    return out.loss, grad, out.metrics["aux"], out.metrics["is_finite"]

  return call


def clipped(grad: Any, norm: float) -> Any:
  """Of one task, at most this global norm: one unstable run must not rule the others."""
  return optax.clip_by_global_norm(norm).update(grad, optax.EmptyState())[0]


def train(model: Model, run: Run, fixed: Mapping[str, float], pools: meta_tasks.Pools) -> Callable:
  """`(values, weights, task, key) -> params` after an ordinary run.

  Rows are drawn from the mixture itself, as `finetune` does. `values` are constrained hyperparameters, `weights`
  `[max_sources]` the mixture, and `task.budget` is the part of the run that is trained. A `batch_size` counts the first
  rows of a batch; below the run's `smallest_batch` the run is cut off. `lora_rank` and `lora_scale` are worked into the
  params, which are thus those of the model that `finetune` exports.
  """
  apply = lambda params, memory, batch: model.apply(params, batch)

  def call(values, weights, task, key):
    weights = weights * task.source_mask
    weights = weights / weights.sum()
    batches = draw(pools, task, weights, key, run.most_steps, run.batch_size)
    # Equal logits over a uniform proposal: every row has the importance weight 1.
    batches = batches.replace(proposal=jnp.full_like(batches.proposal, 1 / len(weights)))
    constant = {"mixture_logits": jnp.zeros_like(weights), "memory": None}
    all_values = _within_budget({**fixed, **values}, task)

    def inner_loss(params, meta_params, batch, rng):
      return sft.inner_loss(apply, params, constant, batch, all_values, run.batch_size)

    optimizer = lambda _: sft.optimizer(all_values, run.num_steps, largest_batch=run.batch_size)
    built = metagrad.Problem(inner_loss, inner_loss, optimizer)
    state = metagrad.init(built, None, model.params)
    state, _ = metagrad.run(built, None, state, batches, jax.random.split(key, run.most_steps))
    return sft.adapted(state.params, all_values)

  return call


def measure(model: Model, rows: Mapping[str, jax.Array], num_rows: int) -> Callable:
  """`(params, task) -> [max_abilities]` losses on held-out rows, `num_rows` of each ability."""
  return lambda params, task: ability_losses(model, params, held_out(rows, task, num_rows), len(task.ability_weight))


def in_batches(program: Callable, args: Any, batch_size: int, index: np.ndarray | None = None) -> Any:
  """`program(*args)` over the leading axis of all arguments, `batch_size` at once.

  The last batch is filled up with copies, so that no number of tasks compiles anew.

  Args:
    index: places to compute, all by default.
  """
  take = lambda places: jax.tree.map(lambda x: x[places], args)
  index = np.arange(len(jax.tree.leaves(args)[0])) if index is None else np.asarray(index)
  places = [np.minimum(np.arange(i, i + batch_size), len(index) - 1) for i in range(0, len(index), batch_size)]
  parts = [program(*take(index[place])) for place in places]
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[: len(index)], *parts)
