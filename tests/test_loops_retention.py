"""Meta-training of a memory: its gradient against differences, its episode against plain runs, and resuming."""

import dataclasses
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mftjax import config as config_lib
from mftjax import metagrad, models, sft, tracking
from mftjax.baselines import continual as methods_lib
from mftjax.loops import answering, retention, sequence
from mftjax.loops import episode as episode_lib
from mftjax.loops import task as task_lib
from mftjax.models import lora
from tests.test_loops_sequence import tiny_setting


def test_a_restarting_optimizer_is_a_new_one_for_each_task():
  plain = lambda: optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda step: -0.1 / (step + 1.0)))
  ours = episode_lib.restarting(plain(), 3)
  params = theirs = {"w": jnp.asarray([1.0, -2.0])}
  state = ours.init(params)
  for step in range(8):
    if step % 3 == 0:
      fresh, fresh_state = plain(), plain().init(theirs)
    grads = {"w": jnp.asarray([0.3 * step + 0.1, -1.0])}
    updates, state = ours.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    updates, fresh_state = fresh.update(grads, fresh_state, theirs)
    theirs = optax.apply_updates(theirs, updates)
    np.testing.assert_array_equal(params["w"], theirs["w"])


def in_f64(tree):
  return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


@pytest.fixture(scope="module")
def config():
  config = tiny_setting().config.copy_and_resolve_references()
  config.checkpoint_every = 1
  return config


@pytest.fixture(scope="module", params=["sparse", "frozen", "new", "adapters", "replay"])
def exact(request, config):
  """An episode in f64 with a memory that holds something and is all open: `(setup, stream, meta_params, value)`.

  With a rule of writing into values, with a LoRA beside slots that are frozen, or with adapters, the last slots then
  being no task's; also with stored rows.
  """
  with jax.enable_x64(True):
    config = config.copy_and_resolve_references()
    config.model.dtype, config.meta.clip_norm, config.memory.num_slots = "float64", 1e9, 16
    config.memory.top_k, config.memory.key_dim = 3, 4
    config.memory.update(product_keys=False, qk_norm=True, null_cosine=0.5)
    config.continual.write_rule, config.continual.written_rows = request.param, 8
    if request.param == "replay":
      config.retention.stored_fraction = 0.15
    if request.param in ("adapters", "replay"):
      config.continual.write_rule = "new"
      config.memory.update(placement="adapters", context=True, num_slots=20, num_shared=4, null_cosine=0.0)
      config.memory.temperature = 0.3
    assert config.retention.tasks_per_episode == 2
    setting = tiny_setting()
    decoder, _ = task_lib.load_model(config)
    graphdef, params = nnx.split(decoder)
    background = in_f64(setting.background)
    own = dataclasses.replace(setting, config=config, base=(graphdef, in_f64(params)), background=background)
    setup = own.setup("memory", 16)
    setup = dataclasses.replace(setup, **{n: in_f64(getattr(setup, n)) for n in ("params", "held", "frozen")})
    training = setting.training
    stream = dataclasses.replace(training, **{n: in_f64(getattr(training, n)) for n in ("train", "test", "base")})
    meta_params = in_f64(retention.init_meta_params(config, setup))
    rng = np.random.default_rng(0)
    meta_params["memory"] = jax.tree.map_with_path(
      lambda path, x: jnp.asarray(rng.normal(size=x.shape)) if is_written(path) else x,
      meta_params["memory"],
    )
    episode = jax.jit(
      lambda meta_params: episode_lib.value_and_grad(
        config, setup, stream, meta_params, stream.order[1], jax.random.key(5)
      )
    )
    yield config, setup, stream, meta_params, episode, episode(meta_params)


def is_written(path):
  return "values" in lora.names_of(path) or lora.is_b(path)


def changed(meta_params, name, place, amount):
  add = lambda path, x: x.at[place].add(amount) if name in lora.names_of(path) else x
  return jax.tree.map_with_path(add, meta_params)


def leaf(tree, name):
  (found,) = [x for path, x in jax.tree.leaves_with_path(tree) if name in lora.names_of(path)]
  return found


NAMES = ("learning_rate", "keys", "query", "log_temperature")
OF_VALUES, OF_ADAPTERS = ("null_score", "values"), ("q_proj_lora_a", "down_proj_lora_b")


@pytest.mark.parametrize("name", [*NAMES, *OF_VALUES, *OF_ADAPTERS, "mixture_logits"])
def test_the_gradient_of_an_episode_is_its_slope(exact, name):
  config, _, _, meta_params, episode, (_, grad, _) = exact
  has_adapters = config.memory.placement == "adapters"
  others = OF_VALUES if has_adapters else OF_ADAPTERS
  if name in (others if config.retention.stored_fraction else (*others, "mixture_logits")):
    assert not any(name in lora.names_of(path) for path, _ in jax.tree.leaves_with_path(grad))
    return
  if name == "keys" and config.continual.write_rule == "new" and not has_adapters:
    assert not np.any(leaf(grad, name))  # they are where the tasks' queries are
    return
  with jax.enable_x64(True):
    own = np.asarray(leaf(grad, name))
    place = np.unravel_index(np.argmax(np.abs(own)), own.shape)
    step = 1e-6
    above, below = (episode(changed(meta_params, name, place, sign * step))[0] for sign in (1, -1))
    slope = float(above - below) / (2 * step)
  assert own.dtype == np.float64 and abs(slope) > 1e-6
  assert own[place] == pytest.approx(slope, rel=2e-4)


