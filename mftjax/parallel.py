"""How a run lies on its devices: tasks side by side, and the rows and the model of each split over some of them."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mftjax import errors, models
from mftjax.models import spread as spread_lib

AXES = ("task", "data", "fsdp", "tensor")
STRATEGIES = ("mesh", "pmap")


@dataclasses.dataclass(frozen=True)
class Layout:
  """The devices of a run, along the axes `AXES` of a mesh.

  `task`: tasks of an outer step side by side; they never talk. `data`: each holds the model and a part of the rows.
  `fsdp`: a part of the rows too, and of the model, of which a layer is gathered when it is used. `tensor`: a part of
  the heads and of the features of the MLP. The numbers are those of one device but for the order of sums.

  Attributes:
    strategy: how tasks are mapped: `mesh` (one program over the mesh) or `pmap` (`jax.pmap`, only tasks).
  """

  mesh: Mesh
  strategy: str = "mesh"

  @property
  def num_task_groups(self) -> int:
    """Groups of devices that tasks are split over."""
    return self.mesh.shape["task"]

  @property
  def spread(self) -> spread_lib.Spread:
    """How a model lies on the devices of its task."""
    return spread_lib.Spread(self.mesh)

  @property
  def is_split(self) -> bool:
    """Whether a task has several devices."""
    return self.mesh.size > self.num_task_groups

  def split(self, decoder: models.Decoder) -> None:
    """Has a decoder lie on the devices of its task, in place; its parameters are put there by `place`.

    Raises:
      InputError: its heads or widths do not divide, with the numbers that would.
    """
    if not self.is_split:
      return
    for name in ("num_heads", "num_kv_heads"):
      number = getattr(decoder.config, name)
      if number % self.mesh.shape["tensor"]:
        raise _does_not_divide(f"The model's {name} = {number}", number, "tensor", self.mesh)
    self.shardings(nnx.state(decoder))
    decoder.spread = self.spread

  def shardings(self, tree: Any) -> Any:
    """A `NamedSharding` for each array of a model's parameters, their optimiser state, or both with more around them.

    Raises:
      InputError: a size that does not divide, with the numbers that would.
    """
    return jax.tree.map_with_path(lambda path, leaf: self._checked(path, leaf.shape), tree)

  def _checked(self, path: Any, shape: tuple[int, ...]) -> NamedSharding:
    if found := self.spread.undivided(path, shape):
      size, axis = found
      raise _does_not_divide(f"The width {size} of {jax.tree_util.keystr(path)}", size, axis, self.mesh)
    return self.spread.sharding(path, shape)

  def place(self, tree: Any) -> Any:
    """The tree's arrays, put where `shardings` has them; as they are on one device."""
    if not self.is_split:
      return tree
    return jax.device_put(tree, self.shardings(tree))

  def check_rows(self, what: str, number: int) -> None:
    """Raise `InputError` if so many rows do not divide; `what` they are comes first in the message."""
    if number % self.spread.size(spread_lib.ROWS):
      raise _does_not_divide(f"{what} = {number}", number, spread_lib.ROWS, self.mesh)

  def place_rows(self, tree: Any, axis: int = 0) -> Any:
    """Batches, put on the devices split by rows, which are this axis of every array; as they are on one device."""
    return jax.device_put(tree, self.row_sharding(axis)) if self.is_split else tree

  def row_sharding(self, axis: int = 0) -> NamedSharding:
    """Of batches whose rows are this axis."""
    return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, spread_lib.ROWS))

  def pin(self, tree: Any) -> Any:
    """`place` inside `jax.jit`: what has these parameters' names, or is made of them, lies as they do."""
    if not self.is_split:
      return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, self.shardings(tree))

  def share(self, tree: Any) -> Any:
    """What all tasks of `over_tasks` have in common, put on every group's devices; as it is on one device."""
    return tree if self.mesh.size == 1 else jax.device_put(tree, self.shardings(tree))

  def over_tasks(self, program: Callable[..., Any]) -> Callable[..., Any]:
    """`program(shared, *args)` of one task, over the leading axis of all args, compiled.

    What it returns is on the first device; args may come from anywhere, `shared` from `share`. Where tasks do not
    divide by the groups of devices, the last one is repeated and left out.
    """
    groups, run = self.num_task_groups, self.mapped(program)
    if self.mesh.size == 1:
      return lambda shared, *args: run(shared, args)

    def call(shared, *args):
      count = len(jax.tree.leaves(args)[0])
      index = np.minimum(np.arange(-(-count // groups) * groups), count - 1)
      args = jax.tree.map(lambda x: x[index], args)
      found = jax.device_put(run(shared, args), self.mesh.devices.flat[0])
      return jax.tree.map(lambda x: x[:count], found)

    return call

  def mapped(self, program: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    """`over_tasks` as `(shared, args) -> results`, for args whose tasks divide by the groups; results stay there."""
    whole, split = PartitionSpec(), PartitionSpec("task")
    on_tasks = NamedSharding(self.mesh, split)
    axis_name = "task" if self.is_split else None
    each = lambda shared, args: jax.vmap(functools.partial(program, shared), spmd_axis_name=axis_name)(*args)
    if self.mesh.size == 1:
      return jax.jit(each)
    if self.strategy == "pmap":
      mapped = jax.pmap(each, in_axes=(None, 0), devices=list(self.mesh.devices.flat))
      in_groups = lambda x: jax.device_put(x.reshape(self.num_task_groups, -1, *x.shape[1:]), on_tasks)
      together = lambda x: x.reshape(-1, *x.shape[2:])
      return lambda shared, args: jax.tree.map(together, mapped(shared, jax.tree.map(in_groups, args)))
    if self.is_split:
      # Not shard_map: XLA does not split a model within a group while the tasks are split by hand.
      run = jax.jit(each, out_shardings=on_tasks)
    else:
      run = jax.jit(jax.shard_map(each, mesh=self.mesh, in_specs=(whole, split), out_specs=split, check_vma=False))
    return lambda shared, args: run(shared, jax.device_put(args, on_tasks))


def single() -> Layout:
  """One device, which nothing is split over."""
  return Layout(_mesh(jax.local_devices()[:1], (1, 1, 1, 1)))


def build(config: ml_collections.ConfigDict) -> Layout:
  """The layout of `config.parallel`, on all devices or as many as it asks for.

  The direct learner has one task, so its `task` axis is 1; unless it is asked to, it uses one device.

  Raises:
    InputError: sizes that do not fit the number of devices or the batches, with the numbers that would.
  """
  asked, devices = config.parallel, jax.devices()
  sizes = {axis: asked[axis] for axis in AXES}
  if config.learner.kind == "direct":
    if sizes["task"] > 1:
      raise errors.InputError(f"config.parallel.task = {sizes['task']}: config.learner.kind = 'direct' has one task.")
    sizes["task"] = 1
  elif jax.process_count() > 1:
    raise errors.InputError("Several hosts run config.learner.kind = 'direct' alone: meta_train and finetune.")
  free = [axis for axis, size in sizes.items() if size == 0]
  if len(free) > 1:
    raise errors.InputError(
      f"config.parallel.{' and '.join(free)} are 0, which is the rest of the devices: one may be."
    )
  fixed = math.prod(size for size in sizes.values() if size)
  given = ", ".join(f"{axis} = {size}" for axis, size in sizes.items())
  if fixed > len(devices) or (free and len(devices) % fixed):
    raise errors.InputError(
      f"config.parallel ({given}) does not fit {len(devices)} devices: "
      f"the product of the sizes that are not 0 is {fixed}; take one of {_divisors(len(devices))}."
    )
  if free:
    sizes[free[0]] = len(devices) // fixed
  number = math.prod(sizes.values())
  if number < len(devices):
    logging.warning("%d of %d devices are used: config.parallel is %s.", number, len(devices), given)
  if asked.strategy == "pmap" and number > sizes["task"]:
    raise errors.InputError("config.parallel.strategy = 'pmap' maps tasks only: data, fsdp and tensor must be 1.")
  layout = Layout(_mesh(devices[:number], tuple(sizes[axis] for axis in AXES)), asked.strategy)
  if config.learner.kind == "direct":
    layout.check_rows("config.batch_size / config.micro_batches", config.batch_size // config.micro_batches)
    rows = len(config.abilities) * config.meta.ability_rows
    layout.check_rows("The number of abilities times config.meta.ability_rows", rows)
  return layout


def _does_not_divide(what: str, number: int, axis: str | tuple[str, ...], mesh: Mesh) -> errors.InputError:
  names = (axis,) if isinstance(axis, str) else axis
  given = " x ".join(f"{name} = {mesh.shape[name]}" for name in names)
  return errors.InputError(
    f"{what} does not divide over config.parallel.{given}; "
    f"{'the product' if len(names) > 1 else 'it'} may be one of {_divisors(number)}."
  )


def _divisors(number: int) -> str:
  return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _mesh(devices: list[Any], shape: tuple[int, ...]) -> Mesh:
  return Mesh(np.asarray(devices).reshape(shape), AXES)
