"""The page holds the run's numbers, marks the best, escapes every name and needs no other file."""

import base64
import html.parser
import io
import json
import re

import pytest
import rich.console

from mftjax import recipe, report, tracking
from mftjax.errors import InputError

_EVIL = "<script>alert(1)</script>"


def _evaluation():
  def row(name, one, two, match, tokens):
    return {
      "name": name,
      "loss": {"maths": one, _EVIL: two},
      "exact_match": {"maths": match, _EVIL: 0.5},
      "mean_loss": (one + two) / 2,
      "mean_exact_match": (match + 0.5) / 2,
      "tokens": tokens,
    }

  rows = [row("base", 3.0, 1.5, 0.125, 0), row("default", 2.0, 2.5, 0.25, 64000), row("learnt", 1.0, 2.0, 0.75, 64000)]
  return {"tokens": 64000, "abilities": ["maths", _EVIL], "rows": rows}


def _fill(workdir):
  workdir.mkdir(exist_ok=True)
  (workdir / "config.json").write_text(json.dumps({"seed": 7, "meta": {"method": "mixed", "note": _EVIL}}))
  (workdir / "evaluation.json").write_text(json.dumps(_evaluation()))
  made = recipe.default(["maths", _EVIL], {"learning_rate": 3.25e-4}, task=_EVIL, model="some/model")
  recipe.save(made, workdir / "recipe.json")
  with tracking.Tracker(workdir, 4, title="t", name="meta_train", quiet=True) as tracker:
    for step in range(1, 5):
      values = {
        "outer_loss": 1.0 / step,
        "grad_norm": float("nan") if step == 2 else 0.5,
        "mixture": {"maths": 0.25 * step, _EVIL: 1 - 0.25 * step, "$x_1$ & _y": 0.0, "_hidden": 0.1},
        "hyperparameters": {"learning_rate": 10.0**-step, "b1": 0.9},
        "ability_loss": {"maths": 2.0 / step},
      }
      tracker.log(step, values)


class _Page(html.parser.HTMLParser):
  def __init__(self, text):
    super().__init__()
    self.tags, self.images, self.text, self.bold, self._open = [], [], "", [], []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self._open.append(tag)
    if tag == "img":
      self.images.append(dict(attributes))

  def handle_endtag(self, tag):
    while self._open and self._open.pop() != tag:
      pass

  def handle_data(self, data):
    if "style" not in self._open:
      self.text += data
    if "strong" in self._open:
      self.bold.append(data)


def _svg(page, title):
  sources = [image["src"] for image in page.images if image["alt"].startswith(title)]
  assert len(sources) == 1
  return base64.b64decode(sources[0].removeprefix("data:image/svg+xml;base64,")).decode()


def test_page(tmp_path):
  _fill(tmp_path)
  path = report.write(tmp_path)
  assert path == tmp_path / "report.html"
  text = path.read_text()
  page = _Page(text)
  assert "script" not in page.tags
  assert "<script" not in text
  assert _EVIL in page.text  # shown as letters
  assert not re.findall(r"(?:src|href)=\"(?!data:)", text)  # nothing to load
  assert "url(" not in text
  # learnt is best in both means and in maths; base in the other loss; no best where all are alike.
  assert page.bold == ["1.5000", "0.6250", "1.0000", "1.5000", "0.7500"]
  for shown in ("64,000", "0.000325", "some/model", "meta.method", "mixed", "4 outer steps"):
    assert shown in page.text, shown
  assert page.text.index("Comparison") < page.text.index("Meta-training") < page.text.index("What was run")
  assert "prefers-color-scheme: dark" in text
  assert "python -m" not in page.text


def test_what_the_steps_took(tmp_path):
  lines = [
    {"step_seconds": 9.0, "input_seconds": 0.1, "tokens_per_second": 10.0, "compiles": 5},
    {"step_seconds": 5.0, "input_seconds": 0.1, "tokens_per_second": 20.0, "compiles": 6},
    {"step_seconds": 1.0, "input_seconds": 0.25, "tokens_per_second": 4000.0, "utilisation": 0.5, "compiles": 7},
  ]
  lines = [{**line, "memory_bytes": {"gpu:0": 1 << 30, "gpu:1": 3 << 30}} for line in lines]
  found = [{"phase": "finetune/a", "step": step, "machine": line} for step, line in enumerate(lines, 1)]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
  text = " ".join(_Page(report.write(tmp_path).read_text()).text.split())
  assert "finetune/a 3 1 25.0 % 4,000 50.0 % 3.00 7" in text


