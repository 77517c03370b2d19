"""The inverse of an optimiser: which have one, what it needs, and that it leads back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from metagrad_problems import OPTIMIZERS, mlp, mlp_inputs, relative_error

from mftjax import metagrad
from mftjax.metagrad import inversion, smoothness
from mftjax.metagrad import problem as problem_lib

MORE = OPTIMIZERS | {
  "decayed": lambda m: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(m["rate"], momentum=m["decay"])),
  "schedule": lambda m: optax.sgd(lambda count: m["rate"] * jnp.exp(-count / 5.0)),
  "clip by value": lambda m: optax.chain(optax.clip(0.1), optax.sgd(m["rate"])),
  "rmsprop": lambda m: optax.rmsprop(m["rate"], decay=m["decay"]),
  "rmsprop momentum": lambda m: optax.rmsprop(m["rate"], decay=m["decay"], momentum=0.9),
  "adabelief": lambda m: optax.adabelief(m["rate"], b1=m["decay"]),
  "nadam": lambda m: optax.nadam(m["rate"], b1=m["decay"]),
  "adagrad": lambda m: optax.adagrad(m["rate"]),
  "sign": lambda m: optax.sign_sgd(m["rate"]),
  "averaged": lambda m: smoothness.averaged(optax.adam(m["rate"], b1=m["decay"]), 0.9),
  "masked": lambda m: optax.masked(optax.adam(m["rate"], b1=m["decay"]), {"w1": True, "w2": False}),
  "two optimisers": lambda m: optax.multi_transform(
    {"a": optax.adam(m["rate"], b1=m["decay"]), "b": optax.sgd(m["rate"], momentum=0.7)}, {"w1": "a", "w2": "b"}
  ),
  "yogi": lambda m: optax.yogi(m["rate"], b1=m["decay"]),
  "adamax": lambda m: optax.adamax(m["rate"], b1=m["decay"]),
  "lamb": lambda m: optax.lamb(m["rate"], b1=m["decay"]),
  "adan": lambda m: optax.adan(m["rate"]),
  "every other step": lambda m: optax.MultiSteps(optax.sgd(m["rate"]), 2).gradient_transformation(),
}
# Their step is a function of the state after it, so the params come back before the gradient is known.
WITHOUT_GRADIENT = (
  "momentum",
  "adam",
  "adamw",
  "decayed",
  "rmsprop momentum",
  "adabelief",
  "averaged",
  "two optimisers",
)
WITH_GRADIENT = (
  *WITHOUT_GRADIENT,
  *("sgd", "nesterov", "lion", "schedule", "clip by value", "rmsprop", "nadam", "adagrad", "sign", "masked"),
)
REASONS = {
  "amsgrad": r"opt_state\[0\].nu_max\['w1'\]: it goes through 'max', which is not affine in it",
  "adamax": r"opt_state\[0\].nu\['w1'\]: it goes through 'max'",
  "yogi": r"opt_state\[0\].nu\['w1'\]: it goes through 'sign'",
  "lamb": r"params\['w1'\]: it goes through 'mul'",  # the norm of the params scales their own step
  "adan": r"opt_state\[0\].v\['w1'\]: it depends on values that are not known by then",  # the gradient a step before
  "every other step": r"params\['w1'\]: it depends on values",
}


def derive(name, has_gradient):
  """(inverse, problem, meta_params, state)"""
  meta_params, params, _, _ = mlp_inputs(1)
  problem = mlp("sgd", optimizer=MORE[name])
  state = metagrad.init(problem, meta_params, params)
  return inversion.derive(problem, meta_params, state, has_gradient), problem, meta_params, state


@pytest.mark.parametrize("name", MORE)
def test_which_optimisers_have_an_inverse(name):
  for has_gradient, having in ((True, WITH_GRADIENT), (False, WITHOUT_GRADIENT)):
    if name in having:
      inverse, _, _, state = derive(name, has_gradient)
      assert (None in inverse.order) == (not has_gradient)
      solved = {inverse.leaves[index].name for index in inverse.order if index is not None}
      assert solved | {leaf.name for leaf in inverse.leaves if leaf.is_kept} == {leaf.name for leaf in inverse.leaves}
      assert len(inverse.leaves) == len(jax.tree.leaves((state.params, state.opt_state)))
    else:
      message = r"params\['w[12]'\]: it depends on values that are not known by then"
      with pytest.raises(inversion.NotInvertible, match=REASONS.get(name, message)):
        derive(name, has_gradient)


@pytest.mark.parametrize(
  ("name", "has_gradient"), [(n, True) for n in WITH_GRADIENT] + [(n, False) for n in WITHOUT_GRADIENT]
)
def test_a_run_backwards_recovers_every_state(name, has_gradient):
  """There in f64 and back to the state after the first step, with nothing exact on the way but the counters."""
  with jax.enable_x64(True):
    inverse, problem, meta_params, state = derive(name, has_gradient)
    _, _, batches, _ = mlp_inputs(6)
    gradient = lambda params, batch: problem_lib.gradient(problem, params, meta_params, batch, None)

    @jax.jit
    def forward(state, batch):
      _, grads = gradient(state.params, batch)
      return problem_lib.update(problem, meta_params, state, grads), grads

    @jax.jit
    def back(after, kept, grads, batch):
      evaluate = lambda params: (*gradient(params, batch), None)
      return inverse(meta_params, after, kept, grads if has_gradient else None, None, evaluate)

    states, gradients = [state], []
    for step in range(6):
      after, grads = forward(states[-1], jax.tree.map(lambda x: x[step], batches))  # noqa: B023 (used at once)
      states.append(after)
      gradients.append(grads)
    found = states[-1]
    for step in reversed(range(1, 6)):
      leaves = jax.tree.leaves((states[step].params, states[step].opt_state))
      kept = [leaf if info.is_kept else None for leaf, info in zip(leaves, inverse.leaves, strict=True)]
      batch = jax.tree.map(lambda x: x[step], batches)  # noqa: B023
      found, grads, _ = back(found, kept, gradients[step], batch)
      assert relative_error(grads, gradients[step]) < 1e-8
      assert jax.tree.structure(found) == jax.tree.structure(states[step])
      for leaf, want in zip(jax.tree.leaves(found), jax.tree.leaves(states[step]), strict=True):
        np.testing.assert_allclose(leaf, want, rtol=1e-7, atol=1e-9)


def test_what_is_known_of_the_leaves():
  """Counters and single numbers are kept; second moments are known not to be below zero, first ones are not."""
  leaves = {leaf.name: leaf for leaf in derive("adamw", False)[0].leaves}
  nonnegative = {name for name, leaf in leaves.items() if leaf.is_nonnegative}
  assert nonnegative == {f"opt_state[1][0].nu['{name}']" for name in ("w1", "w2")}
  assert {name for name, leaf in leaves.items() if leaf.is_kept} == {"opt_state[1][0].count", "opt_state[1][2].count"}


def test_a_moment_that_was_zero_comes_back_small_and_not_negative():
  """Rounding would leave +- 1e-8: a negative second moment has no root, a first one over a tiny root is a long step."""
  inverse, problem, meta_params, state = derive("adam", True)
  _, _, batches, _ = mlp_inputs(1)
  _, grads = problem_lib.gradient(problem, state.params, meta_params, jax.tree.map(lambda x: x[0], batches), None)
  after = problem_lib.update(problem, meta_params, state, grads)
  one_ulp_off = lambda tree: jax.tree.map(lambda x: jnp.nextafter(x, jnp.zeros_like(x)), tree)
  adam, *rest = after.opt_state
  adam = adam._replace(mu=one_ulp_off(adam.mu), nu=one_ulp_off(adam.nu))
  leaves = jax.tree.leaves((state.params, state.opt_state))
  kept = [leaf if info.is_kept else None for leaf, info in zip(leaves, inverse.leaves, strict=True)]
  found, _, _ = inverse(meta_params, after.replace(opt_state=(adam, *rest)), kept, grads, None, None)
  for name in ("w1", "w2"):
    np.testing.assert_array_equal(found.opt_state[0].mu[name], 0)
    assert (found.opt_state[0].nu[name] >= 0).all()
    assert found.opt_state[0].nu[name].max() <= 1e-6 * adam.nu[name].max()
