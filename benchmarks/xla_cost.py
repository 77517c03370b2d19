"""FLOPs and temporaries of a compiled JAX function, from its optimised HLO.

XLA's own `cost_analysis()` counts the body of a loop once, whatever its trip count; see benchmarks.hlo for how it is
walked here.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import hlo as hlo_lib

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
  uncounted: set[str] = set()
  found = hlo_lib.total(hlo, lambda instruction, operand: _flops(instruction, operand, uncounted))
  return {"flops": found.total(), "matmul_flops": found["matmul"], "uncounted": sorted(uncounted)}


def _flops(instruction: hlo_lib.Instruction, operand, uncounted: set[str]) -> Mapping[str, int]:
  """FLOPs in matmuls and in everything else of one instruction."""
  opcode, attributes = instruction.opcode, instruction.attributes
  size = sum(map(math.prod, instruction.shapes))
  operand_shape = lambda index: operand(index).shapes[0]
  if opcode == "dot":
    axes = hlo_lib.integers(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)
    return {"matmul": 2 * size * _contracted(operand_shape(0), axes)}
  if opcode == "convolution":
    return {"matmul": 2 * _products(operand_shape(0), operand_shape(1), instruction)}
  if opcode == "custom-call":
    return {"matmul": _library_call(instruction, operand_shape, uncounted)}
  if opcode in _ARITHMETIC or opcode in _TRANSCENDENTAL:
    return {"other": size}
  if opcode == "reduce":
    return {"other": sum(math.prod(operand_shape(i)) for i in range(len(instruction.operands) // 2))}
  if opcode == "reduce-window":
    return {"other": size * math.prod(hlo_lib.integers(r"window=\{size=([\dx]+)", attributes))}
  if opcode == "scatter":
    return {"other": math.prod(operand_shape(-1))}
  return {}


def _products(image: tuple[int, ...], kernel: tuple[int, ...], convolution: hlo_lib.Instruction) -> int:
  """Pairs of numbers that a convolution multiplies, without those of padding or of the gaps of a dilated image.

  On a TPU a batched matmul is a convolution whose batch is spread over a dilated image.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes).groups()
  sizes = [dict(zip(*pair, strict=True)) for pair in zip(labels, (image, kernel, convolution.shapes[0]), strict=True)]
  of_image, of_kernel, of_result = sizes
  count = of_result["b"] * of_result["f"] * of_kernel["i"]
  option = lambda name, default: _window(name, convolution.attributes) or [default] * len(image)
  strides, gaps, spreads = (option(name, 1) for name in ("stride", "lhs_dilate", "rhs_dilate"))
  pads = option("pad", 0)
  for axis in range(len(image) - 2):
    label = str(axis)
    starts = np.arange(of_result[label]) * strides[axis] - pads[axis]
    places = starts[:, None] + np.arange(of_kernel[label]) * spreads[axis]
    is_real = (places >= 0) & (places < of_image[label] * gaps[axis]) & (places % gaps[axis] == 0)
    count *= int(is_real.sum())
  return count


def _window(name: str, attributes: str) -> list[int]:
  """What a convolution's window says of each axis; of its padding, the one before."""
  found = re.search(rf"window=\{{[^}}]*\b{name}=([\dx_-]+)", attributes)
  return [int(part.split("_")[0]) for part in found.group(1).split("x")] if found else []


def _library_call(instruction: hlo_lib.Instruction, operand_shape, uncounted: set[str]) -> int:
  target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes).group(1)
  if target.startswith(_MATMUL_CALLS):
    config = hlo_lib.integers(r'"lhs_contracting_dimensions":\[([\d,"]*)\]', instruction.attributes)
    # oneDNN's configuration names no axis: its matmul contracts the last one of the left side.
    return 2 * math.prod(instruction.shapes[0]) * _contracted(operand_shape(0), config or [-1])
  if _MATMUL_LIKE.search(target):
    raise ValueError(f"The library call {target!r} looks like a matmul, but its FLOPs are not known.")
  uncounted.add(target)
  return 0


def _contracted(shape: tuple[int, ...], axes: list[int]) -> int:
  return math.prod(shape[axis] for axis in axes)
