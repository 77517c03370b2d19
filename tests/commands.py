"""Commands as a user types them, and what they leave behind; for several files of tests."""

import json
import subprocess
import sys
import time

from pages import ROOT

CONFIG = "tests/tiny_config.py"


def command(script, workdir, *extra, config=CONFIG):
  return [sys.executable, "-m", f"experiments.{script}", f"--config={config}", f"--workdir={workdir}", *extra]


def run(script, workdir, *extra, config=CONFIG, prefix=()):
  words = [*prefix, *command(script, workdir, *extra, config=config)]
  return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)


def started(script, workdir, *extra, lines=0, prefix=()):
  """A process that runs the command and has written so many lines of metrics; the caller ends it."""
  words = [*prefix, *command(script, workdir, *extra)]
  process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  metrics, deadline = workdir / "metrics.jsonl", time.monotonic() + 300
  while time.monotonic() < deadline and process.poll() is None:
    written = metrics.read_text().splitlines() if metrics.exists() else []
    if len(written) >= lines:
      break
    time.sleep(0.005)
  return process


def numbers(workdir, phase=None):
  """The metrics without their clock, of one phase or of all."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  clocks = ("time_seconds", "machine")
  found = [{key: value for key, value in line.items() if key not in clocks} for line in lines]
  return [line for line in found if phase in (None, line["phase"])]
