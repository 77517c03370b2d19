"""The config's objective: its value and what it carries, where references come from, and what is refused."""

import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import tiny_config

from mftjax import config as config_lib
from mftjax import errors, objectives, sft
from mftjax.data import mixture
from mftjax.loops import outer_objective
from mftjax.loops import task as task_lib

LOSSES = jnp.array([1.0, 2.5])
BASE = np.array([1.2, 2.0])


def make_config(**fields):
  config = tiny_config.get_config()
  config.update_from_flattened_dict({f"objective.{name}": value for name, value in fields.items()})
  return config


def with_references(config, *values):
  for name, value in zip(task_lib.names(config.abilities), values, strict=True):
    config.abilities[name].reference = value
  return config


def test_each_stateless_objective_is_that_of_the_module():
  options = {"worst": {"temperature": 0.5}, "cvar": {"fraction": 0.3}, "nash": {"floor": 0.2, "minimum_gain": 0.3}}
  weights = jnp.array([1.0, 3.0])
  for name in objectives.OBJECTIVES:
    config = make_config(name=name, **options.get(name, {}))
    config.abilities.reversal.weight = 3.0
    if name in objectives.NEED_REFERENCE:
      config = with_references(config, 0.5, 1.5)
    config_lib.check(config)
    reference = np.array([0.5, 1.5])
    state = outer_objective.init(config, BASE, reference)
    context = objectives.Context(weights, jnp.asarray(BASE), jnp.asarray(reference))
    want = objectives.build(name, **options.get(name, {}))(LOSSES, context)
    assert float(outer_objective.loss(config, state, LOSSES)) == pytest.approx(float(want), rel=1e-6), name
    # Nothing is kept that the objective does not read.
    assert (state.base is not None) == (name in objectives.NEED_BASE)
    assert (state.reference is not None) == (name in objectives.NEED_REFERENCE)
    assert outer_objective.update(config, state, LOSSES) is state


def test_a_preference_multiplies_the_weights():
  config = make_config(preference=(0.25, 0.75))
  config.abilities.copying.weight = 2.0
  config_lib.check(config)
  np.testing.assert_allclose(task_lib.ability_weights(config), [0.5, 0.75])
  value = outer_objective.loss(config, outer_objective.init(config), LOSSES)
  assert float(value) == pytest.approx((0.5 * 1.0 + 0.75 * 2.5) / 1.25)


