"""The memory: identity when new, gradients, top-k, product keys against the dense formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mftjax.errors import InputError
from mftjax.models import Memory, MemoryParam

KINDS = [{}, {"top_k": 3}, {"top_k": 3, "product_keys": True}, {"top_k": 9, "product_keys": True}]


def filled(seed=0, **options):
  memory = Memory(9, 12, 4, 2, rngs=nnx.Rngs(seed), **options)
  memory.values = MemoryParam(jax.random.normal(jax.random.key(seed), (9, 12)))
  return memory


def reference(memory, hidden):
  """The formula in numpy, one token and head at a time, over every slot."""
  query_matrix, values = np.asarray(memory.query[...]), np.asarray(memory.values[...])
  keys = np.asarray(memory.keys[...])
  out = hidden.copy()
  for token in range(len(hidden)):
    normed = hidden[token] / np.sqrt(np.mean(hidden[token] ** 2) + 1e-6)
    for head in range(memory.num_heads):
      query = normed @ query_matrix[:, head]
      if memory.product_keys:
        half = len(query) // 2
        scores = ((keys[0, head] @ query[:half])[:, None] + (keys[1, head] @ query[half:])[None]).reshape(-1)
      else:
        scores = keys[head] @ query
      scores = scores / np.sqrt(memory.key_dim)
      best = np.argsort(-scores)[: memory.top_k or len(scores)]
      weights = np.exp(scores[best] - scores[best].max())
      out[token] += weights / weights.sum() @ values[best]
  return out


@pytest.mark.parametrize("options", KINDS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_agrees_with_the_formula(options, seed):
  memory = filled(seed, **options)
  hidden = np.random.default_rng(seed).normal(size=(4, 12)).astype(np.float32)
  np.testing.assert_allclose(memory(hidden), reference(memory, hidden), atol=2e-5)


@pytest.mark.parametrize("options", KINDS)
def test_new_memory_is_exactly_the_identity_and_learns(options):
  memory = Memory(9, 12, 4, 2, rngs=nnx.Rngs(0), **options)
  hidden = jax.random.normal(jax.random.key(1), (2, 5, 12))
  np.testing.assert_array_equal(memory(hidden), hidden)
  graphdef, params = nnx.split(memory)
  gradient = jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(hidden) ** 2))(params)
  assert np.abs(gradient["values"][...]).max() > 1e-3


@pytest.mark.parametrize("options", KINDS)
def test_keys_and_queries_get_a_gradient_once_the_values_moved(options):
  graphdef, params = nnx.split(filled(**options))
  hidden = jax.random.normal(jax.random.key(1), (2, 5, 12))
  gradient = jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(hidden) ** 2))(params)
  for name in ("query", "keys", "values"):
    assert np.abs(gradient[name][...]).max() > 1e-3, name


def test_parameters_are_of_the_memorys_own_type():
  memory = Memory(9, 12, 4, 2, rngs=nnx.Rngs(0))
  _, own, rest = nnx.split(memory, MemoryParam, ...)
  assert len(jax.tree.leaves(own)) == 3
  assert not jax.tree.leaves(rest)


@pytest.mark.parametrize(
  ("arguments", "options", "words"),
  [
    ((0, 8, 4, 1), {}, "num_slots = 0"),
    ((4, 8, 4, 1), {"top_k": 5}, "top_k = 5"),
    ((5, 8, 4, 1), {"top_k": 2, "product_keys": True}, "square"),
    ((4, 8, 4, 1), {"product_keys": True}, "top_k = None"),
  ],
)
def test_bad_sizes_are_named(arguments, options, words):
  with pytest.raises(InputError, match=words):
    Memory(*arguments, rngs=nnx.Rngs(0), **options)
