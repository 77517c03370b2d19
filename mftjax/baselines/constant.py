"""The one candidate that is best for all tasks."""

import numpy as np

from mftjax.errors import InputError


def best_constant(losses: np.ndarray, default_losses: np.ndarray) -> int:
  """Index of the candidate with the lowest mean, over tasks, of loss / default loss.

  Args:
    losses: `[num_candidates, num_tasks]`; a candidate with a loss that is not finite, on any task, loses.
    default_losses: `[num_tasks]` of the default candidate, finite and > 0.

  Returns:
    The index; the first among equals.

  Raises:
    InputError: shapes disagree, a default loss is out of range, or no candidate is finite on all tasks.
  """
  losses = np.asarray(losses, np.float64)
  default_losses = np.asarray(default_losses, np.float64)
  if losses.ndim != 2 or losses.shape[1:] != default_losses.shape or losses.size == 0:
    raise InputError(
      f"losses must be [num_candidates, num_tasks] and default_losses [num_tasks], "
      f"got {losses.shape} and {default_losses.shape}."
    )
  if not np.all(np.isfinite(default_losses)) or np.any(default_losses <= 0):
    raise InputError(f"default_losses must be finite and > 0, got {default_losses}.")
  is_finite = np.all(np.isfinite(losses), axis=1)
  if not is_finite.any():
    raise InputError("No candidate has a finite loss on every task.")
  ratios = np.where(is_finite[:, None], losses, np.inf) / default_losses
  return int(np.argmin(ratios.mean(axis=1)))
