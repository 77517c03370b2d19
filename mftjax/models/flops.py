"""FLOPs that a decoder's steps need, in closed form: what a utilisation is measured by."""

import math

from mftjax.models.layers import DecoderConfig, layer_shapes

# Units of a forward pass that an outer step's unroll needs for a token: the step's own gradient, then its
# Hessian-vector product (MixFlow-MG's forward over reverse; reverse over reverse needs as many). Of a frozen model
# nothing is needed for the gradients of its weights.
_STEP = {"all": 3, "adapters": 2}
_UNROLL = {
  "mixed": {"all": 11, "adapters": 6},
  "reverse": {"all": 11, "adapters": 6},
  "finite_difference": {"all": 6, "adapters": 4},
  "first_order": {"all": 6, "adapters": 4},
}


def forward(config: DecoderConfig, length: int) -> float:
  """FLOPs a token of one forward pass.

  2 for each weight of a matrix, and 4 * length * heads * head_dim a layer for the scores and what they weigh; a causal
  mask is not taken off, as is usual.

  Source: PaLM (Chowdhery et al., 2022), Appendix B.
  """
  weights = sum(math.prod(shape) for shape in layer_shapes(config).values() if len(shape) == 2)
  scores = 2 * length * config.num_heads * config.head_dim
  return 2.0 * (config.num_layers * (weights + scores) + config.vocab_size * config.hidden_size)


def step(config: DecoderConfig, length: int, num_tokens: int, is_adapted: bool) -> float:
  """FLOPs of one SFT step on so many tokens; nothing computed twice counts.

  Args:
    is_adapted: whether adapters are trained, and the model is frozen.
  """
  return forward(config, length) * num_tokens * _STEP["adapters" if is_adapted else "all"]


def outer_step(
  config: DecoderConfig, length: int, num_tokens: int, num_held_out: int, is_adapted: bool, method: str
) -> float:
  """FLOPs of one outer step; 0 for a method whose need is not a number of passes.

  Args:
    num_tokens: of the whole unroll.
    num_held_out: of the outer batch.
    method: a word of `metagrad.METHODS`.
  """
  trained = "adapters" if is_adapted else "all"
  if method not in _UNROLL:
    return 0.0
  return forward(config, length) * (num_tokens * _UNROLL[method][trained] + num_held_out * _STEP[trained])
