"""The page and the tables of a transfer: predicted and best learning rates over the width, the law over the budget."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table
import rich.text

from mftjax.errors import InputError
from mftjax.report import page

_COLUMNS = ("learning rate", "of hidden matrices", "ratio to best", "improvement", "minus best")


def write(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Makes `transfer.html` from the `transfer.json` in a workdir.

  Returns:
    Path of the page.

  Raises:
    InputError: there is none, or it is damaged.
  """
  folder = pathlib.Path(workdir)
  found = page.need_object(folder / "transfer.json", "run experiments.transfer there first")
  try:
    curves = {
      f"width {entry['width']}, {way}": grid for entry in found["widths"] for way, grid in entry["grids"].items()
    }
    values = {
      "found": found,
      "columns": _COLUMNS,
      "cells": _cells,
      "law": _law(found["budget"]),
      "rates": page.plot(lambda axes: _rates(axes, found), height=4.2),
      "gains": page.plot(lambda axes: _gains(axes, found), height=4.2),
      "curves": page.plot(lambda axes: _curves(axes, curves), height=4.2),
      "longer": page.plot(lambda axes: _curves(axes, found["budget"]["grids"])),
    }
    return page.write(folder / "transfer.html", f"{folder.resolve().name}: transfer", _BODY, values)
  except (KeyError, TypeError, IndexError) as error:
    raise InputError(f"{folder / 'transfer.json'}: not a transfer, it lacks {error}.") from error


def tables(found: Mapping[str, Any]) -> list[rich.console.RenderableType]:
  """A transfer for the terminal: a table of each width, the law, a table of the longer run."""
  about = f"{found['num_tasks']} unseen tasks, {found['num_seeds']} seeds; meta-trained at width {found['base_width']}"
  shown: list[rich.console.RenderableType] = [rich.text.Text(about)]
  for entry in found["widths"]:
    shift = f"features {entry['feature_shift']:.2f} spreads from those trained on"
    shown.append(_table(f"width {entry['width']}; {shift}", entry["rows"]))
  return [*shown, rich.text.Text(_law(found["budget"])), _table("the longer run", found["budget"]["rows"])]


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> rich.table.Table:
  """Narrow enough for a terminal: the rate of hidden matrices alone, and of the intervals the last one."""
  table, is_plain = rich.table.Table("recipe", title=title), len({row["way"] for row in rows}) == 1
  for name in ("rate", "ratio", "improved", "minus best"):
    table.add_column(name, justify="right", no_wrap=True)
  for row in rows:
    figures = f"{row['hidden_rate']:.1e}", f"{row['ratio']:.2f}", f"{row['improvement']:.3f}", _cells(row)[-1]
    table.add_row(rich.text.Text(row["name"] if is_plain else f"{row['name']}, {row['way']}"), *figures)
  return table


def _cells(row: Mapping[str, Any]) -> list[str]:
  """The figures of a row, in the order of `_COLUMNS`."""
  within = lambda value, ends, form: f"{value:{form}} ({ends[0]:{form}} to {ends[1]:{form}})"
  return [
    within(row["rate"], row["rate_interval"], ".2e"),
    f"{row['hidden_rate']:.2e}",
    within(row["ratio"], row["ratio_interval"], ".2f"),
    within(row["improvement"], (row["low"], row["high"]), ".3f"),
    within(row["minus_best"], row["minus_best_interval"], "+.3f"),
  ]


def _law(budget: Mapping[str, Any]) -> str:
  """The law over the budget in a sentence, beside what the best rates say of it."""
  is_known = page.is_finite(budget["exponent_error"])
  error = f" ± {budget['exponent_error']:.3f} (standard error)" if is_known else ", without an error"
  low, high = budget["observed_interval"]
  return (
    f"Predicted learning rates over {budget['num_tasks']} meta-training tasks of {budget['least_tokens']:,.0f} to "
    f"{budget['most_tokens']:,.0f} tokens: proportional to tokens^{budget['exponent']:.3f}{error}. "
    f"Best rates on unseen tasks, from the largest budget to {budget['checked_tokens']:,.0f} tokens: "
    f"tokens^{budget['observed_exponent']:.3f} ({low:.3f} to {high:.3f})."
  )


def _series(found: Mapping[str, Any]) -> dict[str, list[tuple[int, dict[str, Any]]]]:
  """Label -> `(width, row)`s. At the base width, where all that is predicted is the same, a row stands for each."""
  every = [row for entry in found["widths"] for row in entry["rows"]]
  series: dict[str, list[tuple[int, dict[str, Any]]]] = {}
  for name, way in dict.fromkeys((row["name"], row["way"]) for row in every):
    series[f"{name}, {way}"] = rows = []
    for entry in found["widths"]:
      is_base = entry["width"] == found["base_width"]
      wanted = (name.removesuffix(" at the base width"), "one rate") if is_base else (name, way)
      rows += [(entry["width"], row) for row in entry["rows"] if (row["name"], row["way"]) == wanted]
  return series


