"""The measuring parts of the benchmarks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import collectives, peer_models, peers, xla_cost


def test_flops_of_a_dot_in_a_scan_in_a_scan():
  weight = jnp.ones((8, 8))

  def fn(x):
    inner = lambda x, _: (jnp.tanh(x @ weight), None)
    outer = lambda x, _: (jax.lax.scan(inner, x, length=3)[0], None)
    return jax.lax.scan(outer, x, length=5)[0]

  found = xla_cost.cost(jax.jit(fn).lower(jnp.ones((4, 8))))
  assert found["matmul_flops"] == 5 * 3 * 2 * 4 * 8 * 8
  # Besides: one tanh per element, and the loops' counters.
  assert 5 * 3 * 4 * 8 <= found["flops"] - found["matmul_flops"] <= 5 * 3 * (4 * 8 + 4)
  assert found["uncounted"] == []


def test_flops_of_batched_contractions_and_convolutions():
  def contract(x, y):
    return jnp.einsum("blhd,bmhd->bhlm", x, y)

  x, y = jnp.ones((2, 5, 3, 7)), jnp.ones((2, 11, 3, 7))
  assert xla_cost.cost(jax.jit(contract).lower(x, y))["matmul_flops"] == 2 * 2 * 3 * 5 * 11 * 7
  image, kernel = jnp.ones((2, 9, 9, 3)), jnp.ones((3, 3, 3, 4))
  convolve = lambda x, k: jax.lax.conv_general_dilated(
    x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  found = xla_cost.cost(jax.jit(convolve).lower(image, kernel))
  assert found["matmul_flops"] == 2 * (2 * 7 * 7 * 4) * (3 * 3 * 3)


def test_a_conditional_counts_its_dearest_branch():
  def fn(flag, x):
    return jax.lax.cond(flag, lambda x: x @ x @ x, lambda x: x @ x, x)

  found = xla_cost.cost(jax.jit(fn).lower(True, jnp.ones((16, 16))))
  assert found["matmul_flops"] == 2 * 2 * 16**3


def test_flops_agree_with_cost_analysis_where_there_is_no_loop():
  def loss(params, x):
    for weight in params:
      x = jax.nn.gelu(x @ weight)
    return jnp.sum(jax.nn.log_softmax(x) ** 2)

  compiled = jax.jit(jax.grad(loss)).lower([jnp.ones((32, 32))] * 3, jnp.ones((64, 32))).compile()
  analysis = compiled.cost_analysis()
  assert xla_cost.cost(compiled)["flops"] == pytest.approx(analysis["flops"] + analysis["transcendentals"], rel=0.03)


def test_a_loop_of_unknown_length_raises():
  def fn(x):
    return jax.lax.while_loop(lambda x: jnp.sum(x) < 100.0, lambda x: x @ x, x)

  with pytest.raises(ValueError, match="no known trip count"):
    xla_cost.cost(jax.jit(fn).lower(jnp.ones((4, 4))))


def test_library_calls():
  hlo = """HloModule m

ENTRY %main (a: f32[4,8], b: f32[8,16]) -> f32[4,16] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,16]{1,0} parameter(1)
  %gemm = (f32[4,16]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="TARGET", backend_config={"x":CONFIG}
  ROOT %c = f32[4,16]{1,0} get-tuple-element(%gemm), index=0
}
"""
  config = '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}'
  count = lambda target: xla_cost.count_flops(hlo.replace("TARGET", target).replace("CONFIG", config))
  assert count("__cublas$gemm") == {"flops": 1024, "matmul_flops": 1024, "uncounted": []}
  assert count("Sharding") == {"flops": 0, "matmul_flops": 0, "uncounted": ["Sharding"]}
  with pytest.raises(ValueError, match="looks like a matmul"):
    count("some_dot_kernel")


@pytest.mark.parametrize(
  ("groups", "size"),
  [
    ("{{0,1},{2,3},{4,5}}", 2),
    ("{{0,1,2,3,4,5}}", 6),
    ("{}", 6),
    ("[2,3]<=[6]", 3),
    ("[3,2]<=[2,3]T(1,0)", 2),
    ("mesh['x'=2,'y'=3] {'y'}", 3),
    ("mesh['x'=2,'y'=3] {'x','y'}", 6),
    ("mesh['x'=6] {'x':(3)2}", 2),
  ],
)
def test_groups_of_collectives(groups, size):
  attributes = f", channel_id=1, replica_groups={groups}, use_global_device_ids=true, to_apply=%add"
  assert collectives.group_size(attributes, 6) == size


@pytest.mark.parametrize("groups", ["{{0,1},{2}}", "of_another_kind"])
def test_groups_that_are_not_understood_raise(groups):
  with pytest.raises(ValueError, match="not understood"):
    collectives.group_size(f", replica_groups={groups}, to_apply=%add", 3)


def test_collectives_that_start_and_end_count_once():
  hlo = """HloModule m, is_scheduled=true, num_partitions=4

%call (x: f32[8]) -> f32[2] {
  %x = f32[8]{0} parameter(0)
  ROOT %scatter = f32[2]{0} reduce-scatter(%x), replica_groups={}, dimensions={0}, to_apply=%add
}

ENTRY %main (a: f32[8]) -> f32[32] {
  %a = f32[8]{0} parameter(0)
  %start = (f32[8]{0}, f32[32]{0}) all-gather-start(%a), replica_groups=[1,4]<=[4], dimensions={0}
  %done = f32[32]{0} all-gather-done(%start)
  %send = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}
  %sent = f32[8]{0} collective-permute-done(%send)
  %async = ((f32[8]{0}), f32[2]{0}) async-start(%a), calls=%call
  %awaited = f32[2]{0} async-done(%async), calls=%call
  ROOT %copy = f32[32]{0} copy(%done)
}
"""
  want = {"all-gather": 96, "reduce-scatter": 24, "collective-permute": 32, "total": 152}
  assert collectives.count_bytes_of(hlo) == want


@pytest.mark.parametrize("model", peer_models.MODELS)
def test_jax_and_torch_write_the_same_model(model):
  pytest.importorskip("torch")
  case = peer_models.make_case(model, 1, small=True)
  batch = {name: x[0] for name, x in case.inner.items()}
  ours = peer_models.jax_inner_loss(case)(case.params, case.meta_params, batch, None)
  params, batch = peer_models.torch_tensors(case.params), peer_models.torch_tensors(batch)
  logits = peer_models.torch_tensors({"logits": case.meta_params["mixture_logits"]})["logits"]
  assert float(peer_models.torch_inner_loss(case)(params, logits, batch)) == pytest.approx(float(ours), rel=1e-6)


def test_mixflow_gives_the_gradient_of_naive_reverse():
  case = peer_models.make_case("mlp", 3, small=True)
  arguments = (case.meta_params, case.params, case.inner, case.outer)
  flat = lambda build: np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.jit(build(case))(*arguments))])
  expected = flat(peers.naive_reverse)
  for side in ("mixflow", "mixflow, gradients saved", "mftjax mixed"):
    assert peers.relative_error(flat(peers.JAX_SIDES[side]), expected) < 1e-4


def test_a_peer_that_is_not_there_is_a_row(monkeypatch):
  def missing(case):
    import a_library_that_is_not_there  # noqa: F401

  monkeypatch.setitem(peers.TORCH_SIDES, "absent", (missing, "a-library-that-is-not-there"))
  row = peers.measure("absent", "mlp", 1, small=True)
  assert (row["seconds"], row["note"]) == (None, "not installed")
