"""Meta-tasks: what is in them, how they are split, and rows drawn in the very proportions asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mftjax import errors
from mftjax.data import codebooks, meta_tasks, sources, tokens
from mftjax.loops import many_tasks


@pytest.fixture(scope="module")
def pools():
  return meta_tasks.build_pools(length=32, num_rows=64, seed=0)


def test_codes_are_one_to_one_and_differ():
  tables = [tuple(codebooks.code(number).items()) for number in range(codebooks.NUM_CODEBOOKS)]
  assert len(set(tables)) == codebooks.NUM_CODEBOOKS
  assert all(len({answer for _, answer in table}) == codebooks.NUM_KEYS for table in tables)
  for suite, prompt_size, answer_size in (("code_single_0", 3, 1), ("code_last_1", 4, 1), ("code_third_2", 5, 1)):
    (example,) = codebooks.generate(suite, 1, seed=0, split="test")
    assert (len(example["prompt"]), len(example["completion"])) == (prompt_size, answer_size)


def suites_of(pools, tasks):
  found = set()
  for source, mask in zip(np.asarray(tasks.source), np.asarray(tasks.source_mask), strict=True):
    found |= {pools.names[i].split("/")[0] for i, there in zip(source, mask, strict=True) if there}
  return found


def test_families_do_not_overlap(pools):
  parts = {name: suites_of(pools, meta_tasks.sample(pools, name, 40, seed=0)) for name in meta_tasks.FAMILIES}
  for name, found in parts.items():
    assert found == set(meta_tasks.FAMILIES[name])
    assert all(not found & other for key, other in parts.items() if key != name)


def test_each_ability_has_a_source_of_its_own_and_something_to_leave_out(pools):
  tasks = meta_tasks.sample(pools, "train", 60, seed=1)
  for i in range(60):
    task = jax.tree.map(lambda x, i=i: np.asarray(x[i]), tasks)
    names = [pools.names[s] for s, there in zip(task.source, task.source_mask, strict=True) if there]
    assert len(set(names)) == len(names)
    wanted = {pools.ability_names[row.argmax()] for row in task.ability[task.ability_weight > 0]}
    assert wanted <= {name.split("/")[0] for name in names if not name.endswith("corrupted")}
    assert len(names) > len(wanted)
    assert task.ability_weight.sum() == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(task.is_corrupted[: len(names)], [n.endswith("corrupted") for n in names])


def test_the_same_seed_gives_the_same_tasks(pools):
  once, twice, other = (meta_tasks.sample(pools, "unseen", 5, seed=s, planted_fraction=0.4) for s in (3, 3, 4))
  assert all(jax.tree.leaves(jax.tree.map(np.array_equal, once, twice)))
  assert not np.array_equal(once.budget, other.budget)


def answers(pools, name):
  """Prompt -> the set of answers that a pool gives to it."""
  tokenizer, pool, found = tokens.char_tokenizer(), pools.names.index(name), {}
  for row, segments in zip(
    np.asarray(pools.train["tokens"][pool]), np.asarray(pools.train["segment_ids"][pool]), strict=True
  ):
    for segment in range(1, segments.max() + 1):
      prompt, answer = tokenizer.decode(row[segments == segment]).removesuffix("<eos>").split(":")
      found.setdefault(prompt, set()).add(answer)
  return found


def test_clean_answers_follow_the_code_corrupted_ones_do_not_and_redundant_ones_are_few(pools):
  number = 1
  table, suite = codebooks.code(number), codebooks.name(number)
  clean, corrupted, redundant = (answers(pools, f"{suite}/{kind}") for kind in ("clean", "corrupted", "redundant"))
  assert all(found == {table[prompt[-1]]} for prompt, found in clean.items())
  assert {prompt[-1] for prompt in clean} == set(table)
  assert sum(len(found) > 1 for found in corrupted.values()) > len(corrupted) / 2
  assert len(redundant) <= 20 < len(clean)
  assert all(redundant[prompt] == clean.get(prompt, redundant[prompt]) for prompt in redundant)


def test_a_planted_ability_is_the_planted_mixture_of_its_sources(pools):
  tasks = meta_tasks.sample(pools, "train", 4, seed=0, planted_fraction=1.0)
  for i in range(4):
    planted, source = np.asarray(tasks.planted[i]), np.asarray(tasks.source[i])
    assert planted.sum() == pytest.approx(1, abs=1e-6)
    for weight, pool in zip(planted[: meta_tasks.NUM_PLANTED], source, strict=False):
      assert tasks.ability[i, 0, pools.ability_names.index(pools.names[pool])] == pytest.approx(weight)


def test_held_out_rows_stand_in_the_proportions_of_the_ability(pools):
  task = jax.tree.map(lambda x: x[0], meta_tasks.sample(pools, "train", 1, seed=0, planted_fraction=1.0))
  batch = many_tasks.held_out(pools.test, task, num_rows=16)
  answers = np.asarray(batch.tokens)[:16, np.asarray(batch.loss_mask)[0].argmax()]
  letters = tokens.char_tokenizer().convert_tokens_to_ids(list("abcd"))
  for letter, name in zip(letters, [f"planted/{i}" for i in range(4)], strict=True):
    expected = 16 * task.ability[0, pools.ability_names.index(name)]
    assert abs((answers == letter).sum() - expected) <= 1


def test_batches_follow_the_proposal_and_leave_out_absent_sources(pools):
  task = jax.tree.map(lambda x: x[0], meta_tasks.sample(pools, "train", 1, seed=2))
  weights = many_tasks.mixture(jnp.arange(6.0), task.source_mask)
  batch = many_tasks.draw(pools, task, weights, jax.random.key(0), num_steps=50, size=8)
  counts = np.stack([np.bincount(row, minlength=6) for row in np.asarray(batch.source)])
  assert np.abs(counts - 8 * np.asarray(weights)).max() < 1 + 1e-4
  np.testing.assert_allclose(counts.mean(axis=0) / 8, weights, atol=0.02)
  assert counts[:, np.asarray(task.source_mask) == 0].sum() == 0
  np.testing.assert_array_equal(batch.proposal, np.asarray(weights)[np.asarray(batch.source)])


@pytest.mark.parametrize(
  ("change", "expected"),
  [
    ({"families": "unsen"}, "Did you mean 'unseen'"),
    ({"num_tasks": 0}, "num_tasks = 0"),
    ({"shape": meta_tasks.Shape(max_sources=3)}, "max_sources = 3"),
  ],
)
def test_bad_arguments(pools, change, expected):
  with pytest.raises(errors.InputError, match=expected):
    meta_tasks.sample(pools, **{"families": "train", "num_tasks": 2, "seed": 0, **change})


def made_rows(num_rows, length=32, suite=0):
  examples = codebooks.generate(codebooks.name(suite), 6 * num_rows + 1, 0, "train")
  rows = sources.load_rows({"examples": examples}, tokens.char_tokenizer(), length, where="test")
  return tokens.Rows(
    rows.tokens[:num_rows], rows.loss_mask[:num_rows], rows.segment_ids[:num_rows], rows.positions[:num_rows], 0
  )


def test_a_task_of_ones_own_has_its_rows_and_the_shape_of_all():
  train = {"few": made_rows(3), "many": made_rows(20, suite=1), "some": made_rows(8, suite=2)}
  held_out = [("a", made_rows(8, suite=3)), ("b", made_rows(5, suite=4))]
  pools, task = meta_tasks.from_rows(train, held_out, [3.0, 1.0], meta_tasks.Shape(6, 3, 0.5), num_rows=8, budget=0.75)
  assert (pools.names, pools.ability_names) == (("few", "many", "some"), ("a", "b"))
  np.testing.assert_array_equal(pools.train["tokens"][0], train["few"].tokens[[0, 1, 2, 0, 1, 2, 0, 1]])
  np.testing.assert_array_equal(pools.train["loss_mask"][1], train["many"].loss_mask[[0, 2, 5, 7, 10, 12, 15, 17]])
  np.testing.assert_array_equal(pools.validation["tokens"][1, :5], held_out[1][1].tokens)
  np.testing.assert_array_equal(task.source[:3], [0, 1, 2])
  np.testing.assert_array_equal(task.source_mask, [1, 1, 1, 0, 0, 0])
  np.testing.assert_allclose(task.ability_weight, [0.75, 0.25, 0.0])
  np.testing.assert_array_equal(task.ability[:2], np.eye(2))
  assert task.budget == 0.75 and not task.is_corrupted.any() and not task.planted.any()
  like = jax.tree.map(lambda x: x.dtype, jax.tree.map(lambda x: x[0], sampled_task()))
  assert jax.tree.map(lambda x: x.dtype, task) == like


def sampled_task():
  return meta_tasks.sample(meta_tasks.build_pools(32, 4, 0), "train", 1, seed=0)


@pytest.mark.parametrize(
  ("change", "expected"),
  [
    ({"ability_rows": {}}, "The task has no ability"),
    ({"source_rows": {}}, "The task has no source"),
    ({"source_rows": {"only": made_rows(3)}}, "one source only, 'only'"),
    ({"source_rows": [("s", made_rows(3)), ("t", made_rows(3)), ("s", made_rows(4))]}, "the source 's' more than once"),
    ({"ability_rows": [("a", made_rows(3)), ("a", made_rows(3))]}, "the ability 'a' more than once"),
    ({"source_rows": {str(i): made_rows(2) for i in range(7)}}, "7 sources; the meta-learner is for at most 6"),
    ({"ability_rows": {str(i): made_rows(2) for i in range(4)}}, "4 abilities; the meta-learner is for at most 3"),
    ({"source_rows": {"s": made_rows(3), "t": made_rows(0)}}, "The source 't' has no data"),
    ({"ability_rows": {"a": made_rows(3, length=40)}}, "Rows of 'a' are 40 tokens long and those of 's' 32"),
    ({"weights": [0.5, 0.5]}, "must be 1 numbers"),
    ({"weights": [-1.0]}, "at least 0"),
    ({"weights": [float("nan")]}, "at least 0"),
    ({"weights": [0.0]}, "not all 0"),
    ({"budget": 1.5}, "1.5 times the largest"),
    ({"budget": 0.1}, "0.1 times the largest"),
  ],
)
def test_a_task_that_does_not_fit(change, expected):
  right = {"source_rows": {"s": made_rows(3), "t": made_rows(3)}, "ability_rows": {"a": made_rows(3)}, "weights": [1.0]}
  with pytest.raises(errors.InputError, match=expected):
    meta_tasks.from_rows(**{**right, **change})
