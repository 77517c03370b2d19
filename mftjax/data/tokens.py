"""Examples become tokens with a loss mask, and tokens become packed rows."""

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
import transformers

from mftjax import errors

TRUNCATE_SIDES = ("left", "right")
_SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


@dataclasses.dataclass(frozen=True)
class Rows:
  """Packed rows of one source; the examples of a row are its segments."""

  tokens: np.ndarray  # [num_rows, length] int32, 0 where there is padding
  loss_mask: np.ndarray  # [num_rows, length] float32, 1 where the token is a target of the loss
  segment_ids: np.ndarray  # [num_rows, length] int32, 0 = padding, 1.. = the example within the row
  positions: np.ndarray  # [num_rows, length] int32, restarts at 0 with each segment
  truncated: int  # examples that were longer than a row and were cut

  def take(self, index: np.ndarray | slice) -> "Rows":
    """These rows; `truncated` stays that of all."""
    return Rows(
      self.tokens[index], self.loss_mask[index], self.segment_ids[index], self.positions[index], self.truncated
    )


def char_tokenizer() -> transformers.PreTrainedTokenizerFast:
  """A tokenizer with one token a character: printable ASCII and newline, others become `<unk>`.

  Returns:
    A tokenizer with 100 tokens (`<pad>` 0, `<bos>` 1, `<eos>` 2, `<unk>` 3, then the characters), which adds no
    special tokens by itself and decodes its characters exactly.
  """
  characters = string.digits + string.ascii_letters + string.punctuation + " \n"
  vocab = {token: i for i, token in enumerate([*_SPECIAL.values(), *characters])}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=_SPECIAL["unk_token"]))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
  backend.decoder = tokenizers.decoders.Fuse()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, clean_up_tokenization_spaces=False, model_input_names=["input_ids"], **_SPECIAL
  )


