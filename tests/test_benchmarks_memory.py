"""The benchmark of the memory, at tiny sizes."""

import json

from benchmarks import memory as benchmark


def test_a_step_touches_the_open_slots_and_no_others(tmp_path, capsys):
  benchmark.main([f"--json={tmp_path / 'memory.json'}", "--small", "--repeats=1"])
  figures = json.loads((tmp_path / "memory.json").read_text())
  sizes = benchmark.SMALL
  assert 0 < figures["touched"] <= figures["open"] == sizes.num_rows / sizes.num_slots < 0.01
  assert set(figures["ratio"]) == {"forward", "training"}
  # Two products with the MLP's halves and one back; those of the memory's queries and half scores.
  assert figures["cost"]["forward mlp"]["matmul_flops"] == 2 * 3 * sizes.tokens * sizes.dim * sizes.inner
  keys = sizes.num_heads * sizes.key_dim
  half_scores = 2 * sizes.tokens * keys * int(sizes.num_slots**0.5)
  assert figures["cost"]["forward memory"]["matmul_flops"] == 2 * sizes.tokens * sizes.dim * keys + half_scores
  assert "memory / MLP" in capsys.readouterr().out
