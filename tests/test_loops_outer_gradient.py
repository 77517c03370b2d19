"""The outer step's gradient on a task whose abilities conflict: sources and abilities of one letter each."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
import tiny_config

from mftjax import balancing
from mftjax import config as config_lib
from mftjax.data import mixture
from mftjax.loops import curriculum, meta_train, outer_gradient, outer_objective
from mftjax.loops import task as task_lib

WEIGHTS = (10.0, 1.0)


@pytest.fixture(scope="module")
def conflict(tmp_path_factory):
  """Two abilities, the answers `aaaa` and `bbbb`, and a source for each and for `cccc`."""
  folder = tmp_path_factory.mktemp("letters")
  config = tiny_config.get_config()
  config.sources, config.abilities = ml_collections.ConfigDict(), ml_collections.ConfigDict()
  for name in "abc":
    lines = [json.dumps({"prompt": f"{number}:", "completion": name * 6}) for number in range(40)]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    config.sources[name] = {"path": str(folder / f"{name}.jsonl")}
  for name, weight in zip("ab", WEIGHTS, strict=True):
    config.abilities[name] = {"path": str(folder / f"{name}.jsonl"), "weight": weight}
  config.hyperparameters.learning_rate.value = 0.01
  for name in ("learning_rate", "weight_decay", "b1"):
    config.hyperparameters[name].learn = False
  return config


def window(config):
  """`(frozen, state, params, inner batches, outer batch)` of the first window, and a key."""
  network, tokenizer = task_lib.build_network(config)
  state = meta_train.init_state(config, network)
  stream = mixture.Stream(task_lib.source_rows(config, tokenizer), config.batch_size, 0)
  logits = state.meta_params["mixture_logits"]
  batches = curriculum.draw(config, stream, logits, 0, config.meta.unroll_length, 12)
  outer = mixture.Stream(task_lib.ability_rows(config, tokenizer), 4, 1).next(np.full(2, 0.5))
  return (network.frozen, state, network.params, batches, outer), jax.random.key(0)


def build_step(config):
  """`(state) -> (state, metrics)`, the real outer step on the first window, and the state before it, which stays."""
  network, _ = task_lib.build_network(config)
  (frozen, state, params, batches, outer), key = window(config)
  outer_step = meta_train.build_outer_step(config, network)
  kept = lambda state: jax.tree.map(jnp.copy, state)
  return lambda state: outer_step(frozen, kept(state), params, True, batches, outer, key), state


@pytest.fixture(scope="module")
def in_f64(conflict):
  """`(meta_params, coefficients, is_worst) -> (loss, grad, losses)` at f64, and the meta-parameters.

  The objective is the smooth maximum, or else the losses times the coefficients.
  """
  config = conflict.copy_and_resolve_references()
  config.update_from_flattened_dict({"objective.name": "worst", "objective.temperature": 0.02})
  config.meta.method = "reverse"  # a second implementation, for the step that takes the default one
  config_lib.check(config)
  given, key = window(config)
  with jax.enable_x64(True):
    config.model.dtype = "float64"
    network, _ = task_lib.build_network(config)  # its parameters are other draws than those at f32
    cast = lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x)
    frozen, state, _, batches, outer = jax.tree.map(cast, given)

    @jax.jit
    def evaluate(meta_params, coefficients, is_worst):
      def objective(losses):
        return jnp.where(is_worst, outer_objective.loss(config, state.objective, losses), coefficients @ losses)

      build = lambda _: meta_train.build_problem(config, network, frozen, objective)
      out = outer_gradient.value_and_grad(config, build, state.objective)(meta_params, state.inner, batches, outer, key)
      return out.loss, out.grad, out.metrics["aux"]

    evaluate(state.meta_params, jnp.zeros(2), True)
  return evaluate, state.meta_params


def test_the_gradient_of_worst_weighs_those_of_the_abilities_by_a_softmax(in_f64):
  evaluate, meta_params = in_f64
  with jax.enable_x64(True):
    value, grad, losses = evaluate(meta_params, jnp.zeros(2), True)
    assert value.dtype == jnp.float64
    first, second = (evaluate(meta_params, row, False)[1] for row in jnp.eye(2))
    shares = jax.nn.softmax(losses / 0.02)
    assert 0.01 < float(shares[0]) < 0.99
    want = jax.tree.map(lambda a, b: shares[0] * a + shares[1] * b, first, second)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-14), grad, want)
    # And it is the derivative of the value, along one direction.
    direction = jax.tree.map(lambda g: jnp.cos(jnp.arange(g.size, dtype=g.dtype)).reshape(g.shape), grad)
    at = lambda t: evaluate(jax.tree.map(lambda m, d: m + t * d, meta_params, direction), jnp.zeros(2), True)[0]
    slope = (at(1e-7) - at(-1e-7)) / 2e-7  # Adam bends where a gradient is tiny: 1e-5 is too far
    assert float(slope) == pytest.approx(float(optax.tree_utils.tree_vdot(grad, direction)), rel=1e-6)


def test_mgda_helps_both_abilities_where_the_mean_sacrifices_one(conflict, in_f64):
  evaluate, meta_params = in_f64
  weights = np.asarray(WEIGHTS) / sum(WEIGHTS)
  with jax.enable_x64(True):
    rows = np.stack([evaluate(meta_params, row, False)[1]["mixture_logits"] for row in jnp.eye(2)])
    direction = np.asarray(balancing.mgda(jnp.asarray(rows), jnp.ones(2)))
  mean, norms = weights @ rows, np.linalg.norm(rows, axis=1)
  assert rows[1] @ mean < -0.1 * norms[1] * np.linalg.norm(mean)
  assert np.min(rows @ direction) >= 0
  config = conflict.copy_and_resolve_references()
  config.objective.balancing = "mgda"
  config_lib.check(config)
  step, state = build_step(config)
  after, metrics = step(state)
  assert bool(metrics["is_finite"])
  # The real step's own direction against the gradients that f64 finds.
  norm = np.linalg.norm(direction)
  assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-2)
  np.testing.assert_allclose(metrics["alignment"], rows @ direction / (norms * norm), atol=1e-2)
  assert np.all(np.asarray(metrics["alignment"]) > 0)
  assert float(metrics["outer_loss"]) == pytest.approx(float(weights @ metrics["ability_loss"]), rel=1e-6)
  assert int(after.inner.step) == config.meta.unroll_length


def test_famo_sees_the_same_window_after_the_step(conflict):
  config = conflict.copy_and_resolve_references()
  config.objective.balancing = "famo"
  config.meta.mixture_learning_rate = 1.0
  config.meta.method = "first_order"  # whatever the gradient, and this one compiles sooner
  step, state = build_step(config)
  after, metrics = step(state)
  # The losses of the next step, on the same window, are those that this step's logits moved by.
  _, next_metrics = step(state.replace(meta_params=after.meta_params))
  before, then = metrics["ability_loss"], next_metrics["ability_loss"]
  assert float(jnp.max(jnp.abs(before - then))) > 1e-5
  want = balancing.famo_update(state.objective.famo, before, then, 0.1, jnp.asarray(WEIGHTS))
  np.testing.assert_allclose(after.objective.famo.logits, want.logits, rtol=1e-2, atol=1e-7)
  assert float(metrics["outer_loss"]) == pytest.approx(float(2 / jnp.sum(1 / before)), rel=1e-5)  # c z_i = c / 2
