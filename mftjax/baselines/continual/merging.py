"""Model merging: each task is learnt from the base model on its own, and the model is the base plus a scaled sum.

    base + scale * sum_t (task_t - base)

scale = 1 / num_tasks is the average; what is best is tuned. The changes are LoRA products, summed as such.

Source: Editing Models with Task Arithmetic (Ilharco et al., 2023), Section 2.
"""

from mftjax.baselines.continual import adapters
from mftjax.baselines.continual.method import Method


def init(setup):
  return {"held": setup.held, "stack": adapters.empty(setup.params, setup.num_tasks)}


def begin(setup, params, carry, task, values, key):
  return adapters.fresh(params, key), carry


def final(params, carry, values):
  return adapters.side_by_side(carry["stack"], values["merge_scale"]), carry["held"]


METHOD = Method(
  hyperparameters={"merge_scale": ("linear", (0.1, 1.0))}, init=init, begin=begin, final=final, end=adapters.keep
)
