"""The page and the tables of a comparison on sequences of tasks: what each method learns, keeps and holds."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.colors
import matplotlib.ticker
import numpy as np
import rich.table
import rich.text

from mftjax.errors import InputError
from mftjax.report import page

# Field, title, format and factor, in the order shown.
_ACCURACY = (
  ("average_accuracy", "average accuracy", "{:.1f}", 100.0),
  ("backward_transfer", "backward transfer", "{:+.1f}", 100.0),
  ("forgetting", "forgetting", "{:.1f}", 100.0),
  ("plasticity", "plasticity", "{:.1f}", 100.0),
  ("forward_transfer", "forward transfer", "{:+.1f}", 100.0),
)
_LOSS = (
  ("average_loss", "average loss", "{:.3f}", 1.0),
  ("backward_transfer", "backward transfer", "{:+.3f}", 1.0),
  ("forgetting", "forgetting", "{:.3f}", 1.0),
  ("plasticity", "plasticity", "{:.3f}", 1.0),
  ("forward_transfer", "forward transfer", "{:+.3f}", 1.0),
)
_ABOUT = ("config", "num_sequences", "num_tasks", "task_names", "num_trials", "tokens_per_task", "meta_training")
_COUNTS = ("stored_rows", "trained_parameters", "trials")
_POINTS, _PERCENT = ("{:+.1f}", 100.0), ("{:+.2f}", 100.0)
_COLOUR_MAP = "viridis"  # rises evenly in lightness, also for the colour-blind
_LOG_RATIO = 10.0  # losses whose largest is this many times the smallest get a log axis


def write(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Makes `continual.html` from the `continual.json` in a workdir.

  Returns:
    Path of the page.

  Raises:
    InputError: there is none, or it is damaged.
  """
  folder = pathlib.Path(workdir)
  path = folder / "continual.json"
  found = page.need_object(path, "run experiments.continual there first")
  try:
    rows = [_shown(number, row) for number, row in enumerate(found["rows"])]
    values = {
      "found": {field: found[field] for field in _ABOUT},
      "rows": rows,
      "accuracy": [title for _, title, *_ in _ACCURACY],
      "loss": [title for _, title, *_ in _LOSS],
      "pairs": [_pair(pair) for pair in found["pairs"]],
      "heatmaps": [(row["name"], _heatmap(row["matrix"]["accuracy"])) for row in rows if row["matrix"]["accuracy"]],
      "scale": ", ".join(matplotlib.colors.to_hex(matplotlib.colormaps[_COLOUR_MAP](i / 8)) for i in range(9)),
      "learnt": _curves(rows, "learnt", found["num_tasks"], "average accuracy on tasks so far"),
      "base": _curves(rows, "base", found["num_tasks"], "loss on the base model's data, nats"),
      "memory": found["memory"] and _memory(found["memory"]),
      "count": _count,
    }
    return page.write(folder / "continual.html", f"{folder.resolve().name}: sequences of tasks", _BODY, values)
  except KeyError as error:
    raise InputError(f"{path}: not a comparison on sequences, it lacks {error}.") from error
  except (TypeError, ValueError, IndexError, AttributeError) as error:
    raise InputError(f"{path}: not a comparison on sequences: {error}.") from error


def tables(found: Mapping[str, Any]) -> list[rich.table.Table]:
  """A comparison for the terminal, 80 characters wide: accuracy, costs, pairs, and what the memory holds."""
  about = f"{found['num_sequences']} sequences of {found['num_tasks']} tasks, accuracy in points"
  kept = _table(about, "method", "average accuracy", "backward", "forgetting", "plasticity")
  costs = _table("transfer and costs", "method", "forward", "base loss, %", "rows", "parameters", "trials")
  for row in found["rows"]:
    average, backward, forgetting, plasticity, forward = _figures(row["accuracy"], _ACCURACY)
    change, _ = _figure(row["base_loss_change"], *_PERCENT)
    name = rich.text.Text(row["name"])
    kept.add_row(name, _joined(average), backward[0], forgetting[0], plasticity[0])
    costs.add_row(name, forward[0], change, *(_count(row[field]) for field in _COUNTS))
  shown = [kept, costs]
  if found["pairs"]:
    shown.append(_table("differences, points", "pair", "average accuracy", "backward transfer"))
    for pair in found["pairs"]:
      title, *figures = _pair(pair)
      shown[-1].add_row(rich.text.Text(title), *map(_joined, figures))
  if found["memory"]:
    memory = found["memory"]
    shown.append(_table(f"memory of {_count(memory['num_slots'])} slots", "task", "slots written"))
    for task, slots in zip(memory["tasks"], memory["slots_by_task"], strict=True):
      shown[-1].add_row(rich.text.Text(task), _count(slots))
  return shown


