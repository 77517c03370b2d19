"""A run's results as one HTML page that needs nothing else, and its comparison table for the terminal."""

import json
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.ticker
import rich.table
import rich.text

from mftjax import recipe, tracking
from mftjax.errors import InputError
from mftjax.report import page

_LOG_RATIO = 10.0  # a hyperparameter whose largest value is this many times its smallest gets a log axis


def write(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Makes `report.html` from whatever a run has left in its workdir so far.

  Reads `config.json`, `metrics.jsonl` (of phases but `meta_train` only what they took), `recipe.json` and
  `evaluation.json`; for each that is not there the page says which command makes it.

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
  config = page.read_object(folder / "config.json")
  evaluation = page.read_object(folder / "evaluation.json")
  every_line = tracking.read(folder / tracking.FILE)
  lines = [line for line in every_line if line.get("phase") == "meta_train"]
  recipe_path = folder / "recipe.json"
  values = {
    "name": folder.resolve().name,
    "workdir": str(workdir),
    "config": None if config is None else [(key, _text(value)) for key, value in _flat(config)],
    "table": None if evaluation is None else _cells(evaluation, str(folder / "evaluation.json")),
    "tokens": None if evaluation is None else evaluation.get("tokens"),
    "num_outer_steps": len(lines),
    "plots": _plots(lines),
    "took": _took(every_line),
    "recipe": recipe.load(recipe_path) if recipe_path.exists() else None,
  }
  return page.write(folder / "report.html", folder.resolve().name, _BODY, values)


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
    finite = [value for value in values if page.is_finite(value)]
    # One recipe has nothing to be better than, and all alike are not best either.
    best = better(finite) if len(set(finite)) > 1 else None
    cells = [("–" if not page.is_finite(v) else f"{v:.4f}", page.is_finite(v) and v == best) for v in values]
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


def _took(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
  """What the phases' steps took, as text: medians over the steps but the first two, which compile."""
  found = []
  for phase in dict.fromkeys(str(line["phase"]) for line in lines if line.get("machine")):
    steps = [line["machine"] for line in lines if line.get("phase") == phase and line.get("machine")]
    middle = lambda fn, steps=steps[2:] or steps: statistics.median(map(fn, steps))
    memory = max(max(step["memory_bytes"].values()) for step in steps)
    speed = middle(lambda step: step.get("tokens_per_second") or 0.0)
    used = middle(lambda step: step.get("utilisation") or 0.0)
    found.append(
      [
        *(phase, f"{len(steps):,}", f"{middle(lambda step: step['step_seconds']):.3g}"),
        f"{100 * middle(lambda step: step['input_seconds'] / step['step_seconds']):.1f} %",
        *(page.count(speed) if speed else "–", f"{100 * used:.1f} %" if used else "–"),
        *(f"{memory / 2**30:.2f}", f"{steps[-1]['compiles']:,}"),
      ]
    )
  return found


def _series(lines: Sequence[Mapping[str, Any]], *path: str) -> tuple[list[int], list[float]]:
  steps, values = [], []
  for line in lines:
    value: Any = line
    for name in path:
      value = value.get(name) if isinstance(value, Mapping) else None
    if page.is_finite(value):
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

  def draw(axes):
    for index, (name, (steps, values)) in enumerate(series.items()):
      style = ("-", "--", ":")[index // len(page.COLOURS) % 3]
      marker = "o" if len(steps) == 1 else None
      colour = page.COLOURS[index % len(page.COLOURS)]
      axes.plot(steps, values, style, color=colour, label=page.letters(name), marker=marker, linewidth=1.8)
    axes.set_xlabel("outer step")
    axes.set_ylabel(unit)
    axes.set_yscale("log" if is_log else "linear")
    if stacked:
      axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    if len(series) > 1:
      axes.legend(frameon=False, labelcolor=page.INK, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)

  return page.plot(draw)


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
  pairs: list[tuple[str, Any]] = []
  for name, entry in value.items():
    is_open = isinstance(entry, Mapping) and entry
    pairs += _flat(entry, f"{prefix}{name}.") if is_open else [(f"{prefix}{name}", entry)]
  return pairs


def _text(value: Any) -> str:
  text = value if isinstance(value, str) else json.dumps(value)
  return text if len(text) <= 200 else text[:197] + "..."


_BODY = """{% macro missing(file, script) %}
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
{{ show_recipe(recipe) }}
{% else %}{{ missing("recipe.json", "predict") }}{% endif %}

{% if took %}
<h2>What it took</h2>
<p class="soft">Medians over the steps but the first two, which compile; the most memory in use on one device
(of a CPU, by the process).</p>
<div class="scroll"><table>
<thead><tr><th>phase</th><th>steps</th><th>seconds a step</th><th>of it for input</th><th>tokens/s</th>
<th>utilisation</th><th>memory, GiB</th><th>programs compiled</th></tr></thead>
<tbody>
{% for row in took %}
<tr>
{% for cell in row %}
<td>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% endif %}

<h2>What was run</h2>
{% if config %}
<div class="scroll"><table><tbody>
{% for key, value in config %}
<tr><td>{{ key }}</td><td class="text">{{ value }}</td></tr>
{% endfor %}
</tbody></table></div>
{% else %}{{ missing("config.json", "meta_train") }}{% endif %}
"""
