"""Meta-gradients of the same model and data by mftjax, two other JAX ways, and torchopt, higher and betty-ml.

python -m benchmarks.peers [--small] [--model=mlp] [--steps=8,32] [--json[=FILE]]
python -m benchmarks.peers --side=torchopt --model=mlp --steps=8 --json

Every side unrolls the same Adam steps (optax's formula, eps_root = 0) in f32 and gives d outer loss / d (log learning
rate, mixture logits of 4 sources). Each runs in its own process: median seconds of a few calls after a warm-up, then
the peak of resident memory over one call. Errors are against reverse mode in f64. `make peers` installs the peers.
"""

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.ad_checkpoint import checkpoint_name

from benchmarks import peer_models, torch_peers, xla_cost
from benchmarks.peer_models import B1, B2, EPS
from mftjax import errors, metagrad

TIMED_CALLS = 5
MAX_SECONDS = 3.0  # of timed calls; fewer calls where one takes long
SIDE_TIMEOUT_SECONDS = 1200
REFERENCE = "f64 reverse"


# JAX sides: `(case) -> fn(meta_params, params, inner, outer) -> gradient like meta_params`


def _optimizer(meta_params: Any) -> optax.GradientTransformation:
  return optax.adam(jnp.exp(meta_params["log_learning_rate"]), B1, B2, EPS)


def _reverse_over_scan(case: peer_models.Case, gradient: Callable, wrap_step: Callable) -> Callable:
  """`jax.grad` of the outer loss through a scan; `gradient(params, meta_params, batch)` is that of the inner loss."""

  def outer_loss(meta_params, params, inner, outer):
    optimizer = _optimizer(meta_params)

    def step(carry, batch):
      params, opt_state = carry
      updates, opt_state = optimizer.update(gradient(params, meta_params, batch), opt_state, params)
      return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.lax.scan(wrap_step(step), (params, optimizer.init(params)), inner)
    return peer_models.jax_outer_loss(case)(params, meta_params, outer, None)

  return jax.grad(outer_loss)


def naive_reverse(case: peer_models.Case) -> Callable:
  """What a user writes first: nothing is checkpointed."""
  loss = peer_models.jax_inner_loss(case)
  return _reverse_over_scan(case, lambda *args: jax.grad(loss)(*args, None), lambda step: step)


def checkpointed_reverse(case: peer_models.Case) -> Callable:
  loss = peer_models.jax_inner_loss(case)
  return _reverse_over_scan(case, lambda *args: jax.grad(loss)(*args, None), jax.checkpoint)


def mixflow(save_gradients: bool) -> Callable[[peer_models.Case], Callable]:
  """The inner gradient with a reverse rule that is a forward-mode product; reverse mode over checkpointed steps.

  Source: MixFlow-MG (Kemaev et al., 2025), the reparameterisation and the saving of inner gradients.
  """

  def build(case: peer_models.Case) -> Callable:
    loss = lambda params, meta_params, batch: peer_models.jax_inner_loss(case)(params, meta_params, batch, None)

    @jax.custom_vjp
    def gradient(params, meta_params, batch):
      return jax.grad(loss)(params, meta_params, batch)

    def forward(params, meta_params, batch):
      return gradient(params, meta_params, batch), (params, meta_params, batch)

    def backward(residuals, u):
      params, meta_params, batch = residuals
      both = lambda params: jax.grad(loss, argnums=(0, 1))(params, meta_params, batch)
      return *jax.jvp(both, (params,), (u,))[1], None

    gradient.defvjp(forward, backward)
    if not save_gradients:
      return _reverse_over_scan(case, gradient, jax.checkpoint)
    named = lambda *args: jax.tree.map(lambda g: checkpoint_name(g, "inner_gradient"), gradient(*args))
    policy = jax.checkpoint_policies.save_only_these_names("inner_gradient")
    return _reverse_over_scan(case, named, lambda step: jax.checkpoint(step, policy=policy))

  return build


def ours(method: str, **options) -> Callable[[peer_models.Case], Callable]:
  def build(case: peer_models.Case) -> Callable:
    problem = metagrad.Problem(peer_models.jax_inner_loss(case), peer_models.jax_outer_loss(case), _optimizer)
    step = metagrad.value_and_grad(problem, method, **options)

    def fn(meta_params, params, inner, outer):
      return step(meta_params, metagrad.init(problem, meta_params, params), inner, outer, jax.random.key(0)).grad

    return fn

  return build


