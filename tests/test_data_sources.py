"""Sources read from files, suites and memory; every wrong input gives its own message."""

import collections
import json
import pathlib

import datasets
import numpy as np
import pytest

from mftjax import errors
from mftjax.data import abilities, sources, tokens

SHARED = pathlib.Path(__file__).parents[1] / ".." / "shared" / "data"
WHERE = "config.sources.mine"
EXAMPLES = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(10)]
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not there")


def read(**spec):
  return sources.read(spec, where=WHERE)


def write_lines(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def test_jsonl_keeps_text_as_it_is(tmp_path):
  rows = [
    {"prompt": "when?", "completion": "2020-01-01", "extra": 1},
    {"prompt": " sp\u00e9cial \u2019\n", "completion": "007"},
  ]
  path = tmp_path / "a.jsonl"
  write_lines(path, rows)
  path.write_text(path.read_text() + "\n")  # a blank line at the end is no example
  assert read(path=str(path)) == [{k: r[k] for k in ("prompt", "completion")} for r in rows]


def test_parquet_and_csv_read_the_same(tmp_path, capfd):
  rows = [*EXAMPLES, {"prompt": 'a, "b"\nc', "completion": "007"}, {"prompt": "null", "completion": "NA"}]
  table = datasets.Dataset.from_list(rows)
  table.to_parquet(tmp_path / "a.parquet")
  table.to_csv(tmp_path / "a.csv", index=False)
  capfd.readouterr()
  for name in ("a.parquet", "a.csv"):
    assert read(path=str(tmp_path / name)) == rows
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.parquet"]  # nothing is left beside the data
  assert capfd.readouterr() == ("", "")


def test_reading_leaves_progress_bars_as_they_were(tmp_path):
  datasets.Dataset.from_list(EXAMPLES).to_parquet(tmp_path / "a.parquet")
  for switch, is_on in ((datasets.disable_progress_bars, False), (datasets.enable_progress_bars, True)):
    switch()
    read(path=str(tmp_path / "a.parquet"))
    assert datasets.is_progress_bar_enabled() is is_on


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_splits_slice(tmp_path, ending):
  path = tmp_path / f"a.{ending}"
  if ending == "jsonl":
    write_lines(path, EXAMPLES)
  else:
    datasets.Dataset.from_list(EXAMPLES).to_parquet(path)
  parts = [read(path=str(path), split=s) for s in ("train[:80%]", "train[80%:90%]", "train[90%:]")]
  assert [len(part) for part in parts] == [8, 1, 1]
  assert [*parts[0], *parts[1], *parts[2]] == read(path=str(path)) == EXAMPLES
  assert read(path=str(path), split="train[-2:]+train[:1]") == [*EXAMPLES[-2:], EXAMPLES[0]]
  assert read(path=str(path), num_examples=3) == EXAMPLES[:3]


def test_columns_can_have_other_names(tmp_path):
  path = write_lines(tmp_path / "a.jsonl", [{"question": "q", "answer": "a", "text": "t"}])
  assert read(path=path, prompt_column="question", completion_column="answer") == [{"prompt": "q", "completion": "a"}]
  assert read(path=path) == [{"text": "t"}]
  assert read(path=path, text_column="answer") == [{"text": "a"}]


def test_messages_from_parquet(tmp_path):
  messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
  datasets.Dataset.from_list([{"chat": messages}]).to_parquet(tmp_path / "a.parquet")
  assert read(path=str(tmp_path / "a.parquet"), messages_column="chat") == [{"messages": messages}]
  tokenizer = tokens.char_tokenizer()
  tokenizer.chat_template = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
  )
  spec = {"path": str(tmp_path / "a.parquet"), "messages_column": "chat"}
  rows = sources.load_rows(spec, tokenizer, 64, where=WHERE)
  assert tokenizer.decode(rows.tokens[rows.loss_mask > 0]) == "ho\n<eos>"


def test_suite():
  found = read(suite="copying", num_examples=7, seed=2, suite_split="test")
  assert found == abilities.generate("copying", 7, 2, "test")


