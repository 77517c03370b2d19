"""The images of a comparison on sequences of tasks: accuracy after each task, lines, and what the memory holds."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.ticker
import numpy as np

from mftjax.report import page

COLOUR_MAP = "viridis"  # rises evenly in lightness, also for the colour-blind
_LOG_RATIO = 10.0  # losses whose largest is this many times the smallest get a log axis


def floats(values: Any) -> np.ndarray:
  """Numbers as f64; null becomes NaN, which the plots leave out."""
  return np.asarray(values, np.float64)


def heatmap(matrix: Any) -> str:
  """A small image of an accuracy matrix, on the scale 0 to 1 that all share."""
  values = floats(matrix)

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
    **{"cmap": COLOUR_MAP, "vmin": 0, "vmax": top, "edgecolor": "face", "linewidth": 0.3, "zorder": 3},
  )
  axes.set_ylim(num_rows - 0.5, -0.5)


def curves(rows: Sequence[Mapping[str, Any]], which: str, num_tasks: int, label: str) -> str | None:
  """Lines that end after the last task, each named at its end, the highest first; None where there are none."""
  lines = {row["number"]: floats(row["lines"][which]) for row in rows if row["lines"][which]}
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


def memory(memory: Mapping[str, Any]) -> dict[str, Any]:
  """What the page shows of the memory."""
  tasks, slots, usage, overlap = (memory[field] for field in ("tasks", "slots_by_task", "usage", "overlap"))
  if not len(tasks) == len(slots) == len(usage) == len(overlap):
    raise ValueError(f"the memory's slots_by_task, usage and overlap must have a row for each of {len(tasks)} tasks")
  most = float(np.nanmax(floats(usage), initial=0.0)) or 1.0
  return {
    "num_slots": memory["num_slots"],
    "examples": memory["examples"],
    "slots": page.plot(lambda axes: _bars(axes, tasks, slots), width=5.2, height=1.2 + 0.32 * len(tasks)),
    "overlap": _named_heatmap(floats(overlap), tasks, "slots written by task"),
    "usage": _named_heatmap(floats(usage), tasks, "group of slots", most),
  }


def _bars(axes: Any, tasks: Sequence[str], slots: Sequence[float]) -> None:
  """A bar for each task, the first at the top, its number at its end."""
  bars = axes.barh(range(len(tasks)), slots, color=page.COLOURS[0], height=0.7, zorder=3)
  axes.bar_label(bars, [page.count(value) for value in slots], padding=3, color=page.INK, size=8)
  axes.set_yticks(range(len(tasks)), _numbered(tasks))
  axes.set_ylim(len(tasks) - 0.5, -0.5)
  axes.set_xlabel("slots that the task wrote")
