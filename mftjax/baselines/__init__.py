"""Hyperparameter search and fixed rules to compare with, one object per task.

An evaluation is dear per program call, not per task, so that the caller runs one round of many tasks at once:

```python
methods = [baselines.RandomSearch(space, num_trials=50, seed=seed) for seed in range(num_tasks)]
while (candidates := [method.ask() for method in methods])[0] is not None:
  for method, candidate, loss in zip(methods, candidates, evaluate(candidates)):
    method.tell(candidate, loss)
```

Methods that stop after different numbers of rounds (`Asha`) return None from `ask` one by one.
"""

from mftjax.baselines.asha import Asha
from mftjax.baselines.constant import best_constant
from mftjax.baselines.mixtures import proportional, uniform
from mftjax.baselines.nearest import NearestTask
from mftjax.baselines.random_search import RandomSearch
from mftjax.baselines.search import Candidate, Method, SearchSpace
from mftjax.baselines.tpe import TPE

__all__ = [
  "TPE",
  "Asha",
  "Candidate",
  "Method",
  "NearestTask",
  "RandomSearch",
  "SearchSpace",
  "best_constant",
  "proportional",
  "uniform",
]
