"""Gradients of an outer loss through a run of an optax optimiser; knows nothing of language models."""

from collections.abc import Callable

from mftjax import errors
from mftjax.metagrad import mixed as _mixed
from mftjax.metagrad import reverse as _reverse
from mftjax.metagrad.problem import Output, Problem, State, init, inner_step

_BUILDERS: dict[str, Callable] = {
  "mixed": _mixed.build,
  "reverse": _reverse.build,
  "first_order": _mixed.build_first_order,
}
METHODS = tuple(_BUILDERS)


def value_and_grad(problem: Problem, method: str = "mixed", **options) -> Callable[..., Output]:
  """A pure function that unrolls the inner run and differentiates the outer loss after it.

  Args:
    problem: the two losses and the optimiser.
    method: one of `METHODS`.
    **options: of the method; an unknown one raises.

  Returns:
    `step(meta_params, state, inner_batches, outer_batch, rng) -> Output`, to be jitted or vmapped by the
    caller; `inner_batches` is a pytree with leading axis `[unroll_length, ...]`. The state at the start of
    the window counts as constant.

  Raises:
    InputError: unknown method or option; inside the step, an empty unroll or an integer meta-parameter.
  """
  if method not in _BUILDERS:
    raise errors.unknown_name("meta-gradient method", method, METHODS)
  if options:
    raise errors.InputError(f"Method {method!r} takes no option, got {', '.join(sorted(options))}.")
  return _BUILDERS[method](problem)


__all__ = ["METHODS", "Output", "Problem", "State", "init", "inner_step", "value_and_grad"]
