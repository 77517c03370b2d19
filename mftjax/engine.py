"""Jobs that do not need one another: one after the other in this process, or side by side through Ray.

A job is a name and the file of its result. It writes that file last and whole, so a job whose file is there is done,
however often it was begun: what was killed is begun again, and counts once.
"""

import contextlib
import importlib.util
import os
import pathlib
import signal
import socket
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_collections
from absl import logging

from mftjax import errors, stopping

ENGINES = ("local", "ray")
_RETRIES = 3  # of a job whose worker died
_STOP_SECONDS = 0.5  # in which a run that is asked to stop sees it
_CONNECT_SECONDS = 10.0

Job = Callable[[Any, str, pathlib.Path], None]

# Of a worker: the last run that it had jobs of, and what they share.
_made: tuple[str, Any] = ("", None)


def check(config: ml_collections.ConfigDict) -> None:
  """Raises `InputError` if the config asks for an engine that is not installed, or for a cluster that is not there."""
  if config.engine == "local":
    return
  if importlib.util.find_spec("ray") is None:
    raise errors.InputError("config.engine = 'ray' needs Ray: pip install 'mftjax[ray]'.")
  address = config.ray.address
  if not address:
    return
  host, _, port = address.rpartition(":")
  if not host or not port.isdigit():
    raise errors.InputError(f"config.ray.address = {address!r} must be '' or HOST:PORT.")
  try:  # Ray itself would go on trying for many minutes
    socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
  except (OSError, OverflowError) as error:
    raise errors.InputError(f"config.ray.address = {address!r}: no cluster answers there: {error}.") from error


def run(
  config: ml_collections.ConfigDict,
  job: Job,
  paths: Mapping[str, pathlib.Path],
  shared: Any,
  build: Callable[..., Any],
  *args: Any,
) -> None:
  """Does the jobs whose files are not there, by `config.engine`.

  Args:
    job: `(shared, name, path)`, a function of a module; it writes the path, as `files` does.
    paths: name -> file of its result, in a folder that all workers see.
    shared: what the jobs need, as this process has it.
    build: a function of a module by which each other process makes the same, once.
    *args: what that is given; they can be pickled.

  Raises:
    InputError: there is no Ray, or no cluster at `config.ray.address`; see `check`.
    MftError: a job's worker died again and again, or its file cannot be seen here.
    Exception: what a job raised; jobs that are not done by then are given up.
  """
  check(config)
  missing = {name: path for name, path in paths.items() if not path.exists()}
  if config.engine == "local":
    for name, path in missing.items():
      job(shared, name, path)
  elif missing:
    # A signal that raised inside of Ray would be lost there.
    with stopping.saving(), _cluster(config) as ray:
      _by_ray(ray, config, job, missing, build, args)


def split_cpu(number: object) -> None:
  """Before anything is computed, even by the check of the config: JAX counts its devices once."""
  if isinstance(number, int) and number > 0:
    jax.config.update("jax_num_cpu_devices", number)


def set_up(config: ml_collections.ConfigDict) -> None:
  """Tells JAX what each process of a run has to know."""
  if config.compilation_cache:
    folder = "~/.cache/mftjax" if config.compilation_cache == "default" else config.compilation_cache
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(folder).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  jax.config.update("jax_default_matmul_precision", config.model.matmul_precision)


@contextlib.contextmanager
def _cluster(config: ml_collections.ConfigDict) -> Iterator[Any]:
  """The `ray` module, connected; a cluster that was started for it ends with it, and all its workers."""
  os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
  os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns that this will be so
  import ray

  address = config.ray.address
  own = {} if address else {"num_cpus": config.ray.workers, "include_dashboard": False}
  asked = signal.getsignal(signal.SIGTERM)  # Ray takes it
  try:
    with warnings.catch_warnings():
      warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # JAX does not see that a program follows at once
      ray.init(address or "local", log_to_driver=False, logging_level="error", **own)
  except (ConnectionError, ValueError, RuntimeError) as error:
    raise errors.InputError(f"config.ray.address = {address!r}: {error}") from error
  except SystemExit as error:  # its own answer to SIGTERM
    raise stopping.Stopped from error
  finally:
    signal.signal(signal.SIGTERM, asked)
  try:
    yield ray
  finally:
    ray.shutdown()


def _by_ray(
  ray: Any,
  config: ml_collections.ConfigDict,
  job: Job,
  paths: Mapping[str, pathlib.Path],
  build: Callable[..., Any],
  args: tuple[Any, ...],
) -> None:
  begin = ray.remote(_work).options(max_retries=_RETRIES, retry_exceptions=False, num_gpus=config.ray.gpus)
  common = ray.put((uuid.uuid4().hex, config, job, build, args))
  waiting = list(paths)
  running: dict[Any, str] = {}
  while waiting or running:
    # No more at once, even where the cluster has room: each uses all cores of its machine.
    while waiting and len(running) < config.ray.workers:
      name = waiting.pop(0)
      running[begin.remote(common, name, paths[name])] = name
    ended, _ = ray.wait(list(running), timeout=_STOP_SECONDS)
    if stopping.is_asked():
      raise stopping.Stopped
    if not ended:
      continue
    name = running.pop(ended[0])
    try:
      ray.get(ended[0])
    except ray.exceptions.RayTaskError as error:
      raise error.cause from error
    except ray.exceptions.RayError as error:
      raise errors.MftError(f"{name}: gave up after {_RETRIES + 1} workers died. The last: {error}") from error
    if not paths[name].exists():
      raise errors.MftError(f"{name} is done, but {paths[name]} is not here: --workdir must be a folder that all see.")
    logging.warning("%s is done; %d are not.", name, len(waiting) + len(running))


def _work(common: tuple[Any, ...], name: str, path: pathlib.Path) -> None:
  """A job, in a worker."""
  global _made
  if path.exists():  # a worker died between writing and saying so
    return
  run_id, config, job, build, args = common
  if _made[0] != run_id:
    if not _made[0]:
      split_cpu(config.cpu_devices)
    set_up(config)
    _made = run_id, build(*args)
  job(_made[1], name, path)
