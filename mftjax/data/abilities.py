"""Procedural suites: short text tasks with exact answers, made without limit from a seed."""

import hashlib
from collections.abc import Callable

import numpy as np

from mftjax import errors

SPLITS = ("train", "validation", "test")
_SPLIT_OF_TENTH = ("train",) * 8 + ("validation", "test")
_LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")


def generate(suite: str, num_examples: int, seed: int, split: str) -> list[dict[str, str]]:
  """Examples of a suite; the same for the same arguments.

  A prompt belongs to one split, by a hash of its text: 8 of 10 to train, 1 to validation, 1 to test. So no prompt of
  one split is ever in another, whatever the seeds.

  Args:
    suite: a name in `SUITES`.
    num_examples: how many, at least 1; a small suite may repeat some.
    seed: at least 0.
    split: "train", "validation" or "test".

  Returns:
    `{"prompt", "completion"}` of each.
  """
  if suite not in SUITES:
    raise errors.unknown_name("suite", suite, SUITES)
  if split not in SPLITS:
    raise errors.unknown_name("split of a suite", split, SPLITS)
  if num_examples < 1:
    raise errors.InputError(f"num_examples = {num_examples} of suite {suite!r} must be at least 1.")
  rng = np.random.default_rng([seed, SPLITS.index(split), *suite.encode()])
  found: list[dict[str, str]] = []
  while len(found) < num_examples:
    example = SUITES[suite](rng)
    if split_of(example["prompt"]) == split:
      found.append(example)
  return found


def split_of(prompt: str) -> str:
  """The split that a prompt belongs to."""
  digest = hashlib.sha256(prompt.encode()).digest()
  return _SPLIT_OF_TENTH[int.from_bytes(digest[:8], "big") % len(_SPLIT_OF_TENTH)]


def _example(prompt: str, completion: str) -> dict[str, str]:
  return {"prompt": prompt, "completion": completion}


def _number(rng: np.random.Generator, high: int) -> int:
  return int(rng.integers(high))


def _word(rng: np.random.Generator, low: int, high: int, alphabet: tuple[str, ...] = _LETTERS) -> str:
  """Random letters, from `low` to `high` of them."""
  return "".join(rng.choice(alphabet, size=rng.integers(low, high + 1)))


def addition(rng: np.random.Generator) -> dict[str, str]:
  """`37+85=` -> `122`."""
  a, b = _number(rng, 1000), _number(rng, 1000)
  return _example(f"{a}+{b}=", f"{a + b}")


def subtraction(rng: np.random.Generator) -> dict[str, str]:
  """`37-85=` -> `-48`."""
  a, b = _number(rng, 1000), _number(rng, 1000)
  return _example(f"{a}-{b}=", f"{a - b}")


def modular(rng: np.random.Generator) -> dict[str, str]:
  """`371%7=` -> `0`."""
  a, b = _number(rng, 1000), 2 + _number(rng, 18)
  return _example(f"{a}%{b}=", f"{a % b}")


def sorting(rng: np.random.Generator) -> dict[str, str]:
  """`sort 4 9 1:` -> `1 4 9`."""
  digits = [str(d) for d in rng.integers(10, size=rng.integers(4, 8))]
  return _example(f"sort {' '.join(digits)}:", " ".join(sorted(digits)))


def reversal(rng: np.random.Generator) -> dict[str, str]:
  """`reverse abc:` -> `cba`."""
  word = _word(rng, 4, 10)
  return _example(f"reverse {word}:", word[::-1])


def copying(rng: np.random.Generator) -> dict[str, str]:
  """`copy abc:` -> `abc`."""
  word = _word(rng, 4, 12)
  return _example(f"copy {word}:", word)


def uppercase(rng: np.random.Generator) -> dict[str, str]:
  """`upper abc:` -> `ABC`."""
  word = _word(rng, 4, 10)
  return _example(f"upper {word}:", word.upper())


def replacement(rng: np.random.Generator) -> dict[str, str]:
  """`abca a>x:` -> `xbcx`."""
  word = _word(rng, 5, 10, _LETTERS[:6])
  old, new = str(rng.choice(list(word))), str(rng.choice(_LETTERS[6:]))
  return _example(f"{word} {old}>{new}:", word.replace(old, new))


def lookup(rng: np.random.Generator) -> dict[str, str]:
  """`a=4 c=7 b=1 ; c=` -> `7`."""
  names = [str(n) for n in rng.choice(_LETTERS, size=rng.integers(3, 6), replace=False)]
  values = [str(v) for v in rng.integers(100, size=len(names))]
  asked = _number(rng, len(names))
  table = " ".join(f"{n}={v}" for n, v in zip(names, values, strict=True))
  return _example(f"{table} ; {names[asked]}=", values[asked])


def formatting(rng: np.random.Generator) -> dict[str, str]:
  """`json abc 42:` -> `{"abc": 42}`."""
  name, value = _word(rng, 3, 6), _number(rng, 1000)
  return _example(f"json {name} {value}:", f'{{"{name}": {value}}}')


def counting(rng: np.random.Generator) -> dict[str, str]:
  """`count a in abca:` -> `2`."""
  word = _word(rng, 6, 14, _LETTERS[:4])
  letter = str(rng.choice(_LETTERS[:4]))
  return _example(f"count {letter} in {word}:", str(word.count(letter)))


def comparison(rng: np.random.Generator) -> dict[str, str]:
  """`max 37 85:` -> `85`, likewise `min`."""
  a, b = _number(rng, 10_000), _number(rng, 10_000)
  name, choose = (("max", max), ("min", min))[_number(rng, 2)]
  return _example(f"{name} {a} {b}:", str(choose(a, b)))


SUITES: dict[str, Callable[[np.random.Generator], dict[str, str]]] = {
  suite.__name__: suite
  for suite in (
    addition,
    subtraction,
    modular,
    sorting,
    reversal,
    copying,
    uppercase,
    replacement,
    lookup,
    formatting,
    counting,
    comparison,
  )
}
