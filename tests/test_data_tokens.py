"""Tokens, loss masks and packing against what they must be."""

import itertools
import string

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from mftjax import errors
from mftjax.data import tokens

CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"
# Plain turns that end in eos and a newline, as most instruct models' templates do.
CHAT_TEMPLATE = (
  "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}"
  "{{ '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOKENIZER = tokens.char_tokenizer()


def chat_tokenizer(template=CHAT_TEMPLATE):
  tokenizer = tokens.char_tokenizer()
  tokenizer.chat_template = template
  return tokenizer


def targets(found, mask, tokenizer=TOKENIZER):
  return tokenizer.decode(found[mask > 0])


@given(st.text(CHARACTERS))
@settings(deadline=None)
def test_char_tokenizer_decodes_exactly(text):
  ids = TOKENIZER(text)["input_ids"]
  assert TOKENIZER.decode(ids) == text
  if "<" not in text:
    assert len(ids) == len(text)


def test_char_tokenizer_saves_and_reloads(tmp_path):
  TOKENIZER.save_pretrained(tmp_path)
  reloaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
  text = "a  b ,c .\n\n 'd' n't"
  assert reloaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
  assert reloaded.decode(reloaded(text)["input_ids"]) == text
  special = (reloaded.pad_token_id, reloaded.bos_token_id, reloaded.eos_token_id)
  assert special == (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (0, 1, 2)
  assert len(reloaded) == 100


def test_characters_outside_ascii_are_unknown():
  assert TOKENIZER("a\u2019\u00e9")["input_ids"][1:] == [TOKENIZER.unk_token_id] * 2


def test_completion_and_eos_are_the_targets():
  found, mask = tokens.tokenize({"prompt": "1+2=", "completion": "3"}, TOKENIZER)
  assert TOKENIZER.decode(found) == "1+2=3<eos>"
  assert mask.tolist() == [0, 0, 0, 0, 1, 1]
  assert (found.dtype, mask.dtype) == (np.int32, np.float32)
  assert tokens.prompt_tokens({"prompt": "1+2=", "completion": "3"}, TOKENIZER).tolist() == found[:4].tolist()


def test_empty_prompt_starts_from_bos():
  found, mask = tokens.tokenize({"prompt": "", "completion": "ab"}, TOKENIZER)
  assert found[0] == TOKENIZER.bos_token_id
  assert mask.tolist() == [0, 1, 1, 1]


def test_text_is_a_target_but_for_its_first_token():
  found, mask = tokens.tokenize({"text": "abc"}, TOKENIZER)
  assert TOKENIZER.decode(found) == "abc<eos>"
  assert mask.tolist() == [0, 1, 1, 1]


def test_messages_take_the_loss_on_assistant_turns():
  tokenizer = chat_tokenizer()
  messages = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": "4"},
  ]
  found, mask = tokens.tokenize({"messages": messages}, tokenizer)
  whole = tokenizer.apply_chat_template(messages, tokenize=False)
  assert tokenizer.decode(found) == whole.removesuffix("\n")
  assert targets(found, mask, tokenizer) == "2<eos>4<eos>"
  assert found[-1] == tokenizer.eos_token_id and mask[-1] == 1
  prompt = tokens.prompt_tokens({"messages": messages}, tokenizer)
  assert tokenizer.decode(prompt) == "[system]be brief\n[user]1+1\n[assistant]2<eos>\n[user]2+2\n[assistant]"
  assert prompt.tolist() == found[: len(prompt)].tolist()
  assert tokens.prompt_tokens({"messages": messages[:-1]}, tokenizer).tolist() == prompt.tolist()


def test_eos_is_added_to_a_template_without_it():
  tokenizer = chat_tokenizer(CHAT_TEMPLATE.replace("<eos>", "."))
  messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
  found, mask = tokens.tokenize({"messages": messages}, tokenizer)
  assert tokenizer.decode(found) == "[user]a\n[assistant]b.\n<eos>"
  assert targets(found, mask, tokenizer) == "b.\n<eos>"


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
  ("messages", "template", "message"),
  [
    ([USER, ASSISTANT], None, "no chat template"),
    ([USER], CHAT_TEMPLATE, "no assistant turn"),
    ([ASSISTANT, USER], CHAT_TEMPLATE, "start with an assistant turn"),
    ([USER, {"role": "assistant", "content": " "}], CHAT_TEMPLATE, "message 2 of the messages, tokenises to nothing"),
    ([USER, ASSISTANT], "{{ raise_exception('no thanks') }}", "no thanks"),
    ([USER, ASSISTANT], "{{ messages|length }}{{ messages[0].content }}", "cannot be told apart"),
  ],
)
def test_messages_that_do_not_fit(messages, template, message):
  with pytest.raises(errors.InputError, match=message):
    tokens.tokenize({"messages": messages}, chat_tokenizer(template))


