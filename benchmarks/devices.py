"""What a device of many holds, computes and receives in an outer step, from programs compiled for eight devices.

python -m benchmarks.devices [--json=FILE]

The devices are simulated on a CPU and nothing is run: some minutes on two cores. The model has four layers of width
256 (benchmarks.decoder) with a head of its own, all of it trained; 8 inner steps of 16 x 128 tokens, method `mixed`
with gradients saved.

`fsdp`: the outer step of one task split over 1, 2, 4 and 8 devices: arguments, temporaries, FLOPs and received bytes of
one of them. Arguments are the parameters, Adam's state of them and the batches.

`tasks`: meta-gradients of 1, 2, 4 and 8 tasks on as many devices (`configs/compare.py:small`), which should cost each
device what one task on one device does.

`collectives`: bytes that a device of eight receives, by benchmarks.collectives, beside those that it must:

- a gradient gathers the layers' parameters, L bytes, twice, on its way forward and on its way back, since what is
  gathered is dropped after use; the embedding and the head, E bytes together, once. The outer step takes T inner
  gradients, the outer loss's, and T Hessian products, which are a gradient and its tangent and so gather the
  parameters and u both: (3 T + 1) (2 L + E);
- each of these ends with a gradient, or a Hessian product, of which every device gets its part: (2 T + 1) (L + E)
  are scattered;
- the meta-gradient is summed: twice its bytes, as an all-reduce is a scatter and a gather.

All that times (n - 1) / n on n devices: of a ring, a device has its own part already.
"""

import argparse
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks import collectives, decoder, outer_step, xla_cost
from configs import compare as compare_config
from mftjax import files, models, parallel
from mftjax.data import meta_tasks
from mftjax.loops import setting as setting_lib
from mftjax.loops import task as task_lib

COUNTS = (1, 2, 4, 8)
MIB = 2**20


class CompiledLayout(parallel.Layout):
  """A layout whose programs over tasks are compiled where they would be run."""

  def over_tasks(self, program):
    return lambda shared, *args: jax.jit(self.mapped(program)).lower(shared, args).compile()


@dataclasses.dataclass(frozen=True)
class Case:
  """A model, its data and the window."""

  shape: models.DecoderConfig
  rows: int
  length: int
  unroll_length: int


CASE = Case(dataclasses.replace(decoder.decoder_config(4), tie_embeddings=False), rows=16, length=128, unroll_length=8)


def split_step(case: Case, fsdp: int) -> jax.stages.Compiled:
  """The outer step of one task on so many devices."""
  config = outer_step.base_config(case.shape, case.length, case.rows, case.unroll_length)
  config.meta.recovery, config.meta.save = "store", "gradients"
  mesh = Mesh(np.asarray(jax.devices()[:fsdp]).reshape(1, 1, fsdp, 1), parallel.AXES)
  return outer_step.lower(config, case.shape, parallel.Layout(mesh)).compile()


def task_gradients(num_tasks: int) -> jax.stages.Compiled:
  """Meta-gradients of so many tasks on as many devices."""
  config = compare_config.get_config("small")
  config.parallel.task = num_tasks
  network, _ = task_lib.load_model(config)
  model = setting_lib.base_model(config, network)
  model = dataclasses.replace(model, layout=CompiledLayout(model.layout.mesh))
  pools = meta_tasks.build_pools(config.length, 4, config.seed)
  found = setting_lib.assemble(config, model, pools, {})
  zeros = jnp.zeros(len(pools.ability_names))
  found = dataclasses.replace(found, scale={"validation": setting_lib.Scale(zeros, zeros - 1)})
  tasks = meta_tasks.sample(pools, "unseen", num_tasks, seed=0)
  recipe = {"hyperparameters": found.space.init(found.defaults), "mixture_logits": jnp.zeros(tasks.source.shape[1])}
  recipes = jax.tree.map(lambda x: jnp.stack([x] * num_tasks), recipe)
  return found.gradients(recipes, tasks, jax.random.split(jax.random.key(0), num_tasks))


def measure(compiled: jax.stages.Compiled, **named: Any) -> dict[str, Any]:
  """A row: what it is of, and what a device of the program needs."""
  cost = xla_cost.cost(compiled)
  kept = {name: cost[name] for name in ("arguments", "temporaries", "flops")}
  return named | kept | {"received": collectives.count_bytes(compiled)}


def needed_bytes(case: Case, fsdp: int) -> dict[str, float]:
  """What a device must receive, by what for; see above."""
  shape, length = case.shape, case.unroll_length
  in_layers = 4 * shape.num_layers * sum(map(math.prod, models.layers.layer_shapes(shape).values()))
  ends = 4 * shape.hidden_size * (2 * shape.vocab_size + 1)  # embedding, head and last norm
  meta_params = 4 * (3 + outer_step.NUM_SOURCES)  # three hyperparameters and the mixture
  part = (fsdp - 1) / fsdp
  return {
    "gathers": part * (3 * length + 1) * (2 * in_layers + ends),
    "scatters": part * (2 * length + 1) * (in_layers + ends),
    "meta-gradient": part * 2 * meta_params,
  }


def format_rows(title: str, name: str, rows: list[dict]) -> str:
  lines = ["", title, f"  {name:>8s} {'arguments':>10s} {'temporaries':>12s} {'GFLOP':>8s} {'MiB received':>13s}"]
  for row in rows:
    lines.append(
      f"  {row['devices']:8d} {row['arguments'] / MIB:10.2f} {row['temporaries'] / MIB:12.2f} "
      f"{row['flops'] / 1e9:8.2f} {row['received']['total'] / MIB:13.2f}"
    )
  return "\n".join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--json", help="file to write the figures to")
  arguments = parser.parse_args()
  jax.config.update("jax_num_cpu_devices", COUNTS[-1])
  split = [measure(split_step(CASE, count), devices=count) for count in COUNTS]
  print(format_rows("one task over devices, of one of them; MiB", "fsdp", split), flush=True)
  tasks = [measure(task_gradients(count), devices=count) for count in COUNTS]
  print(format_rows("as many tasks as devices, of one of them; MiB", "tasks", tasks), flush=True)
  received, needed = split[-1]["received"], needed_bytes(CASE, COUNTS[-1])
  print(f"\nfsdp = {COUNTS[-1]}, MiB that a device receives")
  for what, number in (*needed.items(), *((f"found: {kind}", number) for kind, number in received.items())):
    print(f"  {what:28s} {number / MIB:9.2f}")
  ratio = received["total"] / sum(needed.values())
  print(f"  found / needed {ratio:.3f}, target 1.1: {'met' if ratio <= 1.1 else 'MISSED'}")
  if arguments.json:
    figures = {"fsdp": split, "tasks": tasks, "needed": needed, "ratio": ratio, "jax": jax.__version__}
    files.write_json(arguments.json, figures)


if __name__ == "__main__":
  main()
