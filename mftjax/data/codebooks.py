"""Procedural suites that a tiny model learns from a few hundred rows: secret codes from letters to letters.

Each has its own tag, form and code, a random permutation of the letters. What is learnt of one code says
nothing of another, and wrong answers hurt at once: that makes good and bad sources worth telling apart even in short
runs, which the suites of `abilities` do not at this size.
"""

import string
from collections.abc import Callable

import numpy as np

from mftjax.data import abilities

NUM_KEYS = 8  # letters that a code is defined on
_LETTERS = np.asarray(list(string.ascii_lowercase[:NUM_KEYS]))

# Form of a code -> (letters in the prompt, places of those that are answered).
FORMS: dict[str, tuple[int, tuple[int, ...]]] = {
  "single": (1, (0,)),
  "last": (2, (1,)),
  "third": (3, (2,)),
}
FORM_NAMES = tuple(FORMS)
_TAGS = string.ascii_uppercase + string.digits + string.ascii_lowercase[NUM_KEYS:]
NUM_CODEBOOKS = len(_TAGS)


def name(number: int) -> str:
  """The suite's name, `code` with its form and number."""
  return f"code_{FORM_NAMES[number % len(FORMS)]}_{number}"


NAMES = tuple(name(number) for number in range(NUM_CODEBOOKS))


def code(number: int) -> dict[str, str]:
  """Letter -> letter, one to one; the same for the same number."""
  answers = np.random.default_rng([7, number]).permutation(_LETTERS)
  return dict(zip(_LETTERS, answers, strict=True))


def example_fn(number: int) -> Callable[[np.random.Generator], dict[str, str]]:
  """A generator of examples: code 4 is asked for as `Ec:` and answers with the code's letter for c."""
  size, answered = FORMS[FORM_NAMES[number % len(FORMS)]]
  table, tag = code(number), _TAGS[number]

  def example(rng: np.random.Generator) -> dict[str, str]:
    letters = rng.choice(_LETTERS, size=size)
    return {"prompt": f"{tag}{''.join(letters)}:", "completion": "".join(table[letters[place]] for place in answered)}

  return example


def generate(suite: str, num_examples: int, seed: int, split: str) -> list[dict[str, str]]:
  """Examples of a code; unlike other suites' prompts, these few stand in every split: what is learnt is the table.

  Args:
    suite: a name in `NAMES`.
    num_examples, seed, split: as of `abilities.generate`.
  """
  rng = np.random.default_rng([seed, abilities.SPLITS.index(split), NAMES.index(suite)])
  make = example_fn(NAMES.index(suite))
  return [make(rng) for _ in range(num_examples)]
