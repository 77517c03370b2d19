"""Experience replay: a part of each batch is drawn from stored rows of the earlier tasks.

Source: On Tiny Episodic Memories in Continual Learning (Chaudhry et al., 2019), Section 4; the share of a batch is a
hyperparameter here, so that the tokens stay the same.
"""

import dataclasses

from mftjax.baselines.continual.method import Method

REPLAYED = ("linear", (0.1, 0.8))


def replaying(method: Method, stored_fraction: float) -> Method:
  """The method with replay of this fraction of each earlier task's rows, at least one."""
  hyperparameters = {**method.hyperparameters, "replayed": REPLAYED}
  return dataclasses.replace(method, stored_fraction=stored_fraction, hyperparameters=hyperparameters)
