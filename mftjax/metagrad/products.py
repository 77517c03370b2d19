"""The one place where the inner loss is differentiated twice: products of its mixed Hessian with a cotangent."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from mftjax.metagrad import problem as problem_lib


@dataclasses.dataclass(frozen=True)
class Product:
  """d <grad_params loss, u> / d (params, meta_params), and the inner gradient that goes before it.

  Attributes:
    evaluate: `(params, meta_params, batch, key) -> (loss, grads, saved)`; `saved` is kept for `apply` if the plan
      keeps gradients, else evaluated again.
    apply: `(params, meta_params, batch, key, saved, u) -> (params_bar, meta_bar, error)`; `error` is an estimate of
      the product's relative error, `[2]` (rounding, truncation), zero for the exact ones.
  """

  evaluate: Callable[..., tuple[jax.Array, Any, Any]]
  apply: Callable[..., tuple[Any, Any, jax.Array]]


def exact(problem: problem_lib.Problem) -> Product:
  """Forward over reverse, one `jvp` of `grad`, in params and meta_params together: 8 matmuls for each of the model."""

  def evaluate(params, meta_params, batch, key):
    return *problem_lib.gradient(problem, params, meta_params, batch, key), None

  def apply(params, meta_params, batch, key, saved, u):
    gradient = lambda p: problem_lib.gradient(problem, p, meta_params, batch, key, (0, 1))[1]
    return *jax.jvp(gradient, (params,), (u,))[1], jnp.zeros(2)

  return Product(evaluate, apply)


def linearized(problem: problem_lib.Problem, meta_params: Any, params: Any, batch: Any, key: jax.Array):
  """The exact product with the activations of the gradient kept, so that only tangents remain: 6 matmuls in place of 8.

  Args:
    problem, meta_params: as in the step.
    params, batch, key: those of one step, for their shapes and for what comes out the same on every step.

  Returns:
    The product, and the bytes that it keeps each step.
  """
  treedefs = []

  def linearize(meta_params, params, batch, key):
    def both(params):
      loss, grads = problem_lib.gradient(problem, params, meta_params, batch, key, (0, 1))
      return grads, loss

    grads, tangent, loss = jax.linearize(both, params, has_aux=True)
    residuals, treedef = jax.tree.flatten(tangent)
    treedefs.append(treedef)
    return (loss, grads), residuals

  closed, shapes = jax.make_jaxpr(linearize, return_shape=True)(meta_params, params, batch, key)
  num_outputs = len(jax.tree.leaves(shapes[0]))
  residual_vars = closed.jaxpr.outvars[num_outputs:]
  step_vars = closed.jaxpr.invars[len(jax.tree.leaves(meta_params)) :]
  params_vars = step_vars[: len(jax.tree.leaves(params))]
  # A frozen base model turns up among the residuals: what no step changes must not be stacked step by step, and the
  # params are in the state already.
  varying = _dependents(closed.jaxpr, step_vars).difference(params_vars)
  is_kept = [isinstance(var, core.Var) and var in varying for var in residual_vars]
  first_of = {var: index for index, var in reversed(list(enumerate(residual_vars))) if is_kept[index]}
  flat_call = core.jaxpr_as_fun(closed)
  fixed = flat_call(*jax.tree.leaves((meta_params, params, batch, key)))[num_outputs:]

  def evaluate(params, meta_params, batch, key):
    outputs = flat_call(*jax.tree.leaves((meta_params, params, batch, key)))
    loss, grads = jax.tree.unflatten(jax.tree.structure(shapes[0]), outputs[:num_outputs])
    return loss, grads[0], [outputs[num_outputs + index] for index in first_of.values()]

  def apply(params, meta_params, batch, key, saved, u):
    by_var = dict(zip([*first_of, *params_vars], [*saved, *jax.tree.leaves(params)], strict=True))
    found = zip(residual_vars, fixed, strict=True)
    residuals = [by_var.get(var, value) if isinstance(var, core.Var) else value for var, value in found]
    return *jax.tree.unflatten(treedefs[-1], residuals)(u), jnp.zeros(2)

  return Product(evaluate, apply), sum(var.aval.size * var.aval.dtype.itemsize for var in first_of)


def _dependents(jaxpr: core.Jaxpr, variables) -> set[core.Var]:
  """The variables of a jaxpr that depend on the given ones."""
  found = set(variables)
  for eqn in jaxpr.eqns:
    if any(isinstance(atom, core.Var) and atom in found for atom in eqn.invars):
      found |= set(eqn.outvars)
  return found


def none(problem: problem_lib.Problem) -> Product:
  """The product without its params part, which counts as zero."""

  def evaluate(params, meta_params, batch, key):
    return *problem_lib.gradient(problem, params, meta_params, batch, key), None

  def apply(params, meta_params, batch, key, saved, u):
    gradient = lambda p: problem_lib.gradient(problem, p, meta_params, batch, key, 1)[1]
    meta_bar = jax.jvp(gradient, (params,), (u,))[1]
    return jax.tree.map(jnp.zeros_like, params), meta_bar, jnp.zeros(2)

  return Product(evaluate, apply)


def finite_difference(problem: problem_lib.Problem, central: bool) -> Product:
  """Differences of gradients along u, `(g(p + h u) - g(p)) / h` or `(g(p + h u) - g(p - h u)) / 2h`.

  `h |u| = eps^(1/2) (1 + |p|)`, and `eps^(1/3) (1 + |p|) / 5` for central ones: the usual balance of truncation and
  rounding, for central ones shortened, since a net curves on a shorter scale than its |p|.
  The errors reported are `eps |g| / (h |Hu|)` for rounding, and for truncation, which central differences alone
  can see, `|g(p + h u) - 2 g(p) + g(p - h u)| / (2 h |Hu|)`: what a one-sided difference would be off by.

  Source: DARTS (Liu et al., 2019), equation 8; step sizes as in Nocedal and Wright (2006), Section 8.1.
  """

  def evaluate(params, meta_params, batch, key):
    loss, grads = problem_lib.gradient(problem, params, meta_params, batch, key, (0, 1))
    return loss, grads[0], grads

  def apply(params, meta_params, batch, key, saved, u):
    dtype = jnp.result_type(*jax.tree.leaves(params))
    eps = jnp.finfo(dtype).eps
    size = (eps ** (1 / 3) / 5 if central else eps ** (1 / 2)) * (1 + optax.global_norm(params))
    norm = optax.global_norm(u)
    h = size / jnp.where(norm > 0, norm, 1)

    def at(h):
      moved = jax.tree.map(lambda p, x: (p + h * x).astype(p.dtype), params, u)
      return problem_lib.gradient(problem, moved, meta_params, batch, key, (0, 1))[1]

    ahead = at(h)
    behind, width = (at(-h), 2 * h) if central else (saved, h)
    bars = jax.tree.map(lambda a, b: ((a - b) / width).astype(a.dtype), ahead, behind)
    scale = h * optax.global_norm(bars)
    scale = jnp.where(scale > 0, scale, 1)
    rounding = eps * optax.global_norm(saved) / scale
    second = optax.global_norm(jax.tree.map(lambda a, g, b: a - 2 * g + b, ahead, saved, behind)) if central else 0.0
    return *bars, jnp.stack([rounding, second / (2 * scale)])

  return Product(evaluate, apply)


def finite_one_sided(problem: problem_lib.Problem) -> Product:
  """See `finite_difference`; one gradient for each product."""
  return finite_difference(problem, central=False)


def finite_central(problem: problem_lib.Problem) -> Product:
  """See `finite_difference`; two gradients for each product."""
  return finite_difference(problem, central=True)
