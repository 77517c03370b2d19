"""Nothing that is read is run, nothing secret is written, and nothing is written outside the workdir."""

import ast
import contextlib
import json
import subprocess

import numpy as np
import pytest
from flax import nnx

from mftjax import feature_cache, models
from mftjax.data import tokens
from mftjax.errors import InputError
from tests.commands import command
from tests.pages import ROOT

SECRET = "hf_thisMustNeverBeWritten"


@pytest.fixture
def folder(tmp_path):
  tokenizer = tokens.char_tokenizer()
  config = models.DecoderConfig("llama", len(tokenizer), 16, 32, 1, 2, 2, 8)
  models.save(models.Decoder(config, rngs=nnx.Rngs(0)), tokenizer, tmp_path / "model")
  return tmp_path / "model"


def test_code_that_comes_with_a_model_is_not_run(folder, tmp_path, monkeypatch):
  monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked to run it"))
  (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
  for name in ("config.json", "tokenizer_config.json"):
    values = json.loads((folder / name).read_text())
    values |= {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"], "AutoConfig": "own.Own"}}
    (folder / name).write_text(json.dumps(values | {"tokenizer_class": "Own"}))
  with contextlib.suppress(ValueError, InputError):  # that it needs this code may be said
    models.load(folder)
  assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_read(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  with pytest.raises(InputError, match=r"no weights: no \*.safetensors file"):
    models.load(folder)


def test_pickled_arrays_are_refused(tmp_path):
  path = tmp_path / "features.npz"
  np.savez(path, model=np.asarray({"a": 1}, object))
  with pytest.raises(InputError, match="cannot read the features"):
    feature_cache.load(path, "digest")


def test_no_module_unpickles_or_evaluates():
  modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
  calls = {"eval", "exec", "yaml.load", "torch.load", "os.system"}
  unsafe = {("allow_pickle", True), ("trust_remote_code", True), ("shell", True)}
  for path in [*(ROOT / "mftjax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]:
    for node in ast.walk(ast.parse(path.read_text())):
      names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
      names += [node.module] if isinstance(node, ast.ImportFrom) else []
      assert not modules & {str(name).partition(".")[0] for name in names}, path
      if isinstance(node, ast.Call):
        assert ast.unparse(node.func) not in calls, path
        given = {(word.arg, word.value.value) for word in node.keywords if isinstance(word.value, ast.Constant)}
        assert not unsafe & given, path


@pytest.mark.slow
def test_secrets_of_the_environment_are_in_no_file_and_no_message(tmp_path):
  names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
  environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", **dict.fromkeys(names, SECRET)}
  workdir = tmp_path / "run"
  bad = "--config.sources.copying.path=somebody/private"
  for script, *flags in (
    ("meta_train", "--config.meta.outer_steps=2"),
    ("predict", "--config.meta.outer_steps=2"),
    ("evaluate", "--config.meta.outer_steps=2"),
    ("meta_train", "--config.model.path=somebody/private"),
    ("meta_train", bad, "--config=tests/tiny_config.py:files"),
  ):
    words = command(script, workdir if "private" not in flags[0] else tmp_path / "other", *flags)
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == (2 if "private" in flags[0] else 0), done.stderr
    assert SECRET not in done.stdout + done.stderr
  written = [path for path in workdir.rglob("*") if path.is_file()]
  assert any(path.suffix == ".html" for path in written)
  assert not [path for path in written if SECRET.encode() in path.read_bytes()]
