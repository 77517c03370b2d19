"""Measure which unroll length is enough: truncated windows against the whole run, on the config's own data.

python -m experiments.windows --config=configs/quickstart.py --workdir=runs/windows
"""

from mftjax import command
from mftjax.loops import windows


def main(config, workdir):
  print(windows.measure(config, workdir).table())
  print(f"figures: {workdir / 'windows.json'}")


if __name__ == "__main__":
  command.run(main, __doc__)
