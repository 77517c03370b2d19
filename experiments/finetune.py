"""Fine-tune by a recipe and export the model in transformers' format.

python -m experiments.finetune --config=configs/quickstart.py --workdir=runs/quickstart [--recipe=default|PATH]
"""

from absl import flags

from mftjax import command
from mftjax.loops import finetune

_RECIPE = flags.DEFINE_string("recipe", "", "path of a recipe, or 'default'; empty is the workdir's recipe.json")


def main(config, workdir):
  print(f"model: {finetune.finetune(config, workdir, _RECIPE.value)}")


if __name__ == "__main__":
  command.run(main, __doc__)
