"""Train a meta-learner on procedural tasks and compare its recipes with searches, on tasks it never saw.

python -m experiments.compare --config=configs/compare.py:small --workdir=runs/compare
"""

import rich

from mftjax import command, report
from mftjax.loops import compare


def main(config, workdir):
  found = compare.compare(config, workdir)
  for table in report.comparison_tables(found):
    rich.print(table)
  if found["coverage"] is not None:
    print(f"90 % intervals of the prediction cover {100 * found['coverage']:.1f} % of outcomes")
  print(f"meta-training: {found['meta_training_runs']} differentiated runs\nfigures: {workdir / 'compare.json'}")
  print(f"report: {report.write_comparison(workdir)}")


if __name__ == "__main__":
  command.run(main, __doc__)
