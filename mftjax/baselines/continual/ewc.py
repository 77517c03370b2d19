"""Online elastic weight consolidation: a pull towards the last task's weights, by the diagonal Fisher information.

    loss + strength / 2 * sum_i F_i (params_i - anchor_i)^2,    F = decay * F_before + F_of_the_task

Source: Overcoming Catastrophic Forgetting in Neural Networks (Kirkpatrick et al., 2017), equation 3; the online form:
Progress & Compress (Schwarz et al., 2018), Section 3.2, equation 9. The Fisher information is the empirical one, over
the task's rows.
"""

import jax
import jax.numpy as jnp

from mftjax.baselines.continual import l2sp
from mftjax.baselines.continual.method import Method, sft_loss


def init(setup):
  zeros = jax.tree.map(jnp.zeros_like, setup.params)
  return {"held": setup.held, "fisher": zeros, "anchor": setup.params}


def penalty(setup, params, carry, batch, values):
  return 0.5 * values["ewc_strength"] * l2sp.squared_distance(params, carry["anchor"], carry["fisher"])


def fisher(setup, params, carry, rows, values):
  """Like params: the mean over rows of the squared gradient of each one's loss."""

  def add(total, row):
    one = jax.tree.map(lambda x: x[None], row)
    grads = jax.grad(lambda params: sft_loss(setup, (params, carry["held"]), one, values))(params)
    return jax.tree.map(lambda t, g: t + g**2 / len(rows.tokens), total, grads), None

  return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), rows)[0]


def end(setup, params, carry, task, values):
  new = fisher(setup, params, carry, task.rows, values)
  total = jax.tree.map(lambda old, new: values["ewc_decay"] * old + new, carry["fisher"], new)
  return params, {**carry, "fisher": total, "anchor": params}


METHOD = Method(
  hyperparameters={"ewc_strength": ("log", (1.0, 1e5)), "ewc_decay": ("linear", (0.5, 1.0))},
  init=init,
  penalty=penalty,
  end=end,
)
