"""What a memory holds after a sequence: which slots each task wrote, who reads them, and at which prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mftjax.loops import continual_runs, learnt_memory, sequence
from mftjax.models import lora
from tests.test_loops_continual import tiny_entry, whole_run
from tests.test_loops_sequence import tiny_setting


@pytest.fixture(scope="module")
def found():
  """`(view, runs)` of two runs on three tasks, the first of which is looked at."""
  setting, entry, runs = tiny_setting(), tiny_entry("memory"), whole_run()
  model = continual_runs.first_model(entry, runs, entry.fixed)
  return learnt_memory.view(model, runs.written, setting.stream, setting.tokenizer), runs


@pytest.fixture(scope="module")
def reads(found):
  """`[num_tasks, num_slots]` part of each task's reads, by numpy from each token's slots."""
  setting, (_, runs) = tiny_setting(), found
  setup = tiny_entry("memory").setup
  params, held = jax.tree.map(lambda x: x[0], (runs.final.inner.params, runs.final.carry["held"]))
  model, rows = setup.merge((params, held)), []
  for pool in np.asarray(setting.stream.order[0]):
    batch = sequence.as_batch({name: values[pool] for name, values in setting.stream.test.items()})
    (inputs,) = model.memory_inputs(batch.tokens, batch.segment_ids, batch.positions)
    slots = np.asarray(model.memories()[0].lookup(inputs)[0])[np.asarray(batch.segment_ids) > 0]
    rows.append(np.bincount(slots.reshape(-1), minlength=64) / slots.size)
  return np.stack(rows)


def test_slots_by_task_are_those_that_were_written(found):
  view, runs = found
  assert view["slots_by_task"] == [len(slots) for slots in runs.written]
  assert view["num_slots"] == 64 and all(0 < count <= 8 for count in view["slots_by_task"])
  assert view["tasks"] == list(tiny_setting().stream.names[:3])


def test_usage_is_of_the_task_that_wrote_a_slot_last(found, reads):
  view, runs = found
  last = np.full(64, -1)
  for number, slots in enumerate(runs.written):
    last[slots] = number
  wanted = [[row[last == other].sum() for other in range(3)] for row in reads]
  np.testing.assert_allclose(view["usage"], wanted, atol=1e-6)
  assert np.sum(view["usage"], axis=1).max() <= 1 + 1e-6 and np.sum(view["usage"]) > 0


def test_overlap_is_of_all_tasks_that_wrote_a_slot(found, reads):
  view, runs = found
  wanted = [[row[slots].sum() for slots in runs.written] for row in reads]
  np.testing.assert_allclose(view["overlap"], wanted, atol=1e-6)
  # It chose slots that it reads.
  assert all(view["overlap"][task][task] > 0 for task in range(3))
  assert np.all(np.asarray(view["overlap"]) >= np.asarray(view["usage"]) - 1e-6)


def test_the_examples_are_beginnings_of_the_tasks_prompts(found, reads):
  view, runs = found
  setting = tiny_setting()
  texts_of = {}
  for number, pool in enumerate(np.asarray(setting.stream.order[0])):
    segments = np.asarray(setting.stream.test["segment_ids"][pool])
    tokens = np.asarray(setting.stream.test["tokens"][pool])
    texts_of[number] = {
      setting.tokenizer.decode(row[own == segment][:end])
      for row, own in zip(tokens, segments, strict=True)
      for segment in range(1, own.max() + 1)
      for end in range(1, int((own == segment).sum()) + 1)
    }
  assert len(view["examples"]) == 3
  for number, example in enumerate(view["examples"]):
    assert example["task"] == view["tasks"][number] and example["slot"] in runs.written[number]
    own = reads[number][runs.written[number]]
    assert example["usage"] == pytest.approx(own.max(), abs=1e-6) and own.max() > 0
    assert 1 <= len(set(example["nearest"])) == len(example["nearest"]) <= 3
    assert set(example["nearest"]) <= texts_of[number]


def test_changed_slots_are_those_with_another_value_in_the_first_run():
  held = {"written": jnp.asarray([[3, 5, 9], [1, 2, 4]])}
  params = {"delta": jnp.zeros((2, 3, 4)).at[0, 1, 2].set(1e-9).at[0, 2, 0].set(-1.0).at[1].set(1.0)}
  np.testing.assert_array_equal(learnt_memory.changed(params, held), [5, 9])


def test_a_run_changes_only_slots_that_were_written(found):
  _, runs = found
  (before,) = [
    x for path, x in jax.tree.leaves_with_path(tiny_entry("memory").setup.held) if "values" in lora.names_of(path)
  ]
  (after,) = [
    x[0] for path, x in jax.tree.leaves_with_path(runs.final.carry["held"]) if "values" in lora.names_of(path)
  ]
  is_other = np.any(np.asarray(before) != np.asarray(after), axis=1)
  np.testing.assert_array_equal(np.flatnonzero(is_other), np.unique(np.concatenate(runs.written)))
