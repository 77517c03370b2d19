"""How a run is doing while it runs: time of a step and of its input, compiles, memory, utilisation, traces, stacks."""

import contextlib
import dataclasses
import faulthandler
import os
import pathlib
import resource
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

from mftjax.errors import InputError

_WARM_UP = 2  # steps in which programs may be compiled: the first, and one whose arguments come from a step
_COMPILE = "/jax/core/compile/backend_compile_duration"

# Dense bf16 matmuls of one device of JAX's kinds, FLOP/s. Sources: the makers' data sheets (Google Cloud TPU system
# architecture; NVIDIA H100, A100, L4, V100). A JAX device of a v4 or newer is a whole chip, of a v2 or v3 half of one.
PEAK_FLOPS = {
  "TPU v2": 22.5e12,
  "TPU v3": 61.5e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "NVIDIA H200": 989e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA L4": 121e12,
  "Tesla V100-SXM2-16GB": 125e12,
}


@dataclasses.dataclass(frozen=True)
class Options:
  """What the command line asks of every phase of a run."""

  profile: tuple[int, int] | None = None  # first and last step of a trace
  stuck_seconds: float = 0.0  # without a finished step, after which stacks are written; 0 never


# The descriptor itself, since who captures `sys.stderr` may have put something in its place.
_STDERR = 2

_options = Options()
_compiles: list[str] = []  # names of all programs that this process compiled, or read from the compilation cache


def start(profile: str | None, stuck_seconds: float) -> None:
  """Has the phases that follow write a trace of some steps, and the stacks of all threads when a step takes too long.

  SIGUSR1 writes the stacks at any time; they go to standard error.

  Args:
    profile: "FIRST:LAST", steps as `metrics.jsonl` counts them, or None.

  Raises:
    InputError: `profile` is not two steps in order.
  """
  global _options
  _options = Options(None if profile is None else _steps_of(profile), stuck_seconds)
  if hasattr(signal, "SIGUSR1"):
    faulthandler.register(signal.SIGUSR1, file=_STDERR)


def _steps_of(text: str) -> tuple[int, int]:
  first, _, last = text.partition(":")
  if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
    raise InputError(f"--profile={text}: give the first and the last step of the trace, such as 10:12.")
  return int(first), int(last)


class Watch:
  """What the steps of one phase take.

  Args:
    workdir: gets `profile/NAME`, if a trace is asked for.
    name: the phase.
    tokens_per_step: of all devices; 0 leaves tokens/s out.
    flops_per_step: that the step needs, of all devices, see `models.flops`; 0 leaves the utilisation out.
    num_devices: that share the step.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    name: str,
    *,
    tokens_per_step: int = 0,
    flops_per_step: float = 0.0,
    num_devices: int = 1,
  ):
    self._name, self._trace = name, workdir / "profile" / name
    self._tokens, self._flops, self._num_devices = tokens_per_step, flops_per_step, num_devices
    self._input_seconds = 0.0
    self._num_done, self._is_tracing = 0, False
    self._since, self._num_compiles = time.perf_counter(), len(_compiles)

  def steps(self, first: int, stop: int) -> Iterator[int]:
    """`range(first, stop)`, each watched until the next one is asked for."""
    self._since = time.perf_counter()
    try:
      for step in range(first, stop):
        self._begin(step + 1)
        with jax.profiler.StepTraceAnnotation(self._name, step_num=step + 1):
          yield step
        self._end(step + 1)
    finally:
      faulthandler.cancel_dump_traceback_later()
      self._stop_trace()

  @contextlib.contextmanager
  def input(self) -> Iterator[None]:
    """Around what a step waits for before its program starts: drawing and placing its rows."""
    start = time.perf_counter()
    yield
    self._input_seconds += time.perf_counter() - start

  def figures(self) -> dict[str, Any]:
    """What was taken since the last call: the step at hand, with what was saved before it.

    Returns:
      `step_seconds`, `input_seconds`, `compiles` (programs compiled so far in this process), `memory_bytes` (in use on
      each local device; of a CPU the process's), and where they are known `tokens_per_second` and `utilisation`, the
      part of the devices' peak in bf16 that the step's FLOPs are.
    """
    now = time.perf_counter()
    seconds, self._since = now - self._since, now
    found = {"step_seconds": seconds, "input_seconds": self._input_seconds, "compiles": len(_compiles)}
    self._input_seconds = 0.0
    if self._tokens:
      found["tokens_per_second"] = self._tokens / seconds
    peak = PEAK_FLOPS.get(jax.local_devices()[0].device_kind)
    if self._flops and peak:
      found["utilisation"] = self._flops / seconds / (peak * self._num_devices)
    return {**found, "memory_bytes": memory_bytes()}

  def _begin(self, step: int) -> None:
    if _options.stuck_seconds:
      faulthandler.dump_traceback_later(_options.stuck_seconds, repeat=True, file=_STDERR)
    if _options.profile and step == _options.profile[0]:
      jax.profiler.start_trace(str(self._trace))
      self._is_tracing = True

  def _end(self, step: int) -> None:
    self._num_done += 1
    if self._num_done > _WARM_UP and len(_compiles) > self._num_compiles:
      names = ", ".join(dict.fromkeys(_compiles[self._num_compiles :]))
      logging.warning(
        "%s step %d compiled again: %s. A shape or type changed, which costs time.", self._name, step, names
      )
    self._num_compiles = len(_compiles)
    if _options.profile and step == _options.profile[1]:
      self._stop_trace()

  def _stop_trace(self) -> None:
    if self._is_tracing:
      self._is_tracing = False
      jax.profiler.stop_trace()
      logging.warning("The trace of %s is in %s.", self._name, self._trace)


def memory_bytes() -> dict[str, int]:
  """Bytes in use on each local device, by its name; a CPU's are those of this process, under `host`."""
  found = {}
  for device in jax.local_devices():
    stats = device.memory_stats()  # None on a CPU
    if stats:
      found[f"{device.platform}:{device.id}"] = int(stats["bytes_in_use"])
  return found or {"host": _resident_bytes()}


def _resident_bytes() -> int:
  statm = pathlib.Path("/proc/self/statm")
  if not statm.exists():  # not Linux: the most it ever was, which macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _listen(event: str, duration: float, **about: Any) -> None:
  if event == _COMPILE:
    _compiles.append(about.get("fun_name", "a program"))


jax.monitoring.register_event_duration_secs_listener(_listen)
