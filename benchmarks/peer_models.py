"""The two models that the peers are compared on, in JAX and in torch, with the same weights and data.

Each model is written twice, `(params, batch) -> [batch] losses`, with the same maths line by line. Weights and data
come from numpy and one seed. A batch's rows belong to `NUM_SOURCES` sources; the inner loss weighs a row with
softmax(mixture_logits)[source] * NUM_SOURCES, the outer loss is the plain mean.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NUM_SOURCES = 4
LEARNING_RATE, B1, B2 = 1e-3, 0.9, 0.999
# Not the usual 1e-8: with moments that start at 0, the first update is then the gradient's sign, whose derivative is
# the difference of two equal numbers, and in f32 every method would show the rounding of that instead of its own.
EPS = 1e-3
MODELS = ("mlp", "transformer")
MASKED = -1e9  # attention score of what lies ahead


@dataclasses.dataclass(frozen=True)
class Shape:
  """`rows` a batch; `vocab` tokens or classes; `length` tokens a row or features of the MLP's input."""

  width: int
  layers: int
  rows: int
  length: int
  vocab: int


SHAPES = {
  ("mlp", True): Shape(width=256, layers=3, rows=128, length=64, vocab=10),
  ("mlp", False): Shape(width=512, layers=4, rows=256, length=128, vocab=10),
  ("transformer", True): Shape(width=64, layers=2, rows=8, length=32, vocab=32),
  ("transformer", False): Shape(width=128, layers=4, rows=16, length=64, vocab=64),
}
HEAD_DIM = 32


@dataclasses.dataclass(frozen=True)
class Case:
  """One comparison: everything that a side gets.

  Attributes:
    model: one of `MODELS`.
    params: name -> f32 array.
    inner: batches of the unroll, leaves `[steps, rows, ...]`.
    outer: batch of the outer loss, leaves `[rows, ...]`.
    meta_params: `log_learning_rate` scalar and `mixture_logits [NUM_SOURCES]`.
  """

  model: str
  params: dict[str, np.ndarray]
  inner: dict[str, np.ndarray]
  outer: dict[str, np.ndarray]
  meta_params: dict[str, np.ndarray]


def make_case(model: str, steps: int, small: bool, seed: int = 0) -> Case:
  rng = np.random.default_rng(seed)
  shape = SHAPES[model, small]
  make_params, make_data = {"mlp": (_mlp_params, _mlp_data), "transformer": (_transformer_params, _tokens)}[model]
  data = make_data(rng, shape, (steps + 1) * shape.rows)
  data = {name: x.reshape(steps + 1, shape.rows, *x.shape[1:]) for name, x in data.items()}
  meta_params = {
    "log_learning_rate": np.float32(math.log(LEARNING_RATE)),
    "mixture_logits": np.linspace(-0.5, 0.5, NUM_SOURCES).astype(np.float32),
  }
  inner, outer = {k: x[:-1] for k, x in data.items()}, {k: x[-1] for k, x in data.items()}
  return Case(model, make_params(rng, shape), inner, outer, meta_params)


def _weight(rng: np.random.Generator, *shape: int) -> np.ndarray:
  return (rng.standard_normal(shape) / math.sqrt(shape[0])).astype(np.float32)


def _mlp_params(rng: np.random.Generator, shape: Shape) -> dict[str, np.ndarray]:
  sizes = [shape.length] + [shape.width] * shape.layers + [shape.vocab]
  params = {}
  for i, (before, after) in enumerate(itertools.pairwise(sizes)):
    params |= {f"w{i}": _weight(rng, before, after), f"b{i}": np.zeros(after, np.float32)}
  return params


def _mlp_data(rng: np.random.Generator, shape: Shape, rows: int) -> dict[str, np.ndarray]:
  """Classes of a linear teacher; the further a source's number, the more of its labels are drawn at random."""
  inputs = rng.standard_normal((rows, shape.length)).astype(np.float32)
  labels = np.argmax(inputs @ rng.standard_normal((shape.length, shape.vocab)), axis=1)
  source = np.arange(rows) % NUM_SOURCES
  is_random = rng.random(rows) < source / NUM_SOURCES
  labels = np.where(is_random, rng.integers(0, shape.vocab, rows), labels)
  return {"inputs": inputs, "labels": labels.astype(np.int32), "source": source.astype(np.int32)}


def _transformer_params(rng: np.random.Generator, shape: Shape) -> dict[str, np.ndarray]:
  width = shape.width
  params = {"embed": 0.5 * rng.standard_normal((shape.vocab, width)).astype(np.float32)}
  params["position"] = 0.5 * rng.standard_normal((shape.length, width)).astype(np.float32)
  for i in range(shape.layers):
    params |= {f"scale_a{i}": np.ones(width, np.float32), f"scale_m{i}": np.ones(width, np.float32)}
    params |= {f"qkv{i}": _weight(rng, width, 3 * width), f"out{i}": _weight(rng, width, width)}
    params |= {f"up{i}": _weight(rng, width, 4 * width), f"down{i}": _weight(rng, 4 * width, width)}
  return params | {"scale_f": np.ones(width, np.float32), "unembed": _weight(rng, width, shape.vocab)}


