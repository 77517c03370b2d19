"""Fine-tune on sequences of tasks with methods against forgetting, and compare what each learns and keeps.

python -m experiments.continual --config=configs/continual.py:small --workdir=runs/continual
"""

import rich

from mftjax import command, report
from mftjax.loops import continual


def main(config, workdir):
  for table in report.continual_tables(continual.compare(config, workdir)):
    rich.print(table)
  print(f"figures: {workdir / 'continual.json'}\nreport: {report.write_continual(workdir)}")


if __name__ == "__main__":
  command.run(main, __doc__)
