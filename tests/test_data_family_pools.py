"""Pools of real data: what is in them, and that no example is on both sides."""

import families
import jax
import numpy as np
import pytest

from mftjax import errors
from mftjax.data import family_pools, meta_tasks, tokens

LENGTH, NUM_ROWS = 24, 16


def build(*folders, num_validation=1, num_unseen=2, **options):
  sizes = {"length": LENGTH, "num_rows": NUM_ROWS, "seed": 0, **options}
  folders = [str(folder) for folder in folders]
  return family_pools.build(
    folders, tokens.char_tokenizer(), num_validation=num_validation, num_unseen=num_unseen, **sizes
  )


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
  return build(families.write(tmp_path_factory.mktemp("data")))


def pairs(fields, pool):
  """The (prompt, completion) pairs of a pool's rows, in order."""
  tokenizer, found = tokens.char_tokenizer(), []
  for row, segments in zip(np.asarray(fields["tokens"][pool]), np.asarray(fields["segment_ids"][pool]), strict=True):
    for segment in range(1, segments.max() + 1):
      prompt, answer = tokenizer.decode(row[segments == segment]).removesuffix("<eos>").split("?")
      found.append((prompt, answer))
  return found


def test_no_prompt_is_in_two_parts_and_all_are_of_the_family(pools):
  for number, name in enumerate(pools.ability_names):
    clean = pools.names.index(f"{name}/clean")
    parts = [{p for p, _ in pairs(f, i)} for f, i in ((pools.train, clean), (pools.validation, number))]
    parts.append({p for p, _ in pairs(pools.test, number)})
    assert all(len(part) >= family_pools._LEAST_ROWS for part in parts)
    assert sum(map(len, parts)) == len(set().union(*parts))
    assert {prompt.split()[0] for part in parts for prompt in part} == {name[:3]}


def test_clean_answers_are_those_of_the_file_redundant_ones_few_and_corrupted_ones_permuted(pools):
  for name in families.NAMES:
    right = {e["prompt"].removesuffix("?"): e["completion"] for e in families.examples(name)}
    clean, redundant, corrupted = (
      pairs(pools.train, pools.names.index(f"{name}/{kind}")) for kind in ("clean", "redundant", "corrupted")
    )
    assert all(right[prompt] == answer for prompt, answer in clean + redundant)
    assert len(set(redundant)) <= 2 < len(set(clean))  # 40 examples, one of 32 kept
    # One answer of eight is right by chance.
    assert sum(right[prompt] != answer for prompt, answer in corrupted) > len(corrupted) / 2


def test_a_prompt_that_repeats_is_kept_once(tmp_path):
  families.write(tmp_path)
  text = (tmp_path / "alpha.jsonl").read_text()
  (tmp_path / "alpha.jsonl").write_text(text + text.replace('"a"', '"h"'))
  pools = build(tmp_path, num_rows=64)
  number = pools.ability_names.index("alpha")
  parts = [(pools.train, pools.names.index("alpha/clean")), (pools.validation, number), (pools.test, number)]
  found = [set(pairs(fields, pool)) for fields, pool in parts]
  assert sum(len({prompt for prompt, _ in part}) for part in found) == sum(map(len, found)) == 80


def test_a_folder_that_sets_a_test_file_apart_is_one_family(tmp_path):
  folder = tmp_path / "alpha"
  folder.mkdir()
  families.write(folder, ("train",), 60)
  families.write(folder, ("test",), 30)
  assert family_pools.find([str(folder)]) == {"alpha": {part: folder / f"{part}.jsonl" for part in ("train", "test")}}
  # Prompts of `train` are "tra N" and of `test` are "tes N": where they stand says where they came from.
  pools = build(folder, families.write(tmp_path, families.NAMES[1:]))
  number = pools.ability_names.index("alpha")
  assert {prompt[:3] for prompt, _ in pairs(pools.test, number)} == {"tes"}
  train, validation = pairs(pools.train, pools.names.index("alpha/clean")), pairs(pools.validation, number)
  assert {prompt[:3] for prompt, _ in train + validation} == {"tra"}
  assert not {prompt for prompt, _ in train} & {prompt for prompt, _ in validation}


def test_families_are_split_once_each_and_keep_their_order_when_others_come(pools):
  found = [name for part in pools.families.values() for name in part]
  assert sorted(found) == sorted(families.NAMES)
  assert [len(pools.families[part]) for part in ("train", "validation", "unseen")] == [3, 1, 2]
  few, more = (family_pools.split(names, 1, 2, seed=7) for names in (families.NAMES, (*families.NAMES, "eta", "theta")))
  assert set(more["unseen"]) - {"eta", "theta"} <= set(few["unseen"])
  assert {tuple(family_pools.split(families.NAMES, 1, 2, seed)["unseen"]) for seed in range(8)} != {few["unseen"]}


def test_tasks_are_of_their_own_split(pools):
  for part, names in pools.families.items():
    tasks = meta_tasks.sample(pools, part, 12, seed=1, shape=meta_tasks.Shape(4, 2, 1.0))
    there = np.asarray(tasks.source)[np.asarray(tasks.source_mask) > 0]
    assert {pools.names[source].split("/")[0] for source in there} <= set(names)
    assert jax.tree.map(np.shape, tasks).ability == (12, 2, len(families.NAMES))
    assert not tasks.planted.any() and tasks.is_corrupted.any()


def test_planted_tasks_are_refused(pools):
  with pytest.raises(errors.InputError, match=r"planted_fraction = 0\.2 must be 0 with config\.tasks\.folders"):
    meta_tasks.sample(pools, "train", 4, seed=0, planted_fraction=0.2)


@pytest.mark.parametrize(
  ("prepare", "message"),
  [
    (lambda folder: build(folder / "missing"), "missing does not exist"),
    (lambda folder: build(folder), "holds no .jsonl file"),
    (lambda folder: build(families.write(folder), folder / "beta.jsonl"), "names the family 'beta' twice"),
    (lambda folder: build(families.write(folder), num_unseen=5), "6 families: with 1 .* and 5 unseen .* none is left"),
    (
      lambda folder: build(families.write(families.write(folder), ("small",), 20)),
      "'small' .* has too few examples: its 10 for train make 5 rows of 24 tokens, and 8 is the least",
    ),
  ],
)
def test_bad_folders_say_what_is_wrong(prepare, message, tmp_path):
  with pytest.raises(errors.InputError, match=message):
    prepare(tmp_path)
