"""A byte-level BPE tokenizer out of a GGUF file's metadata, without torch."""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

CONTROL, USER_DEFINED = 3, 4  # GGUF's kinds of token


def _split(regex: str) -> pre_tokenizers.PreTokenizer:
  return pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(regex), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )


_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)

# How text is cut before merging, by the name in `tokenizer.ggml.pre`.
# Source: llama.cpp, llama-vocab.cpp, and the tokenizer.json of the models themselves.
SPLITS = {
  "default": _GPT2,
  "gpt-2": _GPT2,
  "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
  "llama-bpe": _split(_WORDS % "{1,3}"),
  "qwen2": _split(_WORDS % ""),
}


def is_known(fields: Mapping[str, Any]) -> bool:
  """Whether `build` knows this file's kind of tokenizer."""
  return fields.get("tokenizer.ggml.model") == "gpt2" and fields.get("tokenizer.ggml.pre", "default") in SPLITS


def build(fields: Mapping[str, Any]) -> Any:
  """The `transformers.PreTrainedTokenizerFast` that a GGUF file's `tokenizer.*` fields describe.

  Args:
    fields: name -> value, of a file for which `is_known` holds.
  """
  import transformers

  tokens = fields["tokenizer.ggml.tokens"]
  merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
  pre = fields.get("tokenizer.ggml.pre", "default")
  backend = tokenizers.Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
  backend.pre_tokenizer = SPLITS[pre]
  backend.decoder = decoders.ByteLevel()
  if pre == "qwen2":
    backend.normalizer = normalizers.NFC()
  named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
  ids = {name: fields.get(f"tokenizer.ggml.{gguf_name}_token_id") for name, gguf_name in named.items()}
  if fields.get("tokenizer.ggml.add_bos_token") and ids["bos"] is not None:
    bos = tokens[ids["bos"]]
    backend.post_processor = processors.TemplateProcessing(
      single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids["bos"])]
    )
  for token, kind in zip(tokens, fields.get("tokenizer.ggml.token_type", ()), strict=False):
    if kind in (CONTROL, USER_DEFINED):
      added = tokenizers.AddedToken(token, normalized=False, special=kind == CONTROL)
      (backend.add_special_tokens if kind == CONTROL else backend.add_tokens)([added])
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    clean_up_tokenization_spaces=False,
    **{f"{name}_token": tokens[number] for name, number in ids.items() if number is not None},
  )
  tokenizer.chat_template = fields.get("tokenizer.chat_template")
  return tokenizer
