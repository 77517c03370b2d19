"""What a config names, made: the model split into what is trained and what is not, and the rows of data."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from flax import nnx

from mftjax import config as config_lib
from mftjax import errors, files, hosts, metagrad, models, parallel, sft, types
from mftjax.data import sources, tokens
from mftjax.models import flops

# Fields of an ability that say how it is measured, not where its examples are read from.
_ABILITY_FIELDS = ("weight", "reference", "test_path", "test_split")


@dataclasses.dataclass(frozen=True)
class Network:
  """A model taken apart, so that pure functions can put it together again."""

  graphdef: Any  # structure of the modules
  params: nnx.State  # what the inner step trains: LoRA, or all but the memory
  memory: nnx.State | None  # the memory's slots, None without memory
  frozen: nnx.State  # everything else
  layout: parallel.Layout  # the devices that all of it lies on

  def apply(self, frozen: nnx.State, params: nnx.State, memory: nnx.State | None, batch: types.Batch) -> jax.Array:
    """Logits `[batch, length, vocab]` of the batch's tokens."""
    return self.merge(frozen, params, memory)(batch.tokens, batch.segment_ids, batch.positions)

  def merge(self, frozen: nnx.State, params: nnx.State, memory: nnx.State | None) -> models.Decoder:
    """The model with these parameters."""
    return nnx.merge(self.graphdef, memory if memory is not None else nnx.State({}), params, frozen)

  def flops(self, length: int, num_tokens: int) -> float:
    """FLOPs that an SFT step on so many tokens needs, in rows of this length."""
    return flops.step(self._shape, length, num_tokens, self._is_adapted)

  def outer_flops(self, config: ml_collections.ConfigDict) -> float:
    """FLOPs that an outer step of the config needs, 0 if that is not known."""
    row = config.length
    num_tokens = config.meta.unroll_length * config.batch_size * row
    num_held_out = len(config.abilities) * config.meta.ability_rows * row
    return flops.outer_step(self._shape, row, num_tokens, num_held_out, self._is_adapted, config.meta.method)

  @property
  def _shape(self) -> models.DecoderConfig:
    return self.merge(self.frozen, self.params, self.memory).config

  @property
  def _is_adapted(self) -> bool:
    return bool(jax.tree.leaves(self.frozen))


def load_model(config: ml_collections.ConfigDict) -> tuple[models.Decoder, Any]:
  """The base model of the config and its tokenizer, without LoRA or memory."""
  dtype = jnp.dtype(config.model.dtype)
  if config.model.path:
    model, tokenizer = models.load(config.model.path, config.model.gguf_file or None, dtype)
  else:
    tokenizer = tokens.char_tokenizer()
    if config.model.hidden_size % config.model.num_heads:
      raise errors.InputError(
        f"config.model.hidden_size = {config.model.hidden_size} does not divide by "
        f"config.model.num_heads = {config.model.num_heads}."
      )
    shape = models.DecoderConfig(
      family="llama",
      vocab_size=len(tokenizer),
      hidden_size=config.model.hidden_size,
      intermediate_size=4 * config.model.hidden_size,
      num_layers=config.model.num_layers,
      num_heads=config.model.num_heads,
      num_kv_heads=config.model.num_heads,
      head_dim=config.model.hidden_size // config.model.num_heads,
      rope_theta=10_000.0,
      norm_eps=1e-5,
      tie_embeddings=True,
      attention_bias=False,
      max_length=max(config.length, 256),
      dtype=dtype,
    )
    model = models.Decoder(shape, rngs=nnx.Rngs(config.seed))
  model.config = dataclasses.replace(model.config, remat=config.model.remat, attention=config.model.attention)
  return model, tokenizer


def attach_memory(model: models.Decoder, config: ml_collections.ConfigDict) -> None:
  """Give the model the config's memory, if there is one.

  Raises:
    InputError: sizes, layers or options that do not go together.
  """
  options, block_size = config.memory, config.continual.written_rows
  if options.num_slots:
    has_adapters = options.placement == "adapters"
    rngs = nnx.Rngs(config.seed + 1)
    memories = [
      models.Memory(
        options.num_slots,
        model.config.hidden_size,
        options.key_dim,
        options.num_heads,
        options.top_k or None,
        options.product_keys,
        options.gated,
        options.temperature,
        options.qk_norm,
        options.null_cosine,
        model.config.context_dim if options.context else 0,
        options.num_shared,
        not has_adapters,
        rngs=rngs,
      )
      for _ in range(1 if options.shared else len(options.layers))
    ]
    adapters = None
    if has_adapters:
      num_blocks = memories[0].num_blocks(block_size)
      adapters = models.Adapters(
        model.layers, num_blocks, block_size, config.lora.rank, config.lora.alpha, tuple(config.lora.targets), rngs=rngs
      )
    model.attach_memory(memories[0] if options.shared else memories, tuple(options.layers), options.placement, adapters)


def attach_lora(model: models.Decoder, config: ml_collections.ConfigDict) -> None:
  """Give the model the config's LoRA.

  Raises:
    InputError: a rank below 1, or targets that the model does not have.
  """
  rngs = nnx.Rngs(config.seed + 2)
  models.lora.add(model, config.lora.rank, config.lora.alpha, tuple(config.lora.targets), rngs=rngs)


def build_network(config: ml_collections.ConfigDict) -> tuple[Network, Any]:
  """The model with its LoRA and memory, taken apart and put on the config's devices, and its tokenizer.

  Raises:
    InputError: the model does not load or does not divide over the devices, or the config names no source or no ability
      to train it with.
  """
  config_lib.need_sources(config)
  layout = parallel.build(config)
  if config.memory.num_slots and config.memory.placement == "adapters":
    raise errors.InputError("config.memory.placement = 'adapters' is for sequences of tasks: experiments.continual.")
  model, tokenizer = load_model(config)
  return take_apart(config, model, layout), tokenizer


