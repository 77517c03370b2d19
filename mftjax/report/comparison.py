"""The page and the tables of a comparison: every method's improvement with its interval, and what it took."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import rich.table
import rich.text

from mftjax.errors import InputError
from mftjax.report import page


def write(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Makes `compare.html` from the `compare.json` in a workdir.

  Returns:
    Path of the page.

  Raises:
    InputError: there is none, or it is damaged.
  """
  folder = pathlib.Path(workdir)
  found = page.need_object(folder / "compare.json", "run experiments.compare there first")
  try:
    image = page.plot(lambda axes: _dots(axes, found["rows"]), height=1.2 + 0.34 * len(found["rows"]), width=8.4)
    values = {"found": found, "image": image, "number": _number, "over_tpe": _over_tpe}
    return page.write(folder / "compare.html", f"{folder.resolve().name}: comparison", _BODY, values)
  except (KeyError, TypeError) as error:
    raise InputError(f"{folder / 'compare.json'}: not a comparison, it lacks {error}.") from error


def tables(found: Mapping[str, Any]) -> list[rich.table.Table]:
  """A comparison for the terminal, 80 characters wide: what the methods reach, and what they take and choose."""
  gains = _table(f"{found['num_tasks']} unseen tasks, {found['num_seeds']} seeds", "improvement", "minus TPE")
  costs = _table("before the final run, and mixtures", "runs", "on corrupted", "TV to planted")
  for row in found["rows"]:
    name = rich.text.Text(row["name"])
    gains.add_row(name, f"{row['improvement']:.3f} ({row['low']:.3f} to {row['high']:.3f})", _over_tpe(row))
    costs.add_row(name, _number(row["runs"], "%.2f"), _number(row["corrupted"]), _number(row["planted_tv"]))
  return [gains, costs]


def _table(title: str, *names: str) -> rich.table.Table:
  table = rich.table.Table("method", title=title)
  for name in names:
    table.add_column(name, justify="right", no_wrap=True)
  return table


def _dots(axes: Any, rows: list[dict[str, Any]]) -> None:
  """A dot and its interval for each method, the first at the top."""
  for place, row in enumerate(rows):
    axes.plot([row["low"], row["high"]], [place, place], color=page.COLOURS[0], linewidth=2.2, alpha=0.55)
    axes.plot([row["improvement"]], [place], "o", color=page.COLOURS[0], markersize=6.5)
  for at, name in ((0.0, "base model"), (1.0, "single-task tuning")):
    axes.axvline(at, color=page.INK, linewidth=1, linestyle="--")
    axes.annotate(name, (at, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", color=page.INK, size=8)
  axes.set_yticks(range(len(rows)), [page.letters(row["name"]) for row in rows])
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.set_xlabel("normalised improvement on unseen tasks, 95 % interval")


def _number(value: Any, form: str = "%.3f") -> str:
  return form % value if page.is_finite(value) else "–"


def _over_tpe(row: dict[str, Any]) -> str:
  """The difference from TPE's on the same tasks with its interval, where TPE was compared too."""
  if not page.is_finite(row.get("over_tpe")):
    return _number(None)
  return "{:+.3f} ({:+.3f} to {:+.3f})".format(row["over_tpe"], *row["over_tpe_interval"])


_BODY = """
<h1>Comparison on unseen tasks</h1>
<p class="soft">{{ found.num_tasks }} tasks, {{ found.num_seeds }} seeds each. 0 is the base model, 1 what tuning on
each ability's own clean data reaches. Intervals: 95 %, bootstrap over tasks.</p>
<div class="panel"><img src="{{ image }}" alt="Improvement of each method with its 95 % interval"></div>
<h2>Figures</h2>
<div class="scroll"><table>
<thead><tr><th>method</th><th>improvement</th><th>95 % interval</th><th>minus TPE</th><th>runs before the final one</th>
<th>weight on corrupted sources</th><th>distance to planted mixtures</th></tr></thead>
<tbody>
{% for row in found.rows %}
<tr><td>{{ row.name }}</td><td>{{ number(row.improvement) }}</td>
<td>{{ number(row.low) }} to {{ number(row.high) }}</td><td>{{ over_tpe(row) }}</td>
<td>{{ number(row.runs, "%.2f") }}</td>
<td>{{ number(row.corrupted) }}</td><td>{{ number(row.planted_tv) }}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="soft">Runs count what a method spends before its final run: trials, probes, meta-gradients. The distance is
total variation, on tasks whose best mixture is known. Meta-training took {{ found.meta_training_runs }} differentiated
runs, counted apart.
{% if found.coverage is not none %}
The 90 % intervals of the predictions cover {{ number(100 * found.coverage, "%.1f") }} % of the outcomes.
{% endif %}
</p>
"""
