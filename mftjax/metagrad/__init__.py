"""Gradients of an outer loss through a run of an optax optimiser; knows nothing of language models."""

import inspect
from collections.abc import Callable
from typing import Any

from mftjax import errors
from mftjax.metagrad import evolution, forward, implicit, mixed, recovery, reverse, smoothness, windows
from mftjax.metagrad import problem as problem_lib
from mftjax.metagrad.checking import check
from mftjax.metagrad.evolution import ParticleState
from mftjax.metagrad.mixed import build_unroll as unroll
from mftjax.metagrad.problem import Output, Problem, State, inner_step, read_params, run

_BUILDERS: dict[str, Callable] = {
  "mixed": mixed.build,
  "reverse": reverse.build,
  "forward": forward.build,
  "first_order": mixed.build_first_order,
  "finite_difference": mixed.build_finite_difference,
  "es": evolution.build_es,
  "pes": evolution.build_pes,
  "implicit": implicit.build,
}
METHODS = tuple(_BUILDERS)


def init(problem: Problem, meta_params: Any, params: Any, method: str = "mixed", **options: Any) -> State:
  """The state before the first inner step; the method and its options matter for `pes`, whose state holds particles.

  A `pes` step takes a plain state as well and starts its particles there, but returns one with particles.
  """
  if method == "pes":
    num_pairs = options.get("num_pairs", inspect.signature(evolution.build_pes).parameters["num_pairs"].default)
    return evolution.init_particles(problem, meta_params, params, num_pairs=num_pairs)
  return problem_lib.init(problem, meta_params, params)


def method_options(method: str) -> tuple[str, ...]:
  """The names of a method's options.

  Raises:
    InputError: unknown method.
  """
  if method not in _BUILDERS:
    raise errors.unknown_name("meta-gradient method", method, METHODS)
  parameters = list(inspect.signature(_BUILDERS[method]).parameters.values())[1:]
  named = [parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD]
  takes_recovery = len(named) < len(parameters)
  return tuple(named + (list(recovery.Options.__dataclass_fields__) if takes_recovery else []))


def value_and_grad(problem: Problem, method: str = "mixed", **options: Any) -> Callable[..., Output]:
  """A pure function that unrolls the inner run and differentiates the outer loss after it.

  Args:
    problem: the two losses and the optimiser.
    method: one of `METHODS`.
    **options: of the method (see its `build`).

  Returns:
    `step(meta_params, state, inner_batches, outer_batch, rng) -> Output`, to be jitted or vmapped by the
    caller; `inner_batches` is a pytree with leading axis `[unroll_length, ...]`. The state at the start of
    the window counts as constant.

  Raises:
    InputError: unknown method or option, an option's value out of range; inside the step, what `problem.check` finds.
  """
  known = method_options(method)
  for name in options:
    if name not in known:
      raise errors.unknown_name(f"option of method {method!r}", name, known)
  return _BUILDERS[method](problem, **options)


__all__ = [
  "METHODS",
  "Output",
  "ParticleState",
  "Problem",
  "State",
  "check",
  "init",
  "inner_step",
  "method_options",
  "read_params",
  "run",
  "smoothness",
  "unroll",
  "value_and_grad",
  "windows",
]
