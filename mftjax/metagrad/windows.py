"""Truncated unrolls: windows of a longer inner run, and how far their meta-gradient is from the whole run's."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mftjax import errors
from mftjax.metagrad import mixed
from mftjax.metagrad import problem as problem_lib


def advance(
  problem: problem_lib.Problem, meta_params: Any, state: problem_lib.State, batches: Any, rng: jax.Array
) -> problem_lib.State:
  """Ordinary inner steps without a gradient, one for each of `batches` `[steps, ...]`.

  The keys are those of an unroll with the same `rng`, so `step(...).state` of any method is the same state.
  """
  keys, _ = problem_lib.split_keys(rng, problem_lib.unroll_length(batches))
  return problem_lib.run(problem, meta_params, state, batches, keys)[0]


def random_start(rng: jax.Array, horizon: int, unroll_length: int) -> jax.Array:
  """First step of a window, int32 scalar, uniform over the windows that lie within the horizon.

  Raises:
    InputError: the window is empty or longer than the horizon.
  """
  if not 1 <= unroll_length <= horizon:
    raise errors.InputError(f"A window needs 1 <= unroll_length <= horizon = {horizon}, got {unroll_length}.")
  return jax.random.randint(rng, (), 0, horizon - unroll_length + 1)


@dataclasses.dataclass(frozen=True)
class Agreement:
  """How a truncated meta-gradient g agrees with the full one f."""

  cosine: float  # <g, f> / (|g| |f|); 0 where only one of them is 0
  norm_ratio: float  # |g| / |f|
  sign_agreement: float  # part of |f|_1 that stands where g has f's sign


@dataclasses.dataclass(frozen=True)
class TruncationReport:
  """What `truncation_bias` found; lengths ascend and end with the horizon."""

  horizon: int
  threshold: float
  overall: dict[int, Agreement]  # by window length, all meta-parameters as one vector
  by_parameter: dict[int, dict[str, Agreement]]  # by window length and path of a meta-parameter's leaf

  @property
  def enough(self) -> int | None:
    """Shortest measured length that it and every longer one agree with the horizon; None: only the horizon does.

    To agree is to have cosine and sign agreement of at least `threshold`, overall and for each meta-parameter.
    """
    found = None
    for length in sorted(self.overall, reverse=True):
      agreements = [self.overall[length], *self.by_parameter[length].values()]
      if not all(min(a.cosine, a.sign_agreement) >= self.threshold for a in agreements):
        break
      found = length
    return found if found != self.horizon else None

  def table(self) -> str:
    """The figures as text, a line for each length and meta-parameter."""
    lines = [f"{'length':>6s} {'windows':>7s} {'meta-parameter':24s} {'cosine':>7s} {'norm ratio':>10s} {'sign':>6s}"]
    for length, overall in self.overall.items():
      for name, a in {"(all)": overall, **self.by_parameter[length]}.items():
        lines.append(
          f"{length:6d} {self.horizon // length:7d} {name:24s} {a.cosine:7.3f} {a.norm_ratio:10.3g} "
          f"{a.sign_agreement:6.2f}"
        )
    enough = self.enough
    lines.append(
      f"Only the whole horizon of {self.horizon} steps agrees (threshold {self.threshold})."
      if enough is None
      else f"Windows of {enough} steps are enough (horizon {self.horizon}, threshold {self.threshold})."
    )
    return "\n".join(lines)


def truncation_bias(
  problem: problem_lib.Problem,
  meta_params: Any,
  state: problem_lib.State,
  inner_batches: Any,
  outer_batch: Any,
  rng: jax.Array,
  lengths: Sequence[int] | None = None,
  build: Callable[[problem_lib.Problem], Callable[..., problem_lib.Output]] = mixed.build,
  threshold: float = 0.95,
) -> TruncationReport:
  """Compares the meta-gradient of short windows with that of the whole run, on the same batches and draws.

  For each length K the run is cut into windows of K steps. They carry the inner state, which counts as constant at
  the start of each; the outer loss stands at the end of each. With g_w the meta-gradient of window w, the mean of
  g_w is compared with the gradient of one window over the whole horizon. Steps after the last whole window are
  left out.

  Args:
    problem: what is differentiated. Step t gets the same key whatever the length.
    meta_params: where the gradients are taken.
    state: at the start of the run.
    inner_batches: `[horizon, ...]`, the batches of the run.
    outer_batch: of the outer loss, the same for each window.
    rng: key of the run.
    lengths: window lengths; default 1, 2, 4, ... below the horizon. The horizon itself is always added.
    build: `problem -> step`, e.g. `metagrad.value_and_grad`; it sets what memory the whole horizon takes.
    threshold: of cosine and sign agreement, for `TruncationReport.enough`.

  Raises:
    InputError: a length that is below 1 or above the horizon.

  Source: Wu et al. (2018), "Understanding short-horizon bias in stochastic meta-optimization", Section 3; Metz et
    al. (2019), "Understanding and correcting pathologies in the training of learned optimizers", Section 3.
  """
  horizon = problem_lib.unroll_length(inner_batches)
  if lengths is None:
    lengths = [2**power for power in range(horizon.bit_length())]
  for length in lengths:
    if not 1 <= length <= horizon:
      raise errors.InputError(f"Window lengths must lie in 1 .. {horizon} (the horizon), got {length}.")
  keys, outer_rng = problem_lib.split_keys(rng, horizon)
  batches = (inner_batches, _draw_keys(keys, problem.micro_batches))
  step = build(_with_keys(problem))

  def mean_gradient(meta_params, state, windows, outer_batch):  # windows: leaves [num_windows, length, ...]
    def body(state, window):
      out = step(meta_params, state, window, outer_batch, rng)
      return out.state, out.grad

    _, grads = jax.lax.scan(body, state, windows)
    return jax.tree.map(lambda g: jnp.mean(g, axis=0), grads)

  compiled = jax.jit(mean_gradient)
  gradients = {}
  for length in sorted({*lengths, horizon}):
    count = horizon // length
    windows = jax.tree.map(lambda x, k=length, n=count: x[: n * k].reshape(n, k, *x.shape[1:]), batches)
    gradients[length] = _by_parameter(compiled(meta_params, state, windows, (outer_batch, outer_rng)))
  full = gradients[horizon]
  return TruncationReport(
    horizon,
    threshold,
    {k: _agreement(np.concatenate([*g.values()]), np.concatenate([*full.values()])) for k, g in gradients.items()},
    {k: {name: _agreement(g[name], full[name]) for name in g} for k, g in gradients.items()},
  )


def _with_keys(problem: problem_lib.Problem) -> problem_lib.Problem:
  """The problem with each key in its batch: a step splits the key of its window, which differs with its length."""

  def inner_loss(params, meta_params, batch_and_keys, rng):
    batch, keys = batch_and_keys
    return problem.inner_loss(params, meta_params, batch, keys[0])

  def outer_loss(params, meta_params, batch_and_key, rng):
    return problem.outer_loss(params, meta_params, *batch_and_key)

  return dataclasses.replace(problem, inner_loss=inner_loss, outer_loss=outer_loss)


def _draw_keys(keys: jax.Array, micro_batches: int) -> jax.Array:
  """`[steps, micro_batches]` keys that the parts of each step's batch would get."""
  return keys[:, None] if micro_batches == 1 else jax.vmap(lambda key: jax.random.split(key, micro_batches))(keys)


def _by_parameter(grad: Any) -> dict[str, np.ndarray]:
  """Path of each meta-parameter's leaf -> its gradient as one vector, f64."""
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".") or "meta_params"
  return {name(path): np.asarray(leaf, np.float64).ravel() for path, leaf in jax.tree_util.tree_leaves_with_path(grad)}


def _agreement(g: np.ndarray, full: np.ndarray) -> Agreement:
  norm, full_norm = float(np.linalg.norm(g)), float(np.linalg.norm(full))
  if full_norm == 0.0:  # a meta-parameter without effect: right only if the window says so too
    same = float(norm == 0.0)
    return Agreement(same, 1.0 if same else np.inf, same)
  # Sign agreement is weighted: the sign of an entry that is close to zero decides nothing.
  signs = float(np.sum(np.abs(full) * (np.sign(g) == np.sign(full))) / np.sum(np.abs(full)))
  return Agreement(float(g @ full / (norm * full_norm)) if norm else 0.0, norm / full_norm, signs)
