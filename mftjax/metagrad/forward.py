"""Forward mode through the unroll: one tangent of the whole state for each meta-parameter."""

from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp

from mftjax.metagrad import problem as problem_lib


def build(problem: problem_lib.Problem, *, batch_size: int | None = None):
  """`step(meta_params, state, inner_batches, outer_batch, rng) -> Output`, exact.

  The tangent Z_t = d (params_t, opt_state_t) / d meta_params is pushed along with the run, Z_{t+1} = A_t Z_t + B_t,
  with A_t and B_t the Jacobians of an inner step in its state and in meta_params; never formed, each direction is
  one `jvp`. Time and memory grow with the number of meta-parameters, memory not with the unroll length.

  Args:
    problem: the losses need a forward-mode rule through their gradient.
    batch_size: directions pushed at the same time, >= 1; all by default. Memory holds `batch_size` tangents of the
      state, and the run itself is repeated once for every `batch_size` directions.

  Source: Williams and Zipser (1989), real-time recurrent learning; Franceschi et al. (2017), Section 3.2, Algorithm 2.
  """
  if batch_size is not None:
    problem_lib.check_count("batch_size", batch_size)

  def step(
    meta_params: Any, state: problem_lib.State, inner_batches: Any, outer_batch: Any, rng: jax.Array
  ) -> problem_lib.Output:
    length = problem_lib.check(problem, meta_params, state, inner_batches, outer_batch)
    keys, outer_rng = problem_lib.split_keys(rng, length)
    flat, unravel = jax.flatten_util.ravel_pytree(meta_params)  # [num_meta_params]

    def outer_loss(flat):
      meta_params = unravel(flat)
      final, inner_losses = problem_lib.run(problem, meta_params, state, inner_batches, keys)
      loss, aux = problem_lib.outer_loss(problem, final, meta_params, outer_batch, outer_rng)
      return loss, (aux, final, inner_losses)

    # Only the tangent depends on the direction, so under vmap the run itself is computed once for all of them.
    push = lambda direction: jax.jvp(outer_loss, (flat,), (direction,), has_aux=True)
    basis = jnp.eye(flat.size, dtype=flat.dtype)
    num_first = flat.size if batch_size is None else batch_size
    found = jax.vmap(push)(basis[:num_first])
    slopes = found[1]
    loss, (aux, final, inner_losses) = jax.tree.map(lambda x: x[0], (found[0], found[2]))
    if num_first < flat.size:
      rest = jax.lax.map(lambda direction: push(direction)[1], basis[num_first:], batch_size=batch_size)
      slopes = jnp.concatenate([slopes, rest])
    return problem_lib.output(loss, aux, unravel(slopes.astype(flat.dtype)), final, inner_losses)

  return step
