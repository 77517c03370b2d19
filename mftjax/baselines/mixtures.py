"""Mixtures that need no search."""

import numpy as np

from mftjax.errors import InputError


def uniform(mask: np.ndarray) -> np.ndarray:
  """Equal shares for the sources that are present.

  Args:
    mask: `[num_sources]` bool, true where a source is present.

  Returns:
    `[num_sources]` float64 shares that sum to 1, 0 where absent.

  Raises:
    InputError: no source is present.
  """
  return proportional(np.ones(np.shape(mask)), mask)


def proportional(sizes: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Shares in proportion to the sources' sizes: what concatenating and shuffling the present sources gives.

  Args:
    sizes: `[num_sources]` examples or tokens, finite and >= 0; absent sources' sizes do not matter.
    mask: `[num_sources]` bool, true where a source is present.

  Returns:
    `[num_sources]` float64 shares that sum to 1, 0 where absent.

  Raises:
    InputError: shapes differ, a present size is out of range, or all present sizes are 0.
  """
  mask = np.asarray(mask, bool)
  if np.shape(sizes) != mask.shape or mask.ndim != 1:
    raise InputError(f"sizes {np.shape(sizes)} and mask {mask.shape} must both be [num_sources].")
  weights = np.where(mask, np.asarray(sizes, np.float64), 0.0)
  if not np.all(np.isfinite(weights)) or np.any(weights < 0) or weights.sum() == 0:
    raise InputError(f"Present sources need finite sizes >= 0 that are not all 0, got sizes {sizes}, mask {mask}.")
  return weights / weights.sum()
