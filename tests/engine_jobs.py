"""Jobs that the tests of engines have done; workers import them from here. As a program: one that waits.

python -m tests.engine_jobs --config=tests/tiny_config.py --workdir=DIR --config.engine=ray
"""

import os
import signal
import time

from mftjax import command, engine, errors, files


def begin(path):
  """Writes down that a job is begun, and by which process; returns how often it was."""
  begun = path.with_suffix(".begun")
  with begun.open("a") as file:
    file.write(f"{os.getpid()}\n")
  return len(begun.read_text().splitlines())


def build(folder, number):
  begin(folder / "build")
  return number


def double(shared, name, path):
  begin(path)
  files.write_json(path, {"name": name, "value": 2 * shared, "process": os.getpid()})


def meet(shared, name, path):
  """Ends when the other job of this folder is begun too."""
  begin(path)
  deadline = time.monotonic() + 60
  while len(list(path.parent.glob("*.begun"))) < 2:
    if time.monotonic() > deadline:
      raise errors.MftError(f"{name} was alone.")
    time.sleep(0.01)
  files.write_json(path, name)


def alone(shared, name, path):
  """Fails beside another job of this folder."""
  busy = path.parent / "busy"
  busy.touch(exist_ok=False)
  time.sleep(0.2)
  busy.unlink()
  files.write_json(path, name)


def killed_once(shared, name, path):
  if name == "killed" and begin(path) == 1:
    os.kill(os.getpid(), signal.SIGKILL)
  files.write_json(path, {"name": name, "value": 2 * shared, "process": os.getpid()})


def killed_after_writing(shared, name, path):
  double(shared, name, path)
  if begin(path) == 2:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(shared, name, path):
  begin(path)
  os.kill(os.getpid(), signal.SIGKILL)


def refuse(shared, name, path):
  begin(path)
  raise errors.InputError(f"{name} is wrong.")


def fail(shared, name, path):
  raise ZeroDivisionError(name)


def write_nothing(shared, name, path):
  pass


def wait(shared, name, path):
  begin(path)
  time.sleep(600)


def main(config, workdir):
  workdir.mkdir()
  engine.run(config, wait, {"a": workdir / "a.json"}, 1, build, workdir, 1)


if __name__ == "__main__":
  command.run(main, __doc__)
