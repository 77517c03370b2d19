"""README and the docs, read by tests of what they say."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def blocks(page: pathlib.Path, language: str) -> list[str]:
  """The code blocks of a Markdown page in that language."""
  return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
