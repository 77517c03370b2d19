"""Decoders from and to the files of `transformers`, and from GGUF; no torch on the way."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mftjax import files
from mftjax.errors import InputError, unknown_name
from mftjax.models import gguf_tokenizer, lora, memory_files
from mftjax.models.decoder import Decoder
from mftjax.models.layers import FAMILIES, DecoderConfig, layer_shapes

# our name of a layer's parameter -> name in transformers, name in GGUF
LAYER_NAMES = {
  "attention_norm": ("input_layernorm.weight", "attn_norm.weight"),
  "mlp_norm": ("post_attention_layernorm.weight", "ffn_norm.weight"),
  "q_proj": ("self_attn.q_proj.weight", "attn_q.weight"),
  "k_proj": ("self_attn.k_proj.weight", "attn_k.weight"),
  "v_proj": ("self_attn.v_proj.weight", "attn_v.weight"),
  "o_proj": ("self_attn.o_proj.weight", "attn_output.weight"),
  "q_proj_bias": ("self_attn.q_proj.bias", "attn_q.bias"),
  "k_proj_bias": ("self_attn.k_proj.bias", "attn_k.bias"),
  "v_proj_bias": ("self_attn.v_proj.bias", "attn_v.bias"),
  "o_proj_bias": ("self_attn.o_proj.bias", "attn_output.bias"),
  "gate_proj": ("mlp.gate_proj.weight", "ffn_gate.weight"),
  "up_proj": ("mlp.up_proj.weight", "ffn_up.weight"),
  "down_proj": ("mlp.down_proj.weight", "ffn_down.weight"),
}
TOP_NAMES = {
  "embedding": ("model.embed_tokens.weight", "token_embd.weight"),
  "final_norm": ("model.norm.weight", "output_norm.weight"),
  "head": ("lm_head.weight", "output.weight"),
}
WEIGHT_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def load(path_or_id: str | Path, gguf_file: str | None = None, dtype: Any = jnp.float32) -> tuple[Decoder, Any]:
  """A pretrained decoder and its tokenizer.

  Args:
    path_or_id: a folder with `config.json` and safetensors weights, a `.gguf` file, or the id of a hub repository.
    gguf_file: name of the GGUF file within the folder or repository, to be read in place of safetensors.
    dtype: of the computation; the parameters are f32.

  Returns:
    The decoder (with its memory, when `save` wrote one), and the `transformers` tokenizer, or None when a folder
    of safetensors holds no tokenizer.

  Raises:
    InputError: nothing at `path_or_id`, no weights there, a kind of model that is not known here, or tensors that
      are missing, do not fit the config or hold numbers that are not finite; or a file of them is damaged.
  """
  path = Path(path_or_id)
  if path.is_file() and path.suffix == ".gguf" and gguf_file is None:
    return load(path.parent, path.name, dtype)
  folder = path if path.is_dir() else _download(str(path_or_id), gguf_file)
  if gguf_file is not None:
    return _load_gguf(folder / gguf_file, dtype)
  if not (folder / "config.json").is_file():
    raise InputError(f"{folder} has no config.json: it is not a model's folder.")
  weights = sorted(file for file in folder.glob("*.safetensors") if file.name != "memory.safetensors")
  if not weights:
    raise InputError(f"{folder} has no weights: no *.safetensors file (give gguf_file for a GGUF one).")
  config = config_from_hf(_read_json(folder / "config.json"), dtype, str(folder / "config.json"))
  tensors: dict[str, Callable[[], np.ndarray]] = {}
  for file in weights:
    opened = files.open_safetensors(file)
    tensors |= {name: lambda opened=opened, name=name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
  model = _build(config, tensors, 0, str(folder))
  if (folder / "memory.safetensors").is_file():
    memory_files.load(model, folder / "memory.safetensors")
  return model, _tokenizer(folder) if any(folder.glob("tokenizer*")) else None


def save(model: Decoder, tokenizer: Any, directory: str | Path) -> None:
  """Writes a folder that `load` and `transformers.AutoModelForCausalLM.from_pretrained` read.

  LoRA is merged into what is written (the model itself stays as it is). A memory goes to `memory.safetensors`, which
  `load` attaches again; transformers knows no such thing and reads the model without it.

  Args:
    model: the decoder.
    tokenizer: a `transformers` tokenizer, or None to write none.
    directory: made when missing; files of the same name are replaced, `config.json` last, so that a folder that has one
      is whole.
  """
  folder = Path(directory)
  folder.mkdir(parents=True, exist_ok=True)
  if lora.adapted(model):
    model = nnx.clone(model)
    lora.merge(model)
  tensors = {}
  for name, (hf_name, _) in TOP_NAMES.items():
    if hasattr(model, name):
      tensors[hf_name] = _to_hf(np.asarray(getattr(model, name)[...]), name == "head")
  for name, stacked in model.layers.arrays().items():
    for number, value in enumerate(np.asarray(stacked)):
      tensors[f"model.layers.{number}.{LAYER_NAMES[name][0]}"] = _to_hf(value, value.ndim == 2)
  files.write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
  if model.memory is not None:
    memory_files.save(model, folder / "memory.safetensors")
  config = config_to_hf(model.config)
  if tokenizer is not None:
    tokenizer.save_pretrained(folder)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config |= {name: value for name, value in ids.items() if value is not None}
  files.write_json(folder / "config.json", config)


def config_from_hf(values: Mapping[str, Any], dtype: Any, where: str) -> DecoderConfig:
  """The decoder's config from the fields of a `config.json`.

  Raises:
    InputError: another kind of model, or a variant of it that the decoder does not compute; names `where`.
  """
  family = str(values.get("model_type"))
  if family not in FAMILIES:
    raise unknown_name(f"model_type in {where}", family, FAMILIES)
  missing = [
    key for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers") if key not in values
  ]
  missing += [] if "num_attention_heads" in values else ["num_attention_heads"]
  if missing:
    raise InputError(f"{where} lacks {', '.join(missing)}.")
  rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
  rope_type = rope.get("rope_type", rope.get("type", "default"))
  unsupported = {
    f"rope type {rope_type!r}": rope_type != "default",
    f"hidden_act {values.get('hidden_act')!r}": values.get("hidden_act", "silu") != "silu",
    "mlp_bias": bool(values.get("mlp_bias")),
    "sliding window attention": bool(values.get("use_sliding_window")),
    "a quantized checkpoint": "quantization_config" in values,
  }
  if any(unsupported.values()):
    raise InputError(f"{where}: the decoder does not do {', '.join(k for k, v in unsupported.items() if v)}.")
  num_heads = values["num_attention_heads"]
  return DecoderConfig(
    family=family,
    vocab_size=values["vocab_size"],
    hidden_size=values["hidden_size"],
    intermediate_size=values["intermediate_size"],
    num_layers=values["num_hidden_layers"],
    num_heads=num_heads,
    num_kv_heads=values.get("num_key_value_heads") or num_heads,
    head_dim=values.get("head_dim") or values["hidden_size"] // num_heads,
    rope_theta=float(rope.get("rope_theta", values.get("rope_theta", 10000.0))),
    norm_eps=float(values.get("rms_norm_eps", 1e-6)),
    tie_embeddings=bool(values.get("tie_word_embeddings", False)),
    attention_bias=family == "qwen2" or bool(values.get("attention_bias", False)),
    max_length=values.get("max_position_embeddings", 2048),
    dtype=dtype,
  )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
  """The fields of the `config.json` that describes the decoder to transformers, version 4 or 5."""
  if config.family == "qwen2" and not config.attention_bias:
    raise InputError("transformers' Qwen2 always has attention biases: attention_bias = False cannot be written.")
  names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
  return {
    "architectures": [names[config.family]],
    "model_type": config.family,
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "intermediate_size": config.intermediate_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "rope_theta": config.rope_theta,
    "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
    "attention_bias": config.attention_bias,
    "max_position_embeddings": config.max_length,
    "bos_token_id": None,  # transformers' defaults would name tokens that may not exist
    "eos_token_id": None,
    "dtype": "float32",
  }


def _to_hf(value: np.ndarray, transpose: bool) -> np.ndarray:
  # safetensors writes a view's bytes as they lie, so a transposed one must be laid out anew
  return np.ascontiguousarray(value.T if transpose else value)


def _download(path_or_id: str, gguf_file: str | None) -> Path:
  """The local folder of a hub repository's files."""
  import huggingface_hub
  from huggingface_hub import errors

  if path_or_id.startswith((".", "/", "~")) or path_or_id.count("/") > 1:
    raise InputError(f"There is no folder {path_or_id}.")
  try:
    return Path(huggingface_hub.snapshot_download(path_or_id, allow_patterns=gguf_file or WEIGHT_FILES))
  except (errors.HFValidationError, errors.RepositoryNotFoundError, errors.LocalEntryNotFoundError, OSError) as error:
    raise InputError(f"{path_or_id!r} is neither a local folder nor a hub repository within reach: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
  try:
    values = json.loads(file.read_text())
  except ValueError as error:
    raise InputError(f"{file} is damaged: {error}.") from error
  if not isinstance(values, dict):
    raise InputError(f"{file} is damaged: it holds no JSON object.")
  return values


def _tokenizer(folder: Path, **options) -> Any:
  import transformers

  try:
    # Said outright, since transformers would ask the terminal whether to run code that comes with a model.
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
  except Exception as error:  # what transformers and tokenizers raise depends on which file is damaged, and how
    raise InputError(f"The tokenizer of {folder} cannot be read: {str(error).strip().splitlines()[0]}") from error


def _build(config: DecoderConfig, tensors: Mapping[str, Callable], column: int, where: str) -> Decoder:
  """A decoder of these tensors; `column` says which of the two names in the tables they go by."""
  prefix = ("model.layers.", "blk.")[column]

  def read(name: str, shape: tuple[int, ...], transpose: bool) -> np.ndarray:
    if name not in tensors:
      raise InputError(f"{where} has no tensor {name}, which its config asks for.")
    value = np.asarray(tensors[name](), np.float32)
    value = value.T if transpose else value
    if value.shape != shape:
      given, wanted = (tuple(s[::-1] if transpose else s) for s in (value.shape, shape))
      raise InputError(f"{where}: tensor {name} is {given}, but its config asks for {wanted}.")
    if not np.isfinite(value).all():
      raise InputError(f"{where}: tensor {name} holds numbers that are not finite.")
    return value

  model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
  for name, names in TOP_NAMES.items():
    if hasattr(model, name):
      value = read(names[column], getattr(model, name).shape, name == "head")
      setattr(model, name, nnx.Param(jnp.asarray(value)))
  for name, shape in layer_shapes(config).items():
    stacked = np.empty((config.num_layers, *shape), np.float32)
    for number in range(config.num_layers):
      stacked[number] = read(f"{prefix}{number}.{LAYER_NAMES[name][column]}", shape, len(shape) == 2)
    setattr(model.layers, name, nnx.Param(jnp.asarray(stacked)))
  return model


def _load_gguf(file: Path, dtype: Any) -> tuple[Decoder, Any]:
  try:
    import gguf
  except ImportError as error:
    raise InputError("Reading a GGUF file needs the package gguf: pip install 'mftjax[gguf]'.") from error
  if not file.is_file():
    raise InputError(f"There is no file {file}.")
  try:
    reader = gguf.GGUFReader(file)
  except ValueError as error:
    raise InputError(f"{file} is not a whole GGUF file: {error}") from error
  fields = {name: field.contents() for name, field in reader.fields.items()}
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  config = _config_from_gguf(fields, tensors, dtype, str(file))

  def read(name: str) -> np.ndarray:
    tensor = tensors[name]
    value = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
    # llama.cpp turns neighbouring features together, and so reorders llama's rows; qwen2 it leaves alone
    if config.family == "llama" and ".attn_q." in name:
      return _unpermute(value, config.num_heads)
    if config.family == "llama" and ".attn_k." in name:
      return _unpermute(value, config.num_kv_heads)
    return value

  model = _build(config, {name: lambda name=name: read(name) for name in tensors}, 1, str(file))
  if gguf_tokenizer.is_known(fields):
    return model, gguf_tokenizer.build(fields)
  return model, _tokenizer(file.parent, gguf_file=file.name)  # this way transformers wants torch


def _unpermute(value: np.ndarray, num_heads: int) -> np.ndarray:
  """Rows of each head from GGUF's order, pairs side by side, to transformers', first halves then second halves."""
  pairs = value.reshape(num_heads, value.shape[0] // num_heads // 2, 2, *value.shape[1:])
  return pairs.swapaxes(1, 2).reshape(value.shape)


def _config_from_gguf(fields: Mapping[str, Any], tensors: Mapping, dtype: Any, where: str) -> DecoderConfig:
  family = str(fields.get("general.architecture"))
  values = {key.removeprefix(f"{family}."): value for key, value in fields.items() if key.startswith(f"{family}.")}
  if "rope_freqs.weight" in tensors or values.get("rope.scaling.type", "none") != "none":
    raise InputError(f"{where}: the decoder does not do scaled rotary embeddings.")
  if "token_embd.weight" not in tensors:
    raise InputError(f"{where} has no tensor token_embd.weight: it holds no language model's weights.")
  names = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
  }
  hf_values = {hf_name: values[name] for hf_name, name in names.items() if name in values}
  hf_values |= {
    "model_type": family,
    "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
    "tie_word_embeddings": "output.weight" not in tensors,
    "attention_bias": "blk.0.attn_q.bias" in tensors,
  }
  return config_from_hf(hf_values, dtype, where)
