"""An outer step on eight devices, split each way, against one device: the same numbers, an eighth of the arrays."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny_config

from benchmarks import collectives, decoder, devices
from mftjax import config as config_lib
from mftjax import metagrad
from mftjax.data import mixture
from mftjax.loops import curriculum, meta_train
from mftjax.loops import task as task_lib

AXES = ("data", "fsdp", "tensor")


def tiny(variant, **fields):
  config = tiny_config.get_config(variant)
  config.batch_size = 8
  config.budget_tokens = 12 * 8 * config.length
  config.meta.ability_rows = 4
  config.model.num_layers, config.model.num_heads = 2, 4
  config.update_from_flattened_dict(fields)
  config_lib.check(config)
  config.model.dtype = "float64"
  return config


def in_f64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64) if x.dtype == np.float32 else x, tree)


def outer_step(config):
  """The compiled step and its arguments on the config's devices, with parameters in f64."""
  network, tokenizer = task_lib.build_network(config)
  rows, held_out = task_lib.source_rows(config, tokenizer), task_lib.ability_rows(config, tokenizer)
  state, frozen, params = in_f64((meta_train.init_state(config, network), network.frozen, network.params))
  draw = mixture.Stream(rows, config.batch_size, 0)
  logits = state.meta_params["mixture_logits"]
  inner = curriculum.draw(config, draw, logits, 0, config.meta.unroll_length, 12)
  outer = mixture.Stream(held_out, 8, 1).next(np.full(2, 0.5))
  layout = network.layout
  placed = layout.place(frozen), layout.place(state), layout.place(params)
  args = *placed, False, layout.place_rows(inner, axis=1), layout.place_rows(outer), jax.random.key(0)
  return meta_train.build_outer_step(config, network).lower(*args).compile(), args


def fields_of(variant, method):
  found = {"meta.method": method}
  if variant == "lora":
    found["lora.rank"] = 2
  if method == "finite_difference":
    found["meta.central"] = True  # of one-sided ones rounding alone is 3e-5
  return found


CASES = [
  *[("full", "mixed", shape) for shape in ((8, 1, 1), (1, 8, 1), (2, 1, 4), (2, 2, 2))],
  *[("full", method, (2, 2, 2)) for method in metagrad.METHODS if method != "mixed"],
  *[("lora", method, (1, 4, 2)) for method in ("mixed", "reverse", "forward")],
  ("memory", "mixed", (2, 2, 2)),
]


@functools.cache
def on_one_device(variant, method):
  compiled, args = outer_step(tiny(variant, **fields_of(variant, method)))
  return jax.tree.map(np.asarray, compiled(*args))


@pytest.mark.parametrize(("variant", "method", "shape"), CASES)
def test_eight_devices_equal_one(variant, method, shape):
  split = {f"parallel.{axis}": size for axis, size in zip(AXES, shape, strict=True)}
  compiled, args = outer_step(tiny(variant, **fields_of(variant, method), **split))
  state, metrics = compiled(*args)
  want_state, want_metrics = on_one_device(variant, method)
  assert bool(want_metrics["is_finite"]) and float(want_metrics["grad_norm"]) > 0
  tolerance = 1e-5 if method == "finite_difference" else 1e-9  # in a difference rounding is a larger part
  pairs = zip(
    jax.tree_util.tree_leaves_with_path((want_state, want_metrics)), jax.tree.leaves((state, metrics)), strict=True
  )
  for (path, want), found in pairs:
    scale = max(np.abs(want).max(initial=0.0), 1e-12)
    np.testing.assert_allclose(
      np.asarray(found), want, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path)
    )


def test_eight_devices_hold_an_eighth_of_the_model_and_do_an_eighth_of_the_work():
  """Of the compiled program: arguments, temporaries and FLOPs of a device."""
  size = {"model.hidden_size": 128, "length": 16}
  one, all_eight = (outer_step(tiny("full", **size, **fields))[0] for fields in ({}, {"parallel.fsdp": 8}))
  memory = [
    (found.argument_size_in_bytes, found.temp_size_in_bytes)
    for found in (one.memory_analysis(), all_eight.memory_analysis())
  ]
  parts = [a / b for a, b in zip(*reversed(memory), strict=True)]
  flops = all_eight.cost_analysis()["flops"] / one.cost_analysis()["flops"]
  assert parts[0] < 1.05 / 8 and parts[1] < 0.25 and flops < 0.15, (parts, flops)


def test_a_step_gathers_what_it_must_and_keeps_nothing_that_is_gathered():
  """Of the compiled program: bytes of all gathers against the closed form, and what is stacked over the window."""
  shape = dataclasses.replace(decoder.decoder_config(2, 64), tie_embeddings=False, vocab_size=320)
  case = devices.Case(shape, rows=8, length=16, unroll_length=3)
  with jax.enable_x64(False):
    compiled = devices.split_step(case, 8)
  needed = devices.needed_bytes(case, 8)["gathers"]
  assert collectives.count_bytes(compiled)["all-gather"] == pytest.approx(needed, rel=0.01)
  text = compiled.as_text()
  assert "[3,320,8]" in text and "[3,320,64]" not in text  # embeddings of three steps
