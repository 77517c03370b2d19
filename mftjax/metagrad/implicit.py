"""The implicit function theorem: the meta-gradient at the end of the inner run, as if it had converged."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.sparse.linalg
import optax

from mftjax import errors
from mftjax.metagrad import problem as problem_lib

SOLVERS = ("cg", "neumann")


def build(
  problem: problem_lib.Problem,
  *,
  solver: str = "cg",
  num_terms: int = 20,
  damping: float = 0.0,
  step_size: float = 0.1,
):
  """`step(meta_params, state, inner_batches, outer_batch, rng) -> Output`, exact at a stationary point.

  With f the inner loss averaged over the window's batches and H its Hessian in params, all at the params after the
  window, (H + damping I) v = d outer / d params and
  grad = d outer / d meta_params - v^T d2 f / d params d meta_params.
  Exact where d f / d params = 0, H is positive definite, damping is 0 and the solve has converged; the metrics say how
  far from that. What only the optimiser sees (learning rate, decoupled weight decay) moves no stationary point of f, so
  its gradient is zero. Memory does not grow with the unroll length.

  Args:
    problem: the losses need a forward-mode rule through their gradient.
    solver: "cg", conjugate gradients, which needs H + damping I positive definite, stopped at a relative residual of
      1e-6; or "neumann", v = step_size sum_{k < num_terms} (I - step_size (H + damping I))^k d outer / d params.
    num_terms: most iterations of cg, or terms of the series; each costs a Hessian-vector product of every batch.
    damping: >= 0.
    step_size: of "neumann" alone, > 0 and below 2 / (largest eigenvalue of H + damping I), or the series diverges.

  Returns:
    The step. Metrics beside the common ones: `residual`, scalar |(H + damping I) v - b| / |b| with
    b = d outer / d params; `inner_gradient_norm`, scalar |d f / d params|.

  Source: Bengio (2000), the implicit gradient; with cg iMAML (Rajeswaran et al., 2019), Lemma 1; with the series
  Lorraine et al. (2020), Algorithms 2 and 3.
  """
  if solver not in SOLVERS:
    raise errors.unknown_name("solver of method 'implicit'", solver, SOLVERS)
  problem_lib.check_count("num_terms", num_terms)
  if not (isinstance(damping, int | float) and damping >= 0):
    raise errors.InputError(f"damping must be a number >= 0, got {damping!r}.")
  if not (isinstance(step_size, int | float) and step_size > 0):
    raise errors.InputError(f"step_size must be a number > 0, got {step_size!r}.")

  if problem.readout:
    raise errors.InputError("Method 'implicit' differentiates at the params themselves; it takes no Problem.readout.")

  def step(
    meta_params: Any, state: problem_lib.State, inner_batches: Any, outer_batch: Any, rng: jax.Array
  ) -> problem_lib.Output:
    length = problem_lib.check(problem, meta_params, state, inner_batches, outer_batch)
    keys, outer_rng = problem_lib.split_keys(rng, length)
    final, inner_losses = problem_lib.run(problem, meta_params, state, inner_batches, keys)

    def outer_loss(params, meta_params):
      return problem_lib.outer_loss(problem, final.replace(params=params), meta_params, outer_batch, outer_rng)

    (loss, aux), (params_bar, direct) = jax.value_and_grad(outer_loss, argnums=(0, 1), has_aux=True)(
      final.params, meta_params
    )

    def mean_gradient(params, argnums):
      def add(total, batch_and_key):
        _, grads = problem_lib.gradient(problem, params, meta_params, *batch_and_key, argnums)
        return optax.tree.add(total, grads), None

      zeros = optax.tree.zeros_like(params if argnums == 0 else (params, meta_params))
      total, _ = jax.lax.scan(add, zeros, (inner_batches, keys))
      return jax.tree.map(lambda x: x / length, total)

    def damped(product, v):
      return jax.tree.map(lambda h, x: h + damping * x, product, v)

    def matvec(v):
      return damped(jax.jvp(lambda params: mean_gradient(params, 0), (final.params,), (v,))[1], v)

    if solver == "cg":
      v, _ = jax.scipy.sparse.linalg.cg(matvec, params_bar, tol=1e-6, maxiter=num_terms)
    else:
      v = _neumann(matvec, params_bar, num_terms, step_size)

    # One more product gives the cross term, the residual of the solve and, as its primal, the inner gradient.
    (inner_gradient, _), (product, cross) = jax.jvp(lambda params: mean_gradient(params, (0, 1)), (final.params,), (v,))
    residual = optax.tree.norm(optax.tree.sub(damped(product, v), params_bar))
    norm = optax.tree.norm(params_bar)
    metrics = {
      "residual": residual / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny),
      "inner_gradient_norm": optax.tree.norm(inner_gradient),
    }
    return problem_lib.output(loss, aux, optax.tree.sub(direct, cross), final, inner_losses, metrics)

  return step


def _neumann(matvec, b: Any, num_terms: int, step_size: float) -> Any:
  """step_size sum_{k < num_terms} (I - step_size A)^k b, each term from the sum so far: v + step_size (b - A v)."""

  def add_term(v, _):
    return jax.tree.map(lambda x, y, ax: x + step_size * (y - ax), v, b, matvec(v)), None

  v, _ = jax.lax.scan(add_term, jax.tree.map(lambda x: step_size * x, b), length=num_terms - 1)
  return v
