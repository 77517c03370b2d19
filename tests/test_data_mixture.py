"""Proposals, the stream's counts and order, and that it resumes bit for bit."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mftjax import errors
from mftjax.data import mixture, tokens

FIELDS = ("tokens", "loss_mask", "segment_ids", "positions", "source", "proposal")


def make_rows(num_rows, first_token, length=4):
  """Row i is full of the token first_token + i."""
  found = np.repeat(np.arange(first_token, first_token + num_rows, dtype=np.int32)[:, None], length, axis=1)
  positions = np.tile(np.arange(length, dtype=np.int32), (num_rows, 1))
  return tokens.Rows(found, np.ones(found.shape, np.float32), np.ones_like(found), positions, 0)


def make_stream(num_sources=3, batch_size=8, seed=0):
  return mixture.Stream([make_rows(30 + s, 1000 * (s + 1)) for s in range(num_sources)], batch_size, seed)


weights_lists = st.lists(st.floats(0, 1e6), min_size=1, max_size=6).filter(lambda w: sum(w) > 1e-3)


@given(weights_lists, st.floats(0, 1))
def test_proposal_blends(weights, fraction):
  found = mixture.proposal(np.asarray(weights), fraction)
  expected = (1 - fraction) * np.asarray(weights) / np.sum(weights) + fraction / len(weights)
  np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
  assert abs(found.sum() - 1) < 1e-9


@pytest.mark.parametrize(
  ("weights", "fraction", "message"),
  [
    ([0.5, -0.1], 0.5, "negative"),
    ([0.5, float("nan")], 0.5, "NaN"),
    ([0.5, float("inf")], 0.5, "infinite"),
    ([0.0, 0.0], 0.5, "sum to 0"),
    ([], 0.5, "shape"),
    ([1.0], 1.5, "uniform_fraction = 1.5"),
    ([1.0], float("nan"), "uniform_fraction = nan"),
  ],
)
def test_bad_weights(weights, fraction, message):
  with pytest.raises(errors.InputError, match=message):
    mixture.proposal(np.asarray(weights), fraction)


@given(weights_lists, st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_counts_are_within_one_of_expected(weights, batch_size, seed):
  proposal = mixture.proposal(np.asarray(weights), 0.1)
  batch = make_stream(len(weights), batch_size, seed).next(proposal)
  counts = np.bincount(batch.source, minlength=len(weights))
  assert counts.sum() == batch_size
  assert np.all(np.abs(counts - batch_size * proposal) < 1 + 1e-5)


def test_counts_are_unbiased():
  proposal = np.asarray([0.07, 0.33, 0.0, 0.6])
  # grain shuffles large sources much faster than small ones
  stream = mixture.Stream([make_rows(20_000, 0) for _ in range(4)], 5, seed=1)
  draws = [np.bincount(stream.next(proposal).source, minlength=4) for _ in range(3000)]
  # A count is one of two whole neighbours, so its deviation is at most 1/2 and the mean's 0.5 / sqrt(3000).
  np.testing.assert_allclose(np.mean(draws, axis=0), 5 * proposal, atol=4.5 * 0.5 / np.sqrt(3000))
  assert not np.any(np.asarray(draws)[:, 2])


@given(st.integers(1, 12), st.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_whole_expected_counts_are_met_exactly(num_sources, rows_each):
  stream = make_stream(num_sources, num_sources * rows_each, seed=num_sources)
  for _ in range(4):
    counts = np.bincount(stream.next(np.full(num_sources, 1 / num_sources)).source, minlength=num_sources)
    assert counts.tolist() == [rows_each] * num_sources


def test_a_row_keeps_its_source_and_every_epoch_has_each_row_once():
  proposal = np.asarray([0.5, 0.3, 0.2])
  stream = make_stream(3, 8, seed=3)
  drawn = [[], [], []]
  orders = set()
  for _ in range(50):
    batch = stream.next(proposal)
    np.testing.assert_array_equal(batch.tokens[:, 0] // 1000 - 1, batch.source)
    np.testing.assert_array_equal(batch.proposal, proposal[batch.source].astype(np.float32))
    orders.add(tuple(batch.source.tolist()))
    for source in range(3):
      drawn[source].append(batch.tokens[batch.source == source, 0].tolist())
  assert len(orders) > 20
  for source in range(3):
    num_rows = 30 + source
    counts = np.bincount(np.concatenate(drawn[source]).astype(int) - 1000 * (source + 1), minlength=num_rows)
    assert counts.max() - counts.min() <= 1


def test_epochs_are_shuffled_anew():
  stream = mixture.Stream([make_rows(8, 0)], 1, seed=0)
  epochs = [[int(stream.next(np.ones(1)).tokens[0, 0]) for _ in range(8)] for _ in range(4)]
  assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 4


@given(st.integers(0, 2**32 - 1), st.integers(0, 30), st.integers(1, 9))
@settings(deadline=None, max_examples=15)
def test_resume_is_bit_exact(seed, num_before, batch_size):
  rng = np.random.default_rng(seed)
  proposals = rng.dirichlet(np.ones(3), size=num_before + 6)
  stream = make_stream(3, batch_size, seed)
  for proposal in proposals[:num_before]:
    stream.next(proposal)
  resumed = make_stream(3, batch_size, seed)
  resumed.restore(json.loads(json.dumps(stream.state())))
  for proposal in proposals[num_before:]:
    one, two = stream.next(proposal), resumed.next(proposal)
    for field in FIELDS:
      a, b = getattr(one, field), getattr(two, field)
      assert a.dtype == b.dtype
      np.testing.assert_array_equal(a, b)
  assert stream.state() == resumed.state()


def test_seeds_differ():
  one, two = (make_stream(seed=seed).next(np.full(3, 1 / 3)) for seed in (0, 1))
  assert not np.array_equal(one.tokens, two.tokens)


def test_state_of_something_else_is_refused():
  state = make_stream(3, 8, seed=0).state()
  with pytest.raises(errors.InputError, match="seed = 0"):
    make_stream(3, 8, seed=1).restore(state)
  with pytest.raises(errors.InputError, match="num_rows"):
    make_stream(2, 8, seed=0).restore(state)


def test_bad_streams():
  with pytest.raises(errors.InputError, match="needs rows"):
    mixture.Stream([make_rows(0, 0)], 2, 0)
  with pytest.raises(errors.InputError, match="different lengths"):
    mixture.Stream([make_rows(2, 0), make_rows(2, 0, length=5)], 2, 0)
  with pytest.raises(errors.InputError, match="batch_size = 0"):
    mixture.Stream([make_rows(2, 0)], 0, 0)
  for proposal in ([0.5, 0.5], [0.5, 0.6, 0.2], [1.5, -0.5, 0.0], [np.nan, 0.5, 0.5]):
    with pytest.raises(errors.InputError, match="3 probabilities"):
      make_stream().next(np.asarray(proposal))


@given(st.integers(0, 20), st.integers(1, 7))
@settings(deadline=None)
def test_batches_read_every_row_once(num_rows, batch_size):
  rows = make_rows(num_rows, 10)
  found = mixture.batches(rows, batch_size, source=2)
  assert len(found) == -(-num_rows // batch_size)
  for batch in found:
    assert batch.tokens.shape == (batch_size, 4)
    assert batch.source.tolist() == [2] * batch_size
  if found:
    for field in ("tokens", "loss_mask", "segment_ids", "positions"):
      whole = np.concatenate([getattr(batch, field) for batch in found])
      np.testing.assert_array_equal(whole[:num_rows], getattr(rows, field))
      assert not np.any(whole[num_rows:])
