"""Compares any method with f64 reverse mode on a shrunken copy of the user's problem."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mftjax import errors
from mftjax.metagrad import problem as problem_lib
from mftjax.metagrad import reverse


@dataclasses.dataclass(frozen=True)
class CheckReport:
  """Relative errors against f64 reverse, |got - want| / |want|; infinite where only the reference is 0."""

  by_leaf: dict[str, float]  # path of each meta-parameter leaf, e.g. "mixture.logits"
  overall: float  # all leaves as one vector
  loss: float  # of the outer loss
  tolerance: float

  @property
  def passed(self) -> bool:
    """Whether the loss and every leaf lie within the tolerance; a NaN does not."""
    return all(error <= self.tolerance for error in (self.loss, self.overall, *self.by_leaf.values()))

  @property
  def worst(self) -> str:
    """Path of the leaf with the largest error, a NaN counting as the largest."""
    return max(self.by_leaf, key=lambda name: np.nan_to_num(self.by_leaf[name], nan=np.inf))

  def table(self) -> str:
    """The errors as text, worst leaf first, and the verdict."""
    rows = sorted(self.by_leaf.items(), key=lambda row: -np.nan_to_num(row[1], nan=np.inf))
    lines = [f"{'':32s} relative error", f"{'outer loss':32s} {self.loss:.1e}", f"{'(all)':32s} {self.overall:.1e}"]
    lines += [f"{name:32s} {error:.1e}" for name, error in rows]
    if self.passed:
      lines.append(f"Within the tolerance of {self.tolerance:.0e}.")
    else:
      lines.append(f"NOT within the tolerance of {self.tolerance:.0e}; worst leaf: {self.worst}.")
      if not self.loss <= self.tolerance:
        lines.append("The outer loss differs too: the loss draws random numbers, casts, or the run is unstable.")
    return "\n".join(lines)


def check(
  problem: problem_lib.Problem,
  build: Callable[[problem_lib.Problem], Callable[..., problem_lib.Output]],
  meta_params: Any,
  params: Any,
  inner_batches: Any,
  outer_batch: Any,
  rng: jax.Array,
  *,
  num_steps: int = 4,
  num_rows: int | None = None,
  tolerance: float = 1e-4,
) -> CheckReport:
  """Runs a method as it is and reverse mode in f64 on the first steps of the user's problem.

  Everything floating that is handed over (params, meta_params, batches) is cast to f64 for the reference. What the
  losses cast themselves (e.g. compute in bf16) stays cast, so the error has that floor; and `jax.random` draws other
  numbers at f64 than at f32, so a loss that uses its `rng` is checked with its draws put into the batches instead.

  Args:
    problem: what is differentiated.
    build: `problem -> step`, e.g. `metagrad.value_and_grad` or a `functools.partial` of it with a method.
    meta_params: where the gradient is taken.
    params: at the start of the run, in the dtype that the method shall be checked in.
    inner_batches: `[unroll_length, rows, ...]`.
    outer_batch: `[rows, ...]`.
    rng: key of the unroll.
    num_steps: inner steps of the copy, the first ones.
    num_rows: rows of the copy: axis 1 of each leaf of `inner_batches` and axis 0 of each leaf of `outer_batch` that
      has one are cut to it; None keeps all.
    tolerance: on the relative errors. 1e-4 suits f32; a biased or sampled method needs its own.

  Raises:
    InputError: num_steps or num_rows below 1, or what `build` or the step refuses.
  """
  for name, value in (("num_steps", num_steps), ("num_rows", num_rows)):
    if value is not None and value < 1:
      raise errors.InputError(f"{name} must be at least 1, got {value}.")
  problem_lib.unroll_length(inner_batches)
  inner_batches = jax.tree.map(lambda x: x[:num_steps, :num_rows] if np.ndim(x) > 1 else x[:num_steps], inner_batches)
  outer_batch = jax.tree.map(lambda x: x[:num_rows] if np.ndim(x) else x, outer_batch)
  inputs = (meta_params, params, inner_batches, outer_batch)
  got_loss, got = _loss_and_gradient(problem, build, inputs, rng)
  with jax.enable_x64(True):
    want_loss, want = _loss_and_gradient(problem, reverse.build, jax.tree.map(_to_f64, inputs), rng)
  return CheckReport(
    {name: _relative_error(got[name], want[name]) for name in want},
    _relative_error(np.concatenate([*got.values()]), np.concatenate([*want.values()])),
    _relative_error(got_loss, want_loss),
    tolerance,
  )


def _loss_and_gradient(problem, build, inputs, rng):
  """The outer loss `[1]` and leaf path -> gradient `[size]`, numpy f64: jax outside would round them to f32 again."""
  meta_params, params, inner_batches, outer_batch = inputs
  state = problem_lib.init(problem, meta_params, params)
  out = jax.jit(build(problem))(meta_params, state, inner_batches, outer_batch, rng)
  flat = lambda x: np.asarray(x, np.float64).ravel()
  leaves = jax.tree_util.tree_leaves_with_path(out.grad)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".") or "meta_params"
  return flat(out.loss), {name(path): flat(leaf) for path, leaf in leaves}


def _to_f64(leaf: Any) -> Any:
  return np.asarray(leaf, np.float64) if problem_lib.is_floating(leaf) else leaf


def _relative_error(got: np.ndarray, want: np.ndarray) -> float:
  difference, norm = float(np.linalg.norm(got - want)), float(np.linalg.norm(want))
  if norm == 0.0:
    return 0.0 if difference == 0.0 else np.inf
  return difference / norm
