"""How long a window must be for its meta-gradient to agree with the whole run's, on the config's own task."""

import functools
import pathlib

import jax
import ml_collections
import numpy as np

from mftjax import config as config_lib
from mftjax import files, metagrad, run_folder
from mftjax.data import mixture
from mftjax.loops import curriculum, meta_train, outer_objective
from mftjax.loops import task as task_lib


def measure(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> metagrad.windows.TruncationReport:
  """Compares window lengths at the config's initial hyperparameters and uniform mixture; writes `windows.json`.

  The run is that of the default recipe, `config_lib.num_steps(config)` steps from the base model; the outer batch has
  `config.meta.ability_rows` rows of each ability.
  """
  network, tokenizer = task_lib.build_network(config)
  rows, held_out = task_lib.source_rows(config, tokenizer), task_lib.ability_rows(config, tokenizer)
  num_steps, num_abilities = config_lib.num_steps(config), len(config.abilities)
  stream = mixture.Stream(rows, config.batch_size, config.seed)
  ability_stream = mixture.Stream(held_out, num_abilities * config.meta.ability_rows, config.seed + 1)
  objective = outer_objective.start(config, network, held_out)
  run_folder.claim(config, workdir)
  meta_params = meta_train.init_meta_params(config, network)
  batches = curriculum.draw(config, stream, meta_params["mixture_logits"], 0, num_steps, num_steps)
  loss = functools.partial(outer_objective.loss, config, objective)
  problem = meta_train.build_problem(config, network, network.frozen, loss)
  report = metagrad.windows.truncation_bias(
    problem,
    meta_params,
    metagrad.init(problem, meta_params, network.params),
    batches,
    ability_stream.next(np.full(num_abilities, 1 / num_abilities)),
    jax.random.key(config.seed),
  )
  as_dict = lambda agreement: {name: float(value) for name, value in vars(agreement).items()}
  found = {
    "horizon": report.horizon,
    "enough": report.enough,
    "overall": {length: as_dict(value) for length, value in report.overall.items()},
    "by_parameter": {
      length: {name: as_dict(value) for name, value in by_name.items()}
      for length, by_name in report.by_parameter.items()
    },
  }
  files.write_json(workdir / "windows.json", found)
  return report
