"""What several files of tests share, made once."""

import gc
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pages import ROOT, faults

from configs import compare as compare_config
from mftjax import run_folder, stopping
from mftjax.data import meta_tasks
from mftjax.loops import learnt, many_tasks, meta_learn
from mftjax.loops import setting as setting_lib
from mftjax.loops import task as task_lib


def pytest_collection_modifyitems(items):
  """Marks the tests that docs/faults.md names (`make test-faults`), and begins with the files that take long.

  So of two processes none is left alone with a long one at the end.
  """
  named = set(faults())
  for item in items:
    if (item.path.relative_to(ROOT).as_posix(), item.originalname) in named:
      item.add_marker(pytest.mark.fault)
  long = {item.path for item in items if item.get_closest_marker("slow")}
  items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
  """Drops compiled programs between files: with those of the whole suite in one process XLA's compiler once crashed."""
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture(autouse=True)
def let_go():
  """Of the folders of runs, which a test's own process may not keep from the commands that it starts."""
  yield
  run_folder.release()


@pytest.fixture
def listening(monkeypatch):
  """Signals end what this process runs, as they do a command."""
  monkeypatch.setattr(stopping, "_is_asked", False)
  before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
  signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves were started with nohup
  stopping.listen()
  yield
  for number, handler in before.items():
    signal.signal(number, handler)


@pytest.fixture(scope="session")
def meta_trained(tmp_path_factory):
  """`(config, workdir)` with the files of a meta-training, but of a meta-learner with random weights and features.

  Nothing is compiled for it; the slow test of the comparison makes such a workdir by meta-training.
  """
  config, workdir = compare_config.get_config("tiny"), tmp_path_factory.mktemp("meta") / "run"
  decoder, _ = task_lib.load_model(config)
  pools = meta_tasks.build_pools(config.length, config.tasks.pool_rows, config.seed)
  setting = setting_lib.assemble(config, many_tasks.Model(*nnx.split(decoder)), pools, {})
  tasks = meta_tasks.sample(pools, "train", config.tasks.num_train, config.seed)
  rng = np.random.default_rng(0)
  normal = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
  keys = jax.random.split(jax.random.key(0), config.tasks.num_train)
  features = jax.tree.map(normal, jax.eval_shape(setting.probing, tasks, keys))
  match = jax.vmap(many_tasks.mixture)(features.match, tasks.source_mask)
  features = features.replace(source_mask=tasks.source_mask, ability_weight=tasks.ability_weight, match=match)
  learner = learnt.build(config)
  learner.fit_normaliser(features)
  graphdef, params, others = nnx.split(learner, nnx.Param, ...)
  moved = jax.tree.map(lambda leaf: leaf + 0.1 * normal(leaf), params)
  graphdef, state = nnx.split(nnx.merge(graphdef, moved, others))
  prediction = meta_learn.predict(graphdef, state, features)
  run_folder.claim(config, workdir)
  run_folder.release()
  learnt.keep(config, workdir, setting, state, 1.7, tasks, features, prediction)
  return config, workdir