def test_group_dro_moves_its_weights_by_the_losses_of_the_step():
  config = make_config(name="group_dro", step_size=0.7)
  config_lib.check(config)
  state, q = outer_objective.init(config), np.full(2, 0.5)
  for losses in (LOSSES, LOSSES[::-1], LOSSES * 2):
    q = q * np.exp(0.7 * np.asarray(losses))
    q = q / q.sum()
    value, grad = jax.value_and_grad(lambda x, state=state: outer_objective.loss(config, state, x))(losses)
    assert float(value) == pytest.approx(float(q @ np.asarray(losses)), rel=1e-5)
    np.testing.assert_allclose(grad, q, rtol=1e-5)  # of the losses only, not of the weights
    state = outer_objective.update(config, state, losses)
    np.testing.assert_allclose(list(outer_objective.readable(config, state)["group_dro_weight"].values()), q, rtol=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_the_price_of_an_ability_rises_while_it_is_worse_than_allowed(penalty):
  config = make_config(name="retention", tolerance=0.1, step_size=0.5, penalty=penalty)
  config.abilities.reversal.weight = 0.0  # only kept
  config_lib.check(config)
  state = outer_objective.init(config, BASE)
  prices = []
  for kept in (2.6, 2.6, 2.3, 2.1, 1.9, 1.5, 1.0):  # allowed: 2.1
    state = outer_objective.update(config, state, jnp.array([0.5, kept]))
    prices.append(float(state.multipliers[1]))
    assert float(state.multipliers[0]) == 0.0
  np.testing.assert_allclose(prices, [0.25, 0.5, 0.6, 0.6, 0.5, 0.2, 0.0], atol=1e-6)
  state = state.replace(multipliers=jnp.array([0.0, 0.4]))
  grad = jax.grad(lambda x: outer_objective.loss(config, state, x))(jnp.array([0.5, 2.6]))
  np.testing.assert_allclose(grad, [1.0, 0.4 + penalty * 0.5], rtol=1e-5)


def test_famo_weighs_by_its_shares_over_the_losses():
  config = make_config(balancing="famo", step_size=0.3)
  config_lib.check(config)
  state = outer_objective.init(config)
  grad = jax.grad(lambda x: outer_objective.loss(config, state, x))(LOSSES)
  np.testing.assert_allclose(grad, np.array([1.0, 0.4]) / 1.4, rtol=1e-5)
  after = outer_objective.update(config, state, LOSSES, jnp.array([0.9, 2.5]))
  assert float(after.famo.logits[1]) > 0 > float(after.famo.logits[0])  # more share for the one that fell less


def test_the_base_losses_are_those_of_the_outer_loss_over_all_held_out_rows():
  config = with_references(make_config(name="normalised"), 0.5, 1.5)
  config.evaluate.num_rows = 3
  network, tokenizer = task_lib.build_network(config)
  held_out = task_lib.ability_rows(config, tokenizer)
  state = outer_objective.start(config, network, held_out)
  np.testing.assert_allclose(state.reference, [0.5, 1.5])
  for ability, rows in enumerate(held_out):
    (batch, *_) = mixture.batches(rows, 3, source=0)
    losses, counts = sft.row_losses(network.apply(network.frozen, network.params, network.memory, batch), batch)
    assert np.all(np.asarray(counts) > 0)
    assert float(state.base[ability]) == pytest.approx(float(losses.mean()), rel=1e-5)


def test_references_of_an_evaluation_are_its_lowest_losses_and_numbers_go_first(tmp_path):
  path = tmp_path / "evaluation.json"
  rows = [{"loss": {"copying": 2.0, "reversal": 1.5}}, {"loss": {"copying": 0.5, "reversal": 1.75, "other": 9.0}}]
  path.write_text(json.dumps({"rows": rows}))
  config = make_config(name="excess", reference=str(path))
  config_lib.check(config)
  np.testing.assert_allclose(outer_objective.read_reference(config), [0.5, 1.5])
  config.abilities.reversal.reference = 1.0
  np.testing.assert_allclose(outer_objective.read_reference(config), [0.5, 1.0])
  config.abilities = ml_collections.ConfigDict({"copyin": {"suite": "copying"}})
  with pytest.raises(errors.InputError, match="Did you mean 'copying'"):
    outer_objective.read_reference(config)
  for text in (
    "[]",
    "{",
    '{"rows": [{"loss": {"copying": null}}]}',
    '{"rows": [{"loss": {"copying": NaN}}]}',
    '{"rows": [{"loss": 3}]}',
  ):
    path.write_text(text)
    with pytest.raises(errors.InputError, match=r"evaluation.json' is not an evaluation.json"):
      outer_objective.read_reference(config)
  config.objective.reference = str(tmp_path / "no.json")
  with pytest.raises(errors.InputError, match=r"no.json' cannot be read: No such file"):
    outer_objective.read_reference(config)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"name": "wrost"}, "one of mean, worst, cvar"),
    ({"name": "worst", "temperature": 0.0}, "temperature = 0.0 is out of its range: above 0"),
    ({"name": "cvar", "fraction": 1.5}, "fraction = 1.5 is out of its range"),
    ({"name": "retention", "tolerance": -0.1}, "tolerance = -0.1 is out of its range"),
    ({"temperature": 1.0}, "temperature has no meaning for config.objective.name = 'mean'"),
    ({"name": "worst", "fraction": 0.25}, "fraction has no meaning for config.objective.name = 'worst'"),
    ({"name": "group_dro", "tolerance": 0.5}, "tolerance has no meaning"),
    ({"name": "retention", "floor": 0.5}, "floor has no meaning"),
    ({"balancing": "mgda", "step_size": 0.5}, "step_size has no meaning .* 'mean' with .*balancing = 'mgda'"),
    ({"balancing": "pcgard"}, "one of none, mgda, pcgrad, famo"),
    ({"name": "worst", "balancing": "mgda"}, "leaves no place for config.objective.name = 'worst'"),
    ({"preference": (0.5, 0.6)}, r"config.objective.preference: .*has the sum 1.1"),
    ({"preference": (0.5, 0.25, 0.25)}, r"has the shape \(3,\); a preference is 2 finite"),
    ({"preference": (1.5, -0.5)}, "-0.5 at place 1"),
    ({"preference": (0.5, 0.5), "name": "worst"}, "preference has no meaning for config.objective.name = 'worst'"),
    ({"preference": (0.5, 0.5), "balancing": "mgda"}, "preference has no meaning for config.objective.balancing"),
    ({"name": "excess"}, "set config.abilities.copying.reference, a loss in nats, or config.objective.reference"),
    ({"reference": "evaluation.json"}, "reference has no meaning for config.objective.name = 'mean'"),
  ],
)
def test_what_is_refused(fields, message):
  with pytest.raises(errors.InputError, match=message):
    config_lib.check(make_config(**fields))


def test_references_and_weights_that_are_refused():
  with pytest.raises(errors.InputError, match=r"abilities.copying.reference has no meaning for .* 'mean'"):
    config_lib.check(with_references(make_config(), 0.5, 0.5))
  for value in (float("nan"), "low", True):
    with pytest.raises(errors.InputError, match=r"reversal.reference = .* must be a finite loss"):
      config_lib.check(with_references(make_config(name="excess"), 0.5, value))
  config = make_config(name="excess")
  config.abilities.copying.reference = 0.5
  with pytest.raises(errors.InputError, match=r"set config.abilities.reversal.reference"):
    config_lib.check(config)
  config.abilities.reversal.weight = 0.0  # then it needs none
  config_lib.check(config)
  config = make_config(preference=(1.0, 0.0))
  config.abilities.copying.weight = 0.0
  with pytest.raises(errors.InputError, match="leaves no ability"):
    config_lib.check(config)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("objective.name", "group_dro"),
    ("objective.balancing", "mgda"),
    ("objective.preference", (0.5, 0.5)),
    ("objective.reference", "evaluation.json"),
    ("mixture.knots", 3),
  ],
)
def test_what_needs_the_direct_learner(field, value):
  config = make_config()
  config.learner.kind = "meta"
  config.update_from_flattened_dict({field: value})
  with pytest.raises(errors.InputError, match=f"config.{field} = .* needs config.learner.kind = 'direct'"):
    config_lib.check(config)