def weighted_loss(setup, weights, batch, row_weights):
  return (row_weights * sft.row_losses(setup.logits(weights, batch), batch)[0]).mean()


def test_an_episode_is_plain_runs_task_by_task_that_are_folded_in(exact):
  """The steps of `sequence`, with a new optimiser and a zero change for each task, on the episode's batches.

  What memories are read with is computed in each step; stored rows weigh by hand what the mixture says.
  """
  config, setup, stream, meta_params, _, (loss, _, metrics) = exact
  order, steps = stream.order[1], config.retention.steps_per_task
  is_new = config.continual.write_rule == "new"
  rule = config.continual.write_rule
  method = methods_lib.memory.method("all" if rule == "sparse" else rule)
  if is_new:  # each task opens a block of its own
    model = setup.merge((setup.params, setup.held))
    model.memory.open(config.continual.written_rows)
    setup = dataclasses.replace(
      setup,
      graphdef=nnx.graphdef(model),
      params=in_f64(nnx.state(model, models.MemoryWrite)),
      held=nnx.state(model, methods_lib.memory.HELD),
    )
  with jax.enable_x64(True):
    values = episode_lib.hyperparameters(config, meta_params)
    data_key, _ = jax.random.split(jax.random.key(5))
    shape, num_rows = (len(order) * steps, config.batch_size), stream.train["tokens"].shape[1]
    number = np.arange(len(order)).repeat(steps)
    of_row, row = number[:, None].repeat(config.batch_size, 1), jax.random.randint(data_key, shape, 0, num_rows)
    weights = np.ones(shape)
    if config.retention.stored_fraction:
      of_row, row = episode_lib._with_past(config.retention.stored_fraction, number, of_row, row, num_rows, data_key)
      is_past = of_row != number[:, None]
      assert is_past[:steps].sum() == 0 and (is_past[steps:].sum(axis=1) == config.batch_size // 2).all()
      assert row[is_past].max() < round(config.retention.stored_fraction * num_rows)
      share = float(values["replayed"])
      weights[steps:] = np.where(is_past[steps:], 2 * share, 2 * (1 - share))
    params, carry = setup.params, {"held": episode_lib.held(setup, meta_params["memory"])}
    problem = metagrad.Problem(
      lambda params, carry, batch, rng: weighted_loss(setup, (params, carry["held"]), *batch),
      None,
      lambda _: sft.optimizer(values, steps),
    )
    step_fn = jax.jit(lambda state, carry, batch: metagrad.inner_step(problem, carry, state, batch, None)[0])
    for number, pool in enumerate(order):
      task = methods_lib.Task(number, sequence.task_rows(stream, pool))
      params, carry = method.begin(setup, params, carry, task, values, None)
      state = metagrad.init(problem, None, params)
      for step in range(number * steps, (number + 1) * steps):
        pools = order[of_row[step]]
        batch = sequence.as_batch({name: found[pools, row[step]] for name, found in stream.train.items()})
        state = step_fn(state, carry, (batch, weights[step]))
      assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(state.params)) > 1e-3
      params, carry = method.end(setup, state.params, carry, None, values)
    losses = jax.jit(lambda rows: sft.row_losses(setup.logits((params, carry["held"]), rows), rows)[0].mean())
    by_task = [losses(sequence.as_batch({n: found[pool] for n, found in stream.test.items()})) for pool in order]
    base = losses(sequence.as_batch(stream.base))
  np.testing.assert_allclose(metrics["tasks"], by_task, rtol=1e-6)
  assert float(metrics["base"]) == pytest.approx(float(base), rel=1e-6)
  assert float(loss) == pytest.approx(float(np.mean(by_task) + config.retention.base_weight * base), rel=1e-6)


def test_an_episode_on_what_the_frozen_model_says_is_the_same(exact):
  config, setup, stream, meta_params, _, (loss, grad, metrics) = exact
  if config.continual.write_rule in ("sparse", "frozen"):
    assert not answering.is_possible(config, setup)
    return
  with jax.enable_x64(True):
    cut = answering.prepared(config, setup, stream)
    assert cut.train["states"].shape[:2] == stream.train["tokens"].shape[:2]
    is_shorter = cut.train["tokens"].shape[-1] < stream.train["tokens"].shape[-1]
    assert is_shorter == (config.memory.placement != "adapters")
    found = jax.jit(
      lambda meta_params: episode_lib.value_and_grad(config, setup, cut, meta_params, cut.order[1], jax.random.key(5))
    )(meta_params)
  assert float(found[0]) == pytest.approx(float(loss), rel=1e-9)
  chex.assert_trees_all_close(found[1], grad, rtol=1e-6, atol=1e-9)
  chex.assert_trees_all_close(found[2], metrics, rtol=1e-9)


