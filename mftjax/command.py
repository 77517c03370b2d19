"""The edge of every command: flags, help, exit codes."""

import contextlib
import errno
import io
import logging as std_logging
import os
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

import ml_collections
from absl import flags, logging
from etils import epath
from ml_collections import config_flags

from mftjax import config as config_lib
from mftjax import engine, errors, hosts, results, stopping, trackers, watching

# It would say at each start that torch is missing, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_READER = (errno.EPIPE, errno.EIO)  # of a pipe, and of a terminal

_CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/X.py[:variant]")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; the same command again resumes")
_RESULTS = flags.DEFINE_string(
  "results", None, "folder or bucket (gs://...) that the results are copied to when the command is done"
)
_HOSTS = flags.DEFINE_bool("hosts", False, "one of several hosts, which a Cloud TPU, GKE, SLURM or Open MPI names")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of the first of several processes")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes run this together")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "which of them this is, from 0")
_PROFILE = flags.DEFINE_string("profile", None, "FIRST:LAST, steps of which WORKDIR/profile gets a trace")


def run(main: Callable[[ml_collections.ConfigDict, pathlib.Path], None], description: str | None) -> None:
  """Read the command line, call `main(config, workdir)` and exit.

  Exit codes: 0 done, or stopped by SIGTERM or Ctrl-C; 2 the user's input is wrong (one message, no traceback); 1
  anything else.
  """
  with (
    _unheard(sys.stdout) as out,
    _unheard(sys.stderr) as err,
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
  ):
    _run(main, description)


def _run(main: Callable[[ml_collections.ConfigDict, pathlib.Path], None], description: str | None) -> None:
  logging.set_verbosity(logging.WARNING)
  logging.get_absl_logger().addFilter(_without_traceback)
  if {"--help", "-h", "--helpfull"} & set(sys.argv[1:]):
    print(description)
    print("\nFlags:\n" + "\n".join(f"  {line}" for line in _flag_help()))
    print("\nConfig fields, with their defaults:\n" + config_lib.help_text())
    sys.exit(0)
  try:
    config, workdir, target = _parse()
    engine.set_up(config)
    stopping.listen()
    main(config, workdir)
    if target is not None:
      hosts.first_does(lambda: results.copy(workdir, target))
  except stopping.Stopped as stopped:
    print(" ".join(["Stopped", *map(str, stopped.args)]) + ". Give the same command to go on.", file=sys.stderr)
  except Exception as error:
    code, said, is_no_room = 1, traceback.format_exc().rstrip(), _is_no_room(error)
    if is_no_room:
      said = f"error: {error}. Make room, and give the same command to go on from what was saved."
    elif hosts.is_lost(error):
      said = "error: Another process of this run is gone. Start all again, and they go on."
    elif isinstance(error, errors.MftError):
      code, said = 2 if isinstance(error, errors.InputError) else 1, f"error: {error}"
    if is_no_room or (code == 1 and hosts.is_joined()):  # the others may wait for this one, which would wait for them
      _end_now(code, said)
    print(said, file=sys.stderr)
    sys.exit(code)


class _Unheard(io.FileIO):
  """A file whose reader may go (`| head`, a terminal that closes): what is written then is lost, the run goes on."""

  def write(self, data: Any) -> int:
    try:
      return super().write(data) or 0
    except OSError as error:
      if error.errno not in _NO_READER:
        raise
      return len(memoryview(data))


def _unheard(stream: TextIO) -> TextIO:
  raw = _Unheard(stream.fileno(), "w", closefd=False)
  return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=True)


def _without_traceback(record: std_logging.LogRecord) -> bool:
  """Takes the traceback off what orbax logs in its threads: it raises the same error again where it is handled."""
  if "orbax" in record.pathname:
    record.exc_info = None
  return True


def _end_now(code: int, last: str) -> None:
  """Ends with this as the last line: threads that still write would each tell the same error again, after it."""
  sys.stdout.flush()
  sys.stderr.flush()
  own = os.dup(2)
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # all but us
  with contextlib.suppress(OSError):  # nobody may be there to read it
    os.write(own, f"{last}\n".encode())
  os._exit(code)


def _is_no_room(error: BaseException) -> bool:
  """Whether an error, or what caused it, is that a disk or a quota is full; tensorstore says so in words alone."""
  return any(
    (isinstance(one, OSError) and one.errno in _NO_ROOM) or any(os.strerror(x) in str(one) for x in _NO_ROOM)
    for one in errors.with_causes(error)
  )


def _flag_help() -> list[str]:
  of = flags.FLAGS.get_flags_for_module
  shown = [flag for flag in of(sys.modules[__name__]) if flag.name != _CONFIG.name] + of(sys.modules["__main__"])
  return [f"--{flag.name}: {flag.help}" for flag in [flags.FLAGS[_CONFIG.name], *shown]]


def _parse() -> tuple[ml_collections.ConfigDict, pathlib.Path, epath.Path | None]:
  try:
    rest = flags.FLAGS(sys.argv)[1:]
    config = _CONFIG.value
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
    raise errors.InputError(str(error).strip("'\"") or type(error).__name__) from error
  if rest:
    raise errors.InputError(f"Unexpected arguments: {' '.join(rest)}.")
  if config is None or _WORKDIR.value is None:
    raise errors.InputError("Give --config=configs/X.py[:variant] and --workdir=DIR.")
  if "://" in _WORKDIR.value:
    raise errors.InputError(
      f"--workdir={_WORKDIR.value}: a run locks its folder and adds to its files, which a bucket does not allow. "
      f"Take a folder, and --results={_WORKDIR.value}."
    )
  engine.split_cpu(loaded(config, "config").get("cpu_devices"))
  processes = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  if _HOSTS.value or any(value is not None for value in processes):
    hosts.start(*processes)
  config_lib.check(config)
  watching.start(_PROFILE.value, config.stuck_seconds)
  trackers.start(config)
  target = None if _RESULTS.value is None else results.destination(_RESULTS.value)
  return config, pathlib.Path(_WORKDIR.value).absolute(), target


def loaded(config: ml_collections.ConfigDict, flag: str) -> ml_collections.ConfigDict:
  """The config of a flag, as given.

  Raises:
    InputError: there is no such file, which `config_flags` says only when the config is read.
  """
  try:
    config.keys()
  except OSError as error:
    reason = " ".join(str(error).rpartition("failure to load: ")[2].split())
    raise errors.InputError(f"--{flag}: {reason}") from error
  return config