def _table(title: str, first: str, *names: str) -> rich.table.Table:
  table = rich.table.Table(title=title)
  table.add_column(first, overflow="fold")
  for name in names:
    table.add_column(name, justify="right", no_wrap=True)
  return table


def _figure(entry: Sequence[Any] | None, form: str, factor: float) -> tuple[str, str]:
  """A mean and its interval as text: a dash and nothing where there is no number."""
  numbers: Sequence[Any] = (None, None, None) if entry is None else entry
  mean, low, high = numbers
  centre = form.format(factor * mean) if page.is_finite(mean) else "–"
  is_known = page.is_finite(low) and page.is_finite(high)
  ends = f"{form.format(factor * low)} to {form.format(factor * high)}" if is_known else ""
  return centre, ends


def _figures(entries: Mapping[str, Any], fields: Sequence[tuple[str, str, str, float]]) -> list[tuple[str, str]]:
  return [_figure(entries[name], form, factor) for name, _, form, factor in fields]


def _pair(pair: Mapping[str, Any]) -> tuple[str, tuple[str, str], tuple[str, str]]:
  """Name of a difference between two methods, and its figures in points."""
  return pair["name"], _figure(pair["average_accuracy"], *_POINTS), _figure(pair["backward_transfer"], *_POINTS)


def _joined(figure: tuple[str, str]) -> str:
  centre, ends = figure
  return f"{centre} ({ends})" if ends else centre


def _count(value: Any) -> str:
  return f"{value:,.0f}" if page.is_finite(value) else "–"


def _shown(number: int, row: Mapping[str, Any]) -> dict[str, Any]:
  """A row with its figures as text and its lines as numbers; the number chooses the colour, in each plot the same."""
  matrix = row["matrix"]["accuracy"]
  average = row["accuracy"]["average_accuracy"]
  learnt = None
  if matrix:
    learnt = [float(np.mean(_floats(after)[: last + 1])) for last, after in enumerate(matrix)]
  elif average is not None:
    learnt = [average[0]]  # trained on all tasks at once: there is an end only
  return {
    **row,
    "number": number,
    "figures": _figures(row["accuracy"], _ACCURACY),
    "losses": _figures(row["loss"], _LOSS),
    "counts": [_count(row[field]) for field in _COUNTS],
    "time": _count(row["seconds"]),
    "change": _figure(row["base_loss_change"], *_PERCENT),
    "chosen": ", ".join(f"{name} {_value(value)}" for name, value in (row["values"] or {}).items()),
    "lines": {"learnt": learnt, "base": row["base_loss"]},
  }


def _value(value: Any) -> str:
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def _floats(values: Any) -> np.ndarray:
  """Numbers as f64; null becomes NaN, which the plots leave out."""
  return np.asarray(values, np.float64)


def _heatmap(matrix: Any) -> str:
  """A small image of an accuracy matrix, on the scale 0 to 1 that all share."""
  values = _floats(matrix)

  def draw(axes):
    _cells(axes, values)
    places = range(0, len(values), 1 if len(values) <= 5 else 3)
    for axis in (axes.xaxis, axes.yaxis):
      axis.set_ticks(places, [str(place + 1) for place in places])
    axes.set_xlabel("on task")
    axes.set_ylabel("after task")

  return page.plot(draw, width=2.3, height=2.2)


