"""Learning without forgetting: on the new task's text, answers stay near those of the model before the task.

    loss + strength * temperature^2 * KL(softmax(teacher / temperature) || softmax(student / temperature))

over the tokens of the task's rows that are not padding.

Source: Learning without Forgetting (Li and Hoiem, 2016), Section 3, equations 2 and 3; their temperature of 2.
"""

import jax
import jax.numpy as jnp

from mftjax.baselines.continual.method import Method

TEMPERATURE = 2.0


def init(setup):
  return {"held": setup.held, "teacher": setup.params}


def begin(setup, params, carry, task, values, key):
  return params, {**carry, "teacher": params}


def penalty(setup, params, carry, batch, values):
  logs = lambda params: jax.nn.log_softmax(setup.logits((params, carry["held"]), batch) / TEMPERATURE)
  teacher, student = logs(carry["teacher"]), logs(params)
  divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)  # [batch, length]
  is_text = batch.segment_ids > 0
  return values["lwf_strength"] * TEMPERATURE**2 * jnp.sum(divergence * is_text) / jnp.maximum(jnp.sum(is_text), 1)


METHOD = Method(hyperparameters={"lwf_strength": ("log", (1e-2, 10.0))}, init=init, begin=begin, penalty=penalty)
