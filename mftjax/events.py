"""TensorBoard's event files."""

import os
import pathlib
import time
from collections.abc import Iterable
from typing import Any

from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2, summary_pb2


class Events:
  """Scalars that TensorBoard shows, in a file of their own in a folder.

  Each step is written at once. tensorboardX's own `SummaryWriter` leaves that to a thread, and a run hangs in its queue
  once that thread has met a full disk or a clock that was set back.

  Args:
    folder: it is made.
    start_step: steps done before; what other files there say of later ones is void.
  """

  def __init__(self, folder: pathlib.Path, start_step: int = 0):
    folder.mkdir(parents=True, exist_ok=True)
    # Two starts may fall into one second, of which the file is named.
    self._writer = event_file_writer.EventsWriter(str(folder / "events"), f".{os.getpid()}")
    if start_step:
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._write(step=start_step + 1, session_log=start)

  def write(self, step: int, scalars: Iterable[tuple[str, float]]) -> None:
    """Writes (tag, value) pairs of one step."""
    values = [value for tag, number in scalars for value in summary.scalar(tag, number).value]
    self._write(step=step, summary=summary_pb2.Summary(value=values))

  def close(self) -> None:
    """Closes the file."""
    self._writer.close()

  def _write(self, **fields: Any) -> None:
    self._writer.write_event(event_pb2.Event(wall_time=time.time(), **fields))
    self._writer.flush()
