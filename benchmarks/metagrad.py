"""What a meta-gradient costs beside the plain training steps that it goes through, and beside other implementations.

python -m benchmarks.metagrad [--small] [--json=FILE] [--no-peers]

FLOPs are those of matmuls in the optimised HLO, loops counted with their trip counts (benchmarks.xla_cost); temporaries
are XLA's; both as ratios to the plain steps of the same run (`plain`). Wall times are medians, all variants of a case
taking turns. An outer batch is as large as an inner one, so its loss adds about 1 / T to every ratio. `--small` takes
less than 5 minutes on 2 cores.
"""

import argparse
import dataclasses
import math
import platform
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import decoder, peers, xla_cost
from mftjax import files, metagrad, models, sft

VOCAB, NUM_SOURCES, LORA_RANK = 512, 4, 8
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Case:
  """A model, its data and its meta-parameters."""

  layers: int = 4
  width: int = 128
  length: int = 128
  rows: int = 8
  lora: bool = False
  remat: bool = False
  attention: str = "full"
  memory_slots: int = 0  # more meta-parameters: (1 + key_dim / width) * width each

  def words(self) -> str:
    found = f"{self.layers} x {self.width}, {self.rows} x {self.length} tokens, {'LoRA' if self.lora else 'full'}"
    found += ", layer remat" if self.remat else ""
    found += f", {self.attention}" if self.attention != "full" else ""
    return found + (f", {self.memory_slots} slots" if self.memory_slots else "")


@dataclasses.dataclass(frozen=True)
class Variant:
  """A way to the meta-gradient, or `plain`: the steps alone."""

  method: str
  options: tuple[tuple[str, Any], ...] = ()
  hyperparameters_only: bool = False

  @classmethod
  def of(cls, method: str, hyperparameters_only: bool = False, **options: Any) -> "Variant":
    return cls(method, tuple(options.items()), hyperparameters_only)


VARIANTS = {
  "plain": Variant.of("plain"),
  "mixed, activations": Variant.of("mixed", recovery="store", save="activations"),
  "mixed, gradients": Variant.of("mixed", recovery="store", save="gradients"),
  "mixed, checkpoint": Variant.of("mixed", recovery="checkpoint"),
  "mixed, invert + gradients": Variant.of("mixed", recovery="invert", save="gradients"),
  "mixed, invert, nothing": Variant.of("mixed", recovery="invert", save="nothing"),
  "mixed, invert, no anchors": Variant.of("mixed", recovery="invert", save="nothing", every=2**20),
  "finite difference": Variant.of("finite_difference", recovery="store", save="gradients"),
  "finite difference, central": Variant.of("finite_difference", central=True, recovery="store", save="gradients"),
  "first order": Variant.of("first_order", recovery="store", save="gradients"),
  "first order, lr and decay": Variant.of("first_order", True, recovery="store", save="gradients"),
  "reverse": Variant.of("reverse"),
  "naive reverse": Variant.of("naive"),
}


def build(case: Case, variant: Variant, steps: int):
  """`(function, arguments)` of one call; the function returns the gradient, or for `plain` the final params."""
  shape = dataclasses.replace(
    decoder.decoder_config(case.layers, case.width),
    vocab_size=VOCAB,
    remat=case.remat,
    attention=case.attention,
    max_length=case.length,
  )
  model = models.Decoder(shape, rngs=nnx.Rngs(0))
  if case.memory_slots:
    model.attach_memory(models.Memory(case.memory_slots, case.width, 32, 2, rngs=nnx.Rngs(1)), (0,))
  if case.lora:
    models.lora.add(model, LORA_RANK, 16.0, models.lora.TARGETS, rngs=nnx.Rngs(2))
  trained = models.lora.LoRAParam if case.lora else nnx.Param
  graphdef, memory, params, frozen = nnx.split(model, models.MemoryParam, trained, ...)
  # eps: with 1e-8 and moments that start at zero, what one compares between methods is rounding.
  optimizer = lambda meta: sft.optimizer({**jax.tree.map(jnp.exp, meta["hyperparameters"]), "eps": 1e-4}, steps)
  fixed = {"mixture_logits": jnp.zeros(NUM_SOURCES), "memory": memory}
  meta_params = {"hyperparameters": {"learning_rate": jnp.log(1e-3), "weight_decay": jnp.log(0.01)}}
  if not variant.hyperparameters_only:
    meta_params |= fixed
  batch = decoder.make_batch(case.rows, case.length, VOCAB)
  sources = np.arange(case.rows, dtype=np.int32) % NUM_SOURCES
  batch = dataclasses.replace(batch, source=sources, proposal=np.full(case.rows, 1 / NUM_SOURCES, np.float32))
  draw = np.random.default_rng(0).integers(0, VOCAB, (steps, case.rows, case.length)).astype(np.int32)
  batches = dataclasses.replace(jax.tree.map(lambda x: np.stack([x] * steps), batch), tokens=draw)

  def step(meta_params, params, frozen, batches, batch):
    def apply(params, memory, batch):
      return nnx.merge(graphdef, memory, params, frozen)(batch.tokens, batch.segment_ids, batch.positions)

    loss = lambda params, meta, batch, rng: sft.inner_loss(apply, params, {**fixed, **meta}, batch)
    problem = metagrad.Problem(loss, loss, optimizer)
    state = metagrad.init(problem, meta_params, params)
    rng = jax.random.key(0)
    run = lambda meta_params, state: jax.lax.scan(
      lambda state, batch: (metagrad.inner_step(problem, meta_params, state, batch, rng)[0], None), state, batches
    )[0]
    if variant.method == "plain":
      return run(meta_params, state).params
    if variant.method == "naive":
      outer = lambda meta_params: loss(run(meta_params, state).params, meta_params, batch, rng)
      return jax.grad(outer)(meta_params)
    return metagrad.value_and_grad(problem, variant.method, **dict(variant.options))(
      meta_params, state, batches, batch, rng
    ).grad

  return step, jax.device_put((meta_params, params, frozen, batches, batch))


