"""What README and docs say can be typed: code runs, commands, flags and fields exist."""

import re

import pytest
from pages import ROOT, blocks, faults

from mftjax import config as config_lib

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_config_of_readme_is_right_and_short():
  (code,) = blocks(ROOT / "README.md", "python")
  assert len(code.splitlines()) < 20
  names: dict = {}
  exec(code, names)
  config_lib.check(names["get_config"]())


def test_the_task_to_predict_for_is_right():
  (code,) = blocks(ROOT / "docs" / "predict.md", "python")
  names: dict = {}
  exec(code, names)
  config_lib.check(names["get_config"]())


def test_the_config_with_a_rank_and_a_scale_of_lora_is_right():
  (code,) = blocks(ROOT / "docs" / "compare.md", "python")
  names: dict = {}
  exec(code, names)
  config = names["get_config"]()
  config_lib.check(config)
  assert {"lora_rank", "lora_scale"} < set(config_lib.space(config).spaces)
  assert config_lib.shared(config) == ("lora_scale",)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_fields_exist(page):
  text = page.read_text()
  for package, name in re.findall(r"python -m (experiments|benchmarks)\.(\w+)", text):
    assert (ROOT / package / f"{name}.py").is_file(), name
  for name in re.findall(r"--config=(configs/\w+\.py)", text):
    assert (ROOT / name).is_file(), name
  for name in re.findall(r"--config\.([\w.]+)=", text):
    assert name in config_lib.FIELDS, name
  targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
  for block in blocks(page, "bash"):
    for name in re.findall(r"^make ([\w-]+)", block, re.MULTILINE):
      assert name in targets, name


def test_every_fault_has_a_test():
  rows = re.findall(r"^\| (?!what happens).*", (ROOT / "docs" / "faults.md").read_text(), re.MULTILINE)
  assert len(rows) == len(set(rows)) == len(faults()) >= 40
  for file, name in faults():
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
  for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
    assert link.startswith("http") or (page.parent / link).exists(), link


@pytest.mark.parametrize("name", ["metagrad.md", "metasmoothness.md"])
def test_examples_run(name):
  names: dict = {}
  for code in blocks(ROOT / "docs" / name, "python"):
    exec(code, names)
