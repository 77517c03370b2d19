"""FLOPs and temporaries of a compiled JAX function, from its optimised HLO.

XLA's own `cost_analysis()` counts the body of a loop once, whatever its trip count. Here the module is walked from its
entry, a loop's body counts as often as the loop turns, a conditional as much as its dearest branch.
"""

import dataclasses
import functools
import math
import re
from typing import Any

# fmt: off
_ARITHMETIC = frozenset([
  "abs", "add", "and", "ceil", "clamp", "compare", "convert", "divide", "floor", "is-finite", "maximum", "minimum",
  "multiply", "negate", "not", "or", "popcnt", "remainder", "round-nearest-afz", "round-nearest-even", "select",
  "shift-left", "shift-right-arithmetic", "shift-right-logical", "sign", "stochastic-convert", "subtract", "xor",
])
_TRANSCENDENTAL = frozenset([
  "acos", "acosh", "asin", "asinh", "atan2", "atanh", "cbrt", "cosine", "cosh", "erf", "exponential",
  "exponential-minus-one", "log", "log-plus-one", "logistic", "power", "rsqrt", "sine", "sinh", "sqrt", "tan", "tanh",
])
# fmt: on
# Matmuls that a backend calls by name, and where its configuration says what they contract.
_MATMUL_CALLS = ("__onednn$matmul", "__cublas$gemm", "__cublas$lt$matmul")
_MATMUL_LIKE = re.compile(r"gemm|matmul|dot|conv|fmha|attention|blas", re.IGNORECASE)

_SHAPE = re.compile(r"[a-z]\w*\[([\d,<= ]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?(\S+) = (.*)$")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([^\s,}]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([^\s,]+))")


@dataclasses.dataclass(frozen=True)
class _Instruction:
  opcode: str
  shapes: list[tuple[int, ...]]  # of the result; several for a tuple
  operands: list[str]
  attributes: str


def cost(stage: Any) -> dict[str, Any]:
  """What a function costs to run once.

  Args:
    stage: what `jax.jit(fn).lower(...)` returns, or its `.compile()`.

  Returns:
    `flops`: 2 * M * N * K of each dot and convolution, 1 per output element of arithmetic and transcendental
      elementwise operations, 1 per input element of reductions. A fusion counts what it computes.
    `matmul_flops`: the dots and convolutions alone.
    `temporaries`, `arguments`, `outputs`: bytes, from `memory_analysis()`.
    `uncounted`: names of the library calls that count as zero.

  Raises:
    ValueError: a loop whose trip count XLA does not know, or a library call that looks like a matmul of a kind that
      is not understood.
  """
  compiled = stage.compile() if hasattr(stage, "compile") else stage
  memory = compiled.memory_analysis()
  return count_flops(compiled.as_text()) | {
    "temporaries": memory.temp_size_in_bytes,
    "arguments": memory.argument_size_in_bytes,
    "outputs": memory.output_size_in_bytes,
  }


def count_flops(hlo: str) -> dict[str, Any]:
  """`flops`, `matmul_flops` and `uncounted` of `cost`, from the text of an optimised HLO module."""
  entry, computations = _parse(hlo)
  uncounted: set[str] = set()

  @functools.cache
  def total(name: str) -> tuple[int, int]:
    instructions = computations[name]
    found = [_flops(name, instructions, instruction, total, uncounted) for instruction in instructions.values()]
    return sum(matmul for matmul, _ in found), sum(other for _, other in found)

  matmul, other = total(entry)
  return {"flops": matmul + other, "matmul_flops": matmul, "uncounted": sorted(uncounted)}


