"""The edge of every command: flags, help, exit codes, the workdir and its config."""

import json
import os
import pathlib
import sys
import traceback
from collections.abc import Callable

import jax
import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from mftjax import config as config_lib
from mftjax import errors, files

# It would say at each start that torch is missing, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

_CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/X.py[:variant]")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; the same command again resumes")


def run(main: Callable[[ml_collections.ConfigDict, pathlib.Path], None], description: str | None) -> None:
  """Read the command line, call `main(config, workdir)` and exit.

  Exit codes: 0 done, 2 the user's input is wrong (one message, no traceback), 1 anything else.
  """
  logging.set_verbosity(logging.WARNING)
  if {"--help", "-h", "--helpfull"} & set(sys.argv[1:]):
    print(description)
    print("\nFlags:\n" + "\n".join(f"  {line}" for line in _flag_help()))
    print("\nConfig fields, with their defaults:\n" + config_lib.help_text())
    sys.exit(0)
  try:
    config, workdir = _parse()
    _use_compilation_cache(config.compilation_cache)
    jax.config.update("jax_default_matmul_precision", config.model.matmul_precision)
    main(config, workdir)
  except errors.MftError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2 if isinstance(error, errors.InputError) else 1)
  except Exception:
    traceback.print_exc()
    sys.exit(1)


def _flag_help() -> list[str]:
  main_flags = flags.FLAGS.get_flags_for_module(sys.modules["__main__"])
  rows = [(flag.name, flag.help) for flag in main_flags]
  return ["--config: configs/X.py[:variant]", "--workdir: folder of the run"] + [
    f"--{name}: {text}" for name, text in rows
  ]


def _parse() -> tuple[ml_collections.ConfigDict, pathlib.Path]:
  try:
    rest = flags.FLAGS(sys.argv)[1:]
    config = _CONFIG.value
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
    raise errors.InputError(str(error).strip("'\"") or type(error).__name__) from error
  if rest:
    raise errors.InputError(f"Unexpected arguments: {' '.join(rest)}.")
  if config is None or _WORKDIR.value is None:
    raise errors.InputError("Give --config=configs/X.py[:variant] and --workdir=DIR.")
  _split_cpu(loaded(config, "config").get("cpu_devices"))
  config_lib.check(config)
  return config, pathlib.Path(_WORKDIR.value).absolute()


def loaded(config: ml_collections.ConfigDict, flag: str) -> ml_collections.ConfigDict:
  """The config of a flag, as given.

  Raises:
    InputError: there is no such file, which `config_flags` says only when the config is read.
  """
  try:
    config.keys()
  except OSError as error:
    reason = " ".join(str(error).rpartition("failure to load: ")[2].split())
    raise errors.InputError(f"--{flag}: {reason}") from error
  return config


def _split_cpu(number: object) -> None:
  """Before anything is computed, even by the check of the config: JAX counts its devices once."""
  if isinstance(number, int) and number > 0:
    jax.config.update("jax_num_cpu_devices", number)


def _use_compilation_cache(folder: str) -> None:
  if folder:
    path = pathlib.Path("~/.cache/mftjax" if folder == "default" else folder).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def claim_workdir(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Make the workdir and write `config.json`, or see that the one there is the same.

  Raises:
    InputError: the workdir belongs to another config; the message names the first field that differs.
  """
  path = workdir / "config.json"
  mine = json.loads(config.to_json_best_effort())
  if path.exists():
    check_workdir(config, workdir)
    return
  files.write_json(path, mine)


def check_workdir(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Raise `InputError` if the workdir holds another config."""
  path = workdir / "config.json"
  if not path.exists():
    return
  mine = config_lib.flatten(json.loads(config.to_json_best_effort()))
  theirs = config_lib.flatten(json.loads(path.read_text()))
  for name in sorted(mine.keys() | theirs.keys()):
    if mine.get(name) != theirs.get(name) and name not in ("compilation_cache", "cpu_devices"):
      raise errors.InputError(
        f"{workdir} belongs to another config: {name} is {theirs.get(name)!r} there and {mine.get(name)!r} here. "
        "Take another --workdir or the config it was made with."
      )