def _prepare_jax(build: Callable, case: peer_models.Case) -> tuple[Callable, dict]:
  """A call that gives the gradient as `[1 + NUM_SOURCES]`, and what XLA says of it."""
  arguments = jax.device_put((case.meta_params, case.params, case.inner, case.outer))
  compiled = jax.jit(build(case)).lower(*arguments).compile()
  cost = xla_cost.cost(compiled)

  def call():
    grad = jax.device_get(compiled(*arguments))
    return np.append(grad["log_learning_rate"], grad["mixture_logits"])

  return call, {"temporaries": cost["temporaries"], "flops": cost["flops"]}


def _prepare_reference(case: peer_models.Case) -> tuple[Callable, dict]:
  jax.config.update("jax_enable_x64", True)
  widen = lambda x: x.astype(np.float64) if x.dtype == np.float32 else x
  trees = (case.params, case.inner, case.outer, case.meta_params)
  return _prepare_jax(checkpointed_reverse, peer_models.Case(case.model, *jax.tree.map(widen, trees)))


JAX_SIDES: dict[str, Callable[[peer_models.Case], Callable]] = {
  "mftjax mixed": ours("mixed"),
  "mftjax mixed, activations": ours("mixed", recovery="store", save="activations"),
  "mftjax mixed, gradients": ours("mixed", recovery="store", save="gradients"),
  "mftjax mixed, checkpoint": ours("mixed", recovery="checkpoint"),
  "mftjax mixed, invert": ours("mixed", recovery="invert", save="nothing"),
  "mftjax reverse": ours("reverse"),
  "naive reverse": naive_reverse,
  "mixflow": mixflow(save_gradients=False),
  "mixflow, gradients saved": mixflow(save_gradients=True),
}
TORCH_SIDES = torch_peers.SIDES
SIDES = (*JAX_SIDES, *TORCH_SIDES)
NOT_IN_SMALL = (
  "mftjax mixed, gradients",
  "mftjax mixed, activations",
  "mftjax mixed, checkpoint",
  "mftjax reverse",
  "mixflow",
)


# One side, in its own process


def measure(side: str, model: str, steps: int, small: bool) -> dict[str, Any]:
  """`seconds`, `peak_bytes`, `gradient` and `note` of one side, and for JAX `temporaries` (bytes) and `flops`."""
  warnings.filterwarnings("ignore")  # torch and functorch on the peers' use of them
  # Else XLA's pool of threads may hold the temporaries of a call until the next one, and its peak cannot be told.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  case = peer_models.make_case(model, steps, small)
  row: dict[str, Any] = {"seconds": None, "peak_bytes": None, "note": ""}
  try:
    if side in TORCH_SIDES:
      build, package = TORCH_SIDES[side]
      row["note"] = f"{package} {importlib.metadata.version(package)}"
      call = build(case)
    else:
      call, cost = _prepare_reference(case) if side == REFERENCE else _prepare_jax(JAX_SIDES[side], case)
      row |= cost
  except ImportError as error:
    package = TORCH_SIDES[side][1] if side in TORCH_SIDES else side
    return row | {"note": "not installed" if error.name in (None, package, side, "torch") else f"lacks {error.name}"}
  except errors.InputError as error:
    return row | {"note": f"not available: {error}"}
  row["gradient"] = call().tolist()
  if side == REFERENCE:
    return row
  seconds: list[float] = []
  while len(seconds) < TIMED_CALLS and (not seconds or sum(seconds) < MAX_SECONDS):
    start = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - start)
  return row | {"seconds": statistics.median(seconds), "peak_bytes": _peak_bytes(call)}


def _peak_bytes(call: Callable) -> int | None:
  """Peak of resident memory during a call less that before it; None where there is no Linux /proc."""
  peak_reset = pathlib.Path("/proc/self/clear_refs")
  if not os.access(peak_reset, os.W_OK):
    return None
  libc = ctypes.CDLL(None)
  if hasattr(libc, "mallopt"):
    # Freed arrays go back to the system at once, so that what earlier calls left behind is not reused uncounted.
    # After the timing, since this makes allocation slow.
    libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD
  call()
  gc.collect()
  if hasattr(libc, "malloc_trim"):
    libc.malloc_trim(0)
  peak_reset.write_text("5")
  before = _resident_bytes("VmRSS")
  call()
  return max(_resident_bytes("VmHWM") - before, 0)


def _resident_bytes(field: str) -> int:
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith(field + ":"):
      return 1024 * int(line.split()[1])
  raise OSError(f"/proc/self/status has no {field}.")


# All sides


