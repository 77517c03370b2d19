"""Reverse mode over the whole unroll, each inner step checkpointed: the reference for the other estimators."""

from typing import Any

import jax

from mftjax.metagrad import problem as problem_lib


def build(problem: problem_lib.Problem):
  """`step(meta_params, state, inner_batches, outer_batch, rng) -> Output`, exact.

  Memory grows by one state (params and optimiser state) an inner step; each step is computed twice.

  Source: Griewank and Walther (2008), Section 12.3; `jax.checkpoint`.
  """

  def step(
    meta_params: Any, state: problem_lib.State, inner_batches: Any, outer_batch: Any, rng: jax.Array
  ) -> problem_lib.Output:
    length = problem_lib.check(problem, meta_params, state, inner_batches, outer_batch)
    keys, outer_rng = problem_lib.split_keys(rng, length)

    def outer_loss(meta_params):
      @jax.checkpoint
      def body(state, batch_and_key):
        state, _, loss = problem_lib.inner_step(problem, meta_params, state, *batch_and_key)
        return state, loss

      final, inner_losses = jax.lax.scan(body, state, (inner_batches, keys))
      loss, aux = problem_lib.outer_loss(problem, final, meta_params, outer_batch, outer_rng)
      return loss, (aux, final, inner_losses)

    (loss, (aux, final, inner_losses)), grad = jax.value_and_grad(outer_loss, has_aux=True)(meta_params)
    return problem_lib.output(loss, aux, grad, final, inner_losses)

  return step