def test_shuffle_gives_every_prompt_anothers_completion():
  found = read(examples=EXAMPLES, corruption="shuffle", seed=1)
  assert [e["prompt"] for e in found] == [e["prompt"] for e in EXAMPLES]
  assert sorted(e["completion"] for e in found) == sorted(e["completion"] for e in EXAMPLES)
  assert all(a["completion"] != b["completion"] for a, b in zip(found, EXAMPLES, strict=True))
  assert found == read(examples=EXAMPLES, corruption="shuffle", seed=1)
  assert found != read(examples=EXAMPLES, corruption="shuffle", seed=2)


def test_redundant_repeats_few_examples():
  many = [{"prompt": str(i), "completion": "a"} for i in range(320)]
  counts = collections.Counter(e["prompt"] for e in read(examples=many, corruption="redundant"))
  assert len(counts) == 10 and set(counts.values()) == {32}


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ({"path": "missing.jsonl"}, r"config\.sources\.mine\.path: there is no file missing\.jsonl"),
    ({"pth": "a.jsonl"}, r"field of config\.sources\.mine: 'pth'\. Did you mean 'path'"),
    ({"suite": "copyin"}, r"config\.sources\.mine\.suite: 'copyin'\. Did you mean 'copying'"),
    ({"suite": "copying", "suite_split": "tests"}, "Did you mean 'test'"),
    ({"suite": "copying", "num_examples": 0}, "num_examples = 0"),
    ({"suite": "copying", "corruption": "shufle"}, r"mine\.corruption: 'shufle'\. Did you mean 'shuffle'"),
    ({}, "needs one of path, suite, examples; given: none"),
    ({"suite": "copying", "path": "a.jsonl"}, "given: path, suite"),
    ({"examples": []}, r"config\.sources\.mine is empty"),
    ({"examples": EXAMPLES[:1], "corruption": "shuffle"}, "at least 2 examples"),
    ({"examples": [{"text": "a"}, {"text": "b"}], "corruption": "shuffle"}, "prompt and completion"),
    ({"examples": [{"prompt": "a", "completion": 8}]}, r"example 1: column 'completion' must be text, not '8' \(int\)"),
    ({"examples": [EXAMPLES[0], {"prompt": "a"}]}, "example 2: column 'completion' must be text"),
    ({"examples": [{"messages": "hi"}]}, "example 1: column 'messages' must be a list"),
    ({"examples": EXAMPLES, "text_column": "a", "prompt_column": "prompt"}, "2 kinds of examples"),
  ],
)
def test_bad_specs(spec, message):
  with pytest.raises(errors.InputError, match=message):
    sources.read(spec, where=WHERE)


def test_bad_files(tmp_path):
  good = json.dumps(EXAMPLES[0])
  path = tmp_path / "data.jsonl"

  def message(**spec):
    with pytest.raises(errors.InputError) as caught:
      read(**{"path": str(path), **spec})
    return str(caught.value)

  path.write_text(f"{good}\n\n{good[:-4]}\n")
  assert message().startswith(f"{path}:3 is not JSON")
  path.write_text(f"{good}\n[1, 2]\n")
  assert message().startswith(f"{path}:2 is not a JSON object")
  path.write_bytes(good.encode() + b'\n{"prompt": "\xff"}\n')
  assert message().startswith(f"{path}:2 is not JSON")
  for content in ("", "\n\n"):
    path.write_text(content)
    assert message().startswith(f"{WHERE} is empty: {path}")
  write_lines(path, [{"question": "q", "completions": "c"}])
  assert "Its columns: question, completions. Did you mean 'completions' for completion?" in message()
  assert "Did you mean 'question'" in message(prompt_column="questions")
  write_lines(path, EXAMPLES)
  assert "'test'" in message(split="test") and "only split is 'train'" in message(split="test")
  assert "only split is 'train'" in message(split="train[:x]")
  assert message(split="train[:0]").startswith(f"{WHERE} is empty")
  assert f"Did you mean {path}" in message(path=str(tmp_path / "dta.jsonl"))
  assert "is a folder" in message(path=str(tmp_path))
  (tmp_path / "a.txt").write_text("hello")
  assert "ending" in message(path=str(tmp_path / "a.txt"))
  for name in ("torn.parquet", "torn.csv"):
    (tmp_path / name).write_bytes(b"PAR1 \x00 no,table\n\xff\xfe,1,2,3,4\n")
    assert f"{tmp_path / name} cannot be read" in message(path=str(tmp_path / name))
  (tmp_path / "head.csv").write_text("prompt,completion\n")
  assert message(path=str(tmp_path / "head.csv")).startswith(f"{WHERE} is empty")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_not_finite_is_no_text(tmp_path, number):
  path = tmp_path / "data.jsonl"
  path.write_text(f'{{"prompt": "a", "completion": "b"}}\n{{"prompt": "a", "completion": {number}}}\n')
  with pytest.raises(errors.InputError, match=r"mine, example 2: column 'completion' must be text, not '(nan|-?inf)'"):
    read(path=str(path))