def tokenize(example: Mapping[str, Any], tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
  """Tokens of one example and which of them the loss is taken on.

  Prompt and completion are tokenised apart, so that the tokens before the completion are those that generation
  starts from (`prompt_tokens`).

  Args:
    example: `{"prompt", "completion"}`, `{"messages"}` (through the tokenizer's chat template) or `{"text"}`.
    tokenizer: of `transformers`, with an end-of-sequence token.

  Returns:
    tokens `[length]` int32 that end in eos, and loss_mask `[length]` float32: 1 on the completion (each
    assistant turn up to its eos; for a text all but its first token), eos included.

  Raises:
    InputError: the completion tokenises to nothing, or the messages do not fit the chat template.
  """
  eos = _eos(tokenizer)
  if "messages" in example:
    return _tokenize_messages(example["messages"], tokenizer, eos)
  if "text" in example:
    body = _encode(example["text"], tokenizer, is_start=True)
    if not body:
      raise errors.InputError("The text tokenises to nothing.")
    return _arrays([*body, eos], [0.0] + [1.0] * len(body))
  prompt = prompt_tokens(example, tokenizer).tolist()
  completion = _encode(example["completion"], tokenizer, is_start=False)
  if not completion:
    raise errors.InputError(f"The completion {example['completion']!r} tokenises to nothing.")
  return _arrays([*prompt, *completion, eos], [0.0] * len(prompt) + [1.0] * (len(completion) + 1))


def prompt_tokens(example: Mapping[str, Any], tokenizer: Any) -> np.ndarray:
  """What generation starts from: `[length]` int32, without eos.

  Of messages, all before the last assistant turn with the template's generation prompt after them. An empty prompt,
  or a text, starts from the beginning-of-sequence token (eos where the tokenizer has none).
  """
  if "messages" in example:
    messages = list(example["messages"])
    turns = _assistant_turns(messages)
    if turns and turns[-1] == len(messages) - 1:
      tokens, _ = _tokenize_turns(messages, turns, tokenizer, stop_before_last=True)
    else:
      tokens = _encode(_render(messages, tokenizer, True), tokenizer, is_start=False)
  else:
    tokens = _encode(example.get("prompt", ""), tokenizer, is_start=True)
  start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else _eos(tokenizer)
  return np.asarray(tokens or [start], np.int32)


def pack(examples: Sequence[tuple[np.ndarray, np.ndarray]], length: int, truncate_side: str = "left") -> Rows:
  """Put examples into as few rows as first fit finds: each goes into the first row with room for it.

  An example longer than a row has its prompt (what stands before the first target) cut on `truncate_side`, down to
  one token; a completion that is longer still is cut at its end. Both are counted in `truncated`. A segment's first
  token is never a target, since nothing stands before it.

  Args:
    examples: (tokens `[n]` int32, loss_mask `[n]` float32) of each.
    length: tokens in a row, at least 2.
    truncate_side: "left" or "right".

  Returns:
    The rows, in the order in which they were opened.
  """
  if truncate_side not in TRUNCATE_SIDES:
    raise errors.unknown_name("truncate_side", truncate_side, TRUNCATE_SIDES)
  if length < 2:
    raise errors.InputError(f"length = {length} leaves no room for a token and its target; it must be at least 2.")
  fits = [_truncate(tokens, mask, length, truncate_side) for tokens, mask in examples]
  rows = _first_fit([len(tokens) for tokens, _ in fits], length)
  shape = (max(rows, default=-1) + 1, length)
  packed = Rows(
    np.zeros(shape, np.int32),
    np.zeros(shape, np.float32),
    np.zeros(shape, np.int32),
    np.zeros(shape, np.int32),
    sum(len(tokens) > length for tokens, _ in examples),
  )
  used, num_segments = np.zeros(shape[0], np.int64), np.zeros(shape[0], np.int64)
  for row, (tokens, mask) in zip(rows, fits, strict=True):
    part = slice(used[row], used[row] + len(tokens))
    num_segments[row] += 1
    packed.tokens[row, part] = tokens
    packed.loss_mask[row, part] = mask
    packed.loss_mask[row, used[row]] = 0.0
    packed.segment_ids[row, part] = num_segments[row]
    packed.positions[row, part] = np.arange(len(tokens))
    used[row] += len(tokens)
  return packed


def _first_fit(sizes: Sequence[int], length: int) -> list[int]:
  """Row of each example. A tree over the rows holds the largest free space below each node: O(log rows) a step."""
  capacity = 1 << max(len(sizes) - 1, 0).bit_length()
  free = [length] * (2 * capacity)
  rows = []
  for size in sizes:
    node = 1
    while node < capacity:
      node = 2 * node if free[2 * node] >= size else 2 * node + 1
    rows.append(node - capacity)
    free[node] -= size
    while node > 1:
      node //= 2
      free[node] = max(free[2 * node], free[2 * node + 1])
  return rows


def _truncate(tokens: np.ndarray, mask: np.ndarray, length: int, truncate_side: str) -> tuple[np.ndarray, np.ndarray]:
  if not len(tokens):
    raise errors.InputError("An example without tokens cannot be packed.")
  if len(tokens) <= length:
    return tokens, mask
  prompt_length = int(np.argmax(mask > 0)) if np.any(mask > 0) else len(tokens)
  keep = min(prompt_length, max(length - (len(tokens) - prompt_length), 1))
  kept = np.arange(len(tokens))
  prompt = kept[prompt_length - keep : prompt_length] if truncate_side == "left" else kept[:keep]
  kept = np.concatenate([prompt, kept[prompt_length:]])[:length]
  return tokens[kept], mask[kept]


def _tokenize_messages(
  messages: Sequence[Mapping[str, Any]], tokenizer: Any, eos: int
) -> tuple[np.ndarray, np.ndarray]:
  turns = _assistant_turns(messages)
  if not turns:
    raise errors.InputError("The messages have no assistant turn, so there is nothing to learn from them.")
  messages = list(messages[: turns[-1] + 1])
  tokens, mask = _tokenize_turns(messages, turns, tokenizer, stop_before_last=False)
  last = len(mask) - 1 - mask[::-1].index(1.0)
  if tokens[last] != eos:
    tokens, mask = [*tokens, eos], [*mask, 1.0]
  return _arrays(tokens, mask)


def _tokenize_turns(
  messages: Sequence[Mapping[str, Any]], turns: Sequence[int], tokenizer: Any, *, stop_before_last: bool
) -> tuple[list[int], list[float]]:
  """Each assistant turn is a piece of the rendered text between two renderings of shorter conversations."""
  tokens: list[int] = []
  mask: list[float] = []
  done = ""
  for turn in turns:
    if turn == 0:
      raise errors.InputError("The messages start with an assistant turn; a user or system turn must stand before it.")
    for end, is_target in ((turn, False), (turn + 1, True)):
      if is_target and stop_before_last and turn == turns[-1]:
        return tokens, mask
      text = _render(messages[:end], tokenizer, not is_target)
      if not text.startswith(done):
        raise errors.InputError(
          "The chat template renders a conversation's beginning differently once more turns follow, so the assistant's "
          f"tokens cannot be told apart: {text[:80]!r}."
        )
      piece = _encode(text[len(done) :], tokenizer, is_start=False)
      if is_target and not str(messages[turn].get("content") or "").strip():
        raise errors.InputError(f"The completion, message {turn + 1} of the messages, tokenises to nothing.")
      targets = [float(is_target)] * len(piece)
      if is_target and tokenizer.eos_token_id in piece:
        # What the template puts after the end of the turn (a newline) is not for the model to say.
        after = piece.index(tokenizer.eos_token_id) + 1
        targets[after:] = [0.0] * (len(piece) - after)
      if is_target and turn == turns[-1]:
        num_targets = int(sum(targets))
        piece, targets = piece[:num_targets], targets[:num_targets]
      tokens, mask, done = tokens + piece, mask + targets, text
  return tokens, mask


def _assistant_turns(messages: Sequence[Mapping[str, Any]]) -> list[int]:
  return [i for i, message in enumerate(messages) if message.get("role") == "assistant"]


def _render(messages: Sequence[Mapping[str, Any]], tokenizer: Any, add_generation_prompt: bool) -> str:
  if not tokenizer.chat_template:
    raise errors.InputError("The tokenizer has no chat template, which messages need; give prompt and completion.")
  try:
    return tokenizer.apply_chat_template(
      [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
    )
  except Exception as error:  # templates raise whatever they like
    raise errors.InputError(f"The chat template refuses the messages: {error}") from error


def _encode(text: str, tokenizer: Any, *, is_start: bool) -> list[int]:
  """Token ids; at the start of a sequence with the special tokens that the tokenizer itself puts there."""
  tokens = tokenizer(text, add_special_tokens=is_start)["input_ids"]
  if is_start and tokenizer.eos_token_id is not None and not text.endswith(str(tokenizer.eos_token)):
    while tokens and tokens[-1] == tokenizer.eos_token_id:
      tokens = tokens[:-1]
  return list(tokens)


def _eos(tokenizer: Any) -> int:
  if tokenizer.eos_token_id is None:
    raise errors.InputError("The tokenizer has no end-of-sequence token; set its eos_token.")
  return tokenizer.eos_token_id


def _arrays(tokens: Sequence[int], mask: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
  return np.asarray(tokens, np.int32), np.asarray(mask, np.float32)
