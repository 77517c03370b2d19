"""Generation: the cached loop against the plain decoder, and against transformers' own."""

import jax
import numpy as np
import pytest
from flax import nnx

from mftjax import models
from mftjax.errors import InputError
from mftjax.models import lora
from tests.test_models_decoder import make, tokens
from tests.test_models_lora import trained

PROMPTS = [tokens(1, 3), tokens(2, 17), tokens(3, 1)]


def slow_greedy(model, prompt, count):
  """The whole row again for each new token, without a cache."""
  row = np.zeros((1, 32), np.int32)  # later tokens are not seen, so zeros stand there
  row[0, : len(prompt)] = prompt
  apply = nnx.jit(lambda model, row: model(row))
  for end in range(len(prompt), len(prompt) + count):
    row[0, end] = np.argmax(apply(model, row)[0, end - 1])
  return row[0, len(prompt) : len(prompt) + count].tolist()


def with_memory():
  model = trained()
  memory = models.Memory(5, 32, 4, 2, rngs=nnx.Rngs(1))
  memory.values = models.MemoryParam(jax.random.normal(jax.random.key(0), (5, 32)))
  model.attach_memory(memory, [0, 1])
  return model


@pytest.mark.parametrize("build", [make, trained, with_memory], ids=["plain", "lora", "lora and memory"])
def test_cached_equals_uncached(build):
  model = build()
  out = models.generate(model, PROMPTS, 6, eos_id=None, pad_id=0)
  assert [list(row) for row in out] == [slow_greedy(model, prompt, 6) for prompt in PROMPTS]


def test_adapters_and_memory_matter():
  outs = [models.generate(b(), PROMPTS, 12, eos_id=None, pad_id=0) for b in (make, trained, with_memory)]
  assert len({tuple(np.concatenate(out).tolist()) for out in outs}) == 3


def test_stops_at_the_end_token_and_leaves_it_out():
  model = make()
  whole = models.generate(model, PROMPTS, 8, eos_id=None, pad_id=0)
  end = int(whole[1][4])
  stopped = models.generate(model, PROMPTS, 8, eos_id=end, pad_id=0)
  for row, full in zip(stopped, whole, strict=True):
    expected = list(full[: list(full).index(end)]) if end in full else list(full)
    assert list(row) == expected


def test_temperature_follows_the_softmax():
  model = make()
  prompt = tokens(1, 3)
  rows = models.generate(model, [prompt] * 2048, 1, eos_id=None, pad_id=0, temperature=0.05, rng=jax.random.key(0))
  counts = np.bincount([row[0] for row in rows], minlength=50) / 2048
  expected = np.asarray(jax.nn.softmax(model(prompt[None])[0, -1] / 0.05))
  assert np.abs(counts - expected).sum() < 0.25  # total variation of 2048 draws over 50 tokens
  uniform = np.full(50, 1 / 50)
  assert np.abs(expected - uniform).sum() > 0.5  # so that the line above tells them apart


def test_same_key_same_draw():
  draw = lambda seed: models.generate(
    make(), PROMPTS, 8, eos_id=None, pad_id=0, temperature=1.0, rng=jax.random.key(seed)
  )
  same = [np.array_equal(a, b) for a, b in zip(draw(0), draw(0), strict=True)]
  other = [np.array_equal(a, b) for a, b in zip(draw(0), draw(1), strict=True)]
  assert all(same)
  assert not any(other)


def test_equals_transformers_greedy(tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  model = trained()
  lora.merge(model)
  models.save(model, None, tmp_path)
  peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
  ours = models.generate(model, PROMPTS, 8, eos_id=None, pad_id=0)
  for prompt, row in zip(PROMPTS, ours, strict=True):
    ids = torch.tensor(prompt[None].astype(np.int64))
    theirs = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert list(row) == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"prompts": [np.array([], np.int32)]}, "Prompt 0 has no tokens"),
    ({"prompts": [np.zeros(60, np.int32)]}, "max_length = 64"),
    ({"max_new_tokens": 0}, "max_new_tokens = 0"),
    ({"temperature": -1.0}, "temperature = -1.0"),
    ({"temperature": 1.0}, "needs a key"),
  ],
)
def test_bad_input_is_named(options, words):
  arguments = {"prompts": PROMPTS, "max_new_tokens": 8, "eos_id": 0, "pad_id": 0} | options
  with pytest.raises(InputError, match=words):
    models.generate(make(), **arguments)


def test_no_prompts_no_rows():
  assert models.generate(make(), [], 4, eos_id=0, pad_id=0) == []
