"""Ending a run when the system or the user asks for it: what is done is saved first."""

import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

_open, _is_asked = 0, False


class Stopped(BaseException):
  """The run ends because that was asked for; no `except Exception` takes it for an error."""


def listen() -> None:
  """Has SIGTERM, Ctrl-C and a terminal that closes end the process: a run that keeps checkpoints after its next step,
  all others at once.

  Asked a second time, all end at once. Who started the process with `nohup` has it live on without a terminal.
  """
  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, _ask)


def _ask(number: int, frame: FrameType | None) -> None:
  global _is_asked
  if frame is not None and frame.f_code in [getattr(callback, "__code__", None) for callback in gc.callbacks]:
    # What is raised in a callback of the garbage collector (JAX has one) goes nowhere.
    threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
    return
  was_asked, _is_asked = _is_asked, True
  if was_asked or not _open:
    raise Stopped
  print("Stopping after this step. Ask again to stop at once.", file=sys.stderr, flush=True)


@contextlib.contextmanager
def saving() -> Iterator[None]:
  """While this is open, who is asked to stop saves first: see `is_asked`; where nothing was, it ends with this."""
  global _open
  if _is_asked:  # and what was raised then was caught, as in a finaliser
    raise Stopped
  _open += 1
  try:
    yield
  finally:
    _open -= 1
  if _is_asked and not _open:
    raise Stopped


def is_asked() -> bool:
  """Whether to save now, and to raise `Stopped` then."""
  return _is_asked