def compare(
  models: Iterable[str], steps: int | Iterable[int], small: bool, sides: Iterable[str] | None = None
) -> list[dict[str, Any]]:
  """One row a model, unroll length and side, each measured in a process of its own.

  Args:
    models: of `peer_models.MODELS`.
    steps: unroll lengths.
    small: whether to take the small shapes.
    sides: of `SIDES`; all by default, those of `NOT_IN_SMALL` only without `small`.

  Returns:
    Rows of `model`, `side`, `steps`, `seconds`, `peak_bytes`, `error` (the larger of the relative errors of the two
    meta-parameters' gradients against f64, Euclidean norms), `note`; `temporaries` and `flops` on JAX sides. What
    could not be measured is None, and `note` says why.
  """
  if sides is None:
    sides = [side for side in SIDES if not small or side not in NOT_IN_SMALL]
  rows = []
  for model in models:
    for length in [steps] if isinstance(steps, int) else steps:
      found = _measure_apart(REFERENCE, model, length, small)
      reference = found.get("gradient")
      for side in sides:
        row = _measure_apart(side, model, length, small)
        gradient = row.pop("gradient", None)
        if reference is None:
          row["note"] += f" (no error: the f64 reference {found['note']})"
        known = gradient is not None and reference is not None
        error = relative_error(np.array(gradient), np.array(reference)) if known else None
        rows.append({"model": model, "side": side, "steps": length, **row, "error": error})
  return rows


def relative_error(gradient: np.ndarray, reference: np.ndarray) -> float:
  """The larger of the two meta-parameters' errors; both gradients `[1 + NUM_SOURCES]`."""
  error = lambda part: float(np.linalg.norm(gradient[part] - reference[part]) / np.linalg.norm(reference[part]))
  return max(error(slice(0, 1)), error(slice(1, None)))


def _measure_apart(side: str, model: str, steps: int, small: bool) -> dict[str, Any]:
  command = [sys.executable, "-m", "benchmarks.peers", f"--side={side}", f"--model={model}", f"--steps={steps}"]
  failed = {"seconds": None, "peak_bytes": None}
  try:
    done = subprocess.run(
      [*command, "--json", *["--small"] * small],
      capture_output=True,
      text=True,
      timeout=SIDE_TIMEOUT_SECONDS,
      cwd=pathlib.Path(__file__).parent.parent,
      # Resident memory says nothing of an accelerator's. Threads of torch that spin at a barrier cost it up to 50x in
      # time as soon as anything else runs on the machine.
      env={**os.environ, "JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "PASSIVE"},
    )
  except subprocess.TimeoutExpired:
    return failed | {"note": f"not done in {SIDE_TIMEOUT_SECONDS} s"}
  if done.returncode:
    return failed | {"note": f"failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}"}
  return json.loads(done.stdout.splitlines()[-1])


def format_table(rows: list[dict[str, Any]]) -> str:
  number = lambda value, form, scale=1.0: "-" if value is None else format(value / scale, form)
  lines = [f"{'model':12s} {'steps':>5s}  {'side':26s} {'ms':>8s} {'peak MiB':>9s} {'XLA MiB':>8s} {'error':>8s}  note"]
  for row in rows:
    lines.append(
      f"{row['model']:12s} {row['steps']:5d}  {row['side']:26s} {number(row['seconds'], '8.1f', 1e-3):>8s} "
      f"{number(row['peak_bytes'], '9.1f', 2**20):>9s} {number(row.get('temporaries'), '8.1f', 2**20):>8s} "
      f"{number(row['error'], '8.1e'):>8s}  {row['note']}".rstrip()
    )
  return "\n".join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--side", choices=[*SIDES, REFERENCE], help="measure this one alone, in this process")
  parser.add_argument("--model", choices=peer_models.MODELS, help="both without it")
  parser.add_argument("--steps", default="8", help="unroll lengths, comma-separated")
  parser.add_argument("--small", action="store_true", help="small shapes, about 90 s in all")
  parser.add_argument("--json", nargs="?", const="-", help="file to write the figures to; without one they are printed")
  arguments = parser.parse_args()
  steps = [int(length) for length in arguments.steps.split(",")]
  models = [arguments.model] if arguments.model else list(peer_models.MODELS)
  if arguments.side:
    figures: Any = measure(arguments.side, models[0], steps[0], arguments.small)
  else:
    figures = compare(models, steps, arguments.small)
    print(format_table(figures))
  if arguments.json == "-":
    print(json.dumps(figures))
  elif arguments.json:
    pathlib.Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")
  elif arguments.side:
    print(figures)


if __name__ == "__main__":
  main()