def _named_heatmap(values: np.ndarray, tasks: Sequence[str], label: str, top: float = 1.0) -> str:
  """An image of a matrix whose rows are tasks, its percentages written in the squares where these are wide enough."""
  num_columns = values.shape[1]
  step = -(-num_columns // 16)

  def draw(axes):
    _cells(axes, values, top)
    for (row, column), value in np.ndenumerate(values) if step == 1 else ():
      if np.isfinite(value):
        ink = "white" if value < 0.6 * top else "black"
        axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=ink, size=8, zorder=4)
    axes.set_yticks(range(len(tasks)), _numbered(tasks))
    axes.set_xticks(range(0, num_columns, step), [str(column + 1) for column in range(0, num_columns, step)])
    axes.set_xlabel(label)

  return page.plot(draw, width=5.2, height=1.2 + 0.32 * len(tasks))


def _numbered(tasks: Sequence[str]) -> list[str]:
  return [f"{number}: {page.letters(name)}" for number, name in enumerate(tasks, 1)]


def _cells(axes: Any, values: np.ndarray, top: float = 1.0) -> None:
  """A matrix as coloured squares, the first row at the top; what is not finite stays empty."""
  num_rows, num_columns = values.shape
  # Paths, since an image within an SVG is smoothed by some browsers; above the grid that the page's look draws.
  axes.pcolormesh(
    np.arange(num_columns + 1) - 0.5,
    np.arange(num_rows + 1) - 0.5,
    np.ma.masked_invalid(values),
    **{"cmap": _COLOUR_MAP, "vmin": 0, "vmax": top, "edgecolor": "face", "linewidth": 0.3, "zorder": 3},
  )
  axes.set_ylim(num_rows - 0.5, -0.5)


def _curves(rows: Sequence[Mapping[str, Any]], which: str, num_tasks: int, label: str) -> str | None:
  """Lines that end after the last task, each named at its end, the highest first; None where there are none."""
  lines = {row["number"]: _floats(row["lines"][which]) for row in rows if row["lines"][which]}
  lines = {number: line for number, line in lines.items() if np.isfinite(line[-1])}
  if not lines:
    return None

  def draw(axes):
    every = np.concatenate(list(lines.values()))
    if which == "base" and np.nanmin(every) > 0 and np.nanmax(every) >= _LOG_RATIO * np.nanmin(every):
      axes.set_yscale("log")
    for number, line in lines.items():
      at = range(num_tasks + 1 - len(line), num_tasks + 1)
      style, width = _style(number), 2.6 if rows[number]["group"] == "ours" else 1.4
      axes.plot(at, line, **style, linewidth=width, marker="D" if len(line) == 1 else None, clip_on=False)
    axes.set_xlim(num_tasks - max(1, max(map(len, lines.values())) - 1), num_tasks)
    axes.set_ylim(axes.get_ylim())  # the labels' places hold for these limits
    _end_labels(axes, num_tasks, lines, rows)
    axes.set_xlabel("tasks learnt")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))

  return page.plot(draw, width=7.0, height=max(3.4, 0.9 + 0.24 * len(lines)))


