"""FLOPs in closed form are those that XLA compiles."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks import xla_cost
from mftjax import models
from mftjax.models import flops


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_a_forward_pass_takes_the_matmuls_of_the_compiled_one(tie_embeddings):
  config = models.DecoderConfig("llama", 96, 32, 64, 3, 4, 2, 8, tie_embeddings=tie_embeddings)
  graphdef, params = nnx.split(models.Decoder(config, rngs=nnx.Rngs(0)))
  batch, length = 2, 24
  forward = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
  found = xla_cost.cost(forward.lower(params, jnp.zeros((batch, length), jnp.int32)))
  assert flops.forward(config, length) * batch * length == pytest.approx(found["matmul_flops"], rel=1e-6)


def test_steps_are_multiples_of_a_forward_pass():
  config = models.DecoderConfig("llama", 96, 32, 64, 3, 4, 2, 8)
  one = flops.forward(config, 16) * 100
  assert flops.step(config, 16, 100, False) == 3 * one and flops.step(config, 16, 100, True) == 2 * one
  # DESIGN's limits: an exact outer step is 11/3 of the plain steps, with a frozen model 3 times them.
  outer = lambda is_adapted: flops.outer_step(config, 16, 100, 0, is_adapted, "mixed")
  assert outer(False) == pytest.approx(11 / 3 * 3 * one) and outer(True) == pytest.approx(3 * 2 * one)
  assert flops.outer_step(config, 16, 100, 50, False, "mixed") == pytest.approx(12.5 * one)
  assert flops.outer_step(config, 16, 100, 50, False, "es") == 0.0
