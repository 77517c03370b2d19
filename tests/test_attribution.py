"""Integrated gradients against closed forms and their axiom, and the names of what they fall to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mftjax import attribution, features


def test_of_a_linear_function_they_are_its_terms():
  weights = {"a": jnp.asarray([[1.0, 2.0], [0.5, -1.0]]), "b": jnp.asarray([3.0, 4.0])}
  fn = lambda x: weights["a"] @ x["a"] + weights["b"] * x["b"]
  x, start = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray(2.0)}, {"a": jnp.ones(2), "b": jnp.asarray(0.0)}
  found, at, before = attribution.integrated_gradients(fn, x, start, num_points=3)
  np.testing.assert_allclose(found["a"], [[0.0, 2.0], [0.0, -1.0]])
  np.testing.assert_allclose(found["b"], [6.0, 8.0])
  np.testing.assert_allclose(at, fn(x))
  np.testing.assert_allclose(before, fn(start))


def test_of_a_product_from_zero_both_get_half():
  fn = lambda x: jnp.stack([x["a"] * x["b"]])
  found, _, _ = attribution.integrated_gradients(
    fn, {"a": jnp.asarray(2.0), "b": jnp.asarray(3.0)}, {"a": jnp.asarray(0.0), "b": jnp.asarray(0.0)}
  )
  assert (float(found["a"][0]), float(found["b"][0])) == pytest.approx((3.0, 3.0))


def test_they_sum_to_the_difference():
  rng = np.random.default_rng(0)
  matrix = jnp.asarray(rng.normal(size=(3, 5)))
  fn = lambda x: jnp.tanh(matrix @ x["a"]) * jnp.exp(0.1 * x["a"][:3])
  x, start = ({"a": jnp.asarray(rng.normal(size=5))} for _ in range(2))
  found, at, before = attribution.integrated_gradients(fn, x, start, num_points=200)
  np.testing.assert_allclose(found["a"].sum(axis=1), at - before, atol=1e-3)


def task(rng, num_tasks=()):
  shape = lambda *sizes: rng.normal(size=(*num_tasks, *sizes))
  mask = np.broadcast_to([1.0, 1.0, 0.0], (*num_tasks, 3))
  weight = np.broadcast_to([0.25, 0.75, 0.0], (*num_tasks, 3))
  there = {"source": mask[..., None], "ability": (weight > 0)[..., None]}
  there["pair"] = mask[..., :, None, None] * (weight > 0)[..., None, :, None]
  sizes = {
    "source": (3, len(features.SOURCE_FEATURES)),
    "ability": (3, len(features.ABILITY_FEATURES)),
    "pair": (3, 3, len(features.PAIR_FEATURES)),
  }
  others = {"match": np.broadcast_to([0.9, 0.1, 0.0], (*num_tasks, 3)), "source_mask": mask, "ability_weight": weight}
  found = {name: shape(*size) * there[name] for name, size in sizes.items()}
  return features.Features(**jax.tree.map(jnp.asarray, {**found, **others, "tokens": np.zeros(num_tasks)}))


def test_the_mean_task_is_the_mean_of_what_is_there():
  rng = np.random.default_rng(1)
  known, one = task(rng, (7,)), task(rng)
  found = attribution.mean_task(known, one)
  np.testing.assert_allclose(found.source[0], np.asarray(known.source)[:, :2].mean(axis=(0, 1)), rtol=1e-5)
  np.testing.assert_allclose(found.pair[1, 0], np.asarray(known.pair)[:, :2, :2].mean(axis=(0, 1, 2)), rtol=1e-5)
  assert not found.source[2].any() and not found.ability[2].any() and not found.pair[2].any()
  np.testing.assert_allclose(found.match, [0.5, 0.5, 0.0])
  np.testing.assert_array_equal(found.ability_weight, one.ability_weight)


def test_the_largest_are_named_by_what_they_are():
  one = task(np.random.default_rng(2))
  values = {name: getattr(one, name) for name in attribution.FIELDS}
  found = {name: np.zeros(np.shape(value)) for name, value in values.items()}
  found["pair"][1, 0, 2], found["source"][0, 1], found["source"][2, 0], found["match"][1] = -3.0, 2.0, 9.0, 1.0
  entries = attribution.largest(found, values, attribution.labels(["s", "t"], ["a", "b"]), 3)
  assert [entry["feature"] for entry in entries] == [
    f"t for a: {features.PAIR_FEATURES[2]}",
    f"s: {features.SOURCE_FEATURES[1]}",
    "t: gradient matching",
  ]
  assert entries[0]["attribution"] == -3.0
  assert entries[0]["value"] == pytest.approx(float(one.pair[1, 0, 2]))
