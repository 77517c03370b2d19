"""Small families of data in files, for tests."""

import json

NAMES = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")


def examples(name, count=80):
  """Prompts that name their family and number, and an answer that the number decides."""
  return [
    {"prompt": f"{name[:3]} {i}?", "completion": "abcdefgh"[(i * (2 * len(name) + 1)) % 8], "template": "x"}
    for i in range(count)
  ]


def write(folder, names=NAMES, count=80):
  """A file for each family."""
  for name in names:
    lines = [json.dumps(example) for example in examples(name, count)]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
  return folder
