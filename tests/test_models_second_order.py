"""Hessian-vector products of the model's parts, each apart, against plain formulas and differences in f64."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mftjax import models
from mftjax.models import MemoryParam, attention, layers, lora

TOKENS, SEGMENTS = (
  np.array([[3, 1, 4, 1, 5, 2], [2, 7, 1, 0, 2, 2]]),
  np.array([[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 0, 0]]),
)
CONFIG = models.DecoderConfig(
  family="llama",
  vocab_size=8,
  hidden_size=8,
  intermediate_size=12,
  num_layers=1,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  tie_embeddings=True,
  dtype=jnp.float64,
)


@pytest.fixture(autouse=True)
def in_f64():
  with jax.enable_x64(True):
    yield


def draw(*shapes, seed=0):
  rng = np.random.default_rng(seed)
  return tuple(jnp.asarray(rng.normal(size=shape)) for shape in shapes)


def like(tree, seed=1):
  """A direction: normal numbers of the same shapes."""
  leaves, treedef = jax.tree.flatten(tree)
  return treedef.unflatten(draw(*[x.shape for x in leaves], seed=seed))


compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(compiled, static_argnums=0)
def product(loss, params, direction):
  """Forward over reverse, as meta-gradients take it."""
  return jax.jvp(jax.grad(loss), (params,), (direction,))[1]


def dense_product(loss, params, direction):
  """The same by the whole Hessian, reverse over reverse."""
  flat, unravel = jax.flatten_util.ravel_pytree(params)
  hessian = compiled(jax.jacrev(jax.grad(lambda flat: loss(unravel(flat)))))(flat)
  np.testing.assert_allclose(hessian, hessian.T, atol=1e-10 * np.abs(hessian).max())
  return unravel(hessian @ jax.flatten_util.ravel_pytree(direction)[0])


def assert_close(got, want, tolerance=1e-10):
  """Leaf by leaf, so that a small one does not hide; none of them is zero."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(want):
    found = dict(jax.tree_util.tree_leaves_with_path(got))[path]
    assert found.dtype == jnp.float64 and np.linalg.norm(leaf) > 1e-6, jax.tree_util.keystr(path)
    assert np.linalg.norm(found - leaf) < tolerance * np.linalg.norm(leaf), jax.tree_util.keystr(path)


def assert_equals_differences(loss, params, step=1e-5):
  """The gradient against differences of the loss, and the product against those of the gradient; returns both."""
  direction = like(params)
  at = compiled(lambda scale: jax.value_and_grad(loss)(jax.tree.map(lambda p, d: p + scale * d, params, direction)))
  (_, gradient), ahead, behind = at(0.0), at(step), at(-step)
  slope, differences = jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)
  along = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
  np.testing.assert_allclose(along, slope, rtol=1e-6, atol=1e-9)
  found = product(loss, params, direction)
  assert_close(found, differences, 1e-6)
  return gradient, found


def plain_attention(q, k, v, segments):
  """The formula, one query at a time."""
  batch, length, num_heads, head_dim = q.shape
  rows = []
  for b in range(batch):
    for t in range(length):
      seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
      for h in range(num_heads):
        kv = h // (num_heads // k.shape[2])
        weights = jax.nn.softmax(jnp.stack([q[b, t, h] @ k[b, s, kv] for s in seen]) / jnp.sqrt(head_dim))
        rows.append(sum(w * v[b, s, kv] for w, s in zip(weights, seen, strict=True)))
  return jnp.stack(rows).reshape(batch, length, num_heads * head_dim)


@pytest.fixture(scope="module")
def plain_attention_product():
  """(inputs, direction, target, product) of sum(target * attention^2) by the formula's dense Hessian."""
  with jax.enable_x64(True):
    inputs = draw((1, 4, 2, 2), (1, 4, 1, 2), (1, 4, 1, 2))
    (target,) = draw((1, 4, 4), seed=2)
    direction = like(inputs)
    loss = lambda inputs: jnp.sum(target * plain_attention(*inputs, np.array([[1, 1, 2, 2]])) ** 2)
    return inputs, direction, target, dense_product(loss, inputs, direction)


@pytest.mark.parametrize(
  "attend",
  [
    attention.full_attention,
    attention.blockwise_attention,
    functools.partial(attention.blockwise_attention, block=3),
    functools.partial(attention.blockwise_attention, block=1),
  ],
  ids=["full", "one block", "blocks of 2", "blocks of 1"],
)
def test_attention(attend, plain_attention_product):
  inputs, direction, target, want = plain_attention_product
  loss = lambda inputs: jnp.sum(target * attend(*inputs, jnp.array([[1, 1, 2, 2]])) ** 2)
  assert_close(product(loss, inputs, direction), want)


def test_rms_norm():
  """Through hidden states and scale; one row is nearly zero, where eps is all that holds the root up."""
  hidden, scale, target = draw((3, 5), (5,), (3, 5))
  hidden = hidden.at[1].mul(1e-3)
  plain = lambda h, s: s * h / jnp.sqrt(jnp.sum(h**2, axis=1, keepdims=True) / 5 + 1e-5)
  loss = lambda norm: lambda inputs: jnp.sum(target * norm(*inputs) ** 2)
  direction = like((hidden, scale))
  got = product(loss(lambda h, s: layers.rms_norm(h, s, 1e-5)), (hidden, scale), direction)
  assert_close(got, dense_product(loss(plain), (hidden, scale), direction))


