"""Mixed mode: reverse over the optimiser's update only, forward-over-reverse through the inner loss."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mftjax.metagrad import problem as problem_lib


def build(problem: problem_lib.Problem):
  """`step(meta_params, state, inner_batches, outer_batch, rng) -> Output`, exact.

  Going back over a step with cotangents of its (params, opt_state): the VJP of the optimiser's update at the
  saved inner gradient gives u, the cotangent of that gradient; the loss adds d <grad_params loss, u> /
  d (params, meta_params), one `jvp` of `grad` along u. No step is differentiated in reverse twice. States and
  inner gradients of the unroll are kept.

  Source: MixFlow-MG (Kemaev et al., 2025), the mixed-mode reparameterisation.
  """
  return functools.partial(_step, problem, _hessian_vector_product)


def build_first_order(problem: problem_lib.Problem):
  """As `mixed`, but the Hessian of the inner loss in params counts as zero; biased.

  What stays: the direct terms of every meta-parameter, and the path through the optimiser's state and decay.

  Source: first-order MAML (Finn et al., 2017), Section 5.2; T1-T2 (Luketina et al., 2016).
  """
  return functools.partial(_step, problem, _direct_product)


def _hessian_vector_product(inner_loss, params, meta_params, u):
  """(d/d params, d/d meta_params) of <grad_params loss, u>."""
  grad_fn = jax.grad(inner_loss, argnums=(0, 1))
  return jax.jvp(lambda p: grad_fn(p, meta_params), (params,), (u,))[1]


def _direct_product(inner_loss, params, meta_params, u):
  """The same without its params part, which is taken as zero."""
  grad_fn = jax.grad(inner_loss, argnums=1)
  meta_bar = jax.jvp(lambda p: grad_fn(p, meta_params), (params,), (u,))[1]
  return jax.tree.map(jnp.zeros_like, params), meta_bar


def _step(
  problem: problem_lib.Problem,
  product,
  meta_params: Any,
  state: problem_lib.State,
  inner_batches: Any,
  outer_batch: Any,
  rng: jax.Array,
) -> problem_lib.Output:
  length = problem_lib.unroll_length(meta_params, inner_batches)
  inner_rng, outer_rng = jax.random.split(rng)
  keys = jax.random.split(inner_rng, length)

  def forward(state, xs):
    after, grads, loss = problem_lib.inner_step(problem, meta_params, state, *xs)
    return after, (state, grads, loss)

  final, (states, grads, inner_losses) = jax.lax.scan(forward, state, (inner_batches, keys))
  loss, (params_bar, meta_bar) = jax.value_and_grad(problem.outer_loss, argnums=(0, 1))(
    final.params, meta_params, outer_batch, outer_rng
  )

  def backward(carry, xs):
    params_bar, floats_bar, meta_bar = carry
    state, grads, batch, key = xs
    floats, rebuild = _split_floats(state.opt_state)

    def update(params, floats, grads, meta_params):
      after = problem_lib.update(problem, meta_params, state.replace(params=params, opt_state=rebuild(floats)), grads)
      return after.params, _split_floats(after.opt_state)[0]

    _, pullback = jax.vjp(update, state.params, floats, grads, meta_params)
    params_direct, floats_bar, u, meta_direct = pullback((params_bar, floats_bar))
    loss_fn = lambda params, meta_params: problem.inner_loss(params, meta_params, batch, key)
    params_loss, meta_loss = product(loss_fn, state.params, meta_params, u)
    add = functools.partial(jax.tree.map, jnp.add)
    return (add(params_direct, params_loss), floats_bar, add(meta_bar, add(meta_direct, meta_loss))), None

  floats_bar = jax.tree.map(jnp.zeros_like, _split_floats(final.opt_state)[0])
  (_, _, grad), _ = jax.lax.scan(
    backward, (params_bar, floats_bar, meta_bar), (states, grads, inner_batches, keys), reverse=True
  )
  finite = problem_lib.is_finite(loss, grad, inner_losses)
  return problem_lib.Output(loss, grad, final, {"inner_loss": inner_losses, "is_finite": finite})


def _split_floats(tree: Any):
  """The floating leaves of an optimiser state, and how to put them back among its counters."""
  leaves, treedef = jax.tree.flatten(tree)
  is_float = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves]

  def rebuild(floats):
    remaining = iter(floats)
    return treedef.unflatten([next(remaining) if use else leaf for use, leaf in zip(is_float, leaves, strict=True)])

  return [leaf for use, leaf in zip(is_float, leaves, strict=True) if use], rebuild
