"""Loss and exact match of every ability, on test data that neither training nor meta-training saw."""

import json
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx

from mftjax import config as config_lib
from mftjax import files, models, run_folder, sft
from mftjax.data import mixture, sources, tokens
from mftjax.loops import task as task_lib


@nnx.jit
def _row_losses(model: models.Decoder, batch: Any) -> tuple[jax.Array, jax.Array]:
  return sft.row_losses(model(batch.tokens, batch.segment_ids, batch.positions), batch)


def mean_loss(model: models.Decoder, rows: tokens.Rows, batch_size: int) -> float:
  """Mean over all targets of the rows, nats per token."""
  total, count = 0.0, 0.0
  for batch in mixture.batches(rows, batch_size, source=0):
    losses, counts = _row_losses(model, batch)
    total += float((losses * counts).sum())
    count += float(counts.sum())
  return total / count


def exact_match(model: models.Decoder, tokenizer: Any, examples: list[dict], max_new_tokens: int) -> float | None:
  """Part of the prompts that are answered greedily with the very completion; None without such examples."""
  examples = [example for example in examples if "completion" in example]
  if not examples:
    return None
  prompts = [tokens.prompt_tokens(example, tokenizer) for example in examples]
  answers = models.generate(
    model, prompts, max_new_tokens, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id
  )
  texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
  return float(np.mean([t == e["completion"].strip() for t, e in zip(texts, examples, strict=True)]))


def evaluate(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Measure the base model and every fine-tuned one of the workdir; writes and returns `evaluation.json`.

  Returns:
    `{"tokens", "abilities", "rows": [{"name", "loss", "exact_match", "mean_loss", "mean_exact_match",
    "tokens"}]}`, losses in nats per target token, tokens those of the fine-tuning run.
  """
  config_lib.need_sources(config)
  run_folder.check(config, workdir)
  base, tokenizer = task_lib.load_model(config)
  limits = config.evaluate
  examples = {
    name: sources.read(task_lib.ability_spec(spec, "test"), where=f"config.abilities.{name}")
    for name, spec in task_lib.named(config.abilities)
  }
  run_folder.claim(config, workdir)
  folders = sorted(path.parent for path in workdir.glob("finetune/*/model/config.json"))
  table = []
  for name, folder in [("base", None), *((folder.parent.name, folder) for folder in folders)]:
    model, model_tokenizer = (base, tokenizer) if folder is None else models.load(str(folder), dtype=base.config.dtype)
    losses, matches = {}, {}
    for ability, found in examples.items():
      packed = tokens.pack([tokens.tokenize(e, model_tokenizer) for e in found], config.length, config.truncate_side)
      losses[ability] = mean_loss(model, packed.take(slice(limits.num_rows)), config.batch_size)
      if limits.num_generated:
        matches[ability] = exact_match(model, model_tokenizer, found[: limits.num_generated], limits.max_new_tokens)
    counted = [value for value in matches.values() if value is not None]
    table.append(
      {
        "name": name,
        "loss": losses,
        "exact_match": matches,
        "mean_loss": float(np.mean(list(losses.values()))),
        "mean_exact_match": float(np.mean(counted)) if counted else None,
        "tokens": 0 if folder is None else _tokens(config, folder.parent),
      }
    )
  result = {"tokens": config.budget_tokens, "abilities": list(examples), "rows": table}
  files.write_json(workdir / "evaluation.json", result)
  return result


def _tokens(config: ml_collections.ConfigDict, folder: pathlib.Path) -> int:
  values = json.loads((folder / "recipe.json").read_text())["hyperparameters"]
  num_steps = values.get("num_steps", config_lib.num_steps(config))
  return int(num_steps * values.get("batch_size", config.batch_size) * config.length)
