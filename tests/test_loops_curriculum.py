"""A mixture at knots: what rows are drawn by, and what the recipe says of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config

from mftjax import recipe, sft
from mftjax.data import mixture
from mftjax.loops import curriculum, finetune
from mftjax.loops import task as task_lib

LOGITS = jnp.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0], [-1.0, 0.5, 3.0]])


def made_recipe(config, num_steps=20):
  made = recipe.default(task_lib.names(config.sources), {"learning_rate": 1e-3})
  average = curriculum.average(LOGITS, num_steps)
  made["mixture"] = dict(zip(made["mixture"], map(float, average), strict=True))
  made["mixture_schedule"] = curriculum.schedule(config, LOGITS)
  return made


def test_one_knot_is_the_plain_mixture():
  config = tiny_config.get_config()
  logits = curriculum.init(config)
  assert logits.shape == (3,) and curriculum.schedule(config, logits) is None
  config.mixture.knots = 4
  assert curriculum.init(config).shape == (4, 3)
  np.testing.assert_allclose(curriculum.average(LOGITS[0], 10), jax.nn.softmax(LOGITS[0]), rtol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 20])
def test_the_recipe_gives_each_step_the_mixture_that_was_learned(num_steps):
  config, steps = tiny_config.get_config(), np.arange(num_steps)
  made = made_recipe(config, num_steps)
  recipe.check(made, "here")
  want = curriculum.weights(LOGITS, steps, num_steps)
  names = task_lib.names(config.sources)
  got = [finetune.proposal(made, names, step, num_steps) for step in steps]
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(want.mean(axis=0), list(made["mixture"].values()), rtol=1e-6)
  np.testing.assert_allclose(want[0], jax.nn.softmax(LOGITS[0]), rtol=1e-6)
  if num_steps > 1:
    np.testing.assert_allclose(want[-1], jax.nn.softmax(LOGITS[-1]), rtol=1e-6)


def test_rows_are_drawn_by_the_mixture_of_their_step_and_weigh_one_on_average():
  config = tiny_config.get_config()
  config.batch_size = 64
  _, tokenizer = task_lib.build_network(config)
  rows = task_lib.source_rows(config, tokenizer)
  batch = curriculum.draw(config, mixture.Stream(rows, 64, 0), LOGITS, 4, 6, 20)
  assert batch.progress.shape == (6, 64)
  np.testing.assert_allclose(batch.progress[:, 0], np.arange(4, 10) / 19, rtol=1e-6)
  half = config.meta.uniform_fraction
  proposals = (1 - half) * curriculum.weights(LOGITS, np.arange(4, 10), 20) + half / 3
  for step in range(6):
    counts = np.bincount(batch.source[step], minlength=3)
    assert np.all(np.abs(counts - 64 * proposals[step]) < 1)
    np.testing.assert_allclose(batch.proposal[step], proposals[step][batch.source[step]], rtol=1e-5)
    one = jax.tree.map(lambda x, step=step: x[step], batch)
    assert float(sft.importance_weights(LOGITS, one).mean()) == pytest.approx(1.0, abs=0.05)
  plain = curriculum.draw(config, mixture.Stream(rows, 64, 0), LOGITS[0], 4, 6, 20)
  assert plain.progress is None
