"""Whether a long run's memory stays as it is: 2,000 outer steps of a small config, resident memory by quarters.

python -m benchmarks.soak [--steps=2000] [--json=FILE]

The command runs as a user's does, with a checkpoint every second step. Memory is read twice a second from the first
outer step on; the last quarter's mean must lie within 2 % of the second quarter's, or the exit code is 1.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import psutil

from mftjax import files, tracking

CONFIG = "tests/tiny_config.py"
SECONDS, TOLERANCE = 0.5, 0.02


def measure(workdir: pathlib.Path, num_steps: int) -> np.ndarray:
  """`[num_samples]` bytes that the command held, from its first outer step to its end."""
  words = [sys.executable, "-m", "experiments.meta_train", f"--config={CONFIG}", f"--workdir={workdir}"]
  process = subprocess.Popen([*words, f"--config.meta.outer_steps={num_steps}"], stderr=subprocess.DEVNULL)
  found, metrics = [], workdir / tracking.FILE
  while process.poll() is None:
    if metrics.exists() and metrics.stat().st_size:
      found.append(psutil.Process(process.pid).memory_info().rss)
    time.sleep(SECONDS)
  if process.returncode:
    sys.exit(f"The command ended with {process.returncode}.")
  return np.asarray([size for size in found if size])  # 0 is a process that has just ended


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--steps", type=int, default=2000, help="outer steps")
  parser.add_argument("--json", help="file to write the figures to")
  arguments = parser.parse_args()
  begun = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    samples = measure(pathlib.Path(folder) / "run", arguments.steps)
  seconds = time.monotonic() - begun
  quarters = [float(part.mean()) for part in np.array_split(samples, 4)]
  growth = quarters[3] / quarters[1] - 1
  print(f"{arguments.steps} outer steps in {seconds:.0f} s, {len(samples)} samples; mean MiB of each quarter:")
  print("  ".join(f"{size / 2**20:.1f}" for size in quarters))
  print(f"the last against the second: {growth:+.2%}; allowed: {TOLERANCE:.0%}")
  if arguments.json:
    files.write_json(arguments.json, {"seconds": seconds, "bytes_by_quarter": quarters, "growth": growth})
  sys.exit(abs(growth) > TOLERANCE)


if __name__ == "__main__":
  main()
