"""The inverse of an optimiser's update, read off the update's own jaxpr: no table of optimisers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from mftjax.metagrad import problem as problem_lib

# Primitives that hand on their first operand, as far as "affine" and "not below zero" go.
_PASSING = ("convert_element_type", "copy", "copy_p", "reduce_precision", "optimization_barrier", "pvary")
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}


class NotInvertible(Exception):
  """An update without an inverse of this kind; the message names the leaf and the reason."""


@dataclasses.dataclass(frozen=True)
class Leaf:
  """How one leaf of (params, opt_state) is known before the update."""

  name: str
  is_kept: bool  # counters and single numbers: kept from the way forward, not solved for
  is_nonnegative: bool = False  # such as Adam's second moment


@dataclasses.dataclass(frozen=True)
class Inverse:
  """One update backwards: before = solve(after, gradient), leaf by leaf.

  Each leaf's value after the update, as a function of its value x before and of all that is known by then, must be
  elementwise affine, a x + b; then x = (after - b) / a. Values after the update count as known wherever they turn up
  within it, so Adam's params are solved from the moments after the step before any gradient is known, and
  its moments once the gradient at these params has been taken. Rounding grows by 1 / a a step.
  """

  problem: problem_lib.Problem
  leaves: tuple[Leaf, ...]  # in the order of jax.tree.leaves((params, opt_state))
  order: tuple[int | None, ...]  # leaves as they are solved; None: the gradient is taken
  num_params: int

  def __call__(
    self,
    meta_params: Any,
    after: problem_lib.State,
    kept: list[Any],
    grads: Any,
    saved: Any,
    evaluate: Callable[[Any], tuple[Any, Any, Any]],
  ) -> tuple[problem_lib.State, Any, Any]:
    """The state before the step, its inner gradient, and what the Hessian product saved beside it.

    Args:
      meta_params: those of the step.
      after: the state after it.
      kept: the leaves before the step that are kept; None for those that are solved for.
      grads, saved: those of the step, or None: then they come from `evaluate`.
      evaluate: `(params) -> (loss, grads, saved)`.
    """
    trace = _trace(self.problem, meta_params, after)
    values = list(kept)
    env = dict(zip(trace.meta, jax.tree.leaves(meta_params), strict=True))
    env |= dict(zip(trace.jaxpr.constvars, trace.consts, strict=True))
    env |= {var: x for var, x, leaf in zip(trace.before, values, self.leaves, strict=True) if leaf.is_kept}
    after_values = dict(zip(trace.after, _flat(after), strict=True))
    params_treedef = jax.tree.structure(after.params)
    if grads is not None:
      env |= dict(zip(trace.grads, jax.tree.leaves(grads), strict=True))
    for index in self.order:
      if index is None:
        _, grads, saved = evaluate(params_treedef.unflatten(values[: self.num_params]))
        env |= dict(zip(trace.grads, jax.tree.leaves(grads), strict=True))
        continue
      before, target = trace.before[index], trace.after[index]
      known = {**{var: x for var, x in after_values.items() if var is not target}, **env}
      cone, _ = _cone(trace.jaxpr, target, before, known)
      values[index] = env[before] = _solve(cone, target, before, known, after_values[target], self.leaves[index])
    params, opt_state = jax.tree.structure((after.params, after.opt_state)).unflatten(values)
    return problem_lib.State(params, opt_state, after.step - 1), grads, saved


def derive(problem: problem_lib.Problem, meta_params: Any, state: problem_lib.State, has_gradient: bool) -> Inverse:
  """Finds the inverse of the problem's update by tracing it; computes nothing.

  Args:
    problem, meta_params, state: as for a step; only shapes are read.
    has_gradient: whether the inner gradient is known before the params are. Without it, updates whose step is a
      function of the state after it have an inverse (Adam, AdamW, momentum), and those that need the
      gradient itself have none (SGD, Nesterov, Lion).

  Raises:
    NotInvertible: a leaf is not an elementwise affine function of itself and of what is known.
  """
  trace = _trace(problem, meta_params, state)
  paths = jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))
  names = [("params", "opt_state")[path[0].idx] + jax.tree_util.keystr(path[1:]) for path, _ in paths]
  num_params = len(jax.tree.leaves(state.params))
  leaves = [
    Leaf(name, index >= num_params and (not problem_lib.is_floating(x) or jnp.size(x) <= 1))
    for index, (name, (_, x)) in enumerate(zip(names, paths, strict=True))
  ]
  known: dict[Any, Any] = dict.fromkeys([*trace.meta, *trace.jaxpr.constvars])
  known |= {var: None for var, leaf in zip(trace.before, leaves, strict=True) if leaf.is_kept}
  if has_gradient:
    known |= dict.fromkeys(trace.grads)
  for leaf, (_, x) in zip(leaves, paths, strict=True):
    if not leaf.is_kept and jnp.finfo(jnp.result_type(x)).bits < 32:
      raise NotInvertible(f"{leaf.name}: {jnp.result_type(x)} keeps too few bits to be solved for")
  pending = [index for index, leaf in enumerate(leaves) if not leaf.is_kept]
  order: list[int | None] = []
  reasons: dict[int, str] = {}
  while pending:
    before_pass = len(pending)
    for index in list(pending):
      before, target = trace.before[index], trace.after[index]
      stops = {**dict.fromkeys(var for var in trace.after if var is not target), **known}
      try:
        cone, unknown = _cone(trace.jaxpr, target, before, stops)
        if unknown:
          raise NotInvertible("it depends on values that are not known by then")
        _check_affine(cone, {before}, target)
      except NotInvertible as error:
        reasons[index] = str(error)
        continue
      is_nonnegative = index >= num_params and _is_nonnegative(cone, {before}, target)
      leaves[index] = dataclasses.replace(leaves[index], is_nonnegative=is_nonnegative)
      known[before] = None
      order.append(index)
      pending.remove(index)
    if not has_gradient and None not in order and not any(index < num_params for index in pending):
      order.append(None)
      known |= dict.fromkeys(trace.grads)
    elif len(pending) == before_pass:
      index = pending[0]
      raise NotInvertible(f"{leaves[index].name}: {reasons[index]}")
  if not has_gradient and None not in order:
    order.append(None)
  return Inverse(problem, tuple(leaves), tuple(order), num_params)


@dataclasses.dataclass(frozen=True)
class _Trace:
  """The jaxpr of one update, its variables by what they are."""

  jaxpr: core.Jaxpr
  consts: list[Any]
  meta: list[core.Var]
  before: list[core.Var]  # leaves of (params, opt_state)
  grads: list[core.Var]
  after: list[core.Var]


def _trace(problem: problem_lib.Problem, meta_params: Any, state: problem_lib.State) -> _Trace:
  def update(meta_params, params_and_opt_state, grads):
    before = problem_lib.State(*params_and_opt_state, state.step)
    after = problem_lib.update(problem, meta_params, before, grads)
    return after.params, after.opt_state

  closed = jax.make_jaxpr(update)(meta_params, (state.params, state.opt_state), state.params)
  num_meta, num_state = len(jax.tree.leaves(meta_params)), len(_flat(state))
  invars = closed.jaxpr.invars
  before, grads = invars[num_meta : num_meta + num_state], invars[num_meta + num_state :]
  return _Trace(closed.jaxpr, closed.consts, invars[:num_meta], before, grads, closed.jaxpr.outvars)


def _flat(state: problem_lib.State) -> list[Any]:
  return jax.tree.leaves((state.params, state.opt_state))


def _is_var(atom: Any) -> bool:
  return not isinstance(atom, core.Literal)


def _cone(jaxpr: core.Jaxpr, target: Any, before: core.Var, known: Any) -> tuple[list[core.JaxprEqn], set[core.Var]]:
  """The equations that make `target` out of `before` and known variables, and the inputs that are neither."""
  needed = {target} if _is_var(target) else set()
  cone = []
  for eqn in reversed(jaxpr.eqns):
    if needed.intersection(eqn.outvars):
      cone.append(eqn)
      needed |= {var for var in eqn.invars if _is_var(var) and var not in known}
  made = {var for eqn in cone for var in eqn.outvars}
  return cone[::-1], needed - made - {before}


def _solve(cone, target, before, known, after, leaf: Leaf):
  """x with f(x) = after for the affine f that the cone computes."""

  made = {var for eqn in cone for var in eqn.outvars}
  free = [var for eqn in cone for var in eqn.invars if _is_var(var) and var not in made]
  inputs = list(dict.fromkeys([before, *free]))
  closed = core.ClosedJaxpr(core.Jaxpr((), inputs, [target], cone), ())

  def f(x):
    (value,) = core.jaxpr_as_fun(closed)(*(x if var is before else known[var] for var in inputs))
    return value

  offset, slope = jax.jvp(f, (jnp.zeros_like(after),), (jnp.ones_like(after),))
  # Slope 0: the value before does not matter to the one after (the first step of an average).
  x = jnp.where(slope == 0, after, (after - offset) / jnp.where(slope == 0, 1, slope))
  # What is left of a difference of two nearly equal numbers is rounding. Where Adam's moments were zero before, such a
  # remainder over the root of another would be a step as long as a real one.
  floor = (
    jnp.finfo(x.dtype).eps * jnp.maximum(jnp.abs(after), jnp.abs(offset)) / jnp.abs(jnp.where(slope == 0, 1, slope))
  )
  return jnp.maximum(x, floor) if leaf.is_nonnegative else jnp.where(jnp.abs(x) <= 2 * floor, 0, x)


def _check_affine(eqns, variables: set[core.Var], target) -> None:
  """Whether `target` is an elementwise affine function of `variables`.

  Raises:
    NotInvertible: it is not, or does not depend on them.
  """
  moving = set(variables)
  for eqn in eqns:
    name, out = eqn.primitive.name, eqn.outvars[0]
    is_moving = [_is_var(atom) and atom in moving for atom in eqn.invars]
    if not any(is_moving):
      continue
    operands = [atom for atom, moves in zip(eqn.invars, is_moving, strict=True) if moves]
    if name in _CALLS and len(eqn.outvars) == 1:
      inner = getattr(eqn.params[_CALLS[name]], "jaxpr", eqn.params[_CALLS[name]])
      entering = {var for var, moves in zip(inner.invars, is_moving, strict=True) if moves}
      _check_affine(inner.eqns, entering, inner.outvars[0])
    elif any(atom.aval.shape != out.aval.shape for atom in operands) or not (
      (name in ("neg", "add", "sub", "add_any", *_PASSING) and jnp.issubdtype(out.aval.dtype, jnp.floating))
      or (name == "mul" and is_moving.count(True) == 1)
      or (name == "div" and is_moving == [True, False])
      or (name == "select_n" and is_moving == [False, *[True] * (len(is_moving) - 1)])
    ):
      raise NotInvertible(f"it goes through {name!r}, which is not affine in it")
    moving.add(out)
  if not _is_var(target) or target not in moving:
    raise NotInvertible("its value after the step does not depend on the one before")


def _is_nonnegative(eqns, variables: set[core.Var], target) -> bool:
  """Whether `target` sums even powers onto `variables`, weighted by scalars (which are taken as non-negative)."""
  found, has_power = set(variables), False

  def holds(atom) -> bool:
    return atom in found if _is_var(atom) else bool(np.all(np.asarray(atom.val) >= 0))

  for eqn in eqns:
    name, atoms = eqn.primitive.name, eqn.invars
    is_even = name in ("square", "abs", "exp", "sqrt") or (name == "integer_pow" and eqn.params["y"] % 2 == 0)
    is_square = name == "mul" and _is_var(atoms[0]) and atoms[0] is atoms[1]
    is_sum = name in ("add", "max", *_PASSING) and all(map(holds, atoms))
    is_weighted = name in ("mul", "div") and any(map(holds, atoms))
    is_weighted = is_weighted and all(holds(atom) or atom.aval.shape == () for atom in atoms)
    has_power |= is_even or is_square
    if is_even or is_square or is_sum or is_weighted:
      found.add(eqn.outvars[0])
  return has_power and target in found