def _flops(name, instructions, instruction: _Instruction, total, uncounted: set[str]) -> tuple[int, int]:
  """FLOPs in matmuls and in everything else of one instruction, with the computations that it calls."""
  opcode, attributes = instruction.opcode, instruction.attributes
  size = sum(map(math.prod, instruction.shapes))
  operand = lambda index: instructions[instruction.operands[index]].shapes[0]
  if opcode == "dot":
    return 2 * size * _contracted(operand(0), _integers(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)), 0
  if opcode == "convolution":
    # Each output element sums over the kernel but for its output features.
    kernel_labels = re.search(r"dim_labels=\w+_(\w+)->", attributes).group(1)
    kernel = operand(1)
    return 2 * size * math.prod(kernel) // kernel[kernel_labels.index("o")], 0
  if opcode == "custom-call":
    return _library_call(instruction, operand, uncounted), 0
  if opcode in _ARITHMETIC or opcode in _TRANSCENDENTAL:
    return 0, size
  if opcode == "reduce":
    return 0, sum(math.prod(operand(i)) for i in range(len(instruction.operands) // 2))
  if opcode == "reduce-window":
    return 0, size * math.prod(_integers(r"window=\{size=([\dx]+)", attributes))
  if opcode == "scatter":
    return 0, math.prod(operand(-1))
  if opcode == "while":
    trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', attributes)
    if trips is None:
      raise ValueError(
        f"A loop of computation {name} has no known trip count, so its FLOPs cannot be counted: use lax.scan or a "
        "fori_loop with constant bounds."
      )
    body = re.search(r"body=%?([^\s,]+)", attributes).group(1)
    return tuple(int(trips.group(1)) * flops for flops in total(body))
  if opcode == "conditional":
    names = [name.strip().lstrip("%") for pair in _BRANCHES.findall(attributes) for name in "".join(pair).split(",")]
    return max((total(name) for name in names), key=sum)
  if opcode in ("fusion", "call", "map", "async-start"):
    return total(_CALLED.search(attributes).group(1))
  return 0, 0


def _library_call(instruction: _Instruction, operand, uncounted: set[str]) -> int:
  target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes).group(1)
  if target.startswith(_MATMUL_CALLS):
    config = _integers(r'"lhs_contracting_dimensions":\[([\d,"]*)\]', instruction.attributes)
    # oneDNN's configuration names no axis: its matmul contracts the last one of the left side.
    return 2 * math.prod(instruction.shapes[0]) * _contracted(operand(0), config or [-1])
  if _MATMUL_LIKE.search(target):
    raise ValueError(f"The library call {target!r} looks like a matmul, but its FLOPs are not known.")
  uncounted.add(target)
  return 0


def _contracted(shape: tuple[int, ...], axes: list[int]) -> int:
  return math.prod(shape[axis] for axis in axes)


def _integers(pattern: str, text: str) -> list[int]:
  found = re.search(pattern, text)
  return [int(number) for number in re.findall(r"\d+", found.group(1))] if found else []


def _parse(hlo: str) -> tuple[str, dict[str, dict[str, _Instruction]]]:
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
        current[found.group(1)] = _instruction(found.group(2))
  if not entry:
    raise ValueError("No ENTRY computation in this text; it takes the optimised HLO, compiled.as_text().")
  return entry, computations


def _instruction(text: str) -> _Instruction:
  """From `TYPE opcode(operands), attributes`, where TYPE may be a tuple and a layout may hold parentheses."""
  end = _closing(text, 0) + 1 if text.startswith("(") else re.match(r"\S+", text).end()
  shapes = [tuple(int(size.strip("<= ")) for size in dims.split(",") if size) for dims in _SHAPE.findall(text[:end])]
  opcode, rest = re.match(r"\s*([\w-]+)(.*)$", text[end:]).groups()
  close = _closing(rest, 0)
  return _Instruction(opcode, shapes, re.findall(r"%([^\s,()]+)", rest[:close]), rest[close + 1 :])


def _closing(text: str, start: int) -> int:
  """Index of the parenthesis that closes the one at `start`."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, start):
    depth += 1 if match.group() == "(" else -1
    if depth == 0:
      return match.start()
  raise ValueError(f"Unbalanced parentheses in HLO: {text[:80]}")
