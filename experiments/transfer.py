"""Predict with a trained meta-learner for base models of other widths, and for a longer run; against the best rates.

python -m experiments.compare --config=configs/compare.py:small --workdir=runs/compare
python -m experiments.transfer --config=configs/compare.py:small --workdir=runs/compare --widths=32,64,128
"""

import rich
from absl import flags

from mftjax import command, errors, report
from mftjax.loops import transfer

_WIDTHS = flags.DEFINE_list("widths", None, "hidden sizes of the base models, e.g. 32,64,128; a head's size stays")
_NUM_TASKS = flags.DEFINE_integer("num_tasks", 6, "unseen tasks, the first of those that experiments.compare takes")
_NUM_SEEDS = flags.DEFINE_integer("num_seeds", 2, "seeds of each")
_NUM_RATES = flags.DEFINE_integer("num_rates", 8, "learning rates of a grid, each 1.5 times the one before")


def main(config, workdir):
  widths = [_number(word) for word in _WIDTHS.value or []]
  if not widths:
    raise errors.InputError("Give --widths=N,N,...: hidden sizes of the base models to predict for.")
  found = transfer.transfer(config, workdir, widths, _NUM_TASKS.value, _NUM_SEEDS.value, _NUM_RATES.value)
  for table in report.transfer_tables(found):
    rich.print(table)
  print(f"figures: {workdir / transfer.FILE}\nreport: {report.write_transfer(workdir)}")


def _number(word):
  try:
    return int(word)
  except ValueError:
    raise errors.InputError(f"--widths: {word!r} is not a whole number.") from None


if __name__ == "__main__":
  command.run(main, __doc__)