def test_plots(tmp_path):
  _fill(tmp_path)
  page = _Page(report.write(tmp_path).read_text())
  titles = [image["alt"].removesuffix(" over outer steps") for image in page.images]
  assert titles == [
    "Outer loss",
    "Norm of the meta-gradient",
    "Mixture",
    "Loss per ability",
    "Hyperparameter learning_rate",
    "Hyperparameter b1",
  ]
  mixture = _svg(page, "Mixture")
  assert "<script>" not in mixture
  assert "&lt;script&gt;" in mixture
  assert "$x_1$ &amp; _y" in mixture  # letters, not mathematics
  assert "_hidden" in mixture
  log, linear = _svg(page, "Hyperparameter learning_rate"), _svg(page, "Hyperparameter b1")
  assert re.search(r"10\D*−?3|mathdefault", log)  # decades
  assert "mathdefault" not in linear


def test_report_is_reproducible(tmp_path):
  _fill(tmp_path)
  first = report.write(tmp_path).read_bytes()
  assert report.write(tmp_path).read_bytes() == first


def test_missing_files_name_the_command(tmp_path):
  page = _Page(report.write(tmp_path).read_text())
  for script in ("evaluate", "meta_train", "predict"):
    assert f"python -m experiments.{script}" in page.text
  assert page.images == []
  with pytest.raises(InputError, match="no such workdir"):
    report.write(tmp_path / "none")


def test_damaged_files(tmp_path):
  _fill(tmp_path)
  before = report.write(tmp_path).read_bytes()
  (tmp_path / "evaluation.json").write_text("{")
  with pytest.raises(InputError, match=r"evaluation.json: not JSON"):
    report.write(tmp_path)
  (tmp_path / "evaluation.json").write_text('{"abilities": ["a"], "rows": [{"name": "base"}]}')
  with pytest.raises(InputError, match=r"evaluation.json: .*mean_loss"):
    report.write(tmp_path)
  assert (tmp_path / "report.html").read_bytes() == before


def test_table():
  output = io.StringIO()
  evaluation = _evaluation()
  evaluation["abilities"] = ["maths", "[bold]x"]
  rich.console.Console(file=output, width=200, force_terminal=True, color_system="standard").print(
    report.table(evaluation)
  )
  text = output.getvalue()
  assert "[bold]x: loss" in text
  assert re.findall(r"\x1b\[1m\s*([\d.]+)\s*\x1b\[0m", text) == ["1.5000", "0.6250", "1.0000", "0.7500"]
  assert "64,000" in text
  assert "–" in text  # an ability that was not measured


def _comparison():
  row = {
    "name": _EVIL,
    "improvement": 0.25,
    "low": -0.5,
    "high": 0.75,
    "runs": 50.0,
    "corrupted": None,
    "planted_tv": 0.125,
  }
  rows = [row, {**row, "name": "predicted", "improvement": 0.875}]
  counts = {"num_tasks": 20, "num_seeds": 5, "meta_training_runs": 1600}
  return {**counts, "rows": rows, "coverage": 0.915}


def test_the_page_of_a_comparison(tmp_path):
  (tmp_path / "compare.json").write_text(json.dumps(_comparison()))
  path = report.write_comparison(tmp_path)
  assert path == tmp_path / "compare.html"
  text = path.read_text()
  page = _Page(text)
  assert "<script" not in text and _EVIL in page.text
  for shown in ("0.875", "-0.500 to 0.750", "50.00", "–", "0.125", "1600", "91.5 %", "20 tasks"):
    assert shown in page.text, shown
  drawn = _svg(page, "Improvement")
  assert "predicted" in drawn and "single-task tuning" in drawn and "<script>" not in drawn
  assert not re.findall(r"(?:src|href)=\"(?!data:)", text)


def test_a_comparison_fits_a_terminal():
  found, output = _comparison(), io.StringIO()
  found["rows"][0] |= {"name": "proportional, default", "over_tpe": -0.75, "over_tpe_interval": [-0.875, -0.625]}
  for table in report.comparison_tables(found):
    rich.console.Console(file=output, width=80).print(table)
  text = output.getvalue()
  assert "…" not in text and "proportional, default" in text
  for words in ("20 unseen tasks", "0.875 (-0.500 to 0.750)", "-0.750 (-0.875 to -0.625)", "50.00", "0.125"):
    assert words in text, words


def test_no_comparison_or_a_damaged_one(tmp_path):
  with pytest.raises(InputError, match=r"run experiments\.compare"):
    report.write_comparison(tmp_path)
  (tmp_path / "compare.json").write_text('{"rows": [{}]}')
  with pytest.raises(InputError, match="it lacks 'low'"):
    report.write_comparison(tmp_path)
  assert not (tmp_path / "compare.html").exists()


