"""LoRA: no change when new, merged equals unmerged, the split into what trains and what does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mftjax import models
from mftjax.errors import InputError
from mftjax.models import lora
from tests.test_models_decoder import make, tokens


def trained(targets=lora.TARGETS, rank=3, alpha=6.0):
  """A decoder whose adapters are all away from zero."""
  model = make()
  lora.add(model, rank, alpha, targets, rngs=nnx.Rngs(1))
  for target in targets:
    b = getattr(model.layers, f"{target}_lora_b")
    noise = 0.1 * jax.random.normal(jax.random.key(2), b.shape)
    setattr(model.layers, f"{target}_lora_b", lora.LoRAParam(noise))
  return model


def test_new_adapters_leave_the_logits_as_they_were():
  model, row = make(), tokens(0, 2, 8)
  before = model(row)
  lora.add(model, 2, 4.0, ["q_proj", "down_proj"], rngs=nnx.Rngs(1))
  np.testing.assert_allclose(model(row), before, atol=1e-7)
  assert lora.adapted(model) == ["q_proj", "down_proj"]


@pytest.mark.parametrize("targets", [lora.TARGETS, ("v_proj",)])
def test_merged_equals_unmerged(targets):
  model, row = trained(targets), tokens(0, 2, 8)
  adapted = model(row)
  assert np.abs(adapted - make()(row)).max() > 1e-3
  lora.merge(model)
  np.testing.assert_allclose(model(row), adapted, atol=1e-5)
  assert not lora.adapted(model)
  assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(nnx.state(make()))


def test_merge_adds_alpha_over_rank_a_b():
  model = trained(("q_proj",), rank=3, alpha=6.0)
  weight, a, b = (np.asarray(getattr(model.layers, f"q_proj{s}")[...]) for s in ("", "_lora_a", "_lora_b"))
  lora.merge(model)
  np.testing.assert_allclose(model.layers.q_proj[1], weight[1] + 2.0 * a[1] @ b[1], atol=1e-6)


def test_only_the_adapters_are_lora_parameters_and_they_get_a_gradient():
  model = trained(("q_proj", "up_proj"))
  row = tokens(0, 2, 8)
  graphdef, adapters, rest = nnx.split(model, lora.LoRAParam, ...)
  assert {path[-1] for path, _ in nnx.to_flat_state(adapters)} == {
    f"{target}_lora_{side}" for target in ("q_proj", "up_proj") for side in "ab"
  }
  gradient = jax.grad(lambda p: jnp.mean(nnx.merge(graphdef, p, rest)(row) ** 2))(adapters)
  for leaf in jax.tree.leaves(gradient):
    assert leaf.shape[0] == 3
    assert np.abs(leaf).reshape(3, -1).max(axis=1).min() > 0  # in every layer


@pytest.mark.parametrize(
  ("act", "words"),
  [
    (lambda: lora.add(make(), 2, 1.0, ["q_prj"], rngs=nnx.Rngs(0)), "Did you mean 'q_proj'"),
    (lambda: lora.add(make(), 0, 1.0, ["q_proj"], rngs=nnx.Rngs(0)), "rank = 0"),
    (lambda: lora.add(make(), 2, 1.0, [], rngs=nnx.Rngs(0)), "one target"),
    (lambda: lora.add(trained(), 2, 1.0, ["q_proj"], rngs=nnx.Rngs(0)), "already"),
    (lambda: lora.merge(make()), "no LoRA"),
  ],
)
def test_bad_input_is_named(act, words):
  with pytest.raises(InputError, match=words):
    act()


def test_save_writes_the_merged_weights_and_leaves_the_model(tmp_path):
  model, row = trained(), tokens(0, 1, 8)
  logits = model(row)
  models.save(model, None, tmp_path)
  assert lora.adapted(model) == list(lora.TARGETS)
  loaded, tokenizer = models.load(tmp_path)
  assert tokenizer is None
  assert not lora.adapted(loaded)
  np.testing.assert_allclose(loaded(row), logits, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_a_masked_rank_is_a_lora_cut_to_it(rank):
  model, cut, row = trained(), trained(), tokens(0, 2, 8)
  for target in lora.adapted(cut):
    b = getattr(cut.layers, f"{target}_lora_b")[...]
    setattr(cut.layers, f"{target}_lora_b", lora.LoRAParam(b.at[:, rank:].set(0.0)))
  graphdef, params = nnx.split(model)
  masked = nnx.merge(graphdef, lora.masked(params, jnp.float32(rank)))
  np.testing.assert_array_equal(masked(row), cut(row))
  if rank == 3:
    np.testing.assert_array_equal(masked(row), model(row))


def test_a_masked_scale_multiplies_alpha():
  graphdef, params = nnx.split(trained(alpha=6.0))
  scaled, row = nnx.merge(graphdef, lora.masked(params, scale=jnp.float32(0.5))), tokens(0, 2, 8)
  np.testing.assert_allclose(scaled(row), trained(alpha=3.0)(row), atol=1e-6)


def test_the_derivative_in_the_rank():
  """A column comes in linearly; at a whole rank the derivative is that of the column that is in last."""
  params = {"layers": {"q_proj_lora_a": jnp.ones((1, 2, 3)), "q_proj_lora_b": jnp.arange(6.0).reshape(1, 3, 2)}}
  total = lambda rank: lora.masked(params, rank)["layers"]["q_proj_lora_b"].sum()
  np.testing.assert_allclose(total(1.5), 0 + 1 + 0.5 * (2 + 3))
  np.testing.assert_allclose([jax.grad(total)(rank) for rank in (0.5, 1.0, 1.5, 3.0)], [1.0, 1.0, 5.0, 9.0])
