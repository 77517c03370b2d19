"""Several hosts, or processes of one, that run one program together: the first of them writes the files."""

import re
import socket
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mftjax import errors

_JOIN_SECONDS = 300  # hosts of a cluster come up minutes apart
_SILENT_SECONDS = 60  # after which a host that says nothing counts as gone


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
  """Joins the other processes; before anything is computed.

  Args:
    coordinator: `HOST:PORT` of the first process, on which it listens. What is None JAX finds itself on a Cloud TPU, on
      GKE, and under SLURM or Open MPI.
    num_processes, process_id: how many there are, and which this is, from 0.

  Raises:
    InputError: some of the three are given and others cannot be found, they do not go together, or the first process
      is not there within five minutes.
  """
  given = f"--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}"
  if num_processes is not None and not 0 <= (process_id or 0) < num_processes:
    raise errors.InputError(f"{given}: process_id must be 0 .. num_processes - 1.")
  if coordinator is not None and process_id:
    _wait_for(coordinator)
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      initialization_timeout=_JOIN_SECONDS,
      heartbeat_timeout_seconds=_SILENT_SECONDS,
      shutdown_timeout_seconds=_SILENT_SECONDS,
    )
  except (ValueError, RuntimeError) as error:
    raise errors.InputError(f"Several hosts were asked for ({given}), but: {error}") from error


def _wait_for(coordinator: str) -> None:
  # JAX's own wait for it ends in an abort.
  host, _, port = coordinator.rpartition(":")
  deadline = time.monotonic() + _JOIN_SECONDS
  while True:
    try:
      socket.create_connection((host, int(port)), timeout=_JOIN_SECONDS).close()
      return
    except ValueError:
      raise errors.InputError(f"--coordinator={coordinator} must be HOST:PORT.") from None
    except OSError as error:
      if time.monotonic() > deadline:
        reason = f"after {_JOIN_SECONDS} s: {error.strerror or error}"
        raise errors.InputError(f"No first process listens on --coordinator={coordinator}, {reason}.") from error
      time.sleep(0.5)


def is_joined() -> bool:
  """Whether this is one of several processes."""
  return jax.distributed.is_initialized()


def is_lost(error: BaseException) -> bool:
  """Whether an error, or what caused it, is that another process is gone; XLA and gloo say so in words alone."""
  words = re.compile("(closed|reset) by peer|heartbeat|Broken pipe|unhealthy")
  return is_joined() and any(words.search(str(one)) for one in errors.with_causes(error))


def is_first() -> bool:
  """Whether this process writes the files that all have in common."""
  return jax.process_index() == 0


def first_does(action: Callable[[], Any]) -> None:
  """Has the first process do something while the others wait; where that fails, all end.

  Raises:
    InputError: it failed on the first process (which raises what it raised there).
  """
  if jax.process_count() == 1:
    action()
    return
  error: BaseException | None = None
  if is_first():
    try:
      action()
    except BaseException as caught:  # the others wait for it
      error = caught
  is_done = multihost_utils.broadcast_one_to_all(np.asarray(error is None))
  if error is not None:
    raise error
  if not is_done:
    raise errors.InputError("The first process gave up; see what it says.")


def any_of(flag: bool) -> bool:
  """Whether it holds on any process; all ask at the same time."""
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def whole(tree: Any) -> Any:
  """The tree's arrays as they are on one process; those that are split over several as NumPy arrays, on all of them."""
  if jax.process_count() == 1:
    return tree
  gather = lambda x: np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
  return jax.tree.map(gather, tree)
