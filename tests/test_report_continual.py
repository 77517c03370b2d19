"""The page of a comparison on sequences holds its numbers, a dash for what has no meaning, and its names as letters."""

import base64
import html
import io
import itertools
import json
import re

import pytest
import rich.console

from mftjax import report
from mftjax.errors import InputError

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # a plot without room warns

_EVIL = "<script>alert(1)</script> & $x"


def _outcome(accuracy):
  return {"accuracy": accuracy, "loss": None, "base_loss": accuracy}


def _row(name, group, final):
  matrix = [[0.75, 0.125, 0.0], [0.5, 0.75, 0.25], [final, final, final]]
  return {
    **{"name": name, "group": group, "trained_parameters": 11776, "stored_rows": 2048, "trials": 12},
    "values": {"learning_rate": 0.00325, "rank": 8, "schedule": "cosine"},
    "tried": [
      {"values": {"learning_rate": 0.00325, "rank": 8, "schedule": "cosine"}, **_outcome(0.8125)},
      {"values": {"learning_rate": 0.5, "rank": 8, "schedule": "linear"}, **_outcome(None)},
    ],
    "accuracy": {
      "average_accuracy": [final, final - 0.0625, final + 0.125],
      "backward_transfer": [-0.25, -0.375, 0.0],
      "forward_transfer": [0.034, 0.0, 0.0625],
      "forgetting": [0.3125, 0.25, 0.5],
      "plasticity": [0.875, 0.8125, 0.9375],
    },
    "loss": {
      "average_loss": [1.25, 1.125, 1.375],
      "backward_transfer": [-0.5, -0.625, -0.375],
      "forward_transfer": [0.0625, 0.0, 0.125],
      "forgetting": [0.5625, 0.5, 0.625],
      "plasticity": [0.4375, 0.375, 0.5],
    },
    "base_loss_change": [0.0123, 0.0, 0.02],
    "matrix": {"accuracy": matrix, "loss": matrix},
    "base_loss": [2.0, 2.125, 2.25, 2.5],
    "seconds": 98.7,
  }


def _joint():
  """As joint training has it: an end and no way there."""
  row = _row("joint training", "upper bound", 0.9375)
  for measure, kept in (("accuracy", "average_accuracy"), ("loss", "average_loss")):
    row[measure] = {name: entry if name == kept else None for name, entry in row[measure].items()}
  return {
    **row,
    "matrix": {"accuracy": None, "loss": None},
    "base_loss": None,
    "values": {},
    "tried": [{"values": {}, **_outcome(0.9375)}],
  }


def _memory():
  return {
    **{"num_slots": 361, "tasks": ["rule 2", _EVIL, "rule 4"], "usage": [[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]]},
    **{"slots_by_task": [17, 23, 4321], "overlap": [[1.0, 0.11, 0.22], [0.33, 1.0, 0.44], [0.55, 0.66, None]]},
    "examples": [{"slot": 77, "task": _EVIL, "usage": 0.1875, "nearest": ["QXa:<b>", "QYab:ba"]}],
  }


def _found(memory=None):
  rows = [_row(_EVIL, "replay", 0.25), _row("ours, meta-learned", "ours", 0.5), _joint()]
  pair = {"name": f"ours minus {_EVIL}", "average_accuracy": [0.061, -0.125, 0.25], "backward_transfer": None}
  return {
    **{"config": "configs/continual.py", "num_sequences": 5, "num_tasks": 3, "task_names": ["rule 2", "<i>", "rule 4"]},
    **{"num_trials": 12, "tokens_per_task": 12288, "rows": rows, "pairs": [pair], "memory": memory},
    "meta_training": {"outer_steps": 150, "episodes": 1200, "seconds": 300.0},
  }


def _write(folder, found):
  (folder / "continual.json").write_text(json.dumps(found))
  return report.write_continual(folder)


def _read(path):
  """Source, its text without tags, and the letters of its images by their descriptions."""
  source = path.read_text()
  images = {}
  for data, about in re.findall(r'<img src="data:image/svg\+xml;base64,([^"]*)"\s+alt="([^"]*)"', source):
    images[html.unescape(about)] = base64.b64decode(data).decode()
  body = source[source.index("<main>") :]
  return source, re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", body))), images


def _print(found):
  output = io.StringIO()
  for table in report.continual_tables(found):
    rich.console.Console(file=output, width=80).print(table)
  return output.getvalue()


def test_the_page_holds_the_numbers(tmp_path):
  path = _write(tmp_path, _found(_memory()))
  assert path == tmp_path / "continual.html"
  source, text, _ = _read(path)
  shown = ["5 sequences of 3 tasks", "12,288 tokens", "150 outer steps, 1,200 episodes, 300 s", "configs/continual.py"]
  shown += ["25.0 18.8 to 37.5", "-25.0 -37.5 to +0.0", "31.2 25.0 to 50.0", "87.5 81.2 to 93.8", "+3.4 +0.0 to +6.2"]
  shown += ["+1.23 +0.00 to +2.00", "2,048", "11,776", "+6.1 -12.5 to +25.0", "upper bound"]
  shown += ["1.250 1.125 to 1.375", "-0.500 -0.625 to -0.375", "0.562 0.500 to 0.625", "0.438 0.375 to 0.500"]
  shown += ["learning_rate 0.00325, rank 8, schedule cosine", "schedule linear"]
  shown += ["81.2 0.812 99", "93.8 0.938", "361 slots", "77", "0.188", "QYab:ba"]
  for words in shown:
    assert words in text, words
  assert "93.8 87.5 to 106.2 – – – – +1.23" in text  # joint training
  assert re.search(r"<details><summary>The same in loss", source)
  assert not re.findall(r"(?:src|href)=\"(?!data:)", source)


