"""Write the recipe that meta-training came to; optionally also as another trainer's config.

python -m experiments.predict --config=configs/quickstart.py --workdir=runs/quickstart
"""

from absl import flags

from mftjax import command, recipe
from mftjax.loops import predict

_EXPORT = flags.DEFINE_list("export", [], "formats to write beside the recipe: trl, axolotl, llamafactory, tunix")


def main(config, workdir):
  path = predict.predict(config, workdir)
  print(f"recipe: {path}")
  for name in _EXPORT.value:
    exported = workdir / f"recipe.{name}"
    recipe.export(recipe.load(path), exported, format=name)
    print(f"{name}: {exported}")


if __name__ == "__main__":
  command.run(main, __doc__)