def measure(case: Case, steps: int, names: list[str], repeats: int, reference: str | None = None) -> list[dict]:
  """Rows of `variant`, `steps`, `flops`, `matmul_flops`, `temporaries`, `seconds` (None if repeats is 0), `error`."""
  compiled, arguments, rows = {}, {}, []
  for name in names:
    function, arguments[name] = build(case, VARIANTS[name], steps)
    start = time.perf_counter()
    compiled[name] = jax.jit(function).lower(*arguments[name]).compile()
    cost = xla_cost.cost(compiled[name])
    kept = {key: cost[key] for key in ("flops", "matmul_flops", "temporaries")}
    rows.append(
      {"case": case.words(), "variant": name, "steps": steps, "compile_seconds": time.perf_counter() - start, **kept}
    )
  seconds: dict[str, list[float]] = {name: [] for name in names}
  results = {}
  for _ in range(repeats + 1 if repeats else 0):  # the first one warms up
    for name in names:
      start = time.perf_counter()
      results[name] = jax.block_until_ready(compiled[name](*arguments[name]))
      seconds[name].append(time.perf_counter() - start)
  for row in rows:
    name = row["variant"]
    row["seconds"] = statistics.median(seconds[name][1:]) if repeats else None
    row["error"] = (
      relative_error(results[name], results[reference]) if reference and name != "plain" and repeats else None
    )
  plain = rows[0]
  for row in rows:
    for key in ("flops", "matmul_flops", "temporaries", "seconds"):
      row[f"{key}_ratio"] = row[key] / plain[key] if row[key] else None
  return rows


def relative_error(got: Any, want: Any) -> float:
  """The largest error of a leaf that both have, relative to the leaf's norm."""
  want = dict(jax.tree_util.tree_leaves_with_path(want))
  errors = [
    float(np.linalg.norm(np.ravel(leaf - want[path])) / max(np.linalg.norm(np.ravel(want[path])), 1e-30))
    for path, leaf in jax.tree_util.tree_leaves_with_path(got)
  ]
  return max(errors)


def format_table(rows: list[dict]) -> str:
  """The rows of one case as text."""
  lines = ["", rows[0]["case"]]
  lines += [f"  {'T':>4s} {'variant':27s} {'FLOPs':>6s} {'time':>6s} {'time/FLOPs':>10s} {'MiB':>8s} error"]
  for row in rows:
    wall = row["seconds_ratio"]
    cells = (f"{wall:6.2f} {wall / row['matmul_flops_ratio']:10.2f}") if wall else f"{'-':>6s} {'-':>10s}"
    error = "" if row["error"] is None else f"{row['error']:.0e}"
    lines.append(
      f"  {row['steps']:4d} {row['variant']:27s} {row['matmul_flops_ratio']:6.2f} {cells} "
      f"{row['temporaries'] / MIB:8.1f} {error}".rstrip()
    )
  return "\n".join(lines)


