"""README and the docs, read by tests of what they say."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def faults() -> list[tuple[str, str]]:
  """`(file, function)` of each test that docs/faults.md names, once for each row."""
  rows = [line for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if line.startswith("| ")]
  found = [re.search(r"`([\w/]+)::(\w+)` \|$", row) for row in rows]
  return [(f"tests/{match[1]}.py", match[2]) for match in found if match]


def blocks(page: pathlib.Path, language: str) -> list[str]:
  """The code blocks of a Markdown page in that language."""
  return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
