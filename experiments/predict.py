"""Write the recipe that meta-training came to, or that a trained meta-learner predicts for a task of your own.

python -m experiments.predict --config=configs/quickstart.py --workdir=runs/quickstart
python -m experiments.predict --config=configs/compare.py:small --workdir=runs/compare --task=configs/own_task.py
"""

import rich
from absl import flags
from ml_collections import config_flags

from mftjax import command, errors, recipe, report
from mftjax.loops import predict, predict_task

_EXPORT = flags.DEFINE_list("export", [], "formats to write beside the recipe: trl, axolotl, llamafactory, tunix")
_TASK = config_flags.DEFINE_config_file(
  "task", help_string="PATH.py[:variant]: sources, abilities and budget of a task, for a meta-learner"
)
_PREFERENCE = flags.DEFINE_list("preference", None, "weights of the task's abilities by name, sum 1, e.g. 0.2,0.8")
_REFINE = flags.DEFINE_integer("refine", 0, "meta-gradient steps on the predicted recipe, each a whole run")
_FRONT = flags.DEFINE_integer("front", 21, "preferences along which the report's Pareto front is predicted; 0 is none")


def main(config, workdir):
  path = _predict(config, workdir)
  print(f"recipe: {path}")
  for name in _EXPORT.value:
    exported = path.with_name(f"recipe.{name}")
    recipe.export(recipe.load(path), exported, format=name)
    print(f"{name}: {exported}")


def _predict(config, workdir):
  if _TASK.value is None:
    if config.learner.kind == "meta":
      raise errors.InputError("A meta-learner predicts for a task: give --task=PATH.py[:variant].")
    return predict.predict(config, workdir)
  preference = _PREFERENCE.value and [_number(word) for word in _PREFERENCE.value]
  task = command.loaded(_TASK.value, "task")
  path = predict_task.predict_task(config, workdir, task, preference, _REFINE.value, _FRONT.value)
  for table in report.task_tables(recipe.load(path)):
    rich.print(table)
  print(f"report: {report.write_task(path.parent)}")
  return path


def _number(word):
  try:
    return float(word)
  except ValueError:
    raise errors.InputError(f"--preference: {word!r} is not a number.") from None


if __name__ == "__main__":
  command.run(main, __doc__)
