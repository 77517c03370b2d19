"""Bytes that collectives move, of programs whose every collective is written by hand, on a mesh of 2 x 4 devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from benchmarks import collectives

ROWS, COLUMNS = 8, 32
BYTES = ROWS * COLUMNS * 4  # of what a device holds, in f32


def bytes_of(body):
  """Of a program in which each device holds `[ROWS, COLUMNS]`."""
  mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("a", "b"))
  whole = PartitionSpec(("a", "b"))
  mapped = jax.shard_map(body, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
  return collectives.count_bytes(jax.jit(mapped).lower(jax.ShapeDtypeStruct((8 * ROWS, COLUMNS), jnp.float32)))


CASES = {
  "all-gather": (lambda x, axes: jax.lax.all_gather(x, axes, tiled=True), lambda n: n - 1),
  "all-reduce": (lambda x, axes: jax.lax.psum(x, axes), lambda n: 2 * (n - 1) / n),
  "reduce-scatter": (lambda x, axes: jax.lax.psum_scatter(x, axes, tiled=True), lambda n: (n - 1) / n),
  "all-to-all": (lambda x, axes: jax.lax.all_to_all(x, axes, 0, 0, tiled=True), lambda n: (n - 1) / n),
}


@pytest.mark.parametrize(("axes", "size"), [("a", 2), ("b", 4), (("a", "b"), 8)])
@pytest.mark.parametrize("kind", CASES)
def test_one_collective(kind, axes, size):
  body, received = CASES[kind]
  found = bytes_of(lambda x: body(x, axes))
  assert found == {kind: received(size) * BYTES, "total": received(size) * BYTES}


def test_a_permutation_moves_the_whole_operand():
  shift = [(i, (i + 1) % 4) for i in range(4)]
  found = bytes_of(lambda x: jax.lax.ppermute(x, "b", shift))
  assert found == {"collective-permute": BYTES, "total": BYTES}


def test_a_loop_counts_as_often_as_it_turns_and_a_narrow_dtype_as_its_bytes():
  gather = lambda x: jax.lax.all_gather(x, "b", tiled=True).sum(axis=0)

  def body(x):
    inner = lambda x, _: (x + gather(x), None)
    outer = lambda x, _: (jax.lax.scan(inner, x, length=3)[0] + jax.lax.psum(x, "a"), None)
    return jax.lax.scan(outer, x, length=5)[0]

  found = bytes_of(body)
  assert found["all-gather"] == 5 * 3 * 3 * BYTES
  assert found["all-reduce"] == 5 * BYTES
  bits = bytes_of(lambda x: jax.lax.all_gather((x > 0).astype(jnp.int8), "b", tiled=True))
  assert bits["total"] == 3 * BYTES / 4


def test_what_sharding_asks_for_is_counted():
  """A product whose long axis is split over all devices: its result is summed, and nothing else moves."""
  mesh = Mesh(np.asarray(jax.devices()), ("a",))
  split = functools.partial(jax.sharding.NamedSharding, mesh)
  left = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=split(PartitionSpec(None, "a")))
  right = jax.ShapeDtypeStruct((64, 4), jnp.float32, sharding=split(PartitionSpec("a")))
  lowered = jax.jit(jnp.matmul, out_shardings=split(PartitionSpec())).lower(left, right)
  want = 2 * 7 / 8 * 16 * 4 * 4
  assert collectives.count_bytes(lowered) == {"all-reduce": want, "total": want}