def test_rows_are_cut_only_where_nothing_else_is_asked_of_them(config):
  config = config.copy_and_resolve_references()
  config.continual.write_rule, config.memory.layers = "all", (config.model.num_layers - 1,)
  of = lambda: dataclasses.replace(tiny_setting(), config=config).setup("memory", 16)
  assert answering.is_possible(config, of())
  config_lib.learned("prompt_loss_weight", config, 1e-3, 1.0, value=0.1)
  assert not answering.is_possible(config, of())


def test_what_is_written_does_not_decay_unless_the_config_learns_that(config):
  space_free = retention.init_meta_params(config, tiny_setting().setup("memory"))
  found = episode_lib.hyperparameters(config, space_free)
  assert found["weight_decay"] == 0.0
  assert float(found["learning_rate"]) == pytest.approx(5.0)


@pytest.fixture(scope="module")
def meta_trained(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("meta")
  setup = tiny_setting().setup("memory", config.retention.written_rows)
  return setup, workdir, retention.meta_train(config, setup, tiny_setting().training, workdir)


@pytest.mark.slow
def test_meta_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(config, meta_trained, tmp_path):
  setup, workdir, whole = meta_trained
  cut = tmp_path / "cut"
  shutil.copytree(workdir, cut)
  shutil.rmtree(cut / "retention" / "2")  # as it was after the first of two steps
  resumed = retention.meta_train(config, setup, tiny_setting().training, cut)
  for found, wanted in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(found, wanted)
  before, after = (tracking.read(path / "metrics.jsonl") for path in (workdir, cut))
  assert [line["step"] for line in after] == [1, 2]
  assert [line["loss"] for line in after] == [line["loss"] for line in before]


@pytest.mark.slow
def test_meta_training_moves_the_memory_and_the_hyperparameters(config, meta_trained):
  setup, _, found = meta_trained
  start = retention.init_meta_params(config, setup)
  assert float(jnp.abs(leaf(found, "values") - leaf(start, "values")).max()) > 1e-3
  assert float(jnp.abs(leaf(found, "learning_rate") - leaf(start, "learning_rate"))) > 1e-3


@pytest.mark.slow
def test_held_takes_the_memory_and_keeps_what_is_open(config, meta_trained):
  setup, _, found = meta_trained
  new = episode_lib.held(setup, found["memory"])
  np.testing.assert_array_equal(leaf(new, "values"), leaf(found["memory"], "values"))
  np.testing.assert_array_equal(leaf(new, "written"), leaf(setup.held, "written"))


def test_training_without_an_outer_loop_lowers_the_loss(config):
  setup, stream = tiny_setting().setup("memory"), tiny_setting().training
  found = retention.train_without(config, setup, stream, 3e-2)
  pools = np.unique(stream.order)
  rows = sequence.as_batch({name: values[pools].reshape(-1, values.shape[-1]) for name, values in stream.train.items()})
  loss = jax.jit(lambda held: methods_lib.sft_loss(setup, (setup.params, held), rows, {}))
  before, after = (float(loss(held)) for held in (setup.held, episode_lib.held(setup, found)))
  assert after < before - 0.05
  # Keys, too, are trained, as they are by the outer loop.
  assert float(jnp.abs(leaf(found, "keys") - leaf(setup.held, "keys")).max()) > 1e-3


def test_slots_that_fill_no_block_are_learnt_by_the_outer_loop_alone(config):
  """They have keys before any task, every task reads them, and no inner step writes them."""
  config = config.copy_and_resolve_references()
  config.continual.write_rule, config.continual.written_rows, config.meta.clip_norm = "new", 8, 1e9
  config.memory.update(num_slots=20, key_dim=4, top_k=20, product_keys=False)
  memory = models.Memory(20, 4, 4, 1, rngs=nnx.Rngs(0))
  assert config.retention.tasks_per_episode * 8 == 16 == methods_lib.memory.num_in_blocks(memory, 8)
  setting = dataclasses.replace(tiny_setting(), config=config)
  setup, stream = setting.setup("memory", 16), setting.training
  meta_params = retention.init_meta_params(config, setup)
  keys = leaf(meta_params["memory"], "keys")
  assert not np.any(keys[:, :16]) and np.all(np.any(keys[:, 16:], axis=-1))
  _, grad, _ = jax.jit(
    lambda meta_params: episode_lib.value_and_grad(
      config, setup, stream, meta_params, stream.order[0], jax.random.key(0)
    )
  )(meta_params)
  assert np.all(np.any(leaf(grad["memory"], "values")[16:], axis=-1))
  assert np.any(leaf(grad["memory"], "keys")[:, 16:])
  for number in range(3):
    assert not np.any(np.isin(methods_lib.memory.block(memory, 8, number), np.arange(16, 20)))
