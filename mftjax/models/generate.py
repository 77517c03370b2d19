"""Sampling from a decoder with a key-value cache, in one compiled loop."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mftjax.errors import InputError
from mftjax.models.attention import grouped_attention
from mftjax.models.decoder import Decoder

SMALLEST_BUCKET = 16


def bucket(size: int, smallest: int = SMALLEST_BUCKET) -> int:
  """The smallest of `smallest`, 2 smallest, 4 smallest, ... that is at least `size`."""
  return max(smallest, 1 << (size - 1).bit_length())


@functools.partial(jax.jit, static_argnames=("graphdef", "num_slots"))
def _decode(graphdef, state, tokens, segment_ids, num_slots, max_new_tokens, eos_id, temperature, key):
  """`[batch, num_slots]` new tokens after `[batch, length]` left-padded prompts; after its end a row repeats eos_id."""
  model = nnx.merge(graphdef, state)
  config = model.config
  batch, length = tokens.shape
  total = length + num_slots
  num_padding = jnp.sum(segment_ids == 0, axis=1, keepdims=True)
  is_prompt = jnp.pad(segment_ids > 0, ((0, 0), (0, num_slots)), constant_values=True)  # [batch, total]
  shape = (model.cache_layers, batch, total, config.num_kv_heads, config.head_dim)
  cache = (jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))

  def next_logits(tokens, cache, index):
    at = index + jnp.arange(tokens.shape[1])  # places in the cache of these tokens
    mask = is_prompt[:, None, :] & (jnp.arange(total)[None, :] <= at[:, None])[None]
    positions = jnp.maximum(at[None] - num_padding, 0)
    attend = functools.partial(grouped_attention, mask=mask)
    hidden, cache = model.run_layers(model.embed(tokens), positions, attend, cache, index)
    return model.logits(hidden[:, -1]), cache

  def choose(logits, key):
    sampled = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, sampled, jnp.argmax(logits, axis=-1)).astype(jnp.int32)

  def keep_on(carry):
    step, _, _, _, is_done, _ = carry
    return (step < max_new_tokens) & ~jnp.all(is_done)

  def body(carry):
    step, cache, logits, new_tokens, is_done, key = carry
    key, subkey = jax.random.split(key)
    token = jnp.where(is_done, eos_id, choose(logits, subkey))
    new_tokens = jax.lax.dynamic_update_slice_in_dim(new_tokens, token[:, None], step, axis=1)
    logits, cache = next_logits(token[:, None], cache, length + step)
    return step + 1, cache, logits, new_tokens, is_done | (token == eos_id), key

  logits, cache = next_logits(tokens, cache, 0)
  new_tokens = jnp.full((batch, num_slots), eos_id, jnp.int32)
  # a row of padding alone fills the batch up to its bucket: done from the start
  carry = (jnp.int32(0), cache, logits, new_tokens, num_padding[:, 0] == length, key)
  return jax.lax.while_loop(keep_on, body, carry)[3]


def generate(
  model: Decoder,
  prompts: Sequence[np.ndarray],
  max_new_tokens: int,
  *,
  eos_id: int | None,
  pad_id: int,
  temperature: float = 0.0,
  rng: jax.Array | None = None,
) -> list[np.ndarray]:
  """Continues each prompt until its end token, or for `max_new_tokens`.

  Args:
    model: with or without LoRA and memory.
    prompts: token ids, each `[length]` with one token or more; they may differ in length.
    max_new_tokens: at least 1.
    eos_id: the token that ends a continuation; None = none does.
    pad_id: fills the prompts up on the left; never seen by the model.
    temperature: 0 = the likeliest token; else tokens are drawn from softmax(logits / temperature).
    rng: key of the draws; needed when `temperature` > 0.

  Returns:
    For each prompt its new tokens, `[up to max_new_tokens]` int32, without the end token.

  Raises:
    InputError: an empty prompt, a prompt with no room left in `config.max_length`, or values out of range.
  """
  if max_new_tokens < 1:
    raise InputError(f"max_new_tokens = {max_new_tokens} must be at least 1.")
  if not temperature >= 0:
    raise InputError(f"temperature = {temperature} must be 0 or more.")
  if temperature > 0 and rng is None:
    raise InputError(f"temperature = {temperature} draws tokens, so it needs a key: rng = jax.random.key(seed).")
  for number, prompt in enumerate(prompts):
    if len(prompt) == 0:
      raise InputError(f"Prompt {number} has no tokens; start it with the tokenizer's bos token.")
    if len(prompt) + max_new_tokens > model.config.max_length:
      raise InputError(
        f"Prompt {number} of {len(prompt)} tokens and {max_new_tokens} new ones are more than "
        f"the decoder's max_length = {model.config.max_length}."
      )
  if not prompts:
    return []
  shape = (bucket(len(prompts), 1), bucket(max(len(prompt) for prompt in prompts)))
  tokens = np.full(shape, pad_id, np.int32)
  segment_ids = np.zeros(shape, np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, shape[1] - len(prompt) :] = prompt
    segment_ids[row, shape[1] - len(prompt) :] = 1
  graphdef, state = nnx.split(model)
  end = -1 if eos_id is None else eos_id
  key = jax.random.key(0) if rng is None else rng  # not used at temperature 0
  new_tokens = np.asarray(
    _decode(graphdef, state, tokens, segment_ids, bucket(max_new_tokens), max_new_tokens, end, float(temperature), key)
  )[: len(prompts), :max_new_tokens]
  # with no end token nothing equals -1, and every row is whole
  return [row[: np.argmax(row == end)] if (row == end).any() else row for row in new_tokens]
