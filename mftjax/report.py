"""A run's results as one HTML page that needs nothing else, and its comparison table for the terminal."""

import base64
import io
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import matplotlib
import matplotlib.figure
import matplotlib.ticker
import rich.table
import rich.text

from mftjax import recipe, tracking
from mftjax.errors import InputError

# Okabe & Ito (2008): told apart by the colour-blind too, and on light and dark ground.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#b8a800", "#8c6bb1")
_INK = "#7d8590"  # axes and letters, readable on both grounds
_LOG_RATIO = 10.0  # a hyperparameter whose largest value is this many times its smallest gets a log axis


def write(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Makes `report.html` from whatever a run has left in its workdir so far.

  Reads `config.json`, `metrics.jsonl` (phase `meta_train`), `recipe.json` and `evaluation.json`; for each that is
  not there the page says which command makes it.

  Args:
    workdir: the run's folder, which must exist.

  Returns:
    Path of the page.

  Raises:
    InputError: no such folder, or one of the files is damaged.
  """
  folder = pathlib.Path(workdir)
  if not folder.is_dir():
    raise InputError(f"{workdir}: no such workdir.")
  config = _read_object(folder / "config.json")
  evaluation = _read_object(folder / "evaluation.json")
  lines = [line for line in tracking.read(folder / tracking.FILE) if line.get("phase") == "meta_train"]
  recipe_path = folder / "recipe.json"
  environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
  page = environment.from_string(_PAGE).render(
    name=folder.resolve().name,
    workdir=str(workdir),
    config=None if config is None else [(key, _text(value)) for key, value in _flat(config)],
    table=None if evaluation is None else _cells(evaluation, str(folder / "evaluation.json")),
    tokens=None if evaluation is None else evaluation.get("tokens"),
    num_outer_steps=len(lines),
    plots=_plots(lines),
    recipe=recipe.load(recipe_path) if recipe_path.exists() else None,
  )
  path = folder / "report.html"
  partial = folder / f".report.html.{os.getpid()}.partial"
  partial.write_text(page, encoding="utf-8")
  partial.replace(path)
  return path


def table(evaluation: Mapping[str, Any]) -> rich.table.Table:
  """The comparison of an `evaluation.json` for the terminal, the best value of each line bold.

  Args:
    evaluation: `{"tokens", "abilities": [name], "rows": [{"name", "loss": {ability: nats},
      "exact_match": {ability: fraction}, "mean_loss", "mean_exact_match", "tokens"}]}`.

  Returns:
    A column per recipe compared, so that many abilities fit a terminal; loss lower is better, exact match higher.

  Raises:
    InputError: a field is missing.
  """
  header, rows = _cells(evaluation, "evaluation")
  result = rich.table.Table()
  for index, name in enumerate(header):
    result.add_column(rich.text.Text(name), justify="left" if index == 0 else "right")
  for row in rows:
    result.add_row(*(rich.text.Text(text, style="bold" if is_best else "") for text, is_best in row))
  return result


def _cells(evaluation: Mapping[str, Any], where: str) -> tuple[list[str], list[list[tuple[str, bool]]]]:
  """Header (the recipes), and a row of (text, is_best) for each measure."""
  try:
    abilities, recipes = list(evaluation["abilities"]), list(evaluation["rows"])
    measures: list[tuple[str, list[Any], Any]] = [
      ("mean loss", [recipe["mean_loss"] for recipe in recipes], min),
      ("mean exact match", [recipe["mean_exact_match"] for recipe in recipes], max),
    ]
    measures += [(f"{name}: loss", [recipe["loss"].get(name) for recipe in recipes], min) for name in abilities]
    measures += [
      (f"{name}: exact match", [recipe["exact_match"].get(name) for recipe in recipes], max) for name in abilities
    ]
    names = [str(recipe["name"]) for recipe in recipes]
    tokens = [recipe.get("tokens") for recipe in recipes]
  except (KeyError, TypeError, AttributeError) as error:
    raise InputError(f"{where}: not an evaluation, it lacks {error}.") from error
  rows: list[list[tuple[str, bool]]] = []
  for measure, values, better in measures:
    finite = [value for value in values if _is_finite(value)]
    # One recipe has nothing to be better than, and all alike are not best either.
    best = better(finite) if len(set(finite)) > 1 else None
    cells = [("–" if not _is_finite(v) else f"{v:.4f}", _is_finite(v) and v == best) for v in values]
    rows.append([(measure, False), *cells])
  rows.append([("tokens", False), *((f"{v:,}" if isinstance(v, int) else "–", False) for v in tokens)])
  return ["", *names], rows


def _plots(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
  """Title and image of each plot that the lines have numbers for."""
  plots = []
  losses = {"outer loss": _series(lines, "outer_loss")}
  norms = {"gradient norm": _series(lines, "grad_norm")}
  groups: list[tuple[str, str, dict[str, Any], bool]] = [
    ("Outer loss", "nats", losses, False),
    ("Norm of the meta-gradient", "", norms, _spans(norms)),
    ("Mixture", "weight", _grouped(lines, "mixture"), False),
    ("Loss per ability", "nats", _grouped(lines, "ability_loss"), False),
  ]
  for name, one in _grouped(lines, "hyperparameters").items():
    groups.append((f"Hyperparameter {name}", "", {name: one}, _spans({name: one})))
  for title, unit, series, is_log in groups:
    if any(steps for steps, _ in series.values()):
      plots.append({"title": title, "image": _plot(series, unit, is_log, stacked=title == "Mixture")})
  return plots


def _series(lines: Sequence[Mapping[str, Any]], *path: str) -> tuple[list[int], list[float]]:
  steps, values = [], []
  for line in lines:
    value: Any = line
    for name in path:
      value = value.get(name) if isinstance(value, Mapping) else None
    if _is_finite(value):
      steps.append(line["step"])
      values.append(value)
  return steps, values


def _grouped(lines: Sequence[Mapping[str, Any]], field: str) -> dict[str, tuple[list[int], list[float]]]:
  names = dict.fromkeys(name for line in lines for name in (line.get(field) or {}))
  return {name: _series(lines, field, name) for name in names}


def _spans(series: Mapping[str, tuple[list[int], list[float]]]) -> bool:
  values = [value for _, numbers in series.values() for value in numbers]
  return bool(values) and min(values) > 0 and max(values) >= _LOG_RATIO * min(values)


def _plot(series: Mapping[str, tuple[list[int], list[float]]], unit: str, is_log: bool, stacked: bool) -> str:
  """A line plot as a data URI."""
  # Letters stay letters, so that the page is small; the hash salt makes the file the same on each run.
  with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mftjax", "font.family": "sans-serif"}):
    figure = matplotlib.figure.Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, (steps, values)) in enumerate(series.items()):
      # A dollar sign would start mathematics, a leading underscore would hide the entry.
      label = ("\u200b" + name if name.startswith("_") else name).replace("$", r"\$")
      style = ("-", "--", ":")[index // len(_COLOURS) % 3]
      marker = "o" if len(steps) == 1 else None
      axes.plot(steps, values, style, color=_COLOURS[index % len(_COLOURS)], label=label, marker=marker, linewidth=1.8)
    axes.set_xlabel("outer step", color=_INK)
    axes.set_ylabel(unit, color=_INK)
    axes.set_yscale("log" if is_log else "linear")
    if stacked:
      axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.tick_params(colors=_INK, which="both")
    axes.grid(color=_INK, alpha=0.2)
    for side, spine in axes.spines.items():
      spine.set_visible(side in ("left", "bottom"))
      spine.set_color(_INK)
    if len(series) > 1:
      axes.legend(frameon=False, labelcolor=_INK, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
  return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _read_object(path: pathlib.Path) -> dict[str, Any] | None:
  if not path.exists():
    return None
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise InputError(f"{path}: not JSON: {error}.") from error
  if not isinstance(value, dict):
    raise InputError(f"{path}: must hold a JSON object.")
  return value


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
  pairs: list[tuple[str, Any]] = []
  for name, entry in value.items():
    is_open = isinstance(entry, Mapping) and entry
    pairs += _flat(entry, f"{prefix}{name}.") if is_open else [(f"{prefix}{name}", entry)]
  return pairs


def _text(value: Any) -> str:
  text = value if isinstance(value, str) else json.dumps(value)
  return text if len(text) <= 200 else text[:197] + "..."


def _is_finite(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ name }} – mftjax report</title>
<style>
:root { --ground: #ffffff; --panel: #f6f8fa; --ink: #1f2328; --soft: #59636e;
  --line: #d1d9e0; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #0d1117; --panel: #161b22; --ink: #e6edf3; --soft: #9198a1;
    --line: #30363d; --accent: #56b4e9; }
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
td strong { color: var(--accent); } td.text { text-align: left; overflow-wrap: anywhere; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
.panel { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: 1rem; min-width: 0; }
.panel img { width: 100%; height: auto; display: block; }
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
{% macro missing(file, script) %}
<p class="panel">No {{ file }} yet. Make it with
<code>python -m experiments.{{ script }} --config=CONFIG.py --workdir={{ workdir }}</code></p>
{% endmacro %}
<h1>{{ name }}</h1>
<p class="soft">{{ num_outer_steps }} outer steps logged
{% if recipe and recipe.task %} · task {{ recipe.task }}{% endif %}
{% if recipe and recipe.model %} · model {{ recipe.model }}{% endif %}</p>

<h2>Comparison</h2>
{% if table %}
<p class="soft">Fine-tuned with each recipe
{%- if tokens is number %} for {{ "{:,}".format(tokens) }} tokens{% endif %}, measured on held-out data.
Loss in nats a token, lower is better; exact match as a fraction, higher is better.
The best of each line is bold.</p>
<div class="scroll"><table>
<thead><tr>{% for cell in table[0] %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table[1] %}
<tr>
{% for text, is_best in row %}
<td>{% if is_best %}<strong>{{ text }}</strong>{% else %}{{ text }}{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% else %}{{ missing("evaluation.json", "evaluate") }}{% endif %}

<h2>Meta-training</h2>
{% if plots %}
<div class="plots">
{% for plot in plots %}
<div class="panel"><h3>{{ plot.title }}</h3>
<img src="{{ plot.image }}" alt="{{ plot.title }} over outer steps"></div>
{% endfor %}
</div>
{% else %}{{ missing("outer steps in metrics.jsonl", "meta_train") }}{% endif %}

<h2>Recipe</h2>
{% if recipe %}
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
{% else %}{{ missing("recipe.json", "predict") }}{% endif %}

<h2>What was run</h2>
{% if config %}
<div class="scroll"><table><tbody>
{% for key, value in config %}
<tr><td>{{ key }}</td><td class="text">{{ value }}</td></tr>
{% endfor %}
</tbody></table></div>
{% else %}{{ missing("config.json", "meta_train") }}{% endif %}
</main></body></html>
"""
