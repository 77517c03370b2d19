"""How a model that is split over devices lies on them: which axis of each parameter, by its name, and its rows."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mftjax.models import lora

ROWS = ("data", "fsdp")  # axes of the mesh that the rows of a batch are split over
BOTH = ("tensor", "fsdp")

_Axes = str | tuple[str, ...] | None

# Of a matrix [..., in, out]: what the axes are split over. `tensor` splits the heads and the features of the MLP, so
# that a layer's two halves talk once each; `fsdp` another axis, which is gathered for use.
_MATRICES: dict[str, tuple[_Axes, _Axes]] = {
  **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "head"), ("fsdp", "tensor")),
  **dict.fromkeys(("o_proj", "down_proj", "embedding"), ("tensor", "fsdp")),
  **dict.fromkeys(("values", "delta"), (None, BOTH)),  # slots of a memory, along their width
}


def axes(name: str) -> tuple[_Axes, ...]:
  """What the last axes of the parameter of this name are split over; `()`: it is whole on every device.

  A LoRA's axis that is not the rank is split as its matrix is, over `fsdp` too; a bias as the matrix's outputs are.

  Source: Megatron-LM (Shoeybi et al., 2019), Section 3, for `tensor`; ZeRO (Rajbhandari et al., 2020), stage 3, for
  `fsdp`.
  """
  base = name.removesuffix("_lora_a").removesuffix("_lora_b").removesuffix("_bias")
  if name.endswith("norm"):
    return ("fsdp",)
  if base not in _MATRICES:
    return ()
  size_in, size_out = (BOTH if axis == "tensor" else axis for axis in _MATRICES[base])
  found: dict[str, tuple[_Axes, ...]] = {
    base: _MATRICES[base],
    f"{base}_bias": (size_out,),
    f"{base}_lora_a": (size_in, None),
    f"{base}_lora_b": (None, size_out),
  }
  return found[name]


def _axes_at(path: Sequence[Any], shape: Sequence[int]) -> tuple[_Axes, ...]:
  found = next((found for name in reversed(lora.names_of(path)) if (found := axes(name))), ())
  return found if len(found) <= len(shape) else ()  # else an optimiser's scalar


def _last(found: tuple[_Axes, ...], shape: Sequence[int]) -> list[tuple[_Axes, int]]:
  return list(zip(found, shape[len(shape) - len(found) :], strict=True))


@dataclasses.dataclass(frozen=True)
class Spread:
  """A mesh with axes `data`, `fsdp` and `tensor`, and how a model lies on it."""

  mesh: Mesh

  def sharding(self, path: Sequence[Any], shape: Sequence[int], is_gathered: bool = False) -> NamedSharding:
    """Of the array at this path of a state, by the last name in it that is a parameter's; any leading axes are whole.

    What does not divide is whole (`undivided`).

    Args:
      is_gathered: as it is used, and not as it is stored: whole along `fsdp`.
    """
    found = _axes_at(path, shape)
    if is_gathered:
      found = tuple("tensor" if axis == BOTH else None if axis == "fsdp" else axis for axis in found)
    ends = [None if size % self.size(axis) else axis for axis, size in _last(found, shape)]
    return NamedSharding(self.mesh, PartitionSpec(*[None] * (len(shape) - len(ends)), *ends))

  def undivided(self, path: Sequence[Any], shape: Sequence[int]) -> tuple[int, Any] | None:
    """A size of the array at this path that does not divide, and the axes it is to be split over.

    A vocabulary may be whole: it is nobody's choice.
    """
    if {"embedding", "head"} & set(lora.names_of(path)):
      return None
    pairs = _last(_axes_at(path, shape), shape)
    return next(((size, axis) for axis, size in pairs if size % self.size(axis)), None)

  def size(self, axis: _Axes) -> int:
    """Parts that an array is split into over these axes."""
    names = (axis,) if isinstance(axis, str) else axis or ()
    return math.prod(self.mesh.shape[name] for name in names)

  def used(self, name: str, value: jax.Array) -> jax.Array:
    """A parameter as it is used. Inside `jax.jit`: there XLA gathers it just before, and drops it."""
    path = [jax.tree_util.DictKey(name)]
    # Held as it is stored first: else a loop around, which stacks the parameters of its steps, stacks what is gathered.
    value = jax.lax.with_sharding_constraint(value, self.sharding(path, value.shape))
    return jax.lax.with_sharding_constraint(value, self.sharding(path, value.shape, is_gathered=True))

  def rows(self, hidden: jax.Array) -> jax.Array:
    """`[batch, ...]` states split by rows; as they are where the rows do not divide. Inside `jax.jit`."""
    if hidden.shape[0] % self.size(ROWS):
      return hidden
    return jax.lax.with_sharding_constraint(hidden, NamedSharding(self.mesh, PartitionSpec(ROWS)))
