"""Numbers that sum up a run: what learning one task after another did to each, and how sure a mean is."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from mftjax.errors import InputError

_NUM_RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class _Fields:
  """Makes a dataclass of numbers a mapping too: `dict(result)` and `result["forgetting"]` work."""

  def keys(self) -> Iterator[str]:
    return (field.name for field in dataclasses.fields(self))

  def __iter__(self) -> Iterator[str]:
    return iter(self.keys())

  def __len__(self) -> int:
    return len(dataclasses.fields(self))

  def __getitem__(self, name: str) -> float:
    if name not in self.keys():
      raise KeyError(name)
    return getattr(self, name)


@dataclasses.dataclass(frozen=True)
class Continual(_Fields):
  """What `continual` returns, fractions; `dict(result)` and `result["forgetting"]` work too."""

  average_accuracy: float
  backward_transfer: float
  forward_transfer: float
  forgetting: float
  plasticity: float


@dataclasses.dataclass(frozen=True)
class ContinualLoss(_Fields):
  """What `continual_loss` returns, nats; `dict(result)` and `result["forgetting"]` work too."""

  average_loss: float
  backward_transfer: float
  forward_transfer: float
  forgetting: float
  plasticity: float


def continual(
  accuracy: np.ndarray | Sequence[Sequence[float]], baseline: np.ndarray | Sequence[float] | None = None
) -> Continual:
  """Sums up the accuracy matrix of a model that learnt tasks one after another.

  With T tasks, R[i, j] the accuracy on task j after training on tasks 0..i, b that before any training:

  - average_accuracy = mean_j R[T-1, j]
  - backward_transfer = mean_{j < T-1} (R[T-1, j] - R[j, j])
  - forward_transfer = mean_{j > 0} (R[j-1, j] - b[j])
  - forgetting = mean_{j < T-1} (max_{i < T-1} R[i, j] - R[T-1, j])
  - plasticity = mean_j R[j, j]

  Args:
    accuracy: `[num_tasks (after), num_tasks (on)]`, finite.
    baseline: `[num_tasks]` b, finite; zero when left out: forward_transfer is then the accuracy itself.

  Returns:
    The five numbers. With one task nothing can transfer or be forgotten: those three are 0.

  Raises:
    InputError: not a square matrix, no task, a value that is not finite, or a baseline of another length.

  Source: Lopez-Paz & Ranzato (2017), Section 2, equations 2-4; Chaudhry et al. (2018), Section 3, forgetting.
  """
  return Continual(*_sums("accuracy", np.asarray(accuracy, np.float64), baseline))


def continual_loss(
  loss: np.ndarray | Sequence[Sequence[float]], baseline: np.ndarray | Sequence[float] | None = None
) -> ContinualLoss:
  """Sums up the loss matrix of a model that learnt tasks one after another.

  The formulas of `continual` on R = -loss and on minus the baseline, so that a higher transfer is better and a
  positive forgetting is a loss that rose; average_loss and plasticity are losses, lower is better.

  Args:
    loss: `[num_tasks (after), num_tasks (on)]` nats, finite.
    baseline: `[num_tasks]` loss before any training, nats, finite; zero when left out: forward_transfer is then
      minus the loss itself.

  Returns:
    The five numbers, nats. With one task nothing can transfer or be forgotten: those three are 0.

  Raises:
    InputError: not a square matrix, no task, a value that is not finite, or a baseline of another length.
  """
  start = None if baseline is None else -np.asarray(baseline, np.float64)
  average, backward, forward, forgetting, plasticity = _sums("loss", -np.asarray(loss, np.float64), start)
  return ContinualLoss(-average, backward, forward, forgetting, -plasticity)


def _sums(
  name: str, matrix: np.ndarray, baseline: np.ndarray | Sequence[float] | None
) -> tuple[float, float, float, float, float]:
  """Average, backward transfer, forward transfer, forgetting, plasticity of a matrix whose higher values are better."""
  if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
    raise InputError(f"{name} must be [num_tasks, num_tasks] with at least one task, got shape {matrix.shape}.")
  num_tasks = matrix.shape[0]
  start = np.zeros(num_tasks) if baseline is None else np.asarray(baseline, np.float64)
  if start.shape != (num_tasks,):
    raise InputError(f"baseline must be [{num_tasks}] like the tasks of {name}, got shape {start.shape}.")
  if not (np.isfinite(matrix).all() and np.isfinite(start).all()):
    raise InputError(f"{name} and baseline must be finite; one of their values is NaN or infinite.")
  last = matrix[-1]
  learnt = np.diagonal(matrix)
  if num_tasks == 1:
    return float(last[0]), 0.0, 0.0, 0.0, float(learnt[0])
  before = np.diagonal(matrix, offset=1)  # R[j-1, j]
  return (
    float(last.mean()),
    float((last - learnt)[:-1].mean()),
    float((before - start[1:]).mean()),
    float((matrix[:-1, :-1].max(axis=0) - last[:-1]).mean()),
    float(learnt.mean()),
  )


def bootstrap_interval(values: np.ndarray | Sequence[float], level: float = 0.95, seed: int = 0) -> tuple[float, float]:
  """Confidence interval of a mean by the percentile bootstrap, 10,000 resamples.

  Args:
    values: `[num_values]` finite, at least one; for example one score per example or per seed.
    level: coverage, in (0, 1).
    seed: of the resampling; the same seed gives the same interval.

  Returns:
    (low, high), in the unit of `values`.

  Raises:
    InputError: no values, not one axis, a value that is not finite, or a level outside (0, 1).

  Source: Efron & Tibshirani (1993), Section 13.3.
  """
  sample = np.asarray(values, np.float64)
  if sample.ndim != 1 or sample.size == 0:
    raise InputError(f"values must be [num_values] with at least one value, got shape {sample.shape}.")
  if not np.isfinite(sample).all():
    raise InputError("values must be finite; one of them is NaN or infinite.")
  if not 0 < level < 1:
    raise InputError(f"level must lie in (0, 1), got {level!r}.")
  rng = np.random.default_rng(seed)
  means = np.empty(_NUM_RESAMPLES)
  rows = max(1, 2**22 // sample.size)  # resample in blocks: 32 MiB of indices at most
  for start in range(0, _NUM_RESAMPLES, rows):
    stop = min(start + rows, _NUM_RESAMPLES)
    means[start:stop] = sample[rng.integers(0, sample.size, (stop - start, sample.size))].mean(axis=1)
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)