def _over_width(axes: Any, found: Mapping[str, Any], value: str, ends: Any) -> None:
  """A line over the widths for each series, with its intervals; the best are dashed."""
  for number, (label, rows) in enumerate(_series(found).items()):
    colour, at = page.COLOURS[number], [width * 1.015 ** (number - 2.5) for width, _ in rows]  # beside one another
    axes.plot(
      at,
      [row[value] for _, row in rows],
      "s--" if label.startswith("best") else "o-",
      color=colour,
      markersize=4.5,
      linewidth=1.6,
      label=page.letters(label),
    )
    for place, (_, row) in zip(at, rows, strict=True):
      axes.plot([place, place], ends(row), color=colour, linewidth=2, alpha=0.45)
  widths = [entry["width"] for entry in found["widths"]]
  axes.set_xscale("log", base=2)
  axes.set_xticks(widths, [str(width) for width in widths])
  axes.xaxis.minorticks_off()
  axes.set_xlabel("width of the base model")
  _legend(axes)


def _rates(axes: Any, found: Mapping[str, Any]) -> None:
  axes.set_yscale("log")
  _over_width(axes, found, "hidden_rate", lambda row: row["hidden_rate_interval"])
  axes.set_ylabel("learning rate of hidden matrices")


def _gains(axes: Any, found: Mapping[str, Any]) -> None:
  _over_width(axes, found, "improvement", lambda row: [row["low"], row["high"]])
  axes.set_ylabel("normalised improvement")


def _curves(axes: Any, grids: Mapping[str, Mapping[str, Any]]) -> None:
  """Improvement over the learning rate, a line for each grid."""
  for number, (label, grid) in enumerate(grids.items()):
    colour = page.COLOURS[number % len(page.COLOURS)]
    axes.plot(grid["rates"], grid["improvement"], "o-", color=colour, markersize=3.5, label=page.letters(label))
  axes.set_xscale("log")
  axes.set_xlabel("learning rate")
  axes.set_ylabel("improvement on validation rows")
  best = max(max(grid["improvement"]) for grid in grids.values())
  axes.set_ylim(
    bottom=max(axes.get_ylim()[0], best - 2), top=best + 0.1
  )  # one run that diverged would flatten the rest
  _legend(axes)


def _legend(axes: Any) -> None:
  """Below the axes, where it covers no line."""
  axes.legend(frameon=False, labelcolor=page.INK, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncol=2)


_BODY = """
{% macro figures(rows) %}
{% for row in rows %}
<tr><td>{{ row.name }}, {{ row.way }}</td>{% for cell in cells(row) %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
{% endmacro %}
{% macro head() %}
<thead><tr><th>recipe</th>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
{% endmacro %}
<h1>Transfer to other widths and budgets</h1>
<p class="soft">Meta-trained with a base model of width {{ found.base_width }}; {{ found.num_tasks }} unseen tasks,
{{ found.num_seeds }} seeds each. 0 is the base model of that width, 1 what tuning it on each ability's own clean data
reaches. Rates and ratios are geometric means over tasks. Intervals: 95 %, bootstrap over tasks.</p>
<div class="plots">
<div class="panel"><h3>Learning rate over width</h3>
<img src="{{ rates }}" alt="Predicted and best learning rate over width"></div>
<div class="panel"><h3>Improvement over width</h3><img src="{{ gains }}" alt="Improvement over width"></div>
</div>
<p class="soft"><em>One rate</em>: all parameters take the predicted learning rate. <em>Width rule</em>: that of hidden
matrices is multiplied by {{ found.base_width }} / width. <em>Predicted at the base width</em>: the recipe is predicted
from probes of the small model. <em>Best of the grid</em>: each task's best learning rate on validation rows, the rest
of the recipe as it is predicted at that width.</p>
{% for entry in found.widths %}
<h2>Width {{ entry.width }}</h2>
<p class="soft">{{ "{:,}".format(entry.num_parameters) }} parameters, {{ entry.num_heads }} heads. The tasks' mean
features lie {{ "%.2f" | format(entry.feature_shift) }} spreads from those of the meta-training; farthest:
{% for name, distance in entry.moved %}
{{ name }} ({{ "%+.1f" | format(distance) }}){{ ", " if not loop.last else "." }}
{% endfor %}
{% for way, grid in entry.grids.items() if grid.at_the_end > 0 %}
The best rate lies at an end of the grid ({{ way }}) for {{ "%.0f" | format(100 * grid.at_the_end) }} % of the tasks.
{% endfor %}</p>
<div class="scroll"><table>{{ head() }}<tbody>{{ figures(entry.rows) }}</tbody></table></div>
{% endfor %}
<h2>Grids</h2>
<div class="panel"><img src="{{ curves }}" alt="Improvement over the learning rate at each width"></div>
<h2>Law over the budget</h2>
<p>{{ law }}</p>
<p class="soft">Checked at width {{ found.base_width }} with runs longer than any of the meta-training.</p>
<div class="panel"><img src="{{ longer }}" alt="Improvement over the learning rate at each budget"></div>
<div class="scroll"><table>{{ head() }}<tbody>{{ figures(found.budget.rows) }}</tbody></table></div>
"""
