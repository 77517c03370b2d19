"""Eight devices of a CPU, in f64: a process of its own (`make test-distributed`), as JAX counts its devices once."""

import os

# Most of a test's time is compiling.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
