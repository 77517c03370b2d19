"""Eight devices of a CPU, in f64: a process of its own (`make test-distributed`), as JAX counts its devices once."""

import os

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)

# Most of a test's time is compiling. XLA reads this once; the commands that tests start are to run as a user's do.
given = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = f"{given or ''} --xla_backend_optimization_level=0"
assert jax.device_count() == 8
if given is None:
  del os.environ["XLA_FLAGS"]
else:
  os.environ["XLA_FLAGS"] = given
