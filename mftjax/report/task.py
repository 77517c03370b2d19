"""The page and the tables of one task whose recipe a meta-learner predicted."""

import itertools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import rich.console
import rich.table
import rich.text

from mftjax import recipe
from mftjax.errors import InputError
from mftjax.report import page


def write(folder: str | os.PathLike[str]) -> pathlib.Path:
  """Makes `report.html` from the `recipe.json` and the `prediction.json` in a task's folder.

  Returns:
    Path of the page.

  Raises:
    InputError: one of them is missing or damaged.
  """
  place = pathlib.Path(folder)
  found = recipe.load(place / "recipe.json")
  shown = page.need_object(place / "prediction.json", "run experiments.predict with --task again")
  try:
    front = shown["front"]
    values = {
      "recipe": found,
      "said": found["predicted"],
      "nearest": shown["nearest"],
      "outputs": [_scaled(output) for output in shown["attributions"]],
      "losses": page.plot(lambda axes: _losses(axes, found["predicted"]), height=1.3 + 0.45 * _count(found)),
      "fronts": _fronts(front, found["predicted"]) if front else [],
      "front": front,
    }
    return page.write(place / "report.html", found["task"], _BODY, values)
  except (KeyError, TypeError) as error:
    raise InputError(f"{place}: not a prediction for a task, it lacks {error}.") from error


def tables(found: Mapping[str, Any]) -> list[rich.console.RenderableType]:
  """A predicted recipe for the terminal: hyperparameters, mixture, expected losses, distance to what was seen."""
  values, said = found["hyperparameters"], found["predicted"]
  names = ("learning_rate", "weight_decay", "batch_size", "num_steps")
  title = rich.text.Text(f"{found['task']}: " + ", ".join(f"{name} {values[name]:.3g}" for name in names))
  mixture = rich.table.Table("source", rich.table.Column("weight", justify="right"))
  for name, weight in found["mixture"].items():
    mixture.add_row(rich.text.Text(name), f"{weight:.3f}")
  losses = rich.table.Table(title="loss on held-out data, nats a token")
  for name in ("ability", "base model", "expected", f"{100 * said['level']:.0f} % interval", "weight"):
    losses.add_column(name, justify="left" if name == "ability" else "right")
  for name, loss in said["ability_loss"].items():
    low, high = said["ability_loss_interval"][name]
    cells = f"{said['base_loss'][name]:.3f}", f"{loss:.3f}", f"{low:.3f} to {high:.3f}"
    losses.add_row(rich.text.Text(name), *cells, f"{said['ability_weight'][name]:.2f}")
  near, typical = said["nearest_distance"], said["typical_distance"]
  distance = rich.text.Text(
    f"nearest meta-task: distance {near:.1f}; a meta-task's from its nearest other: {typical:.1f}"
  )
  return [title, mixture, losses, distance]


def _count(found: Mapping[str, Any]) -> int:
  return len(found["predicted"]["ability_loss"])


def _scaled(output: Mapping[str, Any]) -> dict[str, Any]:
  """With the length of each feature's bar in percent of the longest."""
  most = max([abs(entry["attribution"]) for entry in output["features"]], default=0.0) or 1.0
  entries = [{**entry, "length": 100 * abs(entry["attribution"]) / most} for entry in output["features"]]
  return {**output, "features": entries}


def _losses(axes: Any, said: Mapping[str, Any]) -> None:
  """Expected loss with its interval, beside that of the base model, the first ability at the top."""
  names = list(said["ability_loss"])
  for place, name in enumerate(names):
    is_first = place == 0
    axes.plot(said["ability_loss_interval"][name], [place, place], color=page.COLOURS[0], linewidth=2.2, alpha=0.55)
    expected, base = said["ability_loss"][name], said["base_loss"][name]
    axes.plot([expected], [place], "o", color=page.COLOURS[0], label="expected" if is_first else None)
    axes.plot([base], [place], "D", color=page.COLOURS[4], label="base model" if is_first else None)
  axes.set_yticks(range(len(names)), [page.letters(name) for name in names])
  axes.set_ylim(len(names) - 0.5, -0.5)
  axes.set_xlabel(f"loss, nats a token; {100 * said['level']:.0f} % interval")
  axes.legend(frameon=False, labelcolor=page.INK, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)


def _fronts(front: Mapping[str, Any], said: Mapping[str, Any]) -> list[dict[str, str]]:
  """A plot of the expected losses for each pair of abilities."""
  plots = []
  for pair in itertools.combinations(range(len(front["abilities"])), 2):
    names = [front["abilities"][i] for i in pair]
    image = page.plot(lambda axes, pair=pair: _front(axes, front, said, pair), height=4.2)  # type: ignore[misc]
    plots.append({"title": f"{names[0]} against {names[1]}", "image": image})
  return plots


def _front(axes: Any, front: Mapping[str, Any], said: Mapping[str, Any], pair: tuple[int, int]) -> None:
  names = [front["abilities"][i] for i in pair]
  across, up = ([losses[i] for losses in front["expected"]] for i in pair)
  weights = [preference[pair[0]] for preference in front["preferences"]]
  if len(front["abilities"]) == 2:
    axes.plot(across, up, color=page.INK, linewidth=1, alpha=0.6)
  ring = [page.INK if is_best else "none" for is_best in _undominated(front["expected"])]
  dots = axes.scatter(
    across, up, c=weights, cmap="viridis", vmin=0, vmax=1, s=40, edgecolors=ring, linewidths=2, zorder=3
  )
  here = [said["ability_loss"][name] for name in names]
  axes.plot(*([value] for value in here), "*", color=page.COLOURS[4], markersize=15, zorder=4, label="this recipe")
  bar = axes.figure.colorbar(dots, ax=axes)
  bar.set_label(f"weight of {page.letters(names[0])}", color=page.INK)
  bar.ax.tick_params(colors=page.INK)
  bar.outline.set_visible(False)
  axes.set_xlabel(f"expected loss of {page.letters(names[0])}")
  axes.set_ylabel(f"expected loss of {page.letters(names[1])}")
  axes.legend(frameon=False, labelcolor=page.INK, fontsize=9)


