"""What the pages share: their frame and style, the look of their plots, and how they are written."""

import base64
import io
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jinja2
import markupsafe
import matplotlib
import matplotlib.axes
import matplotlib.figure

from mftjax import files
from mftjax.errors import InputError

# Okabe & Ito (2008): told apart by the colour-blind too, and on light and dark ground.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#b8a800", "#8c6bb1")
INK = "#7d8590"  # axes and letters, readable on both grounds


def write(path: pathlib.Path, title: str, body: str, values: dict[str, Any]) -> pathlib.Path:
  """Renders a page and writes it whole; returns its path.

  Args:
    body: a jinja2 template of what stands in the page; names are escaped.
    values: that the template reads.
  """
  environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
  content = environment.from_string(RECIPE + body).render(**values)
  files.write(path, environment.from_string(_FRAME).render(title=title, content=markupsafe.Markup(content)))
  return path


def plot(draw: Callable[[matplotlib.axes.Axes], None], width: float = 6.4, height: float = 3.2) -> str:
  """A plot as a data URI.

  Args:
    draw: what to draw on the axes, whose look comes after it.
    width, height: inches.
  """
  # Letters stay letters, so that the page is small; the hash salt makes the file the same on each run.
  with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mftjax", "font.family": "sans-serif"}):
    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.tick_params(colors=INK, which="both")
    axes.grid(color=INK, alpha=0.2)
    for side, spine in axes.spines.items():
      spine.set_visible(side in ("left", "bottom"))
      spine.set_color(INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
  return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def letters(name: str) -> str:
  """A name as a label: a dollar sign would start mathematics, a leading underscore would hide the entry."""
  return ("\u200b" + name if name.startswith("_") else name).replace("$", r"\$")


def read_object(path: pathlib.Path) -> dict[str, Any] | None:
  """The JSON object in a file, None where there is no file.

  Raises:
    InputError: it holds anything else.
  """
  if not path.exists():
    return None
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise InputError(f"{path}: not JSON: {error}.") from error
  if not isinstance(value, dict):
    raise InputError(f"{path}: must hold a JSON object.")
  return value


def need_object(path: pathlib.Path, otherwise: str) -> dict[str, Any]:
  """As `read_object`, but a file that is not there is an InputError too; `otherwise` says how to come by it."""
  found = read_object(path)
  if found is None:
    raise InputError(f"{path} does not exist: {otherwise}.")
  return found


def count(value: Any) -> str:
  """A number without decimals, in groups of thousands; a dash where there is none."""
  return f"{value:,.0f}" if is_finite(value) else "–"


def is_finite(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


RECIPE = """
{% macro show_recipe(recipe) %}
<div class="columns">
<div class="scroll"><table><thead><tr><th>hyperparameter</th><th>value</th></tr></thead><tbody>
{% for key, value in recipe.hyperparameters.items() %}
<tr><td>{{ key }}</td><td>{{ "%.4g" | format(value) }}</td></tr>
{% endfor %}
</tbody></table></div>
<div class="scroll"><table><thead><tr><th>source</th><th>weight</th><th></th></tr></thead><tbody>
{% for key, value in recipe.mixture.items() %}
<tr><td>{{ key }}</td><td>{{ "%.4f" | format(value) }}</td>
<td class="text" style="width: 40%">
<span class="bar" style="width: {{ (100 * value) | round(1) }}%"></span></td></tr>
{% endfor %}
</tbody></table></div>
</div>
<details><summary>recipe.json</summary><pre>{{ recipe | tojson(indent=2) }}</pre></details>
{% endmacro %}
"""

_FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }} – mftjax report</title>
<style>
:root { --ground: #ffffff; --panel: #f6f8fa; --ink: #1f2328; --soft: #59636e;
  --line: #d1d9e0; --accent: #0072b2; --other: #d55e00; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #0d1117; --panel: #161b22; --ink: #e6edf3; --soft: #9198a1;
    --line: #30363d; --accent: #56b4e9; --other: #e69f00; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: .95rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
p { margin: .25rem 0 .75rem; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
th { background: var(--panel); color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; } tr:last-child td { border-bottom: 0; }
td.half { width: 22%; padding: 0; } td.half.left { text-align: right; } td.half.right { text-align: left; }
.half .bar { vertical-align: middle; } .left .bar { background: var(--other); }
td:not(.text):not(:first-child) { white-space: nowrap; } th.text { text-align: left; }
td strong { color: var(--accent); } td.text { text-align: left; overflow-wrap: anywhere; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
.panel { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: 1rem; min-width: 0; }
.panel img { width: 100%; max-width: 46rem; height: auto; display: block; margin: 0 auto; }
.columns { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
.bar { display: inline-block; height: .6rem; border-radius: 3px; background: var(--accent); min-width: 1px; }
code, pre { font: .85rem/1.5 ui-monospace, monospace; }
code { background: var(--panel); padding: .1rem .3rem; border-radius: 4px; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: 1rem; overflow-x: auto; }
summary { cursor: pointer; color: var(--soft); margin: .75rem 0; }
</style>
</head>
<body><main>
{{ content }}
</main></body></html>
"""
