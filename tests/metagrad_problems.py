"""The small bilevel problem that the tests of the meta-gradient engine share, and what they measure on it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mftjax import metagrad

OPTIMIZERS = {
  "sgd": lambda m: optax.sgd(m["rate"]),
  "momentum": lambda m: optax.sgd(m["rate"], momentum=m["decay"]),
  "nesterov": lambda m: optax.sgd(m["rate"], momentum=m["decay"], nesterov=True),
  "adam": lambda m: optax.adam(m["rate"], b1=m["decay"]),
  "adamw": lambda m: optax.chain(
    optax.clip_by_global_norm(0.5),
    optax.adamw(lambda count: m["rate"] / (1 + count), b1=m["decay"], weight_decay=m["rate"]),
  ),
  "lion": lambda m: optax.lion(m["rate"], weight_decay=m["decay"]),
  "amsgrad": lambda m: optax.amsgrad(m["rate"], b1=m["decay"]),  # a running maximum has no inverse
}


def predict(params, x):
  return jnp.tanh(x @ params["w1"]) @ params["w2"]


def inner_loss(params, meta_params, batch, rng):
  """A mean over rows, so that micro-batches leave it as it is; the rows' weights are meta-parameters."""
  x, y, group = batch
  return jnp.mean(jax.nn.softmax(meta_params["logits"])[group] * jnp.sum((predict(params, x) - y) ** 2, axis=1))


def outer_loss(params, meta_params, batch, rng):
  x, y = batch
  return jnp.mean((predict(params, x) - y) ** 2) + 0.01 * jnp.sum(meta_params["logits"] ** 2)


def mlp(name: str, **changes) -> metagrad.Problem:
  """Weighted regression with a small net, trained by one of `OPTIMIZERS`."""
  return metagrad.Problem(
    **{"inner_loss": inner_loss, "outer_loss": outer_loss, "optimizer": OPTIMIZERS[name], **changes}
  )


def mlp_inputs(length: int = 7, rows: int = 4, width: int = 5, seed: int = 0):
  """(meta_params, params, [length, rows] batches, outer batch), in the widest dtype that JAX is set to."""
  draw = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(draw.normal(size=shape))
  params = {"w1": normal(3, width) / 2, "w2": normal(width, 2) / 2}
  meta_params = {"rate": jnp.asarray(0.05), "decay": jnp.asarray(0.8), "logits": normal(2)}
  inner = (normal(length, rows, 3), normal(length, rows, 2), jnp.asarray(draw.integers(0, 2, (length, rows))))
  return meta_params, params, inner, (normal(rows, 3), normal(rows, 2))


def unrolled(problem, inputs, method="mixed", **options) -> metagrad.Output:
  """What one compiled step of a method gives."""
  meta_params, params, inner, outer = inputs
  state = metagrad.init(problem, meta_params, params)
  step = metagrad.value_and_grad(problem, method, **options)
  step = jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})  # compiles in two thirds of the time
  return step(meta_params, state, inner, outer, jax.random.key(1))


def relative_error(got, want) -> float:
  """|got - want| / |want| over all leaves as one vector."""
  got, want = (np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(t)]) for t in (got, want))
  return float(np.linalg.norm(got - want) / np.linalg.norm(want))
