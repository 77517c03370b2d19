"""Bytes that the collectives of a compiled program move, from its optimised HLO.

What counts is what a device receives in one run of the program, by algorithms that move the least. With groups of n
devices, each of which holds an operand of some bytes:

| kind | bytes |
|---|---|
| all-gather | (n - 1) operand = (n - 1) / n result |
| reduce-scatter | (n - 1) / n operand |
| all-reduce | 2 (n - 1) / n operand: a reduce-scatter and an all-gather, as in a ring |
| all-to-all | (n - 1) / n operand |
| collective-permute | operand |

Each device sends as much as it receives, which is not counted again. Loops count as in benchmarks.hlo; an asynchronous
collective counts where it starts.
"""

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from benchmarks import hlo as hlo_lib

# Kind -> group size -> bytes that arrive for each byte of the operand.
_RECEIVED: dict[str, Callable[[int], Fraction]] = {
  "all-gather": lambda n: Fraction(n - 1),
  "all-reduce": lambda n: Fraction(2 * (n - 1), n),
  "reduce-scatter": lambda n: Fraction(n - 1, n),
  "all-to-all": lambda n: Fraction(n - 1, n),
  "collective-permute": lambda n: Fraction(1),
}
_UNKNOWN = ("ragged-all-to-all", "collective-broadcast")


def count_bytes(stage: Any) -> dict[str, int]:
  """Bytes that a device receives in one run, by kind of collective and in `total`.

  Args:
    stage: what `jax.jit(fn).lower(...)` returns, or its `.compile()`.

  Raises:
    ValueError: a loop without a known trip count, or a collective or groups of a kind that is not understood.
  """
  compiled = stage.compile() if hasattr(stage, "compile") else stage
  return count_bytes_of(compiled.as_text())


def count_bytes_of(hlo: str) -> dict[str, int]:
  """`count_bytes` of the text of an optimised HLO module."""
  num_devices = math.prod(int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", hlo.partition("\n")[0]))
  found = hlo_lib.total(hlo, lambda instruction, operand: _received(instruction, operand, num_devices))
  by_kind = {kind: round(found[kind]) for kind in _RECEIVED if found[kind]}
  return by_kind | {"total": sum(by_kind.values())}


def _received(instruction: hlo_lib.Instruction, operand, num_devices: int) -> dict[str, Fraction]:
  kind = instruction.opcode.removesuffix("-start")
  if kind in _UNKNOWN:
    raise ValueError(f"The bytes of a {kind} are not known.")
  if kind not in _RECEIVED:
    return {}
  operands = sum(operand(index).num_bytes for index in range(len(instruction.operands)))
  size = 2 if kind == "collective-permute" else group_size(instruction.attributes, num_devices)
  return {kind: operands * _RECEIVED[kind](size)}


def group_size(attributes: str, num_devices: int) -> int:
  """Devices in a group of a collective.

  Args:
    attributes: of the instruction; the groups are a list such as `{{0,1},{2,3}}`, where `{}` is all devices in one, or
      the rows of an array of devices such as `[2,4]<=[4,2]T(1,0)`, or along axes of a mesh or parts of them, such as
      `mesh['x'=2,'y'=4] {'x','y':(1)2}`.

  Raises:
    ValueError: groups that are written in another way, or of several sizes.
  """
  if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
    return int(found.group(1))
  if found := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes):
    sizes = {len(group.split(",")) for group in re.findall(r"\{([\d,]+)\}", found.group(1))} or {num_devices}
    if len(sizes) == 1:
      return sizes.pop()
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", attributes):
    mesh = dict(re.findall(r"('[^']*')=(\d+)", found.group(1)))
    axes = re.findall(r"('[^']*')(?::\(\d+\)(\d+))?", found.group(2))
    return math.prod(int(part or mesh[axis]) for axis, part in axes)
  raise ValueError(f"Groups of a collective that are not understood: {attributes[:200]}")