def take_apart(config: ml_collections.ConfigDict, model: models.Decoder, layout: parallel.Layout) -> Network:
  """The model, given the config's LoRA and memory, as a network that lies on the layout's devices.

  Under `jax.eval_shape` with a model that is made there too, it takes no memory, on any number of devices.

  Raises:
    InputError: the model does not divide over the devices.
  """
  attach_memory(model, config)
  if config.lora.rank:
    attach_lora(model, config)
  layout.split(model)
  trained = models.lora.LoRAParam if config.lora.rank else nnx.Param
  graphdef, *states = nnx.split(model, models.MemoryParam, trained, ...)
  memory, params, frozen = (layout.place(state) for state in states)
  return Network(graphdef, params, memory if config.memory.num_slots else None, frozen, layout)


def problem(
  config: ml_collections.ConfigDict,
  inner_loss: Callable[..., jax.Array],
  outer_loss: Callable[..., Any],
  hyperparameters: Callable[[Any], Mapping[str, jax.Array]],
  num_steps: int,
) -> metagrad.Problem:
  """The config's SFT run around these losses; the outer loss returns `(scalar, aux)`.

  Args:
    inner_loss, outer_loss: of `metagrad.Problem`; they see to the hyperparameters of the losses themselves.
    hyperparameters: meta_params -> those of `sft.optimizer`.
    num_steps: of the whole run, at the config's batch size.
  """

  def optimizer(meta_params):
    values = hyperparameters(meta_params)
    chain = sft.optimizer(values, num_steps, config.normalise_gradients, largest_batch=config.batch_size)
    return metagrad.smoothness.averaged(chain, config.average_decay) if config.average_decay else chain

  return metagrad.Problem(
    inner_loss,
    outer_loss,
    optimizer,
    micro_batches=config.micro_batches,
    has_aux=True,
    readout=metagrad.smoothness.averaged_params if config.average_decay else None,
  )


def source_rows(config: ml_collections.ConfigDict, tokenizer: Any) -> list[tokens.Rows]:
  """Training rows of each source, in the config's (sorted) order of names."""
  return [_rows(config, spec.to_dict(), tokenizer, f"config.sources.{n}") for n, spec in named(config.sources)]


def ability_rows(config: ml_collections.ConfigDict, tokenizer: Any) -> list[tokens.Rows]:
  """Held-out rows of each ability that the outer loss is taken on."""
  return [
    _rows(config, ability_spec(spec, "validation"), tokenizer, f"config.abilities.{n}")
    for n, spec in named(config.abilities)
  ]


def named(section: ml_collections.ConfigDict) -> list[tuple[str, ml_collections.ConfigDict]]:
  """Sources or abilities sorted by name: the order of every array over them."""
  return sorted(section.items())


def names(section: ml_collections.ConfigDict) -> list[str]:
  return [name for name, _ in named(section)]


def ability_spec(spec: ml_collections.ConfigDict, part: str) -> dict[str, Any]:
  """Where an ability's `validation` or `test` examples are read from."""
  found = {name: value for name, value in spec.to_dict().items() if name not in _ABILITY_FIELDS}
  if "suite" in found:
    found["suite_split"] = part
  elif part == "test":
    if "test_split" not in spec and "test_path" not in spec:
      raise errors.InputError("An ability read from a file needs test_split or test_path for `evaluate`.")
    found["path"] = spec.get("test_path", found.get("path"))
    found["split"] = spec.get("test_split", "train")
  return found


def ability_weights(config: ml_collections.ConfigDict) -> np.ndarray:
  """`[num_abilities]` f32 weight of each ability in the objective: its own, times that of the preference."""
  weights = np.asarray([spec.get("weight", 1.0) for _, spec in named(config.abilities)], np.float32)
  return weights * np.asarray(config.objective.preference or 1.0, np.float32)


def stack(batches: Sequence[types.Batch]) -> types.Batch:
  """Batches as one, with a leading axis `[unroll_length, ...]`."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def stop_if_skipped(config: ml_collections.ConfigDict, workdir: pathlib.Path, skipped: int, batch: Any) -> None:
  """Raises `MftError` after `meta.max_skipped` non-finite outer steps in a row, and writes the last one's batch."""
  if skipped >= config.meta.max_skipped:
    path = workdir / "non_finite_batch.npz"
    hosts.first_does(lambda: files.write_npz(path, pure(batch)))
    raise errors.MftError(f"{skipped} outer steps in a row were not finite; the last batch is in {path}.")


def pure(tree: Any) -> dict[str, Any]:
  """A pytree as path -> array, which checkpoints hold whatever modules it came from."""
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unpure(tree_like: Any, arrays: Mapping[str, Any]) -> Any:
  """The inverse of `pure`, in the structure of `tree_like`."""
  return jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(arrays[jax.tree_util.keystr(path)]), tree_like)


def _rows(config: ml_collections.ConfigDict, spec: dict[str, Any], tokenizer: Any, where: str) -> tokens.Rows:
  rows = sources.load_rows(spec, tokenizer, config.length, where=where, truncate_side=config.truncate_side)
  warn_of_cut(config, rows, where)
  return rows


def warn_of_cut(config: ml_collections.ConfigDict, rows: tokens.Rows, where: str) -> None:
  """Says how many examples did not fit a row."""
  if rows.truncated:
    side, length = config.truncate_side, config.length
    logging.warning("%s: %d prompts do not fit %d tokens and were cut on the %s.", where, rows.truncated, length, side)
