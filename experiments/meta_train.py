"""Learn a task's hyperparameters and mixture by differentiating its fine-tuning run, or a network that predicts them.

python -m experiments.meta_train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from mftjax import command
from mftjax.loops import meta_learn, meta_train

LEARNERS = {"direct": meta_train.meta_train, "meta": meta_learn.meta_learn}


def main(config, workdir):
  LEARNERS[config.learner.kind](config, workdir)
  print(f"checkpoints: {workdir / 'checkpoints'}")


if __name__ == "__main__":
  command.run(main, __doc__)
