"""The text of an optimised HLO module: its instructions, and what a run of them adds up to.

A sum walks the module from its entry: a loop's body counts as often as the loop turns, a conditional as much as its
dearest branch, a fusion or an asynchronous call what it calls.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^(ROOT )?%?(\S+) = (.*)$")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([^\s,}]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([^\s,]+))")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  opcode: str
  dtypes: list[str]  # of the result; several for a tuple
  shapes: list[tuple[int, ...]]  # likewise
  operands: list[str]
  arguments: str  # between the parentheses: the operands, or the value of a constant
  attributes: str
  is_root: bool  # whether it is what its computation returns

  @property
  def num_bytes(self) -> int:
    """Of all arrays of the result; what is less than a byte is taken for one."""
    return sum(math.prod(shape) * _item_bytes(dtype) for dtype, shape in zip(self.dtypes, self.shapes, strict=True))


# `(instruction, operand) -> {what: number}` of one instruction, but for what it calls; `operand(index)` is its operand.
Count = Callable[[Instruction, Callable[[int], Instruction]], Mapping[Any, int]]


def total(hlo: str, count: Count) -> collections.Counter:
  """The sum of `count` over one run of the module on one device.

  Raises:
    ValueError: text that is no optimised HLO, or a loop whose trip count XLA does not know.
  """
  entry, computations = _parse(hlo)

  @functools.cache
  def of(name: str) -> collections.Counter:
    found: collections.Counter = collections.Counter()
    instructions = computations[name]
    for instruction in instructions.values():
      operand = lambda index, instruction=instruction: instructions[instruction.operands[index]]
      found.update(count(instruction, operand))
      found.update(_called(name, instruction, computations, of))
    return found

  return of(entry)


def integers(pattern: str, text: str) -> list[int]:
  """The numbers in the first group of the pattern's first match."""
  found = re.search(pattern, text)
  return [int(number) for number in re.findall(r"\d+", found.group(1))] if found else []


def _called(name: str, instruction: Instruction, computations, of) -> Mapping[Any, int]:
  opcode, attributes = instruction.opcode, instruction.attributes
  if opcode == "while":
    trips = _trips(name, instruction, computations)
    return {what: trips * number for what, number in of(_named("body", attributes)).items()}
  if opcode == "conditional":
    names = [
      branch.strip().lstrip("%") for pair in _BRANCHES.findall(attributes) for branch in "".join(pair).split(",")
    ]
    return max(map(of, names), key=lambda found: found.total())
  if opcode in ("fusion", "call", "map", "async-start"):
    return of(_CALLED.search(attributes).group(1))
  return {}


def _trips(name: str, loop: Instruction, computations: dict[str, dict[str, Instruction]]) -> int:
  """How often a loop turns: as XLA says, or where it does not (TPU) as the loop's own counter does."""
  if known := integers(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
    return known[0]
  before, condition, body = (
    computations[which] for which in (name, _named("condition", loop.attributes), _named("body", loop.attributes))
  )
  test, end = _root(condition), _root(body)
  with contextlib.suppress(LookupError, ValueError):
    counter, limit = (condition[operand] for operand in test.operands)
    (place,) = integers(r"index=(\d+)", counter.attributes)
    start, step = before[before[loop.operands[0]].operands[place]], body[end.operands[place]]
    while start.opcode == "copy":
      start = before[start.operands[0]]
    steps = [body[operand] for operand in step.operands if body[operand].opcode == "constant"]
    is_count = step.opcode == "add" and [one.arguments for one in (start, *steps)] == ["0", "1"]
    if is_count and limit.opcode == "constant" and "direction=LT" in test.attributes:
      return int(limit.arguments)
  raise ValueError(
    f"A loop of computation {name} has no known trip count, so what it does cannot be counted: use lax.scan or a "
    "fori_loop with constant bounds."
  )


def _named(what: str, attributes: str) -> str:
  return re.search(rf"{what}=%?([^\s,]+)", attributes).group(1)


def _root(computation: dict[str, Instruction]) -> Instruction:
  return next(instruction for instruction in computation.values() if instruction.is_root)


def _parse(hlo: str) -> tuple[str, dict[str, dict[str, Instruction]]]:
  """The entry's name, and the instructions of each computation by name."""
  entry, computations, current = "", {}, None
  for line in hlo.splitlines():
    if current is None:
      header = _HEADER.match(line)
      if header:
        current = computations[header.group(2)] = {}
        entry = header.group(2) if header.group(1) else entry
    elif line.startswith("}"):
      current = None
    else:
      found = _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line).strip())
      if found:
        current[found.group(2)] = _instruction(found.group(3), bool(found.group(1)))
  if not entry:
    raise ValueError("No ENTRY computation in this text; it takes the optimised HLO, compiled.as_text().")
  return entry, computations


def _instruction(text: str, is_root: bool) -> Instruction:
  """From `TYPE opcode(operands), attributes`, where TYPE may be a tuple and a layout may hold parentheses."""
  end = _closing(text, 0) + 1 if text.startswith("(") else re.match(r"\S+", text).end()
  arrays = _ARRAY.findall(text[:end])
  shapes = [tuple(int(size.strip("<= ")) for size in dims.split(",") if size) for _, dims in arrays]
  opcode, rest = re.match(r"\s*([\w-]+)(.*)$", text[end:]).groups()
  close = _closing(rest, 0)
  arguments = rest[1:close]
  operands = re.findall(r"%([^\s,()]+)", arguments)
  dtypes = [dtype for dtype, _ in arrays]
  return Instruction(opcode, dtypes, shapes, operands, arguments, rest[close + 1 :], is_root)


def _closing(text: str, start: int) -> int:
  """Index of the parenthesis that closes the one at `start`."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, start):
    depth += 1 if match.group() == "(" else -1
    if depth == 0:
      return match.start()
  raise ValueError(f"Unbalanced parentheses in HLO: {text[:80]}")


def _item_bytes(dtype: str) -> int:
  bits = re.search(r"\d+", dtype)  # none in pred, which is a byte
  return -(-int(bits.group()) // 8) if bits else 1
