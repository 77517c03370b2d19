"""A memory of a million product-key slots beside the MLP of one layer: time, FLOPs and how much a step touches.

python -m benchmarks.memory [--json=FILE] [--small] [--num_heads=N]

The MLP has SmolLM2-135M's shape (SwiGLU, width 576, inner width 1536), the memory 2^20 slots of the same width, key
width 128, the 16 best slots for each head, and 4,096 slots open to writes: those most specific to the tokens. Both
add to 512 tokens of f32. `forward` is the output; `training` the gradient of its mean square and an Adam step, of all
the MLP's weights and of what is written into the memory; neither passes a gradient on to its input. Most of the
memory's time is the search for the best half keys, which grows with `--num_heads`.

The sides take turns, so that another load on the machine falls on both; medians and their ratio are printed. The run
takes 4 GB, and half a minute on two cores.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import xla_cost
from mftjax import files, models


@dataclasses.dataclass(frozen=True)
class Sizes:
  num_slots: int = 2**20
  dim: int = 576
  inner: int = 1536
  key_dim: int = 128
  num_heads: int = 2
  top_k: int = 16
  num_rows: int = 4096
  tokens: int = 512


SMALL = Sizes(num_slots=2**10, dim=32, inner=64, key_dim=16, num_rows=8, tokens=16)


@dataclasses.dataclass
class Side:
  """One of the two, as `apply(trained, frozen, hidden)`."""

  apply: Callable[[Any, Any, jax.Array], jax.Array]
  trained: Any
  frozen: Any


def mlp(sizes: Sizes) -> Side:
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = {"gate": (sizes.dim, sizes.inner), "up": (sizes.dim, sizes.inner), "down": (sizes.inner, sizes.dim)}
  weights = {n: jax.random.normal(k, s) * s[0] ** -0.5 for (n, s), k in zip(shapes.items(), keys, strict=True)}
  apply = lambda w, _, x: x + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]
  return Side(apply, weights, None)


def memory(sizes: Sizes, hidden: jax.Array) -> Side:
  """The memory, open at the slots that `hidden` reads more than other random states do."""
  shape = (sizes.num_slots, sizes.dim, sizes.key_dim, sizes.num_heads, sizes.top_k)
  built = models.Memory(*shape, product_keys=True, rngs=nnx.Rngs(0))
  others = jax.random.normal(jax.random.key(1), (4, *hidden.shape))
  usage = nnx.jit(lambda memory, hidden: memory.usage(hidden))
  scores = models.slots.tf_idf(usage(built, hidden), jnp.stack([usage(built, other) for other in others]))
  built.open(sizes.num_rows)
  built.written[...] = models.slots.most_specific(scores, sizes.num_rows)
  graphdef, write, rest = nnx.split(built, models.MemoryWrite, ...)
  return Side(lambda write, rest, x: nnx.merge(graphdef, write, rest)(x), write, rest)


def measure(sizes: Sizes, repeats: int) -> dict[str, Any]:
  """Medians in seconds, ratios, costs and touched slots."""
  hidden = jax.random.normal(jax.random.key(2), (sizes.tokens, sizes.dim))
  sides = {"mlp": mlp(sizes), "memory": memory(sizes, hidden)}
  adam = optax.adam(1e-3)
  figures: dict[str, Any] = {"sizes": dataclasses.asdict(sizes), "cost": {}}
  runs: dict[str, Callable[[], Any]] = {}
  for name, side in sides.items():

    def train(trained, opt_state, frozen, hidden, side=side):
      grads = jax.grad(lambda trained: jnp.mean(side.apply(trained, frozen, hidden) ** 2))(trained)
      updates, opt_state = adam.update(grads, opt_state, trained)
      return optax.apply_updates(trained, updates), opt_state

    forward = jax.jit(side.apply).lower(side.trained, side.frozen, hidden).compile()
    step_arguments = (side.trained, adam.init(side.trained), side.frozen, hidden)
    step = jax.jit(train).lower(*step_arguments).compile()
    runs[f"forward {name}"] = lambda forward=forward, side=side: forward(side.trained, side.frozen, hidden)
    runs[f"training {name}"] = lambda step=step, arguments=step_arguments: step(*arguments)
    figures["cost"] |= {f"forward {name}": xla_cost.cost(forward), f"training {name}": xla_cost.cost(step)}
  before, after = (jax.tree.leaves(tree)[0] for tree in (sides["memory"].trained, runs["training memory"]()[0]))
  figures["open"] = sizes.num_rows / sizes.num_slots
  figures["touched"] = int(np.sum(np.any(np.asarray(before != after), axis=1))) / sizes.num_slots
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for turn in range(repeats + 1):
    for name, run in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      if turn:  # the first one warms up
        seconds[name].append(time.perf_counter() - start)
  figures["seconds"] = {name: statistics.median(times) for name, times in seconds.items()}
  ratio = lambda part: figures["seconds"][f"{part} memory"] / figures["seconds"][f"{part} mlp"]
  figures["ratio"] = {part: ratio(part) for part in ("forward", "training")}
  return figures


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--json", help="file to write the figures to")
  parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
  parser.add_argument("--num_heads", type=int, default=Sizes.num_heads, help="of the memory")
  parser.add_argument("--repeats", type=int, default=21, help="turns that the medians are over")
  given = parser.parse_args(arguments)
  sizes = dataclasses.replace(SMALL if given.small else Sizes(), num_heads=given.num_heads)
  figures = measure(sizes, given.repeats)
  for name, cost in figures["cost"].items():
    line = f"{name:16s} {1e3 * figures['seconds'][name]:8.2f} ms  {cost['flops'] / 1e9:7.3f} GFLOP  "
    line += f"{cost['temporaries'] / 2**20:7.1f} MiB of temporaries"
    print(line + (f"  not counted: {', '.join(cost['uncounted'])}" if cost["uncounted"] else ""))
  for part, ratio in figures["ratio"].items():
    print(f"{part}: memory / MLP {ratio:.2f}")
  print(f"slots open to writes {figures['open']:.3%}, changed by a step {figures['touched']:.3%}")
  if given.json:
    files.write_json(given.json, figures)


if __name__ == "__main__":
  main()
