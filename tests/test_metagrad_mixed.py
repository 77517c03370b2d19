"""Every optimiser x state recovery of mixed mode against reverse mode in f64."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metagrad_problems import OPTIMIZERS, mlp, mlp_inputs, relative_error, unrolled

from mftjax import metagrad

LENGTH = 7
RECOVERIES = {
  "store activations": {"recovery": "store", "save": "activations"},
  "store nothing": {"recovery": "store", "save": "nothing"},
  "checkpoint": {"recovery": "checkpoint", "every": 3},  # a rest of one step
  "invert gradients": {"recovery": "invert", "save": "gradients", "every": 4},
  "invert nothing": {"recovery": "invert", "save": "nothing"},
}
WITHOUT_INVERSE = {
  "amsgrad": "opt_state[0].nu_max['w1']: it goes through 'max'",
  # Their step needs the gradient itself, which is not known before the params are.
  "sgd": "params['w1']: it depends on values that are not known by then",
  "nesterov": "params['w1']: it depends on values that are not known by then",
  "lion": "params['w1']: it depends on values that are not known by then",
}


@functools.cache
def reference(name: str, **shape):
  """Reverse mode at f64; numpy."""
  with jax.enable_x64(True):
    out = unrolled(mlp(name), mlp_inputs(**shape), "reverse")
    assert all(np.linalg.norm(leaf) > 1e-3 for key, leaf in out.grad.items() if (name, key) != ("sgd", "decay"))
    return jax.tree.map(np.asarray, (out.grad, out.loss, out.state, out.metrics["inner_loss"]))


def assert_equals_reverse(name, out, tolerance, **shape):
  grad, loss, state, inner_losses = reference(name, **shape)
  assert relative_error(out.grad, grad) < tolerance
  for key in grad:  # a small part must not hide behind a large one
    assert np.linalg.norm(out.grad[key] - grad[key]) <= tolerance * max(np.linalg.norm(grad[key]), 1e-2), key
  got = (out.loss, out.state, out.metrics["inner_loss"])
  assert relative_error(got, (loss, state, inner_losses)) < tolerance


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("recovery", RECOVERIES)
def test_equals_reverse_in_f64(recovery, name, caplog):
  options = RECOVERIES[recovery]
  with jax.enable_x64(True), caplog.at_level(logging.WARNING, logger="absl"):
    out = unrolled(mlp(name), mlp_inputs(LENGTH), **options)
    assert_equals_reverse(name, out, 1e-10 if options["recovery"] != "invert" else 1e-6, length=LENGTH)
  falls_back = name == "amsgrad" if recovery == "invert gradients" else name in WITHOUT_INVERSE
  falls_back = falls_back and options["recovery"] == "invert"
  assert ("recovery_error" in out.metrics) == (options["recovery"] == "invert" and not falls_back)
  assert ("checkpoint" in caplog.text) == falls_back
  if falls_back:
    assert WITHOUT_INVERSE[name] in caplog.text


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"memory_bytes": 2000},
    {"memory_bytes": 1},
    {"recovery": "store", "offload": True},
    {"recovery": "checkpoint", "every": 3, "offload": True},
    {"recovery": "invert", "every": 3, "offload": True},
  ],
  ids=str,
)
def test_automatic_and_offloaded_ones_equal_reverse(options):
  with jax.enable_x64(True):
    inverts = options.get("recovery") == "invert" or options.get("memory_bytes") == 1
    assert_equals_reverse("adam", unrolled(mlp("adam"), mlp_inputs(LENGTH), **options), 1e-6 if inverts else 1e-10)


@settings(deadline=None, max_examples=4)
@given(
  length=st.integers(1, 9),
  rows=st.integers(1, 5),
  width=st.integers(1, 6),
  every=st.integers(1, 10),
  how=st.sampled_from([("momentum", "invert"), ("adam", "checkpoint"), ("lion", "invert"), ("adamw", "store")]),
)
def test_equals_reverse_whatever_the_shapes(length, rows, width, every, how):
  name, recovery = how
  shape = {"length": length, "rows": rows, "width": width, "seed": 3}
  with jax.enable_x64(True):
    inputs = mlp_inputs(**shape)
    options = {} if recovery == "store" else {"every": every}
    out = unrolled(mlp(name), inputs, recovery=recovery, **options)
    want = unrolled(mlp(name), inputs, "reverse")
    assert relative_error((out.grad, out.state), (want.grad, want.state)) < 1e-9
  assert {leaf.shape for leaf in jax.tree.leaves(out.metrics["finite"])} == {(length,), ()}


@pytest.mark.parametrize(("name", "tolerance"), [("sgd", 1e-6), ("adam", 1e-5), ("adamw", 5e-4)])
def test_equals_reverse_in_f32(name, tolerance):
  assert_equals_reverse(name, unrolled(mlp(name), mlp_inputs(LENGTH), recovery="checkpoint"), tolerance, length=LENGTH)


@pytest.fixture(scope="module")
def long_inversion():
  """128 steps of Adam, inverted in f32 with the default distance of exact states."""
  return unrolled(mlp("adam"), mlp_inputs(128), recovery="invert", save="nothing")


def test_inversion_holds_over_128_steps_in_f32(long_inversion):
  assert_equals_reverse("adam", long_inversion, 1e-4, length=128)


def test_the_recovery_error_tells_a_good_inverse_from_a_bad_one(long_inversion):
  """Rounding in the first moment grows by 1 / b1 a step: 0.8^-16 = 36, but 0.5^-128 = 3e38."""
  error = long_inversion.metrics["recovery_error"]
  assert error.shape == (128,) and 0 < error.max() < 1e-2
  # Measured where an exact state is at hand, each 16th step; these were not solved for from an exact one.
  np.testing.assert_array_equal(np.flatnonzero(error) % 16, 0)
  meta_params, *rest = mlp_inputs(128)
  bad = unrolled(
    mlp("adam"), ({**meta_params, "decay": jnp.asarray(0.5)}, *rest), recovery="invert", save="nothing", every=128
  )
  assert not bad.metrics["recovery_error"].max() < 0.5


def test_the_unroll_is_differentiable_in_both_its_arguments():
  """An objective of one's own over the whole final state, twice through the unroll."""
  problem = mlp("adam")

  def objective(run, meta_params, state):
    for _ in range(2):
      state, losses = run(meta_params, state)
    moments = sum(jnp.vdot(x, x) for x in jax.tree.leaves(state.opt_state[0].mu))
    return jnp.sum(jnp.sin(state.params["w1"])) + moments, losses

  with jax.enable_x64(True):
    meta_params, params, inner, _ = mlp_inputs(5)
    keys = jax.random.split(jax.random.key(0), 5)

    def gradients(run):
      def of(meta_params, params, nu):
        state = metagrad.init(problem, meta_params, params)
        adam = state.opt_state[0]._replace(nu=jax.tree.map(lambda x: x + nu, state.opt_state[0].nu))
        state = state.replace(opt_state=(adam, *state.opt_state[1:]))
        return objective(lambda m, s: run(m, s, inner, keys), meta_params, state)

      return jax.jit(jax.grad(of, argnums=(0, 1, 2), has_aux=True))(meta_params, params, jnp.asarray(0.1))

    plain = lambda m, s, batches, keys: metagrad.problem.run(problem, m, s, batches, keys)
    want, losses = gradients(plain)
    for options in ({}, {"recovery": "invert", "save": "nothing", "every": 2}):
      got, got_losses = gradients(metagrad.unroll(problem, **options))
      assert relative_error(got, want) < 1e-9
      for part, part_want in zip(got, want, strict=True):
        assert relative_error(part, part_want) < 1e-9
      np.testing.assert_allclose(got_losses, losses, rtol=1e-10)