def _tokens(rng: np.random.Generator, shape: Shape, rows: int) -> dict[str, np.ndarray]:
  """Each token is the one before plus the source's number; with probability 1/2 it is drawn at random instead.

  So every token is in about every batch, and no gradient is exactly 0, where the square root in Adam has no
  derivative: the peers have no eps below it.
  """
  source = np.arange(rows) % NUM_SOURCES
  tokens = rng.integers(0, shape.vocab, (rows, shape.length + 1))
  follows = rng.random((rows, shape.length + 1)) < 0.5
  for i in range(1, shape.length + 1):
    tokens[:, i] = np.where(follows[:, i], (tokens[:, i - 1] + source + 1) % shape.vocab, tokens[:, i])
  return {"tokens": tokens.astype(np.int32), "source": source.astype(np.int32)}


# JAX


def jax_inner_loss(case: Case):
  """`(params, meta_params, batch, rng) -> scalar`, as `metagrad.Problem` takes it."""
  losses = {"mlp": _jax_mlp, "transformer": _jax_transformer}[case.model]

  def inner_loss(params, meta_params, batch, rng):
    del rng
    weights = NUM_SOURCES * jax.nn.softmax(meta_params["mixture_logits"])
    return jnp.mean(weights[batch["source"]] * losses(params, batch))

  return inner_loss


def jax_outer_loss(case: Case):
  losses = {"mlp": _jax_mlp, "transformer": _jax_transformer}[case.model]
  return lambda params, meta_params, batch, rng: jnp.mean(losses(params, batch))


def _jax_nll(logits: jax.Array, labels: jax.Array) -> jax.Array:
  return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]


def _jax_mlp(params: dict[str, jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
  x, last = batch["inputs"], len(params) // 2 - 1
  for i in range(last):
    x = jnp.tanh(x @ params[f"w{i}"] + params[f"b{i}"])
  return _jax_nll(x @ params[f"w{last}"] + params[f"b{last}"], batch["labels"])


def _jax_transformer(params: dict[str, jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
  tokens, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
  rows, length = tokens.shape
  width = params["embed"].shape[1]
  norm = lambda x, scale: scale * x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
  heads = lambda x: x.reshape(rows, length, -1, HEAD_DIM).swapaxes(1, 2)
  ahead = jnp.triu(jnp.ones((length, length), bool), 1)
  x = params["embed"][tokens] + params["position"]
  for i in range(sum(name.startswith("qkv") for name in params)):
    q, k, v = map(heads, jnp.split(norm(x, params[f"scale_a{i}"]) @ params[f"qkv{i}"], 3, -1))
    scores = jnp.where(ahead, MASKED, q @ k.swapaxes(2, 3) / math.sqrt(HEAD_DIM))
    attended = (jax.nn.softmax(scores, -1) @ v).swapaxes(1, 2).reshape(rows, length, width)
    x = x + attended @ params[f"out{i}"]
    x = x + jax.nn.gelu(norm(x, params[f"scale_m{i}"]) @ params[f"up{i}"]) @ params[f"down{i}"]
  return _jax_nll(norm(x, params["scale_f"]) @ params["unembed"], targets).mean(-1)


# torch, imported where it is used: it need not be there


def torch_inner_loss(case: Case):
  """`(params, mixture_logits, batch) -> scalar`; params by name."""
  losses = {"mlp": _torch_mlp, "transformer": _torch_transformer}[case.model]

  def inner_loss(params, mixture_logits, batch):
    weights = NUM_SOURCES * mixture_logits.softmax(0)
    return (weights[batch["source"]] * losses(params, batch)).mean()

  return inner_loss


def torch_outer_loss(case: Case):
  losses = {"mlp": _torch_mlp, "transformer": _torch_transformer}[case.model]
  return lambda params, batch: losses(params, batch).mean()


def torch_tensors(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
  """Integers become 64 bits wide, which torch indexes with."""
  import torch

  return {k: torch.from_numpy(x.astype(np.int64) if x.dtype.kind == "i" else x.copy()) for k, x in arrays.items()}


def torch_module(case: Case):
  """A `torch.nn.Module` that holds the params by their names and gives them back, `module() -> {name: tensor}`."""
  import torch

  class Params(torch.nn.Module):
    def __init__(self):
      super().__init__()
      for name, value in torch_tensors(case.params).items():
        self.register_parameter(name, torch.nn.Parameter(value))

    # By attribute: the libraries put other tensors there while they unroll.
    def forward(self):
      return {name: getattr(self, name) for name in case.params}

  return Params()


def _torch_nll(logits, labels):
  return -logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def _torch_mlp(params, batch):
  x, last = batch["inputs"], len(params) // 2 - 1
  for i in range(last):
    x = (x @ params[f"w{i}"] + params[f"b{i}"]).tanh()
  return _torch_nll(x @ params[f"w{last}"] + params[f"b{last}"], batch["labels"])


def _torch_transformer(params, batch):
  import torch

  tokens, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
  rows, length = tokens.shape
  width = params["embed"].shape[1]
  norm = lambda x, scale: scale * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
  heads = lambda x: x.reshape(rows, length, -1, HEAD_DIM).transpose(1, 2)
  ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
  x = params["embed"][tokens] + params["position"]
  for i in range(sum(name.startswith("qkv") for name in params)):
    q, k, v = map(heads, (norm(x, params[f"scale_a{i}"]) @ params[f"qkv{i}"]).chunk(3, -1))
    scores = (q @ k.transpose(2, 3) / math.sqrt(HEAD_DIM)).masked_fill(ahead, MASKED)
    attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, width)
    x = x + attended @ params[f"out{i}"]
    gelu = torch.nn.functional.gelu(norm(x, params[f"scale_m{i}"]) @ params[f"up{i}"], approximate="tanh")
    x = x + gelu @ params[f"down{i}"]
  return _torch_nll(norm(x, params["scale_f"]) @ params["unembed"], targets).mean(-1)
