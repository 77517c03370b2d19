"""What an unroll keeps for its way back, chosen by name or by a memory budget."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from absl import logging

from mftjax import errors
from mftjax.metagrad import inversion, products
from mftjax.metagrad import problem as problem_lib

RECOVERIES = ("auto", "store", "checkpoint", "invert")
SAVES = ("auto", "activations", "gradients", "nothing")
INVERT_EVERY = 16  # 1 / 0.9^16 = 5.4: what rounding in a first moment grows by between two exact states
DEFAULT_MEMORY_BYTES = 2 * 2**30  # where the device does not say how much it has


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is kept between the way forward and the way back.

  Attributes:
    recovery: `store` every state; `checkpoint` one every `every` steps and run these steps again; `invert` the update,
      with an exact state every `every` steps, so that rounding does not grow further than that.
    save: `gradients` of the inner steps, `activations` beside them, or `nothing`.
    product: the Hessian product; its `saved` is kept beside the gradient.
    every: steps of a segment.
    bytes: that are kept, about; None where they were not counted.
    inverse: of the update, for `invert`.
    offload: whether what is kept lies in the host's memory meanwhile.
  """

  recovery: str
  save: str
  product: products.Product
  every: int
  bytes: int
  inverse: inversion.Inverse | None = None
  offload: bool = False

  @property
  def saves_gradients(self) -> bool:
    """Whether inner gradients are kept; else they are taken again on the way back."""
    return self.save != "nothing"


@dataclasses.dataclass(frozen=True)
class Options:
  """What a user asks for (see `choose`)."""

  recovery: str = "auto"
  save: str = "auto"
  every: int | None = None
  memory_bytes: int | None = None
  offload: bool = False

  def __post_init__(self):
    for name, value, known in (("recovery", self.recovery, RECOVERIES), ("save", self.save, SAVES)):
      if value not in known:
        raise errors.unknown_name(name, value, known)
    if self.every is not None:
      problem_lib.check_count("every", self.every)
    if self.memory_bytes is not None and not (isinstance(self.memory_bytes, int | float) and self.memory_bytes > 0):
      raise errors.InputError(f"memory_bytes must be a number of bytes above 0, got {self.memory_bytes!r}.")
    if self.recovery == "checkpoint" and self.save not in ("auto", "gradients"):
      raise errors.InputError(f"recovery='checkpoint' saves the gradients of one segment, not save={self.save!r}.")
    if self.save == "activations" and self.recovery not in ("auto", "store"):
      raise errors.InputError(f"save='activations' goes with recovery='store', not {self.recovery!r}.")
    if self.offload and "pinned_host" not in {memory.kind for memory in jax.devices()[0].addressable_memories()}:
      raise errors.InputError("offload=True needs a backend with pinned host memory; this one has none.")


# Fewest operations first, and the exact ones before the one that rounds.
_PREFERENCE = (
  ("store", "activations"),
  ("store", "gradients"),
  ("store", "nothing"),
  ("invert", "gradients"),
  ("checkpoint", "gradients"),
  ("invert", "nothing"),
)
_AUTO_SKIPS = (("store", "nothing"), ("invert", "gradients"))


def choose(
  problem: problem_lib.Problem,
  product: Callable[[problem_lib.Problem], products.Product],
  options: Options,
  meta_params: Any,
  state: problem_lib.State,
  batches: Any,
  keys: jax.Array,
) -> Plan:
  """The plan for an unroll of these shapes.

  The first that fits `memory_bytes` (a quarter of the device's memory by default, 2 GiB where it does not say) of:
  store with activations (exact product, not on a CPU), store with gradients, checkpoint, invert with nothing saved;
  `recovery` and `save` narrow them down. Says so in the log if none fits, or if an optimiser has no inverse.
  """
  length = len(keys)
  state_bytes = _num_bytes((state.params, state.opt_state))
  gradient_bytes = _num_bytes(state.params)
  budget = options.memory_bytes or _device_budget()
  plans = []
  for recovery, save in _PREFERENCE:
    if options.recovery not in ("auto", recovery) or options.save not in ("auto", save):
      continue
    if options.recovery == options.save == "auto" and (recovery, save) in _AUTO_SKIPS:
      continue
    if save == "activations":
      if product is not products.exact:
        if options.save == "activations":
          raise errors.InputError("save='activations' goes with exact products (method 'mixed'); leave it out here.")
        continue
      # On a CPU reading activations back takes longer than computing them again (docs/results.md).
      if options.save == "auto" and jax.default_backend() == "cpu":
        continue
      if options.save == "auto" and length * (state_bytes + gradient_bytes) > budget:
        continue
      step = jax.tree.map(lambda x: x[0], (batches, keys))
      linearized, activation_bytes = products.linearized(problem, meta_params, state.params, *step)
      kept = length * (state_bytes + gradient_bytes + activation_bytes)
      plan = Plan(recovery, save, linearized, length, kept, offload=options.offload)
    elif recovery == "store":
      kept = length * (state_bytes + (gradient_bytes if save == "gradients" else 0))
      plan = Plan(recovery, save, product(problem), length, kept, offload=options.offload)
    elif recovery == "checkpoint":
      plan = _checkpoint(problem, product, options, length, state_bytes, gradient_bytes)
    else:
      try:
        inverse = inversion.derive(problem, meta_params, state, has_gradient=save == "gradients")
      except inversion.NotInvertible as error:
        if options.recovery == "invert":
          logging.warning("recovery='invert' with save=%r: no inverse of %s.", save, error)
        continue
      segment = min(options.every or INVERT_EVERY, length)
      kept = -(-length // segment) * state_bytes + (length * gradient_bytes if save == "gradients" else 0)
      plan = Plan(recovery, save, product(problem), segment, kept, inverse, options.offload)
    plans.append(plan)
    if plan.bytes <= budget:
      return plan
  if not plans:
    logging.warning("This optimiser has no inverse; recovery='checkpoint' in its place.")
    return _checkpoint(problem, product, options, length, state_bytes, gradient_bytes)
  least = min(plans, key=lambda plan: plan.bytes)
  if len(plans) > 1 or options.memory_bytes:
    logging.warning(
      "Nothing fits the memory budget of %.0f MiB; %s with save=%r keeps the least, about %.0f MiB.",
      budget / 2**20, least.recovery, least.save, least.bytes / 2**20,
    )  # fmt: skip
  return least


def _checkpoint(problem, product, options: Options, length: int, state_bytes: int, gradient_bytes: int) -> Plan:
  """Checkpoints at the distance that keeps the least; all distances cost the same one run more."""
  kept = lambda every: -(-length // every) * state_bytes + every * (state_bytes + gradient_bytes)
  candidates: Iterable[int] = range(1, length + 1)
  if options.every:
    candidates = [min(options.every, length)]
  least = min(map(kept, candidates))
  # A distance that divides the unroll compiles its steps once, not once more for the rest.
  near = [every for every in candidates if length % every == 0 and kept(every) <= 1.25 * least]
  every = min(near or candidates, key=kept)
  return Plan("checkpoint", "gradients", product(problem), every, kept(every), offload=options.offload)


def _device_budget() -> int:
  stats = jax.devices()[0].memory_stats() or {}
  return stats["bytes_limit"] // 4 if "bytes_limit" in stats else DEFAULT_MEMORY_BYTES


def _num_bytes(tree: Any) -> int:
  shapes = jax.eval_shape(lambda: jax.tree.map(jax.numpy.asarray, tree))
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
