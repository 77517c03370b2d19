"""Runs of the tests' own process that end in the middle, for several files of tests."""

import contextlib

import pytest

from mftjax import tracking


@contextlib.contextmanager
def cut_off(last, at=None, then=None):
  """Has a run inside end when it has written its line of step `last`, after something is done at the line of `at`."""
  log = tracking.Tracker.log

  def cut_off_log(tracker, step, values):
    log(tracker, step, values)
    if step == at:
      then()
    if step == last:
      raise KeyboardInterrupt

  with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(tracking.Tracker, "log", cut_off_log)
    yield
