"""The page and the tables of a comparison on sequences of tasks: what each method learns, keeps and holds."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.colors
import numpy as np
import rich.table
import rich.text

from mftjax.errors import InputError
from mftjax.report import continual_plots, page

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
      "heatmaps": [
        (row["name"], continual_plots.heatmap(row["matrix"]["accuracy"])) for row in rows if row["matrix"]["accuracy"]
      ],
      "scale": ", ".join(
        matplotlib.colors.to_hex(matplotlib.colormaps[continual_plots.COLOUR_MAP](i / 8)) for i in range(9)
      ),
      "learnt": continual_plots.curves(rows, "learnt", found["num_tasks"], "average accuracy on tasks so far"),
      "base": continual_plots.curves(rows, "base", found["num_tasks"], "loss on the base model's data, nats"),
      "memory": found["memory"] and continual_plots.memory(found["memory"]),
      "count": page.count,
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
    costs.add_row(name, forward[0], change, *(page.count(row[field]) for field in _COUNTS))
  shown = [kept, costs]
  if found["pairs"]:
    shown.append(_table("differences, points", "pair", "average accuracy", "backward transfer"))
    for pair in found["pairs"]:
      title, *figures = _pair(pair)
      shown[-1].add_row(rich.text.Text(title), *map(_joined, figures))
  if found["memory"]:
    memory = found["memory"]
    shown.append(_table(f"memory of {page.count(memory['num_slots'])} slots", "task", "slots written"))
    for task, slots in zip(memory["tasks"], memory["slots_by_task"], strict=True):
      shown[-1].add_row(rich.text.Text(task), page.count(slots))
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


def _shown(number: int, row: Mapping[str, Any]) -> dict[str, Any]:
  """A row with its figures as text and its lines as numbers; the number chooses the colour, in each plot the same."""
  matrix = row["matrix"]["accuracy"]
  average = row["accuracy"]["average_accuracy"]
  learnt = None
  if matrix:
    learnt = [float(np.mean(continual_plots.floats(after)[: last + 1])) for last, after in enumerate(matrix)]
  elif average is not None:
    learnt = [average[0]]  # trained on all tasks at once: there is an end only
  return {
    **row,
    "number": number,
    "figures": _figures(row["accuracy"], _ACCURACY),
    "losses": _figures(row["loss"], _LOSS),
    "counts": [page.count(row[field]) for field in _COUNTS],
    "time": page.count(row["seconds"]),
    "change": _figure(row["base_loss_change"], *_PERCENT),
    "tried": [_trial(trial) for trial in row["tried"]],
    "lines": {"learnt": learnt, "base": row["base_loss"]},
  }


def _trial(trial: Mapping[str, Any]) -> tuple[str, str, str]:
  """A trial's values, its accuracy in points, and the loss on the base model's data that it left."""
  values = ", ".join(f"{name} {_value(value)}" for name, value in trial["values"].items())
  accuracy, _ = _figure((trial["accuracy"], None, None), "{:.1f}", 100.0)
  base_loss, _ = _figure((trial["base_loss"], None, None), "{:.3f}", 1.0)
  return values or "–", accuracy, base_loss


def _value(value: Any) -> str:
  return f"{value:.4g}" if isinstance(value, float) else str(value)


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
<details><summary>Trials and time</summary>
<div class="scroll"><table>
<thead><tr><th>method</th><th class="text">values tried, the chosen ones first</th><th>accuracy</th><th>base loss</th>
<th>seconds</th></tr></thead>
<tbody>
{% for row in rows %}{% for values, accuracy, base_loss in row.tried %}
<tr><td>{% if loop.first %}{{ name(row) }}{% endif %}</td><td class="text">{{ values }}</td><td>{{ accuracy }}</td>
<td>{{ base_loss }}</td><td>{% if loop.first %}{{ row.time }}{% endif %}</td></tr>
{% endfor %}{% endfor %}
</tbody></table></div>
<p class="soft">Accuracy and the base model's loss over the sequences that were tuned on, after the last task;
seconds of all runs.
</p></details>
"""
