"""Learn a task's hyperparameters and mixture by differentiating its fine-tuning run.

python -m experiments.meta_train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from mftjax import command
from mftjax.loops import meta_train


def main(config, workdir):
  meta_train.meta_train(config, workdir)
  print(f"checkpoints: {workdir / 'checkpoints'}")


if __name__ == "__main__":
  command.run(main, __doc__)
