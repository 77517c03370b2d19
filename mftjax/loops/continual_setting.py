"""What the runs of a comparison on sequences of tasks have in common: the base model, the tasks, and the numbers."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from mftjax import config as config_lib
from mftjax import errors, models, types
from mftjax.baselines import continual as methods_lib
from mftjax.data import sequences
from mftjax.loops import answering, base_model, continual_methods, continual_tasks, sequence
from mftjax.loops import task as task_lib
from mftjax.models import slots

_TRAINED = {"full": nnx.Param, "lora": models.lora.LoRAParam, "memory": models.MemoryWrite}
_BASE_ROWS = 4096  # of the procedural base model's training


@dataclasses.dataclass(frozen=True)
class Setting:
  """The base model and the tasks, and the programs' common numbers."""

  config: ml_collections.ConfigDict
  base: tuple[Any, Any]  # the base model taken apart
  tokenizer: Any
  stream: sequences.Stream  # the sequences to judge on
  validation: jax.Array  # [num_validation, num_tasks] int32, pools of the sequences to tune on
  training: sequences.Stream | None  # the sequences to meta-train on
  background: Any  # Batch of rows like the base model's training data
  run: sequence.Run

  def setup(self, trained: str, num_rows: int | None = None) -> methods_lib.Setup:
    """The base model with what a kind of method trains.

    Args:
      trained: "full", "lora" or "memory".
      num_rows: slots that a memory is open to; `config.continual.written_rows` by default.
    """
    if trained == "memory":
      model = nnx.merge(*self._with_memory, copy=True)
      for memory in model.memories():
        memory.open(min(num_rows or self.config.continual.written_rows, memory.num_slots))
    else:
      model = nnx.merge(*self.base)
      _add(model, self.config, trained)
    trained = continual_methods.trained_of(trained, self.config.continual.write_rule)
    parts: Any = nnx.split(model, _TRAINED[trained], methods_lib.memory.HELD, ...)
    graphdef, params, held, frozen = parts
    return methods_lib.Setup(graphdef, params, held, frozen, self.stream.num_tasks, self.background)

  @functools.cached_property
  def _with_memory(self) -> tuple[Any, Any]:
    """The base model with a memory that no task has written yet, taken apart."""
    model = nnx.merge(*self.base)
    _add(model, self.config, "memory")
    nnx.jit(functools.partial(_address, config=self.config))(model, self.background)
    return nnx.split(model)

  @functools.cached_property
  def memory_stream(self) -> sequences.Stream:
    """The sequences to judge on with what a memory is read with, where the frozen model alone says that."""
    return answering.with_inputs(self.setup("memory"), self.stream)


def _address(model: models.Decoder, rows: types.Batch, config: ml_collections.ConfigDict) -> None:
  """Says, in place, what the model's memories are addressed by before the first task.

  Args:
    rows: of what the base model was trained on.
  """
  states = model.memory_inputs(rows.tokens, rows.segment_ids, rows.positions)
  for number, memory in enumerate(model.memories()):
    if config.continual.write_rule == "new":
      in_blocks = methods_lib.memory.num_in_blocks(memory, config.continual.written_rows)
      memory.keys[...] = memory.keys[...].at[:, :in_blocks].set(0.0)  # no query is near a slot that no task has yet
    if config.memory.whitened:
      slots.whiten(memory, states[number], rows.segment_ids > 0)
  methods_lib.memory.place_shared(model, rows)


def build(config: ml_collections.ConfigDict, base: Mapping[str, Any] | None = None) -> Setting:
  """The setting of a config; a base model for procedural tasks is trained here.

  Args:
    base: its params where it is trained already, as `task.pure` has them.

  Raises:
    InputError: tasks, a memory or a LoRA that are not to be had, or sizes that do not go together; before any training.
  """
  decoder, tokenizer = task_lib.load_model(config)
  graphdef, params = nnx.split(decoder)
  names = continual_methods.chosen(config)
  for trained in {continual_methods.get(name, config.continual.write_rule).trained for name in names}:
    _add(nnx.merge(graphdef, params), config, trained)
  tasks = continual_tasks.read(config, tokenizer)
  if base is not None:
    params = task_lib.unpure(params, base)
  elif config.continual.source == "procedural":
    params = _trained(config, graphdef, params)
  run = sequence.Run(config_lib.num_steps(config), config.batch_size)
  return Setting(
    config, (graphdef, params), tokenizer, tasks.stream, tasks.validation, tasks.training, tasks.background, run
  )


def _add(model: models.Decoder, config: ml_collections.ConfigDict, trained: str) -> None:
  """Gives the model what a kind of method trains, in place."""
  if continual_methods.trained_of(trained, config.continual.write_rule) == "lora":
    task_lib.attach_lora(model, config)
  if trained == "memory":
    if not config.memory.num_slots:
      raise errors.InputError("config.memory.num_slots = 0 leaves the memory nothing to write: give it slots.")
    if config.memory.placement == "adapters" and config.continual.write_rule != "new":
      raise errors.InputError(
        f"config.continual.write_rule = {config.continual.write_rule!r} writes into values of slots: a memory with "
        "adapters needs 'new', a block for each task."
      )
    if config.retention.matching_steps and config.continual.write_rule != "new":
      raise errors.InputError(
        f"config.retention.matching_steps = {config.retention.matching_steps} learns which task's slots a token reads: "
        f"with config.continual.write_rule = {config.continual.write_rule!r} no slots are one task's; take 'new', or 0."
      )
    task_lib.attach_memory(model, config)


def _trained(config: ml_collections.ConfigDict, graphdef: Any, params: Any) -> Any:
  """The procedural base model's params."""
  pools = {name: rows[None] for name, rows in sequences.base_rows(config.length, _BASE_ROWS, 0, True).items()}
  apply = lambda params, batch: nnx.merge(graphdef, params)(batch.tokens, batch.segment_ids, batch.positions)
  key, num_steps = jax.random.key(config.seed), config.continual.base_steps
  return base_model.train(apply, params, pools, jnp.zeros(1, jnp.int32), num_steps, 32, key)