def _undominated(losses: list[list[float]]) -> list[bool]:
  """Whether no other point is at least as low in every ability and lower in one."""
  beats = lambda other, one: all(x <= y for x, y in zip(other, one, strict=True)) and other != one
  return [not any(beats(other, one) for other in losses) for one in losses]


_BODY = """
<h1>{{ recipe.task }}</h1>
<p class="soft">Predicted by a meta-learner · model {{ recipe.model }}
 · probe {{ "{:,}".format(said.probe_tokens) }} tokens
{% if said.refine_steps %} · {{ said.refine_steps }} meta-gradient step{{ "s" if said.refine_steps > 1 }},
{{ "{:,}".format(said.refine_tokens) }} tokens{% endif %}</p>

<h2>Expected losses</h2>
<p class="soft">On held-out data, nats a token, lower is better. {{ "%.0f" | format(100 * said.level) }} % of outcomes
on tasks like those of the meta-training lie within their intervals; on a task unlike them there is no such promise.
{% if said.refine_steps %}They are those of the recipe before it was refined; "refined" is measured on validation rows
after the run that the last meta-gradient step started from.{% endif %}</p>
<div class="columns">
<div class="panel"><img src="{{ losses }}" alt="Expected loss of each ability, and the base model's"></div>
<div class="scroll"><table>
<thead><tr><th>ability</th><th>base</th><th>expected</th><th>interval</th>
{% if said.refine_loss %}<th>refined</th>{% endif %}<th>weight</th></tr></thead><tbody>
{% for name, loss in said.ability_loss.items() %}
<tr><td>{{ name }}</td><td>{{ "%.3f" | format(said.base_loss[name]) }}</td><td>{{ "%.3f" | format(loss) }}</td>
<td>{{ "%.3f" | format(said.ability_loss_interval[name][0]) }} to
{{ "%.3f" | format(said.ability_loss_interval[name][1]) }}</td>
{% if said.refine_loss %}<td>{{ "%.3f" | format(said.refine_loss[name]) }}</td>{% endif %}
<td>{{ "%.2f" | format(said.ability_weight[name]) }}</td></tr>
{% endfor %}
</tbody></table></div>
</div>

<h2>Recipe</h2>
{{ show_recipe(recipe) }}

{% if front %}
<h2>Other preferences</h2>
<p class="soft">Losses that are expected of the recipes predicted for {{ front.preferences | length }} weightings of the
abilities{% if front.abilities | length > 2 %}, a plot for each pair{% endif %}; ringed where none of
the others is lower in one ability and as low in all. Probing for them took
{{ "{:,}".format(front.probe_tokens) }} tokens more.</p>
<div class="plots">
{% for plot in fronts %}
<div class="panel"><h3>{{ plot.title }}</h3>
<img src="{{ plot.image }}" alt="Expected losses: {{ plot.title }}"></div>
{% endfor %}
</div>
{% endif %}

<h2>Nearest meta-tasks</h2>
<p class="soft">Those of the meta-training whose features are nearest, in standard deviations over them all, with what
is predicted for them. A meta-task's own distance from its nearest other is
{{ "%.2f" | format(nearest.typical_distance) }} in the median; far above that, this task is unlike what was
trained on.</p>
<div class="scroll"><table>
<thead><tr><th>abilities</th><th>distance</th>
{% for name in nearest.tasks[0].hyperparameters %}<th>{{ name }}</th>{% endfor %}
<th class="text">mixture</th></tr></thead><tbody>
{% for one in nearest.tasks %}
<tr><td>{% for name, weight in one.abilities.items() %}{{ name }} {{ "%.2f" | format(weight) }}
{%- if not loop.last %}, {% endif %}{% endfor %}</td><td>{{ "%.2f" | format(one.distance) }}</td>
{% for value in one.hyperparameters.values() %}<td>{{ "%.3g" | format(value) }}</td>{% endfor %}
<td class="text">{% for name, weight in one.mixture.items() %}{{ name }} {{ "%.2f" | format(weight) }}
{%- if not loop.last %}, {% endif %}{% endfor %}</td></tr>
{% endfor %}
</tbody></table></div>

<h2>What moved the prediction</h2>
<p class="soft">The eight features of the probe that moved each output most, from its value for the mean task to
that for this one: integrated gradients (Sundararajan, Taly and Yan, 2017), whose parts over all features sum to the
difference. A logit counts from the mean of the task's logits.</p>
<div class="plots">
{% for output in outputs %}
<div class="panel"><h3>{{ output.output }}: {{ "%.3f" | format(output.mean_task) }} for the mean task,
{{ "%.3f" | format(output.value) }} here</h3>
<table><tbody>
{% for entry in output.features %}
<tr><td>{{ entry.feature }}<span class="soft"> = {{ "%.3g" | format(entry.value) }}</span></td>
<td class="half left">{% if entry.attribution < 0 %}
<span class="bar" style="width: {{ entry.length | round(1) }}%"></span>{% endif %}</td>
<td class="half right">{% if entry.attribution > 0 %}
<span class="bar" style="width: {{ entry.length | round(1) }}%"></span>{% endif %}</td>
<td>{{ "%+.3f" | format(entry.attribution) }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
</div>
"""