def test_hub_ids(monkeypatch):
  calls = []

  def load_dataset(*args, **options):
    calls.append((args, options))
    if args[0] == "nobody/nothing":
      raise ConnectionError("no such host")
    return datasets.Dataset.from_list(EXAMPLES)

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  assert read(path="somebody/something", subset="main", split="train[:5%]") == EXAMPLES
  assert calls == [(("somebody/something", "main"), {"split": "train[:5%]"})]  # no remote code
  with pytest.raises(errors.InputError, match=r"'nobody/nothing' is no local file, and .* no such host"):
    read(path="nobody/nothing")


def test_completion_that_tokenises_to_nothing_has_its_number():
  spec = {"examples": [EXAMPLES[0], {"prompt": "a", "completion": ""}]}
  with pytest.raises(errors.InputError, match=r"config\.sources\.mine, example 2: .*tokenises to nothing"):
    sources.load_rows(spec, tokens.char_tokenizer(), 32, where=WHERE)


def test_long_texts_go_on_in_the_next_row():
  tokenizer = tokens.char_tokenizer()
  text = "abcdefghij" * 5
  rows = sources.load_rows({"examples": [{"text": text}]}, tokenizer, 16, where=WHERE)
  assert tokenizer.decode(rows.tokens[rows.segment_ids > 0]) == text + "<eos>"
  assert rows.truncated == 0


def test_prompts_are_cut_on_the_given_side_and_counted():
  tokenizer = tokens.char_tokenizer()
  spec = {"examples": [{"prompt": "0123456789", "completion": "ab"}]}
  for side, expected in (("left", "56789ab<eos>"), ("right", "01234ab<eos>")):
    rows = sources.load_rows(spec, tokenizer, 8, where=WHERE, truncate_side=side)
    assert tokenizer.decode(rows.tokens[0]) == expected
    assert rows.truncated == 1


@needs_shared
@pytest.mark.parametrize(
  ("name", "num_examples"), [("gsm8k/test.jsonl", 1319), ("bbh/object_counting.jsonl", 250), ("p3/quartz.jsonl", None)]
)
def test_real_files(name, num_examples):
  path = SHARED / name
  lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
  found = read(path=str(path))
  assert found == [{"prompt": line["prompt"], "completion": line["completion"]} for line in lines]
  assert num_examples in (None, len(found))  # numbers: the data's README


@needs_shared
def test_real_rows_hold_every_completion():
  tokenizer = tokens.char_tokenizer()
  spec = {"path": str(SHARED / "bbh" / "multistep_arithmetic_two.jsonl"), "split": "train[:80%]"}
  rows = sources.load_rows(spec, tokenizer, 128, where=WHERE)
  segments = [
    tokenizer.decode(rows.tokens[r][(rows.segment_ids[r] == s) & (rows.loss_mask[r] > 0)])
    for r in range(len(rows.tokens))
    for s in range(1, rows.segment_ids[r].max() + 1)
  ]
  assert sorted(segments) == sorted(e["completion"] + "<eos>" for e in sources.read(spec, where=WHERE))
  assert np.mean(rows.segment_ids > 0) > 0.7  # packing leaves little padding
