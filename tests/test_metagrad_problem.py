"""What is wrong with a problem or its inputs is said by every method, in one error, before anything is compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from metagrad_problems import mlp, mlp_inputs, outer_loss, predict

from mftjax import errors, metagrad


def cut(leaf: int, length: int):
  """The same batches, one leaf of them shorter."""
  return lambda inner: tuple(x[:length] if index == leaf else x for index, x in enumerate(inner))


def choosing(m):
  return optax.adam(m["rate"]) if m["rate"] > 0 else optax.sgd(m["rate"])


CASES = {
  "ragged": ({"inner": cut(1, 2)}, r"unroll_length >= 1.*leading sizes \[2, 3\].*pad the ones that differ"),
  "a list of unequal steps": ({"inner": lambda _: [np.zeros((4, 3)), np.zeros((5, 3))]}, r"leading sizes \[4, 5\]"),
  "no step": ({"inner": lambda inner: jax.tree.map(lambda x: x[:0], inner)}, r"leading sizes \[0\]"),
  "no leaf": ({"inner": lambda _: ()}, r"leading sizes \[\]"),
  "a scalar leaf": ({"inner": lambda inner: (*inner[:2], jnp.zeros(()))}, r"leading sizes \[0, 3\]"),
  "integer meta-parameter": ({"meta": lambda m: {**m, "count": jnp.arange(2)}}, r"meta_params\['count'\].*int32"),
  "integer params": ({"params": lambda p: {**p, "w1": jnp.ones((3, 5), int)}}, r"params\['w1'\].*int32.*freeze"),
  "float()": ({"optimizer": lambda m: optax.sgd(float(m["rate"]))}, "needs concrete values.*without float"),
  "if": ({"optimizer": choosing}, "needs concrete values"),
  "numpy": ({"optimizer": lambda m: optax.sgd(np.asarray(m["rate"]))}, "needs concrete values"),
  "inner loss": ({"inner_loss": lambda p, m, b, r: predict(p, b[0])}, r"inner_loss must return .* scalar.*\(4, 2\)"),
  "outer loss": ({"outer_loss": lambda p, m, b, r: predict(p, b[0])}, r"outer_loss must return .* scalar.*\(4, 2\)"),
  "integer loss": ({"inner_loss": lambda p, m, b, r: jnp.zeros((), int)}, "inner_loss must return a floating scalar"),
  "aux unasked": ({"outer_loss": lambda *a: (outer_loss(*a), 1.0)}, "outer_loss must return a floating scalar"),
  "aux missing": ({"has_aux": True}, "outer_loss must return .loss, further values. with has_aux"),
  "too few states": ({"state_of": "sgd"}, "does not fit this optimiser.*metagrad.init"),
  "too many states": ({"state_of": "adam", "name": "sgd"}, "does not fit this optimiser.*metagrad.init"),
  "state of other shapes": (
    {"state": lambda s: s.replace(params={**s.params, "w1": jnp.zeros((3, 4)), "w2": jnp.zeros((4, 2))})},
    "does not fit this optimiser",
  ),
  "a dtype that changes": (
    {"params": lambda p: jax.tree.map(lambda x: x.astype(jnp.bfloat16), p), "meta": lambda m: strong(m)},
    r"changes state.opt_state\[0\].mu\['w1'\] from bfloat16\(3, 5\) to float32\(3, 5\): cast",
  ),
  "micro-batches": (
    {"micro_batches": 3},
    r"inner_batches\[0\] of shape \(3, 4, 3\) does not divide.*micro_batches = 3",
  ),
  "no micro-batch": ({"micro_batches": 0}, "micro_batches must be a whole number >= 1, got 0"),
}


def strong(tree):
  """As arrays are that come out of a computation: their dtype does not give way to a narrower one."""
  return jax.tree.map(lambda x: jnp.asarray(x, x.dtype), tree)


@functools.cache
def valid():
  return mlp_inputs(3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", metagrad.METHODS)
def test_bad_input_is_refused(method, case, monkeypatch):
  changes, message = CASES[case]
  changes = dict(changes)
  meta_params, params, inner, outer = valid()
  meta_params, params, inner = (
    changes.pop(key, lambda x: x)(value) for key, value in (("meta", meta_params), ("params", params), ("inner", inner))
  )
  change_state, name = changes.pop("state", lambda x: x), changes.pop("name", "adam")
  state_of = changes.pop("state_of", name if "optimizer" not in changes else "sgd")
  state = change_state(metagrad.init(mlp(state_of), meta_params, params))
  step = metagrad.value_and_grad(mlp(name, **changes), method)
  monkeypatch.setattr(jax.lax, "scan", lambda *_, **__: pytest.fail("it went on to run the steps"))
  with pytest.raises(errors.InputError, match=message):
    step(meta_params, state, inner, outer, jax.random.key(0))


@pytest.mark.parametrize("method", metagrad.METHODS)
def test_unknown_options_are_refused(method):
  with pytest.raises(errors.InputError, match=f"Unknown option of method '{method}': 'depth'"):
    metagrad.value_and_grad(mlp("sgd"), method, depth=3)


def test_unknown_words_name_the_nearest():
  with pytest.raises(errors.InputError, match=r"meta-gradient method: 'mixd'\. Did you mean 'mixed'"):
    metagrad.value_and_grad(mlp("sgd"), "mixd")
  with pytest.raises(errors.InputError, match=r"Unknown option.*'recovry'\. Did you mean 'recovery'"):
    metagrad.value_and_grad(mlp("sgd"), "first_order", recovry="store")
  with pytest.raises(errors.InputError, match="Unknown meta-gradient method"):
    metagrad.method_options("backward")


def test_every_method_lists_its_options():
  assert {
    method: set(metagrad.method_options(method)) for method in ("mixed", "finite_difference", "reverse", "es")
  } == {
    "mixed": {"recovery", "save", "every", "memory_bytes", "offload"},
    "finite_difference": {"central", "recovery", "save", "every", "memory_bytes", "offload"},
    "reverse": set(),
    "es": {"num_pairs", "sigma", "batch_size"},
  }
