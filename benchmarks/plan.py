"""What an outer step would take of each device of a cluster, for models of 8 and 70 billion parameters.

python -m benchmarks.plan [--json=FILE] [--cases="NAME;..."] [--platform=tpu|cpu] [--hlo=FOLDER]

The very program of `experiments.meta_train` is compiled for a cluster that is not there, from the shapes of the arrays:
for TPU v5p by libtpu, which needs no TPU (`pip install libtpu` of the version that `jax[tpu]` asks for), or, with
`--platform=cpu`, for as many devices of a CPU. A case takes four minutes or more of one core.

Llama-3-8B's shape on 64 devices and Llama-3-70B's on 256; method `mixed`, 16 inner steps; parameters and Adam's state
in f32, computation in bf16, layer remat, blockwise attention. `full` trains all parameters, `lora` a LoRA of rank 16
on the attention's matrices. Each row is one device's: arguments (parameters, twice, as a fresh run may start from
them, with Adam's state and the batches), results and temporaries in GB (1e9 bytes); FLOPs of matmuls and bytes
received through collectives (benchmarks.collectives) in one outer step.

What fits an H100 is said of the same bytes, not of a program for it. `estimate` is no measurement: the FLOPs at
40 % of the peak, 459 TFLOP/s (v5p) and 989 TFLOP/s (H100), bf16, dense. What blockwise attention leaves out, keys
that come after the queries, is counted as if it were computed.
"""

import argparse
import dataclasses
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks import collectives, outer_step, xla_cost
from mftjax import files, models, parallel
from mftjax.models import layers

GB = 1e9
UTILISATION = 0.4
UNROLL_LENGTH = 16
LORA_RANK = 16


@dataclasses.dataclass(frozen=True)
class Device:
  """Of a kind, by its vendor's data sheet."""

  memory: float  # bytes
  peak: float  # FLOP/s, bf16


DEVICES = {"v5p": Device(95e9, 459e12), "H100": Device(80e9, 989e12)}

LLAMA_8B = models.DecoderConfig(
  family="llama",
  vocab_size=128256,
  hidden_size=4096,
  intermediate_size=14336,
  num_layers=32,
  num_heads=32,
  num_kv_heads=8,
  head_dim=128,
  rope_theta=500_000.0,
  norm_eps=1e-5,
  max_length=8192,
  remat=True,
  attention="blockwise",
  dtype=jnp.bfloat16,
)
LLAMA_70B = dataclasses.replace(LLAMA_8B, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64)


@dataclasses.dataclass(frozen=True)
class Case:
  """A model on a cluster."""

  shape: models.DecoderConfig
  topology: str  # of TPU v5p, chips along each axis
  mesh: tuple[int, int, int, int]  # task, data, fsdp, tensor
  rows: int
  length: int
  lora: bool = False
  recovery: str = "store"
  save: str = "gradients"


CASES = {
  "8B, LoRA": Case(LLAMA_8B, "4x4x4", (1, 1, 64, 1), 64, 4096, lora=True),
  "8B, full": Case(LLAMA_8B, "4x4x4", (1, 1, 64, 1), 64, 2048, recovery="checkpoint"),
  "70B, LoRA": Case(LLAMA_70B, "8x8x4", (1, 1, 256, 1), 256, 2048, lora=True),
  "70B, full": Case(LLAMA_70B, "8x8x4", (1, 1, 256, 1), 256, 2048, recovery="invert", save="nothing"),
}


def mesh_of(case: Case, platform: str) -> Mesh:
  """The case's devices: of a TPU that need not be there, or of the CPU."""
  if platform == "cpu":
    return Mesh(np.asarray(jax.devices()[: np.prod(case.mesh)]).reshape(case.mesh), parallel.AXES)
  from jax.experimental import topologies

  described = topologies.get_topology_desc(platform="tpu", topology_name=f"v5p:{case.topology}")
  return topologies.make_mesh(described, case.mesh, parallel.AXES)