def _transfer():
  def row(name, way, rate, hidden):
    interval = [0.8 * rate, 1.25 * rate]
    figures = {"ratio": 1.5, "ratio_interval": [1.0, 2.0], "improvement": 0.625, "low": 0.5, "high": 0.75}
    return {
      **{"name": name, "way": way, "rate": rate, "rate_interval": interval, "hidden_rate": hidden * rate},
      **{"hidden_rate_interval": [hidden * end for end in interval], **figures},
      **{"minus_best": -0.125, "minus_best_interval": [-0.25, 0.0]},
    }

  def size(width, ways):
    names = ["predicted", "best of the grid"] + (["predicted at the base width"] if width > 32 else [])
    grid = {"rates": [1e-3, 2e-3, 4e-3], "improvement": [0.25, 0.5, -30.0], "at_the_end": 0.25}
    return {
      **{"width": width, "num_heads": width // 16, "num_parameters": 12345 * width},
      **{"feature_shift": 0.75, "moved": [[_EVIL, -2.5], ["ability loss", 1.5]]},
      "grids": dict.fromkeys(ways, grid),
      "rows": [row(name, way, 3e-3, 32 / width if way == "width rule" else 1) for name in names for way in ways],
    }

  grids = size(32, ["largest budget", "longer budget"])["grids"]
  budget = {
    **{"intercept": 1.0, "exponent": -0.375, "intercept_error": 0.5, "exponent_error": 0.0625, "spread": 0.1},
    **{"num_tasks": 256, "least_tokens": 8192.0, "most_tokens": 16384.0, "checked_tokens": 32768},
    **{"observed_exponent": -0.5, "observed_interval": [-0.75, -0.25], "grids": grids},
    "rows": [row("carried by the law", "one rate", 2e-3, 1)],
  }
  widths = [size(32, ["one rate"]), size(64, ["one rate", "width rule"])]
  return {"base_width": 32, "num_tasks": 6, "num_seeds": 2, "widths": widths, "budget": budget}


def test_the_page_of_a_transfer(tmp_path):
  (tmp_path / "transfer.json").write_text(json.dumps(_transfer()))
  path = report.write_transfer(tmp_path)
  assert path == tmp_path / "transfer.html"
  text = path.read_text()
  page = _Page(text)
  assert "<script" not in text and _EVIL in page.text
  shown = ["3.00e-03 (2.40e-03 to 3.75e-03)", "1.50e-03", "1.50 (1.00 to 2.00)", "0.625 (0.500 to 0.750)"]
  shown += ["-0.125 (-0.250 to +0.000)", "tokens^-0.375 ± 0.062", "tokens^-0.500 (-0.750 to -0.250)", "32,768 tokens"]
  shown += ["790,080 parameters, 4 heads", "0.75 spreads", "(-2.5)", "for 25 % of the tasks", "256 meta-training tasks"]
  for words in shown:
    assert words in page.text, words
  drawn = _svg(page, "Predicted and best learning rate over width")
  for label in (
    "predicted, one rate",
    "predicted, width rule",
    "best of the grid, width rule",
    "base width, width rule",
  ):
    assert label in drawn, label
  ticks = re.findall(r'<g id="ytick_\d+">(?:(?!</g>\s*<g id="ytick)[\s\S])*?<text', drawn)
  assert len(ticks) >= 2  # a span below a decade has numbers too
  assert "improvement on validation rows" in _svg(page, "Improvement over the learning rate at each width")
  assert not re.findall(r"(?:src|href)=\"(?!data:)", text)

  output = io.StringIO()
  for table in report.transfer_tables(_transfer()):
    rich.console.Console(file=output, width=80).print(table)
  for words in ("6 unseen tasks", "width 64; features 0.75", "1.5e-03", "-0.125 (-0.250 to +0.000)", "tokens^-0.375"):
    assert words in output.getvalue(), words


def test_a_law_without_errors_and_one_width_make_a_page(tmp_path):
  found = _transfer()
  found["budget"]["exponent_error"], found["widths"] = None, found["widths"][:1]
  (tmp_path / "transfer.json").write_text(json.dumps(found))
  assert "tokens^-0.375, without an error" in _Page(report.write_transfer(tmp_path).read_text()).text


def test_no_transfer_or_a_damaged_one(tmp_path):
  with pytest.raises(InputError, match=r"run experiments\.transfer"):
    report.write_transfer(tmp_path)
  for damaged, lacks in (
    (lambda found: found["widths"][0].pop("grids"), "grids"),
    (lambda f: f.pop("budget"), "budget"),
  ):
    found = _transfer()
    damaged(found)
    (tmp_path / "transfer.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match=f"it lacks '{lacks}'"):
      report.write_transfer(tmp_path)
  assert not (tmp_path / "transfer.html").exists()