def test_gated_mlp():
  """A layer whose attention gives nothing is hidden + (silu(n gate) * (n up)) down with n = rms_norm(hidden)."""
  rng = nnx.Rngs(0)
  arrays = {name: x[0].astype(jnp.float64) for name, x in layers.Layers(CONFIG, rngs=rng).arrays().items()}
  names = ("mlp_norm", "gate_proj", "up_proj", "down_proj")
  params = {name: arrays[name] * (1 if name == "mlp_norm" else 20) for name in names}
  hidden, target = draw((1, 3, 8), (1, 3, 8))
  rope = layers.rope_tables(jnp.arange(3)[None], 4, 1e4)

  def loss(params):
    nothing = lambda q, k, v: jnp.zeros((1, 3, 8))
    out, _ = layers.layer(arrays | params, hidden, rope, nothing, CONFIG, 0.0)
    return jnp.sum(target * out**2)

  def plain(params):
    normed = params["mlp_norm"] * hidden / jnp.sqrt(jnp.mean(hidden**2, axis=-1, keepdims=True) + CONFIG.norm_eps)
    gate = normed @ params["gate_proj"]
    gated = gate / (1 + jnp.exp(-gate)) * (normed @ params["up_proj"])
    return jnp.sum(target * (hidden + gated @ params["down_proj"]) ** 2)

  direction = like(params)
  assert_close(product(loss, params, direction), dense_product(plain, params, direction))


def model_loss(model, *filters):
  """(params -> scalar, params): the loss of the model in the parameters of a type, the others fixed."""
  graphdef, params, rest = nnx.split(model, *filters, ...)
  params, rest = jax.tree.map(lambda x: x.astype(jnp.float64), (params, rest))
  (target,) = draw((*TOKENS.shape, CONFIG.vocab_size), seed=3)
  visible = jnp.asarray(SEGMENTS > 0)[..., None]

  def loss(params):
    logits = nnx.merge(graphdef, params, rest)(TOKENS, SEGMENTS)
    return jnp.mean(jnp.where(visible, target * jax.nn.log_softmax(logits), 0))

  return loss, params


def wide_decoder(**changes):
  """A decoder whose weights, but for those of the norms, are large enough for every part to count."""
  model = models.Decoder(models.DecoderConfig(**{**vars(CONFIG), **changes}), rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(model)
  return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.where(x == 1, 1, 15 * x), params))


@pytest.mark.parametrize("word", ["full", "blockwise"])
def test_a_whole_decoder(word):
  assert_equals_differences(*model_loss(wide_decoder(attention=word), nnx.Param))


def test_tied_embeddings_count_in_both_places():
  """With E in and E^T out, the product along u is that of an untied model along (u, u^T), its two parts added."""
  tied, untied = wide_decoder(), wide_decoder(tie_embeddings=False)
  embedding = tied.embedding[...]
  untied.head = nnx.Param(embedding.T)
  untied.embedding = nnx.Param(embedding)
  is_table = lambda path, _: path[-1] in ("embedding", "head")
  (tied_loss, table), (untied_loss, tables) = (model_loss(model, is_table) for model in (tied, untied))
  (u,) = draw(embedding.shape, seed=5)
  set_all = lambda params, values: jax.tree.unflatten(jax.tree.structure(params), values)
  got = jax.tree.leaves(product(tied_loss, table, set_all(table, [u])))[0]
  by_embedding, by_head = jax.tree.leaves(product(untied_loss, tables, set_all(tables, [u, u.T])))
  assert np.linalg.norm(by_head) > 0.01 * np.linalg.norm(by_embedding) > 0
  assert_close(got, by_embedding + by_head.T)
  assert_equals_differences(tied_loss, table)


def test_adapters_at_their_zero_start():
  """B = 0: A has no gradient yet, but its product has, along B."""
  model = wide_decoder()
  lora.add(model, 2, 4.0, lora.TARGETS, rngs=nnx.Rngs(1))
  loss, params = model_loss(model, lora.LoRAParam)
  gradient, found = assert_equals_differences(loss, params)
  for name in lora.TARGETS:
    np.testing.assert_array_equal(gradient["layers"][f"{name}_lora_a"][...], 0)
    assert np.abs(found["layers"][f"{name}_lora_a"][...]).max() > 1e-6, name


MEMORIES = {"dense": {}, "top-k": {"top_k": 3}, "product keys": {"top_k": 3, "product_keys": True}}


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "filled"])
@pytest.mark.parametrize("kind", MEMORIES)
def test_reads_of_the_memory(kind, fresh):
  """Fresh, its values are 0: keys and queries have no gradient yet, but their products have, along the values."""
  memory = models.Memory(9, 8, 4, 2, rngs=nnx.Rngs(0), **MEMORIES[kind])
  if not fresh:
    memory.values = MemoryParam(like(memory.values[...]))
  graphdef, params = nnx.split(memory)
  params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
  hidden, target = draw((5, 8), (5, 8))
  loss = lambda inputs: jnp.sum(target * nnx.merge(graphdef, inputs[0])(inputs[1]) ** 2)
  (gradient, _), (found, _) = assert_equals_differences(loss, (params, hidden), 1e-6)
  for name in ("keys", "query"):
    assert (np.abs(gradient[name][...]).max() == 0) == fresh, name
    assert np.abs(found[name][...]).max() > 1e-3, name


def test_a_memory_within_the_decoder_starts_with_products_of_its_keys():
  model = wide_decoder()
  model.attach_memory(models.Memory(4, 8, 4, 2, rngs=nnx.Rngs(2)), (0,))
  loss, params = model_loss(model, MemoryParam)
  gradient, found = assert_equals_differences(loss, params)
  np.testing.assert_array_equal(gradient["memory"]["keys"][...], 0)
  assert np.abs(found["memory"]["keys"][...]).max() > 1e-5