def _style(number: int) -> dict[str, Any]:
  return {
    "color": page.COLOURS[number % len(page.COLOURS)],
    "linestyle": ("-", "--", ":")[number // len(page.COLOURS) % 3],
  }


def _end_labels(axes: Any, end: float, lines: Mapping[int, np.ndarray], rows: Sequence[Mapping[str, Any]]) -> None:
  """Names right of the axes in the order of the lines' ends, pushed apart until none covers another."""
  order = sorted(lines, key=lambda number: float(lines[number][-1]))
  to_axes = axes.transData + axes.transAxes.inverted()
  ends = np.array([to_axes.transform((end, lines[number][-1]))[1] for number in order])
  # Less its least distance from the first, an end may only not lie below the one before it.
  gap = 1 / max(len(order), 14)
  least = gap * np.arange(len(order))
  pushed_up = np.maximum.accumulate(ends - least)
  pushed_down = np.minimum.accumulate((ends - least)[::-1])[::-1]
  places = np.clip((pushed_up + pushed_down) / 2, 0, 1 - least[-1]) + least
  for number, start, place in zip(order, ends, places, strict=True):
    colour, is_ours = _style(number)["color"], rows[number]["group"] == "ours"
    where: dict[str, Any] = {"transform": axes.transAxes, "color": colour, "clip_on": False}
    axes.plot([1.0, 1.05], [start, place], linewidth=0.8, **where)
    weight = "bold" if is_ours else "normal"
    axes.text(1.06, place, page.letters(rows[number]["name"]), va="center", size=8.5, weight=weight, **where)


def _memory(memory: Mapping[str, Any]) -> dict[str, Any]:
  """What the page shows of the memory."""
  tasks, slots, usage, overlap = (memory[field] for field in ("tasks", "slots_by_task", "usage", "overlap"))
  if not len(tasks) == len(slots) == len(usage) == len(overlap):
    raise ValueError(f"the memory's slots_by_task, usage and overlap must have a row for each of {len(tasks)} tasks")
  most = float(np.nanmax(_floats(usage), initial=0.0)) or 1.0
  return {
    "num_slots": memory["num_slots"],
    "examples": memory["examples"],
    "slots": page.plot(lambda axes: _bars(axes, tasks, slots), width=5.2, height=1.2 + 0.32 * len(tasks)),
    "overlap": _named_heatmap(_floats(overlap), tasks, "slots written by task"),
    "usage": _named_heatmap(_floats(usage), tasks, "group of slots", most),
  }


def _bars(axes: Any, tasks: Sequence[str], slots: Sequence[float]) -> None:
  """A bar for each task, the first at the top, its number at its end."""
  bars = axes.barh(range(len(tasks)), slots, color=page.COLOURS[0], height=0.7, zorder=3)
  axes.bar_label(bars, [_count(value) for value in slots], padding=3, color=page.INK, size=8)
  axes.set_yticks(range(len(tasks)), _numbered(tasks))
  axes.set_ylim(len(tasks) - 0.5, -0.5)
  axes.set_xlabel("slots that the task wrote")


_BODY = """
{% macro figure(pair) %}
<td>{{ pair[0] }}{% if pair[1] %}<br><small class="soft">{{ pair[1] }}</small>{% endif %}</td>
{% endmacro %}
{% macro name(row) %}
{% if row.group == "ours" %}<strong>{{ row.name }}</strong>{% else %}{{ row.name }}{% endif %}
{% endmacro %}
{% macro wide(image, about) %}
<div class="panel" style="overflow-x: auto"><img src="{{ image }}" alt="{{ about }}"
style="min-width: 31rem"></div>
{% endmacro %}
<h1>Tasks learnt one after another</h1>
<p class="soft">{{ found.num_sequences }} sequences of {{ found.num_tasks }} tasks, {{ count(found.tokens_per_task) }}
tokens a task; each method's values chosen in {{ found.num_trials }} trials; configuration
<code>{{ found.config }}</code>.
{% if found.meta_training %}
Meta-training: {{ count(found.meta_training.outer_steps) }} outer steps, {{ count(found.meta_training.episodes) }}
episodes, {{ count(found.meta_training.seconds) }} s.
{% endif %}
</p>
<h2>Methods</h2>
<div class="scroll"><table>
<thead><tr><th>method, group</th>{% for title in accuracy %}<th>{{ title }}</th>{% endfor %}
<th>base loss change, %</th><th>stored rows</th><th>trained parameters</th><th>trials</th></tr></thead>
<tbody>
{% for row in rows %}
<tr><td style="min-width: 9rem">{{ name(row) }}<br><small class="soft">{{ row.group }}</small></td>
{% for pair in row.figures %}{{ figure(pair) }}{% endfor %}
{{ figure(row.change) }}
{% for count in row.counts %}<td>{{ count }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<p class="soft">Accuracy in points (per cent), below each mean its 95 % interval over sequences. <em>Backward
transfer</em>: accuracy after the last task minus that right after learning, over all tasks but the last.
<em>Forgetting</em>: the best accuracy before the last task minus that after it; lower is better. <em>Plasticity</em>:
accuracy on each task right after learning it. <em>Forward transfer</em>: accuracy on a task just before learning it,
minus the base model's. <em>Base loss change</em>: how much the loss on the base model's own held-out data rose.
<em>Stored rows</em>: rows of earlier tasks kept for replay.</p>
{% if pairs %}
<h2>Differences</h2>
<div class="scroll"><table>
<thead><tr><th>pair</th><th>average accuracy</th><th>backward transfer</th></tr></thead>
<tbody>
{% for name, average, backward in pairs %}
<tr><td>{{ name }}</td>{{ figure(average) }}{{ figure(backward) }}</tr>
{% endfor %}
</tbody></table></div>
<p class="soft">In points, paired by sequence, with 95 % intervals.</p>
{% endif %}
{% if learnt %}
<h2>Average accuracy over the tasks so far</h2>
{{ wide(learnt, "Average accuracy over the tasks so far of each method") }}
<p class="soft">After each task, the mean accuracy on it and on those before it. A diamond: trained on all tasks at
once.</p>
{% endif %}
{% if base %}
<h2>Loss on the base model's own data</h2>
{{ wide(base, "Loss on the base model's held-out data after each task") }}
{% endif %}
{% if heatmaps %}
<h2>Accuracy on each task after each task</h2>
<p class="soft" style="display: flex; gap: .6rem; align-items: center">0 <span style="width: 12rem; height: .8rem;
border-radius: 3px; background: linear-gradient(to right, {{ scale }})"></span> 1</p>
<div style="display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr))">
{% for name, image in heatmaps %}
<div class="panel" style="padding: .6rem"><h3>{{ name }}</h3>
<img src="{{ image }}" alt="Accuracy on each task after each task: {{ name }}"></div>
{% endfor %}
</div>
<p class="soft">Means over sequences. The diagonal is a task right after it was learnt, right of it what is still to
come. Tasks of the first sequence: {% for name in found.task_names %}
{{ loop.index }}: {{ name }}{{ ", " if not loop.last else "." }}
{% endfor %}</p>
{% endif %}
{% if memory %}
<h2>What the memory holds</h2>
<p class="soft">{{ count(memory.num_slots) }} slots.</p>
<div class="plots">
<div class="panel"><h3>Slots by task</h3><img src="{{ memory.slots }}" alt="Slots that each task wrote"></div>
<div class="panel"><h3>Overlap</h3><img src="{{ memory.overlap }}" alt="Overlap of the tasks' slots">
<p class="soft">Part of a row's reads that falls on slots the column's task writes, per cent.</p></div>
<div class="panel"><h3>Usage by group of slots</h3><img src="{{ memory.usage }}" alt="Usage of each group of slots">
<p class="soft">Per cent.</p></div>
</div>
{% if memory.examples %}
<h3 style="margin-top: 1.5rem">Slots and the rows nearest to them</h3>
<div class="scroll"><table>
<thead><tr><th>slot</th><th class="text">task</th><th>usage</th><th class="text">nearest rows</th></tr></thead>
<tbody>
{% for example in memory.examples %}
<tr><td>{{ example.slot }}</td><td class="text">{{ example.task }}</td><td>{{ "%.3f" | format(example.usage) }}</td>
<td class="text">{% for row in example.nearest %}<code>{{ row }}</code> {% endfor %}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% endif %}
<h2>Details</h2>
<details><summary>The same in loss, nats</summary>
<div class="scroll"><table>
<thead><tr><th>method</th>{% for title in loss %}<th>{{ title }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr><td>{{ name(row) }}</td>{% for pair in row.losses %}{{ figure(pair) }}{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<p class="soft">A higher transfer is better; forgetting is by how much the loss rose; average and plasticity are losses.
</p></details>
<details><summary>Values chosen and time</summary>
<div class="scroll"><table>
<thead><tr><th>method</th><th class="text">values</th><th>seconds</th></tr></thead>
<tbody>
{% for row in rows %}
<tr><td>{{ name(row) }}</td><td class="text">{{ row.chosen or "–" }}</td><td>{{ row.time }}</td></tr>
{% endfor %}
</tbody></table></div></details>
"""
