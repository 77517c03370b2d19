"""What a tracker writes can be read by others, and a resumed run's file looks like one that never stopped."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from tensorboardX.proto import event_pb2

from mftjax import tracking
from mftjax.errors import InputError


def _scalars(folder):
  """Tag -> {step: value}, read from the TFRecord framing: length, crc, payload, crc."""
  found = {}
  for path in folder.glob("events*"):
    content, place = path.read_bytes(), 0
    while place < len(content):
      length = int.from_bytes(content[place : place + 8], "little")
      event = event_pb2.Event.FromString(content[place + 12 : place + 12 + length])
      place += 16 + length
      for value in event.summary.value:
        found.setdefault(value.tag, {})[event.step] = value.simple_value
  return found


def _tracker(workdir, total_steps=3, **options):
  options = {"title": "Outer steps", "name": "meta_train", "quiet": True} | options
  return tracking.Tracker(workdir, total_steps, **options)


def test_lines_and_scalars(tmp_path):
  with _tracker(tmp_path) as tracker:
    tracker.log(1, {"loss": jnp.float32(0.5), "mixture": {"a": 0.25, "b": np.float64(0.75)}, "n": [1, 2]})
    # Flushed per line: readable while the run goes on.
    assert tracking.read(tmp_path / "metrics.jsonl")[0]["mixture"] == {"a": 0.25, "b": 0.75}
    tracker.log(2, {"loss": float("nan"), "array": jnp.asarray([1.5, jnp.inf], jnp.bfloat16), "note": "x"})
  text = (tmp_path / "metrics.jsonl").read_text()
  assert "NaN" not in text
  assert "Infinity" not in text
  first, second = [json.loads(line) for line in text.splitlines()]
  seconds = first.pop("time_seconds")
  assert 0 <= seconds <= second["time_seconds"]
  assert first.pop("machine")["step_seconds"] > 0
  assert first == {"phase": "meta_train", "step": 1, "loss": 0.5, "mixture": {"a": 0.25, "b": 0.75}, "n": [1, 2]}
  assert second["loss"] is None
  assert second["array"] == [1.5, None]
  scalars = _scalars(tmp_path / "tensorboard")
  assert scalars["meta_train/loss"] == {1: 0.5}
  assert scalars["meta_train/mixture/b"] == {1: 0.75}
  assert scalars["meta_train/array/0"] == {2: 1.5}


def test_resumed_file_is_as_if_never_stopped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  with _tracker(tmp_path, name="probe") as tracker:
    tracker.log(9, {"loss": 7.0})
  with _tracker(tmp_path) as tracker:
    for step in (1, 2, 3):
      tracker.log(step, {"loss": 10.0 * step})
  with path.open("a") as file:
    file.write('{"phase": "meta_train", "step": 4, "lo')
  with _tracker(tmp_path, start_step=2) as tracker:
    tracker.log(3, {"loss": 31.0})
  lines = tracking.read(path)
  assert [(line["phase"], line["step"], line["loss"]) for line in lines] == [
    ("probe", 9, 7.0),
    ("meta_train", 1, 10.0),
    ("meta_train", 2, 20.0),
    ("meta_train", 3, 31.0),
  ]
  times = [line["time_seconds"] for line in lines[1:]]
  assert times == sorted(times)


def test_torn_last_line_does_not_swallow_the_next(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"phase": "meta_train", "step": 1, "time_seconds": 1.0}\n{"phase"')
  assert len(tracking.read(path)) == 1
  with _tracker(tmp_path, start_step=1) as tracker:
    tracker.log(2, {"loss": 1.0})
  assert [line["step"] for line in tracking.read(path)] == [1, 2]


def test_damage_within_the_file_is_told(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
  with pytest.raises(InputError, match=r"metrics.jsonl:2: not a JSON object"):
    tracking.read(path)
  assert tracking.read(tmp_path / "none.jsonl") == []


def test_plain_lines_are_few(tmp_path):
  output = io.StringIO()
  console = rich.console.Console(file=output, force_terminal=False, width=200)
  with _tracker(tmp_path, 50, quiet=False, console=console, tokens_per_step=100) as tracker:
    for step in range(1, 51):
      tracker.log(step, {"outer_loss": step / 2, "grad_norm": 1.0})
  lines = output.getvalue().splitlines()
  assert len(lines) == 2  # the first, and the last: 50 steps take less than five seconds
  assert lines[0].startswith("Outer steps 1/50")
  assert "outer_loss 25" in lines[1]
  assert "tokens/s" in lines[1]
  assert "s left" in lines[0]


def test_bar_on_a_terminal_and_quiet(tmp_path):
  output = io.StringIO()
  console = rich.console.Console(file=output, force_terminal=True, width=160)
  with _tracker(tmp_path / "a", 3, title="[red]x", quiet=False, console=console) as tracker:
    tracker.log(3, {"loss": 0.125})
  assert "loss 0.125" in output.getvalue()
  assert "[red]x" in output.getvalue()  # a title is a text, not markup
  assert "3/3" in output.getvalue()
  output.truncate(0)
  with _tracker(tmp_path / "b", 3, console=console) as tracker:
    tracker.log(3, {"loss": 0.125})
  assert output.getvalue().strip("\0") == ""


def test_reserved_names(tmp_path):
  with _tracker(tmp_path) as tracker, pytest.raises(InputError, match="step"):
    tracker.log(1, {"step": 2})
