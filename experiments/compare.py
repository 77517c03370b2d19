"""Train a meta-learner on procedural tasks and compare its recipes with searches, on tasks it never saw.

python -m experiments.compare --config=configs/compare.py:small --workdir=runs/compare
"""

import rich
import rich.table

from mftjax import command, report
from mftjax.loops import compare


def main(config, workdir):
  found = compare.compare(config, workdir)
  table = rich.table.Table(title=f"{found['num_tasks']} unseen tasks, {found['num_seeds']} seeds")
  for name in ("method", "improvement", "95 % interval", "minus TPE", "runs before", "on corrupted", "TV to planted"):
    table.add_column(name, justify="left" if name == "method" else "right")
  number = lambda value: "–" if value is None else f"{value:.3f}"
  for row in found["rows"]:
    interval = f"{row['low']:.3f} to {row['high']:.3f}"
    is_tpe = row["over_tpe"] is not None
    difference = "{:+.3f} ({:.3f} to {:.3f})".format(row["over_tpe"], *row["over_tpe_interval"]) if is_tpe else "–"
    figures = [difference, *(number(row[name]) for name in ("runs", "corrupted", "planted_tv"))]
    table.add_row(row["name"], number(row["improvement"]), interval, *figures)
  rich.print(table)
  if found["coverage"] is not None:
    print(f"90 % intervals of the prediction cover {100 * found['coverage']:.1f} % of outcomes")
  print(f"meta-training: {found['meta_training_runs']} differentiated runs\nfigures: {workdir / 'compare.json'}")
  print(f"report: {report.write_comparison(workdir)}")


if __name__ == "__main__":
  command.run(main, __doc__)