def _pretend_tpu() -> None:
  """Has libtpu not look for a TPU, nor for other hosts of it, which takes minutes where there are none."""
  os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
  jax.config.update("jax_platforms", "cpu")


def measure(name: str, case: Case, platform: str, folder: str | None = None) -> dict[str, Any]:
  """One row of figures, of one device; the program's HLO goes into the folder."""
  config = outer_step.base_config(case.shape, case.length, case.rows, UNROLL_LENGTH)
  config.lora.rank = LORA_RANK if case.lora else 0
  config.meta.recovery, config.meta.save = case.recovery, case.save
  start = time.perf_counter()
  compiled = outer_step.lower(config, case.shape, parallel.Layout(mesh_of(case, platform))).compile()
  if folder:
    files.write(pathlib.Path(folder) / f"{name}.hlo", compiled.as_text())
  cost = xla_cost.cost(compiled)
  held = cost["arguments"] + cost["temporaries"] + cost["outputs"] - compiled.memory_analysis().alias_size_in_bytes
  kept = {key: cost[key] for key in ("arguments", "outputs", "temporaries", "matmul_flops")}
  return kept | {
    "case": name,
    "devices": int(np.prod(case.mesh)),
    "mesh": dict(zip(parallel.AXES, case.mesh, strict=True)),
    "rows": case.rows,
    "length": case.length,
    "recovery": f"{case.recovery}, {case.save}",
    "held": held,
    "fits": {name: held < device.memory for name, device in DEVICES.items()},
    "received": collectives.count_bytes(compiled),
    "estimate_seconds": {n: cost["matmul_flops"] / (UTILISATION * device.peak) for n, device in DEVICES.items()},
    "compile_seconds": time.perf_counter() - start,
  }


def format_row(row: dict[str, Any]) -> str:
  mesh = " x ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
  fits = ", ".join(f"{name} {'yes' if fit else 'NO'}" for name, fit in row["fits"].items())
  seconds = ", ".join(f"{name} {value:.0f} s" for name, value in row["estimate_seconds"].items())
  kinds = ", ".join(f"{kind} {number / GB:.1f}" for kind, number in row["received"].items() if kind != "total")
  return "\n".join(
    [
      f"\n{row['case']}: {row['devices']} devices, {mesh}, {row['rows']} x {row['length']} tokens, {row['recovery']}",
      f"  arguments {row['arguments'] / GB:.2f} GB, results {row['outputs'] / GB:.2f}, "
      f"temporaries {row['temporaries'] / GB:.2f}; together {row['held'] / GB:.1f}, fits: {fits}",
      f"  {row['matmul_flops'] / 1e15:.2f} PFLOP, {row['received']['total'] / GB:.1f} GB received ({kinds})",
      f"  estimate at {UTILISATION:.0%} of the peak: {seconds}; compiled in {row['compile_seconds']:.0f} s",
    ]
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--json", help="file to write the figures to")
  parser.add_argument("--cases", default=";".join(CASES), help="which ones, with ; between them")
  parser.add_argument("--platform", choices=("tpu", "cpu"), default="tpu", help="what is compiled for")
  parser.add_argument("--hlo", help="folder to write the compiled programs to, as text")
  arguments = parser.parse_args()
  if arguments.platform == "cpu":
    jax.config.update("jax_num_cpu_devices", 256)
  else:
    _pretend_tpu()
  # The trace would ask the machine at hand, and split long sums as on a CPU.
  layers.LONGEST_SUM = 2**30
  rows = []
  for name in arguments.cases.split(";"):
    rows.append(measure(name, CASES[name], arguments.platform, arguments.hlo))
    print(format_row(rows[-1]), flush=True)
  if arguments.json:
    files.write_json(arguments.json, {"platform": arguments.platform, "jax": jax.__version__, "rows": rows})


if __name__ == "__main__":
  main()