def test_images(tmp_path):
  _, _, images = _read(_write(tmp_path, _found(_memory())))
  over_tasks = images["Average accuracy over the tasks so far of each method"]
  places = [over_tasks.index(name) for name in ("&lt;script&gt;", "ours, meta-learned", "joint training")]
  assert places == sorted(places)  # in the order of their ends
  base = images["Loss on the base model's held-out data after each task"]
  assert "ours, meta-learned" in base and "joint training" not in base
  heatmaps = [about for about in images if about.startswith("Accuracy on each task")]
  assert heatmaps == [f"Accuracy on each task after each task: {name}" for name in (_EVIL, "ours, meta-learned")]
  assert ">4,321<" in images["Slots that each task wrote"]
  overlap = images["Overlap of the tasks' slots"]
  assert all(f">{percent}<" in overlap for percent in (11, 22, 33, 44, 55, 66)) and "nan" not in overlap
  assert all(f">{percent}<" in images["Usage of each group of slots"] for percent in (25, 75, 50, 100))


def test_names_are_letters(tmp_path):
  source, text, images = _read(_write(tmp_path, _found(_memory())))
  assert "<script" not in source and "<b>" not in source and "<i>" not in source
  assert text.count(_EVIL) >= 6 and "QXa:<b>" in text
  assert all("<script" not in image for image in images.values())
  assert "$x" in images["Slots that each task wrote"]  # no mathematics
  found = _found()
  found["rows"][0]["name"] = "[bold]x"
  assert "[bold]x" in _print(found)


def test_the_page_is_reproducible(tmp_path):
  first = _write(tmp_path, _found(_memory())).read_bytes()
  assert report.write_continual(tmp_path).read_bytes() == first


def test_without_memory_meta_training_pairs_and_matrices(tmp_path):
  found = _found() | {"meta_training": None, "pairs": []}
  found["rows"] = found["rows"][2:]
  found["rows"][0]["base_loss_change"] = [float("nan"), None, float("inf")]
  _, text, images = _read(_write(tmp_path, found))
  for words in ("memory holds", "Meta-training", "Differences", "after each task", "nan", "inf"):
    assert words not in text, words
  assert list(images) == ["Average accuracy over the tasks so far of each method"]
  found["rows"][0]["accuracy"]["average_accuracy"] = None
  assert _read(_write(tmp_path, found))[2] == {}
  assert "slots" not in _print(found)


def test_a_run_that_diverged_leaves_the_others(tmp_path):
  found = _found()
  found["rows"][0]["base_loss"] = [2.0, float("nan"), float("inf"), float("inf")]
  found["rows"][0]["matrix"]["accuracy"][1][0] = None
  _, _, images = _read(_write(tmp_path, found))
  base = images["Loss on the base model's held-out data after each task"]
  assert "ours, meta-learned" in base and "script" not in base


def test_thirty_methods_and_many_groups_are_told_apart(tmp_path):
  found = _found(_memory() | {"usage": [[0.01] * 100] * 3})
  found["rows"] = [_row(f"method {number}", "replay", 0.25) for number in range(30)]  # all end at one place
  _, _, images = _read(_write(tmp_path, found))
  over_tasks = images["Average accuracy over the tasks so far of each method"]
  heights = re.findall(r'transform="translate\([\d.]+ ([\d.]+)\)[^>]*>method \d+<', over_tasks) or re.findall(
    r'y="([\d.]+)"[^>]*>method \d+<', over_tasks
  )
  heights = sorted(map(float, heights))
  assert len(heights) == 30
  assert min(after - before for before, after in itertools.pairwise(heights)) > 8  # points


def test_the_tables_fit_a_terminal():
  text = _print(_found(_memory()))
  assert "…" not in text and max(map(len, text.splitlines())) <= 80
  shown = ["5 sequences of 3 tasks", "25.0 (18.8 to 37.5)", "-25.0", "31.2", "87.5", "+3.4", "+1.23", "2,048", "11,776"]
  for words in (*shown, "+6.1 (-12.5 to +25.0)", "361 slots", "4,321", "–"):
    assert words in text, words
  assert re.search(r"joint training +│ +93.8 \(87.5 to 106.2\) │ +– │ +– │ +– │", text)


def test_no_comparison_or_a_damaged_one(tmp_path):
  with pytest.raises(InputError, match=r"run experiments\.continual"):
    report.write_continual(tmp_path)
  (tmp_path / "continual.json").write_text("{")
  with pytest.raises(InputError, match="not JSON"):
    report.write_continual(tmp_path)
  for damage, said in (
    (lambda found: found.pop("pairs"), "it lacks 'pairs'"),
    (lambda found: found.pop("num_trials"), "it lacks 'num_trials'"),
    (lambda found: found["rows"][1].pop("trials"), "it lacks 'trials'"),
    (lambda found: found["rows"][1]["accuracy"].pop("forgetting"), "it lacks 'forgetting'"),
    (lambda found: found["rows"][1]["loss"].update(forgetting=[1.0]), "continual.json: not a comparison"),
    (lambda found: found["rows"][1]["matrix"].update(accuracy=[[1.0], [1.0, 2.0]]), "continual.json: not a comparison"),
    (lambda found: found["rows"][1].update(accuracy=3), "continual.json: not a comparison"),
    (lambda found: found["memory"].pop("overlap"), "it lacks 'overlap'"),
    (lambda found: found["memory"].update(slots_by_task=[1]), "a row for each of 3 tasks"),
  ):
    found = _found(_memory())
    damage(found)
    with pytest.raises(InputError, match=said):
      _write(tmp_path, found)
  assert not (tmp_path / "continual.html").exists()
