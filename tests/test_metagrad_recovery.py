"""What is kept of an unroll: the choice by memory, the bytes that it counts, and the options that it refuses."""

import logging
import math

import jax
import pytest
from metagrad_problems import mlp, mlp_inputs

from mftjax import errors, metagrad
from mftjax.metagrad import problem as problem_lib
from mftjax.metagrad import products, recovery
from mftjax.metagrad.passes import backward, forward, split_floats

LENGTH = 8
PARAMS = (3 * 5 + 5 * 2) * 4  # bytes
ADAM = 3 * PARAMS + 4  # params, two moments, a counter
STORED = LENGTH * (ADAM + PARAMS)
CHECKPOINTED = 4 * ADAM + 2 * (ADAM + PARAMS)  # every two steps keeps the least
INVERTED = ADAM


def inputs(name="adam", length=LENGTH):
  """(meta_params, state, batches, keys)"""
  meta_params, params, inner, _ = mlp_inputs(length)
  state = metagrad.init(mlp(name), meta_params, params)
  return meta_params, state, inner, problem_lib.split_keys(jax.random.key(0), length)[0]


def choose(name="adam", product=products.exact, length=LENGTH, **options):
  return recovery.choose(mlp(name), product, recovery.Options(**options), *inputs(name, length))


def flops(plan, name="adam") -> float:
  """Products of matrices of the way there and back, with the steps of its loops counted."""
  meta_params, state, inner, keys = inputs(name)

  def there_and_back():
    after, _, residuals = forward(mlp(name), plan, meta_params, state, inner, keys)
    floats, _ = split_floats(after.opt_state)
    return backward(mlp(name), plan, meta_params, residuals, after.params, floats, inner, keys)

  def count(jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
      total += eqn.primitive.name == "dot_general"
      inner = [param for param in eqn.params.values() if hasattr(param, "eqns") or hasattr(param, "jaxpr")]
      total += eqn.params.get("length", 1) * sum(count(getattr(part, "jaxpr", part)) for part in inner)
    return total

  return count(jax.make_jaxpr(there_and_back)().jaxpr)


def test_less_memory_takes_the_next_plan_and_never_fewer_flops(caplog):
  activations = choose(save="activations")
  assert activations.bytes > STORED > CHECKPOINTED > INVERTED
  budgets = (activations.bytes, STORED, STORED - 1, CHECKPOINTED, CHECKPOINTED - 1, INVERTED)
  plans = [choose(memory_bytes=budget) for budget in budgets]
  assert [(plan.recovery, plan.save) for plan in plans] == [
    *[("store", "gradients")] * 2,
    *[("checkpoint", "gradients")] * 2,
    *[("invert", "nothing")] * 2,
  ]
  assert [plan.bytes for plan in plans] == [*[STORED] * 2, *[CHECKPOINTED] * 2, *[INVERTED] * 2]
  costs = [flops(plan) for plan in (activations, *plans)]
  assert costs == sorted(costs) and costs[0] < costs[1] < costs[3]
  assert not caplog.text


def test_nothing_that_fits_takes_the_least_and_says_so(caplog):
  with caplog.at_level(logging.WARNING, logger="absl"):
    assert choose(memory_bytes=INVERTED - 1).recovery == "invert"
    assert "Nothing fits the memory budget" in caplog.text
    # Without an inverse the checkpoints are what keeps the least.
    assert choose("amsgrad", memory_bytes=1).recovery == "checkpoint"


@pytest.mark.parametrize("product", [products.exact, products.finite_one_sided])
def test_without_a_budget_small_states_are_all_stored(product):
  plan = choose(product=product)
  assert (plan.recovery, plan.save) == ("store", "gradients")


@pytest.mark.parametrize("length", [1, 5, 8, 12, 49])
def test_checkpoints_stand_where_they_keep_the_least(length):
  """Against every distance; one that divides the unroll may keep a quarter more, and is preferred."""
  kept = lambda every: math.ceil(length / every) * ADAM + every * (ADAM + PARAMS)
  plan = choose(recovery="checkpoint", length=length)
  assert plan.bytes == kept(plan.every) <= 1.25 * min(map(kept, range(1, length + 1)))
  if any(length % every == 0 and kept(every) <= 1.25 * min(map(kept, range(1, length + 1))) for every in (2, 3, 4, 7)):
    assert length % plan.every == 0


@pytest.mark.parametrize(
  ("options", "every", "num_bytes"),
  [
    ({"recovery": "store", "save": "gradients"}, LENGTH, STORED),
    ({"recovery": "store", "save": "nothing"}, LENGTH, LENGTH * ADAM),
    ({"recovery": "checkpoint", "every": 3}, 3, 3 * ADAM + 3 * (ADAM + PARAMS)),
    ({"recovery": "checkpoint", "every": 99}, LENGTH, ADAM + LENGTH * (ADAM + PARAMS)),
    ({"recovery": "invert", "save": "nothing", "every": 3}, 3, 3 * ADAM),
    ({"recovery": "invert", "save": "gradients"}, LENGTH, ADAM + LENGTH * PARAMS),
  ],
  ids=str,
)
def test_named_plans_count_their_bytes(options, every, num_bytes):
  plan = choose(**options)
  assert (plan.recovery, plan.every, plan.bytes) == (options["recovery"], every, num_bytes)
  assert plan.saves_gradients == (options.get("save") != "nothing")


@pytest.mark.parametrize(
  "options",
  [
    {"recovery": "store", "save": "activations"},
    {"recovery": "store", "save": "gradients"},
    {"recovery": "store", "save": "nothing"},
    {"recovery": "invert", "save": "nothing", "every": 3},
  ],
  ids=str,
)
def test_the_bytes_are_those_of_the_residuals(options):
  """But for the state after the unroll, which the caller has anyway, and a few counters."""
  plan = choose(**options)
  _, _, residuals = jax.eval_shape(lambda: forward(mlp("adam"), plan, *inputs()))
  kept = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(residuals)) - ADAM - 4
  assert 0 <= kept - plan.bytes <= 2 * 4 * LENGTH


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"recovery": "invers"}, "recovery: 'invers'. Did you mean 'invert'"),
    ({"save": "gradient"}, "save: 'gradient'. Did you mean 'gradients'"),
    ({"every": 0}, "every must be a whole number >= 1, got 0"),
    ({"every": 2.0}, "every must be a whole number >= 1, got 2.0"),
    ({"memory_bytes": 0}, "memory_bytes must be a number of bytes above 0, got 0"),
    ({"memory_bytes": float("nan")}, "memory_bytes must be .* got nan"),
    ({"memory_bytes": "2G"}, "memory_bytes must be .* got '2G'"),
    ({"recovery": "checkpoint", "save": "activations"}, "'checkpoint' saves the gradients .* not save='activations'"),
    ({"recovery": "checkpoint", "save": "nothing"}, "'checkpoint' saves the gradients .* not save='nothing'"),
    ({"recovery": "invert", "save": "activations"}, "save='activations' goes with recovery='store', not 'invert'"),
  ],
  ids=str,
)
def test_bad_options_are_refused_when_the_step_is_built(options, message):
  for method in ("mixed", "first_order", "finite_difference"):
    with pytest.raises(errors.InputError, match=message):
      metagrad.value_and_grad(mlp("sgd"), method, **options)
  with pytest.raises(errors.InputError, match=message):
    metagrad.unroll(mlp("sgd"), **options)


def test_activations_are_of_exact_products_alone():
  with pytest.raises(errors.InputError, match="save='activations' goes with the exact product"):
    choose(product=products.finite_central, save="activations")


def test_offload_needs_memory_of_the_host(monkeypatch):
  class Device:
    def addressable_memories(self):
      return []

  monkeypatch.setattr(jax, "devices", lambda: [Device()])
  with pytest.raises(errors.InputError, match="pinned host memory"):
    metagrad.value_and_grad(mlp("sgd"), offload=True)
