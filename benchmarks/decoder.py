"""Train step of the decoder against the same model in transformers + torch, and compile time over depth.

python -m benchmarks.decoder [--json=FILE]

Both sides: f32, gradient of the mean token loss, no optimiser, batch 8 x 256, the same number of CPU threads, on two
shapes: `small` (width 256, 8 layers, vocabulary 4,096) and SmolLM2-135M's, with random weights. The two sides take
turns; medians are printed. Compile time is that of the outer step (mixed, T = 4) at two depths, without cache.
"""

import argparse
import dataclasses
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mftjax import files, metagrad, models, sft, types

BATCH, LENGTH, VOCAB = 8, 256, 4096
COMPILE_DEPTHS = (4, 24)


def decoder_config(num_layers: int, width: int = 256) -> models.DecoderConfig:
  return models.DecoderConfig(
    family="llama",
    vocab_size=VOCAB,
    hidden_size=width,
    intermediate_size=4 * width,
    num_layers=num_layers,
    num_heads=width // 32,
    num_kv_heads=width // 32,
    head_dim=32,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
    attention_bias=False,
    max_length=LENGTH,
    remat=False,
    dtype=jnp.float32,
  )


SHAPES = {
  "small": decoder_config(8),
  "smollm2-135m": dataclasses.replace(
    decoder_config(30),
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
  ),
}


def make_batch(batch: int, length: int, vocab_size: int = VOCAB) -> types.Batch:
  tokens = np.random.default_rng(0).integers(0, vocab_size, (batch, length)).astype(np.int32)
  return types.Batch(
    tokens=tokens,
    loss_mask=np.ones_like(tokens, np.float32),
    segment_ids=np.ones_like(tokens),
    positions=np.tile(np.arange(length, dtype=np.int32), (batch, 1)),
    source=np.zeros(batch, np.int32),
    proposal=np.ones(batch, np.float32),
  )


def jax_step(shape: models.DecoderConfig):
  graphdef, params = nnx.split(models.Decoder(shape, rngs=nnx.Rngs(0)))
  batch = make_batch(BATCH, LENGTH, shape.vocab_size)

  def loss(params):
    model = nnx.merge(graphdef, params)
    return sft.row_losses(model(batch.tokens, batch.segment_ids, batch.positions), batch)[0].mean()

  gradient = jax.jit(jax.value_and_grad(loss))
  return lambda: jax.block_until_ready(gradient(params))


def torch_step(shape: models.DecoderConfig):
  import torch
  import transformers

  torch.set_num_threads(os.cpu_count() or 1)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=shape.vocab_size,
      hidden_size=shape.hidden_size,
      intermediate_size=shape.intermediate_size,
      num_hidden_layers=shape.num_layers,
      num_attention_heads=shape.num_heads,
      num_key_value_heads=shape.num_kv_heads,
      tie_word_embeddings=True,
    )
  )
  tokens = torch.from_numpy(make_batch(BATCH, LENGTH, shape.vocab_size).tokens.astype(np.int64))

  def step():
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()

  return step


def time_in_turns(steps: dict, repeats: int = 5) -> dict[str, float]:
  """Median seconds of each step, the steps taking turns after one warm-up each."""
  seconds: dict[str, list[float]] = {name: [] for name in steps}
  for step in steps.values():
    step()
  for _ in range(repeats):
    for name, step in steps.items():
      start = time.perf_counter()
      step()
      seconds[name].append(time.perf_counter() - start)
  return {name: statistics.median(times) for name, times in seconds.items()}


def outer_step_compile_seconds(num_layers: int) -> float:
  """Seconds XLA takes for the outer step (mixed, T = 4) of a decoder of that depth, width 64, no cache."""
  graphdef, params = nnx.split(models.Decoder(decoder_config(num_layers, width=64), rngs=nnx.Rngs(0)))
  apply = lambda params, memory, batch: nnx.merge(graphdef, params)(batch.tokens, batch.segment_ids, batch.positions)
  loss = lambda params, meta_params, batch, rng: sft.inner_loss(apply, params, meta_params, batch)
  problem = metagrad.Problem(
    inner_loss=loss, outer_loss=loss, optimizer=lambda m: sft.optimizer({"learning_rate": m["learning_rate"]}, 100)
  )
  meta_params = {"learning_rate": jnp.float32(1e-3), "mixture_logits": jnp.zeros(2), "memory": None}
  state = metagrad.init(problem, meta_params, params)
  batch = make_batch(4, 64)
  inner = jax.tree.map(lambda x: np.stack([x] * 4), batch)
  lowered = jax.jit(metagrad.value_and_grad(problem)).lower(meta_params, state, inner, batch, jax.random.key(0))
  start = time.perf_counter()
  lowered.compile()
  return time.perf_counter() - start


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--json", help="file to write the figures to")
  arguments = parser.parse_args()
  figures: dict = {}
  for name, shape in SHAPES.items():
    seconds = time_in_turns({"mftjax": jax_step(shape), "torch": torch_step(shape)})
    rates = {side: BATCH * LENGTH / value for side, value in seconds.items()}
    figures[name] = {"tokens_per_second": rates, "ratio": rates["mftjax"] / rates["torch"]}
    print(f"{name:14s}" + "".join(f"{side} {rate:7.0f} tokens/s  " for side, rate in rates.items()), end="")
    print(f"mftjax / torch {figures[name]['ratio']:.2f}")
  compiled = {depth: outer_step_compile_seconds(depth) for depth in COMPILE_DEPTHS}
  figures["compile_seconds"] = compiled
  figures["compile_ratio"] = compiled[COMPILE_DEPTHS[-1]] / compiled[COMPILE_DEPTHS[0]]
  print("".join(f"compile at {depth} layers {value:.1f} s  " for depth, value in compiled.items()), end="")
  print(f"ratio {figures['compile_ratio']:.2f}")
  if arguments.json:
    files.write_json(arguments.json, figures)


if __name__ == "__main__":
  main()
