"""Measure the base model and every fine-tuned one of the workdir on test data, and write the report.

python -m experiments.evaluate --config=configs/quickstart.py --workdir=runs/quickstart
"""

import rich

from mftjax import command, report
from mftjax.loops import evaluate


def main(config, workdir):
  rich.print(report.table(evaluate.evaluate(config, workdir)))
  print(f"recipe: {workdir / 'recipe.json'}\nreport: {report.write(workdir)}")


if __name__ == "__main__":
  command.run(main, __doc__)
