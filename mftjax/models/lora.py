"""Low-rank adapters, stacked over the layers like the weights that they adapt."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from mftjax.errors import InputError, unknown_name

if TYPE_CHECKING:  # the decoder looks for adapters itself
  from mftjax.models.decoder import Decoder

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRAParam(nnx.Param):
  """A parameter of an adapter, for `nnx.split(model, LoRAParam, ...)`."""


def add(model: "Decoder", rank: int, alpha: float, targets: Sequence[str], *, rngs: nnx.Rngs) -> None:
  """Adds adapters in place: W becomes W + alpha / rank A B, with B zero, so the logits stay as they were.

  Args:
    model: gets `layers.<target>_lora_a` `[num_layers, in, rank]` and `_lora_b` `[num_layers, rank, out]`, f32.
    rank: at least 1.
    alpha: scale of the adapters' sum, times rank.
    targets: some of `TARGETS`.
    rngs: its `params` stream draws A (uniform, +- sqrt(1 / in), as in the reference implementation).

  Raises:
    InputError: an unknown target, none, a rank below 1, or adapters that are there already.

  Source: LoRA (Hu et al., 2021), Section 4.1.
  """
  check(rank, targets)
  if adapted(model):
    raise InputError(f"The model has LoRA on {', '.join(adapted(model))} already; merge that first.")
  for target in dict.fromkeys(targets):
    num_layers, size_in, size_out = getattr(model.layers, target).shape
    a = draw_a(rngs.params(), (num_layers, size_in, rank))
    setattr(model.layers, f"{target}_lora_a", LoRAParam(a))
    setattr(model.layers, f"{target}_lora_b", LoRAParam(jnp.zeros((num_layers, rank, size_out), jnp.float32)))
  model.layers.lora_scale = alpha / rank


def check(rank: int, targets: Sequence[str]) -> None:
  """Raise `InputError` if the rank or the targets are not to be had."""
  if rank < 1:
    raise InputError(f"LoRA rank = {rank} must be at least 1.")
  if not targets:
    raise InputError(f"LoRA needs one target or more of: {', '.join(TARGETS)}.")
  for target in targets:
    if target not in TARGETS:
      raise unknown_name("LoRA target", target, TARGETS)


def draw_a(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """A new A `[..., in, rank]`, f32, uniform within +- sqrt(1 / in)."""
  bound = shape[-2] ** -0.5
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def is_a(name: str) -> bool:
  """Whether an array of this name is an A, whose last axis is the rank; a B's is the one before."""
  return name.endswith("_lora_a")


def is_b(path: Sequence[Any]) -> bool:
  """Whether the parameter at this path is a B, which starts at zero."""
  return any(name.endswith("_lora_b") for name in names_of(path))


def adapted(model: "Decoder") -> list[str]:
  """The targets that have an adapter."""
  return [target for target in TARGETS if hasattr(model.layers, f"{target}_lora_a")]


def masked(params: Any, rank: jax.typing.ArrayLike | None = None, scale: jax.typing.ArrayLike = 1.0) -> Any:
  """Params whose adapters have a smaller rank and another scale; differentiable in both.

  Column k of A counts `clip(rank - k, 0, 1)`: at a whole rank r exactly the first r columns are there, in between the
  last one is there in part. At whole ranks the derivative is the one from below.

  Args:
    params: a pytree whose paths name the parameters, such as the state of a model; all but `_lora_b` stays as it is.
    rank: scalar, at least 0; None is the whole rank.
    scale: scalar that alpha / rank (the whole rank) is multiplied by.

  Source: Nested dropout's ordering (Rippel et al., 2014, Section 3), made soft.
  """

  def mask(path, leaf):
    if not is_b(path):
      return leaf
    kept = jnp.asarray(scale)
    if rank is not None:
      kept = kept * ramp(rank - jnp.arange(leaf.shape[-2])[:, None])
    return leaf * kept.astype(leaf.dtype)

  return jax.tree.map_with_path(mask, params)


def ramp(x: jax.Array) -> jax.Array:
  """clip(x, 0, 1), whose derivative at 0 and 1 is the one from below (`jnp.clip` has half of it at either)."""
  return jnp.where(x > 1, 1.0, jnp.where(x > 0, x, 0.0))


def names_of(path: Sequence[Any]) -> list[str]:
  """The names along a path of a pytree, such as `["layers", "q_proj_lora_b", "value"]`."""
  return [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]


def merge(model: "Decoder") -> None:
  """Folds the adapters into the weights in place, and removes them; the logits stay the same but for rounding.

  Raises:
    InputError: a model without adapters.
  """
  if not adapted(model):
    raise InputError("The model has no LoRA to merge.")
  for target in adapted(model):
    weight = getattr(model.layers, target)[...]
    a = getattr(model.layers, f"{target}_lora_a")[...]
    b = getattr(model.layers, f"{target}_lora_b")[...]
    update = model.layers.lora_scale * jnp.einsum("lir,lro->lio", a, b)
    setattr(model.layers, target, nnx.Param((weight + update).astype(weight.dtype)))
    delattr(model.layers, f"{target}_lora_a")
    delattr(model.layers, f"{target}_lora_b")
  model.layers.lora_scale = 0.0
