"""What an unroll keeps for its way back, chosen by name or by a memory budget."""

import dataclasses
import math
from collections.abc import Callable
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
      if self.recovery == "store" or self.save == "activations":
        raise errors.InputError("every has no meaning where each state is stored.")
    if self.memory_bytes is not None and not (isinstance(self.memory_bytes, int | float) and self.memory_bytes > 0):
      raise errors.InputError(f"memory_bytes must be a number of bytes above 0, got {self.memory_bytes!r}.")
    if self.recovery == "checkpoint" and self.save not in ("auto", "gradients"):
      raise errors.InputError(f"recovery='checkpoint' saves the gradients of one segment, not save={self.save!r}.")
    if self.save == "activations" and self.recovery not in ("auto", "store"):
      raise errors.InputError(f"save='activations' goes with recovery='store', not {self.recovery!r}.")
    if not isinstance(self.offload, bool):
      raise errors.InputError(f"offload must be True or False, got {self.offload!r}.")
    if self.offload and "pinned_host" not in {memory.kind for memory in jax.devices()[0].addressable_memories()}:
      raise errors.InputError("offload=True needs a backend with pinned host memory; this one has none.")


def options(given: dict[str, Any]) -> Options:
  """`Options` of a user's keywords.

  Raises:
    InputError: an unknown one, or a value out of its range.
  """
  known = [field.name for field in dataclasses.fields(Options)]
  for name in given:
    if name not in known:
      raise errors.unknown_name("option", name, known)
  return Options(**given)


# Fewest operations first, and the exact ones before the one that rounds. Activations are kept only where they are asked
# for: reading them back took longer than computing them again on a CPU and on a GPU (docs/results.md).
_PREFERENCE = (
  ("store", "activations"),
  ("store", "gradients"),
  ("store", "nothing"),
  ("invert", "gradients"),
  ("checkpoint", "gradients"),
  ("invert", "nothing"),
)
_NOT_IN_AUTO = (("store", "nothing"), ("invert", "gradients"))


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

  The first that fits `memory_bytes` (`device_budget()` by default) of: store with gradients, checkpoint, invert with
  nothing saved; `recovery` and `save` narrow them down. Says so in the log if none fits, or if an optimiser has no
  inverse.

  Raises:
    InputError: `save="activations"` of a product that is not the exact one.
  """
  if options.save == "activations" and product is not products.exact:
    raise errors.InputError("save='activations' goes with the exact product of method 'mixed'; leave it out here.")
  budget = options.memory_bytes or device_budget()
  window = _Window(problem, product, options, meta_params, state, batches, keys)
  plans = []
  for recovery, save in _PREFERENCE:
    if options.recovery not in ("auto", recovery) or options.save not in ("auto", save):
      continue
    if options.recovery == options.save == "auto" and (recovery, save) in _NOT_IN_AUTO:
      continue
    if save == "activations" and options.save != save:
      continue
    plan = window.plan(recovery, save)
    if plan:
      plans.append(plan)
      if plan.bytes <= budget:
        return plan
  if not plans:
    logging.warning("This optimiser has no inverse; recovery='checkpoint' in its place.")
    return window.checkpoint()
  least = min(plans, key=lambda plan: plan.bytes)
  if len(plans) > 1 or options.memory_bytes:
    sizes = budget / 2**20, least.recovery, least.save, least.bytes / 2**20
    logging.warning("Nothing fits the memory budget of %.0f MiB; %s with save=%r keeps the least, %.0f MiB.", *sizes)
  return least


@dataclasses.dataclass(frozen=True)
class _Window:
  """The arguments of `choose`; makes plans from them."""

  problem: problem_lib.Problem
  product: Callable[[problem_lib.Problem], products.Product]
  options: Options
  meta_params: Any
  state: problem_lib.State
  batches: Any
  keys: jax.Array

  @property
  def length(self) -> int:
    return len(self.keys)

  @property
  def state_bytes(self) -> int:
    return _num_bytes((self.state.params, self.state.opt_state))

  @property
  def gradient_bytes(self) -> int:
    return _num_bytes(self.state.params)

  def plan(self, recovery: str, save: str) -> Plan | None:
    """One plan, or None where there is none."""
    if recovery == "checkpoint":
      return self.checkpoint()
    if recovery == "invert":
      return self.invert(save)
    kept = self.length * (self.state_bytes + (0 if save == "nothing" else self.gradient_bytes))
    if save != "activations":
      return Plan(recovery, save, self.product(self.problem), self.length, kept, offload=self.options.offload)
    step = jax.tree.map(lambda x: x[0], (self.batches, self.keys))
    product, activation_bytes = products.linearized(self.problem, self.meta_params, self.state.params, *step)
    kept += self.length * activation_bytes
    return Plan(recovery, save, product, self.length, kept, offload=self.options.offload)

  def checkpoint(self) -> Plan:
    """Checkpoints at the distance that keeps the least; all distances cost the same one run more."""
    length, state_bytes, step_bytes = self.length, self.state_bytes, self.state_bytes + self.gradient_bytes
    kept = lambda every: -(-length // every) * state_bytes + every * step_bytes
    candidates = [min(self.options.every, length)] if self.options.every else range(1, length + 1)
    least = min(map(kept, candidates))
    # A distance that divides the unroll compiles its steps once, not once more for the rest.
    near = [every for every in candidates if length % every == 0 and kept(every) <= 1.25 * least]
    every = min(near or candidates, key=kept)
    product = self.product(self.problem)
    return Plan("checkpoint", "gradients", product, every, kept(every), offload=self.options.offload)

  def invert(self, save: str) -> Plan | None:
    """The update inverted, with an exact state every so many steps; None if it has no inverse."""
    try:
      inverse = inversion.derive(self.problem, self.meta_params, self.state, has_gradient=save == "gradients")
    except inversion.NotInvertible as error:
      if self.options.recovery == "invert":
        logging.warning("recovery='invert' with save=%r: no inverse of %s.", save, error)
      return None
    every = min(self.options.every or INVERT_EVERY, self.length)
    kept = -(-self.length // every) * self.state_bytes + (
      self.length * self.gradient_bytes if save == "gradients" else 0
    )
    return Plan("invert", save, self.product(self.problem), every, kept, inverse, self.options.offload)


def device_budget() -> int:
  """A quarter of a device's memory, or 2 GiB where it does not say how much it has; bytes."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats["bytes_limit"] // 4 if "bytes_limit" in stats else DEFAULT_MEMORY_BYTES


def _num_bytes(tree: Any) -> int:
  shapes = jax.eval_shape(lambda: jax.tree.map(jax.numpy.asarray, tree))
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
