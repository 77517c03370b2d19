"""Meta-tasks split over devices, against one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json
import jax
import jax.numpy as jnp
import numpy as np
from mftjax.loops import many_tasks

model = many_tasks.Model(None, None, frozen={"w": jnp.arange(3.0)})
build = lambda model: lambda x, key: {"y": model.frozen["w"] @ x + jax.random.normal(key), "w": model.frozen["w"]}
x, keys = jnp.arange(15.0).reshape(5, 3), jax.random.split(jax.random.key(0), 5)  # 5 tasks do not divide by 2
found, want = model.over_tasks(build)(x, keys), jax.vmap(build(model))(x, keys)
batched = many_tasks.in_batches(model.over_tasks(build), (x, keys), batch_size=3)
again = jax.jit(lambda a, b: a["y"] - b["y"])(found, want)  # what comes back mixes with arrays of one device
where = model.over_tasks(lambda model: lambda x: jax.lax.axis_index("tasks"))(x)
differences = again, found["w"] - want["w"], batched["y"] - want["y"]
print(json.dumps({
  "computed on": where.tolist(),
  "found on": sorted({device.id for leaf in jax.tree.leaves(found) for device in leaf.devices()}),
  "error": max(float(jnp.abs(difference).max()) for difference in differences),
}))
"""


def test_tasks_over_two_devices():
  """In a process of its own: the number of devices of a CPU must be set before JAX starts."""
  env = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(Path(__file__).parents[1]),
  }
  done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout)
  assert found.pop("error") < 1e-5
  assert found == {"computed on": [0, 0, 0, 1, 1], "found on": [0]}
