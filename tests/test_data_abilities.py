"""Every suite's answers against a second solver that reads the prompt."""

import collections
import re

import numpy as np
import pytest

from mftjax import errors
from mftjax.data import abilities, tokens


def solve(suite, prompt):
  """The answer, by parsing the prompt and another way of computing it."""
  words = prompt.rstrip(":").split(" ")
  if suite in ("addition", "subtraction", "modular"):
    a, operator, b = re.fullmatch(r"(\d+)([+%-])(\d+)=", prompt).groups()
    if operator == "%":
      rest = int(a)
      while rest >= int(b):
        rest -= int(b)
      return str(rest)
    return str(int(a) - (-1 if operator == "+" else 1) * int(b))
  if suite == "sorting":
    counts = collections.Counter(words[1:])
    return " ".join(d for d in "0123456789" for _ in range(counts[d]))
  if suite == "reversal":
    return "".join(words[1][-i - 1] for i in range(len(words[1])))
  if suite == "copying":
    return re.fullmatch(r"copy ([a-z]+):", prompt).group(1)
  if suite == "uppercase":
    return "".join(chr(ord(c) - 32) for c in words[1])
  if suite == "replacement":
    old, new = words[1].split(">")
    return "".join(new if c == old else c for c in words[0])
  if suite == "lookup":
    table, asked = re.fullmatch(r"(.+) ; ([a-z])=", prompt).groups()
    (answer,) = re.findall(rf"(?:^| ){asked}=(\d+)", table)
    return answer
  if suite == "formatting":
    return '{"' + words[1] + '": ' + words[2] + "}"
  if suite == "counting":
    return str(sum(c == words[1] for c in words[3]))
  if suite == "comparison":
    return str(sorted([int(words[1]), int(words[2])])[0 if words[0] == "min" else 1])
  raise AssertionError(f"no solver for {suite}")


@pytest.mark.parametrize("suite", abilities.SUITES)
def test_answers_are_right_short_and_printable(suite):
  tokenizer = tokens.char_tokenizer()
  for split in abilities.SPLITS:
    for example in abilities.generate(suite, 150, seed=3, split=split):
      prompt, completion = example["prompt"], example["completion"]
      assert completion == solve(suite, prompt), prompt
      assert prompt and completion and len(prompt) + len(completion) <= 48
      assert max(len(prompt), len(completion)) <= 40
      assert (prompt + completion).isascii() and (prompt + completion).isprintable()
      assert tokenizer.unk_token_id not in tokens.tokenize(example, tokenizer)[0]


@pytest.mark.parametrize("suite", abilities.SUITES)
def test_splits_are_disjoint_whatever_the_seeds(suite):
  prompts = [
    {e["prompt"] for seed in range(3) for e in abilities.generate(suite, 200, seed, split)}
    for split in abilities.SPLITS
  ]
  assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]
  assert all(len(part) > 150 for part in prompts)  # and there are enough different ones


def test_splits_have_their_shares():
  shares = collections.Counter(abilities.split_of(f"prompt {i}") for i in range(5000))
  for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
    assert abs(shares[split] / 5000 - share) < 4.5 * np.sqrt(share * (1 - share) / 5000)


def test_same_arguments_same_examples():
  one, two, other = (abilities.generate("sorting", 30, seed, "train") for seed in (5, 5, 6))
  assert one == two != other
  assert abilities.generate("sorting", 10, 5, "train") == one[:10]


def test_there_are_suites_enough():
  assert len(abilities.SUITES) >= 8


def test_bad_arguments():
  with pytest.raises(errors.InputError, match="Did you mean 'copying'"):
    abilities.generate("copyin", 1, 0, "train")
  with pytest.raises(errors.InputError, match="Did you mean 'validation'"):
    abilities.generate("copying", 1, 0, "valid")
  with pytest.raises(errors.InputError, match="num_examples = 0"):
    abilities.generate("copying", 0, 0, "train")
