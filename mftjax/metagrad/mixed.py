"""Mixed mode: reverse over the optimiser's update only, forward over reverse through the inner loss."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax

from mftjax import errors
from mftjax.metagrad import passes, products, recovery
from mftjax.metagrad import problem as problem_lib


def build(problem: problem_lib.Problem, **options):
  """`step(meta_params, state, inner_batches, outer_batch, rng) -> Output`, exact.

  Going back over a step with cotangents of its (params, opt_state): the VJP of the optimiser's update at the
  inner gradient gives u, the cotangent of that gradient; the loss adds d <grad_params loss, u> /
  d (params, meta_params), one `jvp` of `grad` along u. No step is differentiated in reverse twice.

  Args:
    problem: what is differentiated.
    **options: the fields of `recovery.Options`. `recovery`: "store", "checkpoint", "invert" or "auto"; `save`:
      "activations", "gradients", "nothing" or "auto"; `every`: steps between checkpoints or exact values;
      `memory_bytes`: what "auto" may keep; `offload`: keep it in the host's memory.

  Source: MixFlow-MG (Kemaev et al., 2025), the mixed-mode reparameterisation; inverting an optimiser: Maclaurin et al.
  (2015), Section 2.
  """
  return functools.partial(_step, problem, products.exact, recovery.options(options))


def build_first_order(problem: problem_lib.Problem, **options):
  """As `mixed`, but the Hessian of the inner loss in params counts as zero; biased.

  What stays: the direct terms of every meta-parameter, and the path through the optimiser's state and decay.

  Source: first-order MAML (Finn et al., 2017), Section 5.2; T1-T2 (Luketina et al., 2016).
  """
  return functools.partial(_step, problem, products.none, recovery.options(options))


def build_finite_difference(problem: problem_lib.Problem, central: bool = False, **options):
  """As `mixed`, with the Hessian product as a difference of gradients; `central` takes two of them a step, not one.

  `metrics["product_error"]` `[unroll_length, 2]`: each product's relative error as estimated, by rounding and (central
  only) by truncation.

  Source: see `products.finite_difference`.
  """
  product = products.finite_central if central else products.finite_one_sided
  return functools.partial(_step, problem, product, recovery.options(options))


def build_unroll(problem: problem_lib.Problem, **options) -> Callable[..., tuple[problem_lib.State, jax.Array]]:
  """The inner run as one differentiable function, for objectives of one's own.

  Returns:
    `unroll(meta_params, state, inner_batches, keys [unroll_length]) -> (state, inner_losses [unroll_length])`, whose
    reverse mode is that of `mixed`, in meta_params and in the state at the start. Batches and keys count as constants,
    and so do the inner losses. The options are those of `build`.
  """
  chosen = recovery.options(options)
  plan_for = functools.partial(recovery.choose, problem, products.exact, chosen)

  @jax.custom_vjp
  def differentiable(meta_params, state, batches, keys):
    return problem_lib.run(problem, meta_params, state, batches, keys)

  def forward(meta_params, state, batches, keys):
    plan = plan_for(meta_params, state, batches, keys)
    final, metrics, residuals = passes.forward(problem, plan, meta_params, state, batches, keys)
    return (final, metrics["inner_loss"]), (meta_params, state, residuals, batches, keys)

  def backward(kept, cotangents):
    meta_params, state, residuals, batches, keys = kept
    plan = plan_for(meta_params, state, batches, keys)
    final_bar, _ = cotangents
    opt_bar, _ = passes.split_floats(final_bar.opt_state)
    bars, _ = passes.backward(problem, plan, meta_params, residuals, final_bar.params, opt_bar, batches, keys)
    _, rebuild = passes.split_floats(state.opt_state)
    opt_bar = jax.tree.map(lambda x: x if problem_lib.is_floating(x) else None, rebuild(bars.opt_floats))
    return bars.meta_params, problem_lib.State(bars.params, opt_bar, None), None, None

  differentiable.defvjp(forward, backward)

  def run(meta_params, state, inner_batches, keys):
    length = problem_lib.unroll_length(inner_batches)
    if len(keys) != length:
      raise errors.InputError(f"An unroll of {length} steps needs as many keys, got {len(keys)}.")
    return differentiable(meta_params, state, *jax.lax.stop_gradient((inner_batches, keys)))

  return run


def _step(
  problem: problem_lib.Problem,
  product,
  options: recovery.Options,
  meta_params: Any,
  state: problem_lib.State,
  inner_batches: Any,
  outer_batch: Any,
  rng: jax.Array,
) -> problem_lib.Output:
  length = problem_lib.check(problem, meta_params, state, inner_batches, outer_batch)
  keys, outer_rng = problem_lib.split_keys(rng, length)
  plan = recovery.choose(problem, product, options, meta_params, state, inner_batches, keys)
  final, metrics, residuals = passes.forward(problem, plan, meta_params, state, inner_batches, keys)
  floats, rebuild = passes.split_floats(final.opt_state)

  def outer_loss(params, floats, meta_params):
    end = final.replace(params=params, opt_state=rebuild(floats))
    return problem_lib.outer_loss(problem, end, meta_params, outer_batch, outer_rng)

  (loss, aux), (params_bar, opt_bar, meta_bar) = jax.value_and_grad(outer_loss, argnums=(0, 1, 2), has_aux=True)(
    final.params, floats, meta_params
  )
  bars, back = passes.backward(problem, plan, meta_params, residuals, params_bar, opt_bar, inner_batches, keys)
  grad = jax.tree.map(operator.add, meta_bar, bars.meta_params)
  finite = metrics["finite"] | back.pop("finite") | {"outer_loss": problem_lib.is_finite(loss, params_bar, meta_bar)}
  more = {name: value for name, value in back.items() if value is not None}
  return problem_lib.output(loss, aux, grad, final, metrics["inner_loss"], {"finite": finite, **more})
