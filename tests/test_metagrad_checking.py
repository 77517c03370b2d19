"""The check of a method against f64 reverse mode on a small copy of the problem."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mftjax import errors
from mftjax.metagrad import checking, reverse
from mftjax.metagrad import problem as problem_lib

NAMES = {"optimizer.log_learning_rate", "logits"}


def classifier(dtype=np.float32):
  """A small net with weighted rows and momentum, 6 steps of 4 rows: (problem, meta_params, params, inner, outer)."""

  def row_losses(params, x, y):
    return jnp.sum((jnp.tanh(x @ params["w1"]) @ params["w2"] - y) ** 2, axis=1)

  problem = problem_lib.Problem(
    inner_loss=lambda p, m, b, rng: jnp.mean(jax.nn.softmax(m["logits"])[b[2]] * row_losses(p, *b[:2])),
    outer_loss=lambda p, m, b, rng: jnp.mean(row_losses(p, *b)),
    optimizer=lambda m: optax.sgd(jnp.exp(m["optimizer"]["log_learning_rate"]), momentum=0.9),
  )
  draw = np.random.default_rng(0)
  normal = lambda *shape: draw.normal(size=shape).astype(dtype)
  params = {"w1": normal(3, 8), "w2": normal(8, 2)}
  meta_params = {"optimizer": {"log_learning_rate": np.asarray(-3.0, dtype)}, "logits": np.zeros(2, dtype)}
  inner = (normal(6, 4, 3), normal(6, 4, 2), np.tile(np.array([0, 1], np.int32), (6, 2)))
  return problem, meta_params, params, inner, (normal(4, 3), normal(4, 2))


def check(inputs, build=reverse.build, **options):
  return checking.check(inputs[0], build, *inputs[1:], jax.random.key(1), **options)


def doubled_logits(problem):
  """A method whose gradient of one leaf is wrong by a factor of two."""
  step = reverse.build(problem)

  def wrong(*args):
    out = step(*args)
    return out.replace(grad={**out.grad, "logits": 2 * out.grad["logits"]})

  return wrong


def first_order(problem):
  """A method that takes the inner gradient as constant, with what a custom rule for it leaves out."""

  def inner_loss(params, meta_params, batch, rng):
    return problem.inner_loss(params, jax.lax.stop_gradient(meta_params), batch, rng)

  return reverse.build(dataclasses.replace(problem, inner_loss=inner_loss))


def test_an_exact_method_passes_in_f32_and_x64_stays_off():
  report = check(classifier(), num_steps=3, num_rows=2)
  assert set(report.by_leaf) == NAMES
  assert 0 < report.overall < 1e-5 and max(report.by_leaf.values()) < 1e-5 and report.loss < 1e-5
  assert report.passed and "Within the tolerance" in report.table()
  assert jnp.zeros(1).dtype == jnp.float32


def test_the_reference_is_the_gradient_of_the_shrunken_run_in_f64():
  """Against a finite difference at f64 of plain training over the first two steps and rows."""
  problem, meta_params, params, inner, outer = classifier()
  inner, outer = jax.tree.map(lambda x: x[:2, :2], inner), jax.tree.map(lambda x: x[:2], outer)
  with jax.enable_x64(True):
    cast = lambda tree: jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, tree)

    @jax.jit
    def trained_loss(logit):
      m = {**cast(meta_params), "logits": jnp.stack([logit, 0.0])}
      state = problem_lib.init(problem, m, cast(params))
      final, _ = problem_lib.run(problem, m, state, cast(inner), jax.random.split(jax.random.key(0), 2))
      return problem.outer_loss(final.params, m, cast(outer), None)

    slope = float(trained_loss(1e-5) - trained_loss(-1e-5)) / 2e-5

  def known(problem):  # the gradient of the first of two logits whose softmax counts: the second has its negative
    step = reverse.build(problem)
    return lambda *args: (out := step(*args)).replace(grad={**out.grad, "logits": jnp.array([slope, -slope])})

  assert check(classifier(), known, num_steps=2, num_rows=2).by_leaf["logits"] < 1e-6


@pytest.mark.parametrize("build", [doubled_logits, first_order])
def test_a_wrong_gradient_fails_and_its_leaf_is_named(build):
  report = check(classifier(), build)
  assert not report.passed and report.worst == "logits"
  assert report.by_leaf["logits"] > 0.5 and report.by_leaf["optimizer.log_learning_rate"] < 1e-5
  assert report.loss < 1e-5
  assert "NOT within" in report.table() and "worst leaf: logits" in report.table()


def test_a_bare_leaf_a_nan_and_a_leaf_without_effect():
  loss = lambda p, m, b, rng: 0.5 * (p - jnp.sum(m)) ** 2

  def add(value):
    def build(problem):
      step = reverse.build(problem)
      return lambda *args: (out := step(*args)).replace(grad=out.grad + value)

    return build

  effect = problem_lib.Problem(loss, loss, lambda m: optax.sgd(0.1))
  no_effect = problem_lib.Problem(lambda *_: 0.5 * _[0] ** 2, lambda *_: 0.5 * _[0] ** 2, lambda m: optax.sgd(0.1))
  for problem, value, error in ((effect, np.nan, np.nan), (no_effect, 0.0, 0.0), (no_effect, 1.0, np.inf)):
    report = check((problem, np.float32(1.0), np.float32(2.0), np.zeros(3), np.zeros(())), add(value))
    np.testing.assert_equal(report.by_leaf, {"meta_params": error})
    assert report.passed == (error == 0.0) and report.worst == "meta_params"


def test_bf16_params_show_their_own_rounding():
  report = check(classifier(jnp.bfloat16))
  assert 1e-4 < report.overall < 0.2 and not report.passed
  assert "outer loss differs too" in report.table()


def test_bad_input_is_refused():
  with pytest.raises(errors.InputError, match="num_steps must be at least 1"):
    check(classifier(), num_steps=0)
  with pytest.raises(errors.InputError, match="num_rows must be at least 1"):
    check(classifier(), num_rows=0)