def targets(rows: list[dict]) -> list[tuple[str, float, float]]:
  """`(what, figure, limit)` of each target that these rows speak of."""

  def find(variant, steps, lora=False, key="matmul_flops_ratio"):
    for row in rows:
      if (row["variant"], row["steps"], "LoRA" in row["case"]) == (variant, steps, lora):
        return row[key]
    return math.nan

  flat = lambda name, lora=False: find(name, 128, lora, "temporaries") / find(name, 8, lora, "temporaries")
  wall = [
    row["seconds_ratio"] / row["matmul_flops_ratio"] for row in rows if row["seconds"] and row["variant"] != "plain"
  ]
  return [
    ("FLOPs, mixed with gradients saved, full, T = 32", find("mixed, gradients", 32), 3.75),
    ("FLOPs, mixed with gradients saved, LoRA, T = 32", find("mixed, gradients", 32, True), 3.1),
    ("FLOPs, nothing saved, T = 128", find("mixed, invert, nothing", 128), 5.8),
    ("temporaries, nothing saved, T = 128 / T = 8, exact states every 16 steps", flat("mixed, invert, nothing"), 1.1),
    ("temporaries, nothing saved, T = 128 / T = 8, no exact states", flat("mixed, invert, no anchors"), 1.1),
    ("temporaries, nothing saved, T = 128 / T = 8, LoRA", flat("mixed, invert, nothing", True), 1.1),
    (
      "temporaries, nothing saved / naive reverse, T = 16",
      find("mixed, invert, nothing", 16, key="temporaries") / find("naive reverse", 16, key="temporaries"),
      1 / 25,
    ),
    ("FLOPs, one-sided finite difference, T = 32", find("finite difference", 32), 2.1),
    ("FLOPs, first order on learning rate and decay, T = 32", find("first order, lr and decay", 32), 1.1),
    ("wall time / FLOPs ratio, the worst variant", max(wall, default=math.nan), 1.25),
    ("wall time / FLOPs ratio, the median variant", statistics.median(wall) if wall else math.nan, 1.25),
  ]


SMALL = Case(layers=4, width=128, length=128, rows=4)
# Wider, with one row: what adapters and attention add to a frozen base shrinks with the width.
SMALL_LORA = Case(layers=4, width=256, length=128, rows=1, lora=True)


def small_tables() -> Iterator[list[dict]]:
  timed = ["plain", "mixed, gradients", "mixed, activations", "mixed, invert, nothing", "finite difference"]
  timed += ["first order, lr and decay"]
  yield measure(SMALL, 32, timed, 1, "mixed, gradients")
  for steps in (8, 128):
    yield measure(SMALL, steps, ["plain", "mixed, invert, nothing", "mixed, invert, no anchors"], 0)
  yield measure(dataclasses.replace(SMALL, remat=True), 16, ["plain", "mixed, invert, nothing", "naive reverse"], 0)
  yield measure(SMALL_LORA, 32, ["plain", "mixed, gradients", "mixed, activations"], 1, "mixed, gradients")
  for steps in (8, 128):
    yield measure(SMALL_LORA, steps, ["plain", "mixed, invert, nothing"], 0)


def full_tables() -> Iterator[list[dict]]:
  base, lora = SMALL, SMALL_LORA
  yield measure(base, 8, list(VARIANTS), 2, "reverse")
  lora_variants = ["plain", "mixed, activations", "mixed, gradients", "mixed, invert, nothing", "reverse"]
  yield measure(lora, 8, lora_variants, 2, "reverse")
  # What does not keep every step's activations, over the unroll length; times of the shorter ones only.
  some = ["plain", "mixed, gradients", "mixed, checkpoint", "mixed, invert, nothing", "mixed, invert, no anchors"]
  some += ["finite difference", "first order, lr and decay", "reverse"]
  for steps, repeats in ((2, 2), (32, 1), (128, 0)):
    yield measure(base, steps, some, repeats, "reverse")
    yield measure(
      lora, steps, [name for name in lora_variants if steps <= 32 or "activ" not in name], repeats, "reverse"
    )
  some = ["plain", "mixed, gradients", "mixed, activations", "mixed, invert, nothing", "naive reverse"]
  for change in (
    {},
    {"remat": True},
    {"layers": 8},
    {"width": 256},
    {"length": 512, "rows": 1},
    {"length": 512, "rows": 1, "attention": "blockwise"},
    {"memory_slots": 64},
    {"memory_slots": 1024},
  ):
    yield measure(dataclasses.replace(base, **change), 16, some, 1, "mixed, gradients")


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--small", action="store_true", help="less than 5 minutes on 2 cores")
  parser.add_argument("--no-peers", action="store_true", help="leave the other implementations out")
  parser.add_argument("--json", help="file to write the figures to")
  arguments = parser.parse_args()
  device = jax.devices()[0]
  machine = {
    "device": getattr(device, "device_kind", device.platform),
    "processor": platform.processor() or platform.machine(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "optax": optax.__version__,
  }
  print("  ".join(f"{name} {value}" for name, value in machine.items()))
  rows = []
  for table in small_tables() if arguments.small else full_tables():
    rows += table
    print(format_table(table), flush=True)
  print("\ntarget")
  for what, figure, limit in targets(rows):
    verdict = "-" if math.isnan(figure) else "yes" if figure <= limit else "NO"
    print(f"  {verdict:3s} {figure:7.3f} <= {limit:5.3f}  {what}")
  compared = []
  if not arguments.no_peers:
    compared = peers.compare(["mlp", "transformer"], [8] if arguments.small else [2, 8, 32], arguments.small)
    print("\n" + peers.format_table(compared))
  if arguments.json:
    files.write_json(arguments.json, {"machine": machine, "rows": rows, "peers": compared})


if __name__ == "__main__":
  main()
