"""Learning rates carried over widths and budgets: closed forms, a second implementation, bad input."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from mftjax import models, sft, transfer
from mftjax.errors import InputError


def test_at_the_base_width_the_rule_changes_nothing():
  assert set(transfer.width_multipliers(48, 48).values()) == {1.0}
  values = {"learning_rate": np.asarray([1e-3, 2e-3]), "learning_rate_mlp": 0.7}
  carried = transfer.to_width(values, 48, 48)
  assert carried["learning_rate"] is values["learning_rate"] and carried["learning_rate_mlp"] == 0.7


def test_hidden_matrices_alone_take_the_rate_of_the_width():
  """The optimiser's first step, of Adam's size, says what each parameter's rate is."""
  shape = models.DecoderConfig("llama", 11, 8, 16, 1, 2, 2, 4, tie_embeddings=True)
  params = nnx.split(models.Decoder(shape, rngs=nnx.Rngs(0)))[1]
  values = {"learning_rate": 1e-2, "weight_decay": 0.0, "warmup_fraction": 0.0, "learning_rate_mlp": 0.5}

  def step(values):
    optimizer = sft.optimizer(values, num_steps=10)
    grads = jax.tree.map(jnp.ones_like, params)
    updates = optimizer.update(grads, optimizer.init(params), params)[0]
    return {jax.tree_util.keystr(path): float(x.mean()) for path, x in jax.tree_util.tree_leaves_with_path(updates)}

  before, after = step(values), step(transfer.to_width(values, width=32, base_width=8))
  quarter = {name for name in before if after[name] == pytest.approx(before[name] / 4)}
  assert quarter == {name for name in before if "_proj" in name} and len(quarter) == 7
  assert all(after[name] == pytest.approx(before[name]) for name in before.keys() - quarter)


@hypothesis.settings(deadline=None)
@hypothesis.given(
  st.floats(-3, 3),
  st.floats(-12, 2),
  st.lists(st.floats(1e2, 1e12), min_size=2, max_size=12),
)
def test_an_exact_law_is_recovered(exponent, intercept, tokens):
  hypothesis.assume(max(tokens) > 1.1 * min(tokens))
  rates = np.exp(intercept + exponent * np.log(tokens))
  law = transfer.fit_budget_law(rates, tokens)
  assert law.exponent == pytest.approx(exponent, abs=1e-6) and law.num_tasks == len(tokens)
  assert transfer.rate_at(law, 2 * max(tokens)) == pytest.approx(math.exp(intercept) * (2 * max(tokens)) ** exponent)
  np.testing.assert_allclose(transfer.to_budget(law, rates, tokens, 7e5), transfer.rate_at(law, 7e5), rtol=1e-4)
  assert (law.least_tokens, law.most_tokens) == pytest.approx((min(tokens), max(tokens)))


def test_errors_are_those_of_ordinary_least_squares():
  rng = np.random.default_rng(0)
  tokens = rng.uniform(1e4, 4e4, 20)
  rates = 0.3 * tokens**-0.5 * np.exp(0.2 * rng.normal(size=20))
  law, other = transfer.fit_budget_law(rates, tokens), scipy.stats.linregress(np.log(tokens), np.log(rates))
  found = law.exponent, law.exponent_error, law.intercept, law.intercept_error
  assert found == pytest.approx((other.slope, other.stderr, other.intercept, other.intercept_stderr))
  residual = np.log(rates) - law.intercept - law.exponent * np.log(tokens)
  assert law.spread == pytest.approx(math.sqrt((residual**2).sum() / 18))


def test_two_tasks_give_a_law_without_errors():
  law = transfer.fit_budget_law([1e-3, 2e-3], [100.0, 400.0])
  assert law.exponent == pytest.approx(0.5)
  assert math.isnan(law.exponent_error) and math.isnan(law.intercept_error) and math.isnan(law.spread)


_LAW = transfer.fit_budget_law([1e-3, 2e-3], [100.0, 400.0])


@pytest.mark.parametrize(
  ("call", "expected"),
  [
    (lambda: transfer.width_multipliers(0, 32), "width must be positive numbers, got 0"),
    (lambda: transfer.width_multipliers(32, math.nan), "base_width must be positive"),
    (lambda: transfer.to_width({}, 32, -1), "base_width must be positive numbers, got -1"),
    (lambda: transfer.fit_budget_law([1e-3, 2e-3], [0.0, 4.0]), "tokens must be positive numbers, got 0"),
    (lambda: transfer.fit_budget_law([1e-3, -2.0], [1.0, 4.0]), "rates must be positive numbers, got -2"),
    (lambda: transfer.fit_budget_law([1e-3], [1.0]), "2 distinct budgets"),
    (lambda: transfer.fit_budget_law([], []), "2 distinct budgets"),
    (lambda: transfer.fit_budget_law([1e-3, 2e-3, 1e-3], [5.0, 5.0, 5.0]), "2 distinct budgets"),
    (lambda: transfer.fit_budget_law([1e-3, 2e-3], [1.0, 4.0, 5.0]), r"shapes \(2,\) and \(3,\)"),
    (lambda: transfer.rate_at(_LAW, 0.0), "tokens must be positive"),
    (lambda: transfer.to_budget(_LAW, 1e-3, 100.0, math.inf), "to_tokens must be positive"),
  ],
)
def test_bad_input(call, expected):
  with pytest.raises(InputError, match=expected):
    call()
