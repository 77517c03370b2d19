"""shard_map over tasks and over rows of data gives the numbers of one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from metagrad_problems import inner_loss, mlp, mlp_inputs, outer_loss, relative_error

from mftjax import metagrad

OPTIONS = [{"recovery": "store"}, {"recovery": "checkpoint", "every": 2}, {"recovery": "invert", "save": "nothing"}]
meta_params, params, inner, outer = mlp_inputs(3)
KEY = jax.random.key(1)
errors = {"devices": jax.device_count()}


def compiled(function):
  return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def results(problem, meta_params, params, inner, outer, method="mixed", **options):
  state = metagrad.init(problem, meta_params, params)
  out = metagrad.value_and_grad(problem, method, **options)(meta_params, state, inner, outer, KEY)
  return out.grad, out.loss, out.state.params, out.metrics["inner_loss"]


mesh = jax.make_mesh((4,), ("task",), (AxisType.Auto,))
tasks = jax.tree.map(lambda x: jnp.stack([x * scale for scale in (0.5, 0.8, 1.0, 1.1)]), (meta_params, params))
want = compiled(jax.vmap(lambda task: results(mlp("adam"), *task, inner, outer, "reverse")))(tasks)
for options in OPTIONS:
  one = lambda task: results(mlp("adam"), *task, inner, outer, **options)
  each = lambda tasks: jax.tree.map(lambda x: x[None], one(jax.tree.map(lambda x: x[0], tasks)))
  sharded = compiled(jax.shard_map(each, mesh=mesh, in_specs=P("task"), out_specs=P("task")))(tasks)
  errors["task " + options["recovery"]] = relative_error(sharded, want)

mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
mean_inner = lambda *args: jax.lax.pmean(inner_loss(*args), "data")
mean_outer = lambda *args: jax.lax.pmean(outer_loss(*args), "data")
problem = mlp("adam", inner_loss=mean_inner, outer_loss=mean_outer)
want = compiled(lambda *inputs: results(mlp("adam"), *inputs, "reverse"))(meta_params, params, inner, outer)
for options in OPTIONS:
  part = lambda *inputs: results(problem, *inputs, **options)
  specs = (P(), P(), P(None, "data"), P("data"))
  sharded = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P())
  errors["data " + options["recovery"]] = relative_error(compiled(sharded)(meta_params, params, inner, outer), want)
print(json.dumps(errors))
"""


@pytest.mark.slow
def test_shard_map_over_tasks_and_over_data():
  """In a process of its own: the number of devices of a CPU must be set before JAX starts."""
  root = Path(__file__).parents[1]
  env = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}",
  }
  done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  errors = json.loads(done.stdout)
  assert errors.pop("devices") == 4
  assert len(errors) == 6 and max(errors.values()) < 1e-5, errors
