"""The measuring parts of `benchmarks.objectives`, where the answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import objectives as benchmark
from mftjax.data import meta_tasks
from mftjax.loops import outer_objective


@pytest.fixture(scope="module")
def pools():
  return meta_tasks.build_pools(length=32, num_rows=16, seed=0, also_held_out=meta_tasks.BASE)


def test_a_kept_ability_has_no_weight_and_a_clean_source(pools):
  tasks = benchmark.guarded(pools, 5, seed=0, split="unseen")
  for source, mask, ability, weight in zip(
    *map(np.asarray, (tasks.source, tasks.source_mask, tasks.ability, tasks.ability_weight)), strict=True
  ):
    kept = pools.ability_names[ability[benchmark.GUARDED].argmax()]
    assert kept in meta_tasks.BASE and weight.tolist() == [0.5, 0.5, 0.0]
    assert f"{kept}/clean" in [pools.names[number] for number, there in zip(source, mask, strict=True) if there]


def test_each_kind_of_case_lowers_its_own_objective(pools):
  config, tasks = benchmark.get_config("tiny"), benchmark.guarded(pools, 1, seed=0, split="unseen")
  task = jax.tree.map(lambda x: x[0], tasks)
  state = outer_objective.init(config, jnp.asarray([1.0, 1.0, 0.1])).replace(multipliers=jnp.asarray([0.0, 0.0, 2.0]))
  grads = {}
  for kind in benchmark.KINDS:
    case = benchmark.Case(task, jnp.asarray(benchmark.KINDS.index(kind)), state)
    grads[kind] = np.asarray(jax.grad(benchmark.objective(config, case))(jnp.asarray([0.9, 0.4, 0.3])))
  np.testing.assert_allclose(grads["mean"], [0.5, 0.5, 0.0], atol=1e-6)
  np.testing.assert_allclose(grads["worst"], [1 / (1 + np.exp(-5)), 1 / (1 + np.exp(5)), 0.0], atol=1e-5)
  # 0.2 above base, priced at the multiplier 2 and the penalty 20; the others' violations are below zero.
  np.testing.assert_allclose(grads["retention"], [0.5, 0.5, 2.0 + 20.0 * 0.2], atol=1e-5)


def test_figures_of_known_losses():
  losses = {"worst": np.asarray([[[0.5, 0.4, 9.0]]] * 2), "mean": np.asarray([[[0.7, 0.1, 9.0]], [[0.1, 0.9, 9.0]]])}
  found = benchmark.worst_against_mean(losses, np.asarray([[0.5, 0.5, 0.0]]))
  assert (found["worst"], found["mean"]) == pytest.approx((0.5, 0.8))  # an ability of weight 0 does not count
  assert (found["lower"], found["difference"]) == pytest.approx((1.0, -0.3))
  assert benchmark.difference(np.asarray([1.0, 1.0]), np.asarray([1.0005, 1.1]))["tied"] == 0.5
  kept = np.asarray([[[0.3, 0.5, 0.12], [0.3, 0.5, 0.30]]])
  found = benchmark.retention_figures(kept, np.asarray([[1.0, 1.0, 0.1], [1.0, 1.0, 0.1]]), tolerance=0.05)
  assert (found["within"], found["excess"], found["others"]) == pytest.approx((0.5, 0.11, 0.4))
