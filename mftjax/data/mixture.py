"""Batches drawn from several sources by a proposal, in an order that can be resumed."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from mftjax import errors, types
from mftjax.data import tokens


def proposal(weights: np.ndarray, uniform_fraction: float) -> np.ndarray:
  """Probabilities that rows are drawn with: mixture weights blended with the uniform distribution.

      proposal = (1 - uniform_fraction) * weights / sum(weights) + uniform_fraction / num_sources

  Args:
    weights: `[num_sources]` at least 0, of any positive sum.
    uniform_fraction: from 0 to 1.

  Returns:
    `[num_sources]` float64 with sum 1.

  Raises:
    InputError: a weight is negative or not finite, their sum is 0, or the fraction is out of its range.
  """
  weights = np.asarray(weights, np.float64)
  if weights.ndim != 1 or not len(weights):
    raise errors.InputError(f"Mixture weights have shape {weights.shape}; one number a source is needed.")
  if not np.all(np.isfinite(weights)):
    raise errors.InputError(f"Mixture weights must be finite numbers, not NaN or infinite: {weights.tolist()}.")
  if np.any(weights < 0):
    raise errors.InputError(f"Mixture weights must be at least 0, none negative: {weights.tolist()}.")
  if not weights.sum() > 0:
    raise errors.InputError(f"Mixture weights sum to 0: {weights.tolist()}; at least one must be above 0.")
  if not 0 <= uniform_fraction <= 1:
    raise errors.InputError(f"uniform_fraction = {uniform_fraction} must be from 0 to 1.")
  weights = weights / weights.max()  # the sum of large ones overflows
  return (1 - uniform_fraction) * weights / weights.sum() + uniform_fraction / len(weights)


class Stream:
  """Batches without end, each a new draw of rows from the sources; the same for the same seed and draws before.

  Args:
    rows: those of each source; all of one length.
    batch_size: rows in a batch.
    seed: of the order of the rows and of the sources' counts, at least 0.
  """

  def __init__(self, rows: Sequence[tokens.Rows], batch_size: int, seed: int):
    if not rows or any(len(r.tokens) == 0 for r in rows):
      raise errors.InputError(f"Every source needs rows to draw; there are {[len(r.tokens) for r in rows]}.")
    if len({r.tokens.shape[1] for r in rows}) > 1:
      raise errors.InputError(f"The sources' rows have different lengths: {[r.tokens.shape[1] for r in rows]}.")
    if batch_size < 1:
      raise errors.InputError(f"batch_size = {batch_size} must be at least 1.")
    self._rows = list(rows)
    self._batch_size = batch_size
    self._seed = seed
    self._checksums = [_checksum(r) for r in rows]
    self._orders = [_order(len(r.tokens), seed, source) for source, r in enumerate(rows)]
    self._cursors = [0] * len(rows)  # rows drawn of each source so far
    self._num_draws = 0

  def next(self, proposal: np.ndarray) -> types.Batch:
    """The next batch.

    Args:
      proposal: `[num_sources]` probabilities, sum 1. A source's count is `batch_size * proposal[source]` on average
        and never a whole row or more away from it.

    Returns:
      A batch of NumPy arrays, its rows in random order, in whose `proposal` each row has that of its source.
    """
    proposal = np.asarray(proposal, np.float64)
    if proposal.shape != (len(self._rows),) or not np.all(proposal >= 0) or abs(proposal.sum() - 1) > 1e-4:
      raise errors.InputError(
        f"A proposal needs {len(self._rows)} probabilities with sum 1, one a source; given {proposal.tolist()}."
      )
    rng = np.random.default_rng([self._seed, self._num_draws])
    counts = _systematic_counts(proposal, self._batch_size, rng.random())
    drawn = []
    for source, count in enumerate(counts):
      for _ in range(count):
        drawn.append((source, self._orders[source][self._cursors[source]]))
        self._cursors[source] += 1
    self._num_draws += 1
    drawn = [drawn[i] for i in rng.permutation(len(drawn))]
    drawn_sources = np.asarray([s for s, _ in drawn], np.int32)
    return types.Batch(
      tokens=np.stack([self._rows[s].tokens[i] for s, i in drawn]),
      loss_mask=np.stack([self._rows[s].loss_mask[i] for s, i in drawn]),
      segment_ids=np.stack([self._rows[s].segment_ids[i] for s, i in drawn]),
      positions=np.stack([self._rows[s].positions[i] for s, i in drawn]),
      source=drawn_sources,
      proposal=proposal[drawn_sources].astype(np.float32),
    )

  def state(self) -> dict[str, Any]:
    """What `restore` needs to go on from here; JSON can hold it."""
    return {
      "seed": self._seed,
      "num_draws": self._num_draws,
      "cursors": list(self._cursors),
      "num_rows": [len(r.tokens) for r in self._rows],
      "checksums": list(self._checksums),
    }

  def restore(self, state: Mapping[str, Any]) -> None:
    """Go on from a `state()`: the batches after it are the same, bit for bit.

    Raises:
      InputError: the state is of another seed or of sources with other rows.
    """
    own = self.state()
    for name in ("seed", "num_rows", "checksums"):
      found = state.get(name)
      if found is None or np.asarray(found).tolist() != own[name]:
        raise errors.InputError(
          f"The saved state of the data has {name} = {found}, but here it is {own[name]}: the config or data changed. "
          "Put back what was there, or take another --workdir."
        )
    self._num_draws = int(state["num_draws"])
    self._cursors = [int(cursor) for cursor in state["cursors"]]


def batches(rows: tokens.Rows, batch_size: int, source: int) -> list[types.Batch]:
  """Every row once and in order, in batches of `batch_size`; the last is filled up with rows of padding.

  Args:
    rows: what to read.
    batch_size: rows in a batch, at least 1.
    source: what the batches' `source` is set to; their `proposal` is 1.
  """
  if batch_size < 1:
    raise errors.InputError(f"batch_size = {batch_size} must be at least 1.")
  found = []
  for start in range(0, len(rows.tokens), batch_size):
    parts = [a[start : start + batch_size] for a in (rows.tokens, rows.loss_mask, rows.segment_ids, rows.positions)]
    missing = batch_size - len(parts[0])
    found_tokens, loss_mask, segment_ids, positions = (np.pad(part, ((0, missing), (0, 0))) for part in parts)
    found.append(
      types.Batch(
        tokens=found_tokens,
        loss_mask=loss_mask,
        segment_ids=segment_ids,
        positions=positions,
        source=np.full(batch_size, source, np.int32),
        proposal=np.ones(batch_size, np.float32),
      )
    )
  return found


def _checksum(rows: tokens.Rows) -> int:
  """Of what the rows hold, by which data that changed between two parts of a run are told."""
  checksum = 0
  for array in (rows.tokens, rows.loss_mask, rows.segment_ids):
    checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
  return checksum


def _order(num_rows: int, seed: int, source: int) -> Any:
  """A random-access sequence of row numbers, every epoch shuffled anew."""
  own_seed = int(np.random.SeedSequence([seed, source]).generate_state(1)[0])
  return grain.MapDataset.source(range(num_rows)).seed(own_seed).shuffle().repeat()


def _systematic_counts(proposal: np.ndarray, batch_size: int, offset: float) -> np.ndarray:
  """Counts `[num_sources]` of the points offset, offset + 1, ... in each source's stretch of [0, batch_size).

  Source: systematic resampling (Kitagawa, 1996), appendix.
  """
  ends = batch_size * np.cumsum(proposal) / proposal.sum()
  # A stretch that ends on a whole number must not lose its last row to rounding.
  ends = np.where(np.abs(ends - np.rint(ends)) < 1e-6, np.rint(ends), ends)
  ends[-1] = batch_size
  return np.diff(np.ceil(ends - offset), prepend=0.0).astype(np.int64)
