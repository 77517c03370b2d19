"""Where arrays lie, what is computed where, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from flax import nnx
from jax.sharding import PartitionSpec

from configs import compare as compare_config
from mftjax import models, parallel, recipe
from mftjax.errors import InputError
from mftjax.loops import finetune, predict
from mftjax.loops import task as task_lib


def config_of(variant="", **fields):
  config = tiny_config.get_config(variant)
  config.batch_size, config.meta.ability_rows = 8, 4
  config.model.num_heads = 4
  config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
  return config


def specs(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {"/".join(models.lora.names_of(path)).removesuffix("/value"): leaf.sharding.spec for path, leaf in leaves}


def test_parameters_lie_by_their_names():
  network, _ = task_lib.build_network(config_of("memory", parallel__fsdp=2, parallel__tensor=2, parallel__data=2))
  both = ("tensor", "fsdp")
  want = {
    "embedding": ("tensor", "fsdp"),
    "final_norm": ("fsdp",),
    "layers/q_proj": (None, "fsdp", "tensor"),
    "layers/o_proj": (None, "tensor", "fsdp"),
    "layers/down_proj": (None, "tensor", "fsdp"),
    "layers/mlp_norm": (None, "fsdp"),
  }
  found = specs(network.frozen)
  assert {name: tuple(found[name]) for name in want} == want
  found = specs(network.params)
  assert tuple(found["layers/q_proj_lora_a"]) == (None, "fsdp", None)
  assert tuple(found["layers/q_proj_lora_b"]) == (None, None, both)
  assert tuple(found["layers/o_proj_lora_a"]) == (None, both, None)
  found = specs(network.memory)
  assert tuple(found["memory/values"]) == (None, both) and not any(found["memory/keys"])


def test_a_memory_reads_the_same_on_eight_devices_that_each_hold_a_part_of_its_values():
  layout = parallel.build(config_of(parallel__fsdp=4, parallel__tensor=2))
  hidden = jax.random.normal(jax.random.key(0), (6, 16))
  for options in ({}, {"top_k": 3}, {"top_k": 3, "product_keys": True}):
    memory = models.Memory(9, 16, 4, 2, **options, rngs=nnx.Rngs(0))
    memory.values[...] = jax.random.normal(jax.random.key(1), (9, 16))
    graphdef, state = nnx.split(memory)
    apply = jax.jit(lambda state, graphdef=graphdef: nnx.merge(graphdef, state)(hidden))
    placed = layout.place(state)
    assert {shard.data.shape for shard in placed["values"][...].addressable_shards} == {(9, 2)}
    np.testing.assert_allclose(apply(placed), apply(state), atol=1e-6)


def test_tasks_are_computed_on_all_groups_and_found_on_the_first_device():
  layout = parallel.build(compare_config.get_config("tiny"))
  shared, x = {"w": jnp.arange(3.0)}, jnp.arange(15.0).reshape(5, 3)  # 5 tasks do not divide by 8
  where = lambda shared, x: (jax.lax.axis_index("task"), shared["w"] @ x)
  group, product = layout.over_tasks(where)(layout.share(shared), x)
  assert group.tolist() == [0, 1, 2, 3, 4] and group.devices() == {jax.devices()[0]}
  np.testing.assert_array_equal(product, x @ shared["w"])


def test_a_vocabulary_that_does_not_divide_is_whole():
  found = specs(parallel.build(config_of(parallel__tensor=4, parallel__fsdp=2)).place({"embedding": jnp.ones((9, 8))}))
  assert tuple(found["embedding"]) == (None, "fsdp")


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"parallel__data": 3}, "does not divide over config.parallel.data = 3 x fsdp = 1.*one of 1, 2, 4, 8"),
    ({"parallel__data": 9}, "does not fit 8 devices.*is 9; take one of 1, 2, 4, 8"),
    ({"parallel__data": 3, "parallel__fsdp": 0}, "does not fit 8 devices"),
    ({"parallel__data": 0, "parallel__fsdp": 0}, "data and fsdp are 0"),
    ({"parallel__data": 2, "parallel__strategy": "pmap"}, "maps tasks only"),
    ({"parallel__task": 2}, "has one task"),
    ({"parallel__data": 8, "batch_size": 12}, "micro_batches = 12 does not divide.*one of 1, 2, 3, 4, 6, 12"),
    ({"parallel__fsdp": 4, "micro_batches": 4}, "micro_batches = 2 does not divide.*one of 1, 2"),
    ({"parallel__fsdp": 8, "meta__ability_rows": 2}, "abilities.*= 4 does not divide.*one of 1, 2, 4"),
    (
      {"parallel__tensor": 8},
      "num_heads = 4 does not divide over config.parallel.tensor = 8; it may be one of 1, 2, 4",
    ),
    (
      {"parallel__fsdp": 3, "batch_size": 6, "meta__ability_rows": 3},
      "The width 16 of .*; it may be one of 1, 2, 4, 8",
    ),
  ],
)
def test_what_does_not_divide_is_refused_with_the_numbers_that_would(fields, words):
  with pytest.raises(InputError, match=words):
    task_lib.build_network(config_of(**fields))


def test_devices_that_are_left_idle_are_named(caplog):
  assert parallel.build(config_of(parallel__data=2)).mesh.size == 2
  assert "2 of 8 devices are used" in caplog.text
  assert parallel.build(config_of(parallel__data=2, parallel__fsdp=0)).mesh.shape["fsdp"] == 4


def test_on_one_device_nothing_is_put_anywhere():
  layout, tree = parallel.single(), {"q_proj": jnp.ones((2, 3))}
  assert layout.place(tree) is tree and layout.pin(tree) is tree and layout.place_rows(tree) is tree
  assert PartitionSpec("task") and layout.over_tasks(lambda s, x: s * x)(2.0, jnp.arange(3.0)).tolist() == [0, 2, 4]


def test_a_recipe_s_batch_that_does_not_divide_is_refused(tmp_path):
  config = config_of(parallel__data=4)
  found = predict.default_recipe(config)
  found["hyperparameters"]["batch_size"] = 6.0
  recipe.save(found, tmp_path / "six.json")
  with pytest.raises(InputError, match=r"The recipe's batch_size / micro_batches = 6 does not divide.*1, 2, 3, 6"):
    finetune.finetune(config, tmp_path / "run", str(tmp_path / "six.json"))
  assert not (tmp_path / "run").exists()