def test_empty_completion_is_an_error():
  with pytest.raises(errors.InputError, match="tokenises to nothing"):
    tokens.tokenize({"prompt": "a", "completion": ""}, TOKENIZER)
  with pytest.raises(errors.InputError, match="tokenises to nothing"):
    tokens.tokenize({"text": ""}, TOKENIZER)


def first_fit(sizes, length):
  rows = []
  for size in sizes:
    row = next((i for i, used in enumerate(rows) if used + size <= length), None)
    if row is None:
      rows.append(0)
      row = len(rows) - 1
    rows[row] += size
    yield row


@given(st.lists(st.integers(1, 12), max_size=40), st.integers(12, 20))
def test_packing_keeps_every_token_once_in_order(sizes, length):
  starts = np.cumsum([1, *sizes])
  examples = [
    (np.arange(a, b, dtype=np.int32), (np.arange(a, b) % 3 > 0).astype(np.float32))
    for a, b in itertools.pairwise(starts)
  ]
  rows = tokens.pack(examples, length)
  assert rows.truncated == 0
  assert sorted(rows.tokens[rows.segment_ids > 0].tolist()) == list(range(1, sum(sizes) + 1))
  expected = [[] for _ in range(len(rows.tokens))]
  for example, row in zip(examples, first_fit(sizes, length), strict=True):
    expected[row].append(example)
  for row, wanted in enumerate(expected):
    end = sum(len(t) for t, _ in wanted)
    assert rows.segment_ids[row, end:].max(initial=0) == rows.tokens[row, end:].max(initial=0) == 0
    assert rows.loss_mask[row, end:].max(initial=0) == 0
    for segment, (found, mask) in enumerate(wanted, start=1):
      part = rows.segment_ids[row] == segment
      assert rows.tokens[row, part].tolist() == found.tolist()
      assert rows.positions[row, part].tolist() == list(range(len(found)))
      assert rows.loss_mask[row, part].tolist() == [0, *mask[1:].tolist()]


@given(st.integers(0, 20), st.integers(1, 20), st.sampled_from(tokens.TRUNCATE_SIDES), st.integers(2, 16))
def test_too_long_prompts_are_cut_on_their_side(num_prompt, num_completion, side, length):
  prompt, completion = np.arange(100, 100 + num_prompt), np.arange(200, 200 + num_completion)
  mask = np.repeat([0.0, 1.0], [num_prompt, num_completion]).astype(np.float32)
  rows = tokens.pack([(np.concatenate([prompt, completion]).astype(np.int32), mask)], length, side)
  too_long = num_prompt + num_completion > length
  assert rows.truncated == too_long
  found = rows.tokens[0][rows.segment_ids[0] > 0]
  if not too_long:
    assert len(found) == num_prompt + num_completion
    return
  assert len(found) == length
  kept = found[found < 200].tolist()
  assert found[found >= 200].tolist() == completion[: length - len(kept)].tolist()
  assert kept == (prompt[num_prompt - len(kept) :] if side == "left" else prompt[: len(kept)]).tolist()
  assert len(kept) == min(num_prompt, max(length - num_completion, 1))


def test_bad_packing():
  example = (np.ones(3, np.int32), np.ones(3, np.float32))
  with pytest.raises(errors.InputError, match="Did you mean 'left'"):
    tokens.pack([example], 8, "lift")
  with pytest.raises(errors.InputError, match="length = 1"):
    tokens.pack([example], 1)
  assert tokens.pack([], 8).tokens.shape == (0, 8)
