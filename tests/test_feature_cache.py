"""Probed features on disk: computed once, and refused for another model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probe_problems import OPTIONS, make_params, make_task, run

from mftjax import feature_cache
from mftjax.errors import InputError


def test_digest_sees_values_dtypes_shapes_and_names():
  tree = {"a": jnp.zeros(4), "b": jnp.ones(2)}
  others = [
    {"a": jnp.zeros(4), "b": jnp.array([1.0, 1.0 + 1e-6])},
    {"a": jnp.zeros(4, jnp.int32), "b": jnp.ones(2)},
    {"a": jnp.zeros((2, 2)), "b": jnp.ones(2)},
    {"a": jnp.zeros(4), "c": jnp.ones(2)},
  ]
  assert feature_cache.digest(tree) == feature_cache.digest({"b": np.ones(2, np.float32), "a": np.zeros(4, np.float32)})
  assert len({feature_cache.digest(t) for t in [tree, *others]}) == 5


def test_cached_computes_once_and_refuses_another_model(tmp_path):
  calls = []

  def compute():
    calls.append(1)
    return run(make_task())

  model = feature_cache.digest(make_params())
  what = {"model": model, "rows": np.arange(4), "options": repr(OPTIONS), "data": b"x"}
  first = feature_cache.cached(tmp_path, what, compute)
  again = feature_cache.cached(tmp_path, dict(reversed(what.items())), compute)
  assert len(calls) == 1
  jax.tree.map(np.testing.assert_array_equal, first, again)
  (path,) = (tmp_path / "features").iterdir()  # and no part of a file beside it
  for name, value in {"rows": np.arange(5), "options": "", "data": b"y", "model": "f" * 64}.items():
    feature_cache.cached(tmp_path, what | {name: value}, compute)
  assert len(calls) == 5
  other = feature_cache.digest(make_params(1))
  with pytest.raises(InputError, match=rf"{model[:8]}.*{other[:8]}"):
    feature_cache.load(path, other)
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(InputError, match="Delete the file"):
    feature_cache.cached(tmp_path, what, compute)
  with pytest.raises(InputError, match="digest"):
    feature_cache.cached(tmp_path, {"rows": np.arange(4)}, compute)
