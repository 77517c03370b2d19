"""Meta-tasks as arrays: which pools of rows a task trains on, and what its abilities are made of.

Every task of a `Pools` has the same shapes, absent sources and abilities being masked, so that one program runs many.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mftjax import errors
from mftjax.data import codebooks, sources, tokens

# Families of procedural abilities: a meta-learner that is trained on the first never sees the last.
FAMILIES: dict[str, tuple[str, ...]] = {
  "train": codebooks.NAMES[:24],
  "validation": codebooks.NAMES[24:34],
  "unseen": codebooks.NAMES[34:42],
}
BASE = codebooks.NAMES[42:]  # no task is about these: a base model learns from them what a code is
_REDUNDANT_EXAMPLES = 640  # before `sources` keeps one of 32 of them: 20 distinct examples, repeated
_MOST_OTHERS = 7  # suites that a task is not about and may have sources of: corrupted ones are as frequent in any split
NUM_PLANTED = 4  # sources of a planted task: each gives its own answer to the same prompts


@flax.struct.dataclass
class Pools:
  """Rows on the device, in pools; all pools are equally large."""

  train: dict[str, jax.Array]  # fields of a Batch's rows, each [num_pools, num_rows, length]
  validation: dict[str, jax.Array]  # likewise, of each clean pool: what recipes are chosen by
  test: dict[str, jax.Array]  # likewise: what they are judged by
  names: tuple[str, ...] = flax.struct.field(pytree_node=False)  # "suite/kind" of each train pool
  ability_names: tuple[str, ...] = flax.struct.field(pytree_node=False)  # suite of each held-out pool
  families: Mapping[str, tuple[str, ...]] = flax.struct.field(
    pytree_node=False, default_factory=dict
  )  # split -> suites


@flax.struct.dataclass
class MetaTask:
  """One task, or with a leading axis many."""

  source: jax.Array  # [max_sources] int32, train pool
  source_mask: jax.Array  # [max_sources] f32, 0 = absent
  ability: jax.Array  # [max_abilities, num_held_out_pools] f32, what each ability's rows are drawn from; sum 1
  ability_weight: jax.Array  # [max_abilities] f32, sum 1; 0 = absent
  budget: jax.Array  # f32, part of the largest budget
  is_corrupted: jax.Array  # [max_sources] f32, for judging only
  planted: jax.Array  # [max_sources] f32, the mixture that is best, for judging only; zeros where there is none


@dataclasses.dataclass(frozen=True)
class Shape:
  """What the tasks of one program have in common."""

  max_sources: int = 6
  max_abilities: int = 3
  min_budget: float = 0.5


def stack(tasks: Sequence[MetaTask]) -> MetaTask:
  """Tasks with a leading axis."""
  return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *tasks)


def sample(
  pools: Pools, families: str, num_tasks: int, seed: int, shape: Shape = Shape(), planted_fraction: float = 0.0
) -> MetaTask:
  """Random tasks of one split of the families, `[num_tasks, ...]`.

  Of each ability there is a clean source, in one case of four a redundant one in its place; then, at random, corrupted
  sources of the same suites and clean ones of other suites of the split, up to `max_sources`. The abilities weigh
  alike or, in half of the tasks, by a draw from a flat Dirichlet distribution. A planted task has the planted sources
  and one ability which is a mixture of them, drawn likewise: that mixture is the best to train on, since the
  cross-entropy of answers is least at their own distribution.

  Args:
    families: a split of the pools' families, "train", "validation" or "unseen".
    seed: of the tasks; another seed, other tasks.
    planted_fraction: part of the tasks that are planted.

  Raises:
    InputError: no such split, fewer than one task, or planted tasks of pools without planted sources.
  """
  if families not in pools.families:
    raise errors.unknown_name("split of the families", families, pools.families)
  if num_tasks < 1:
    raise errors.InputError(f"num_tasks = {num_tasks} must be at least 1.")
  if shape.max_sources < NUM_PLANTED or shape.max_sources < 2:
    raise errors.InputError(f"max_sources = {shape.max_sources} must be at least {NUM_PLANTED}.")
  if planted_fraction and "planted/0" not in pools.names:
    raise errors.InputError(
      f"config.tasks.planted_fraction = {planted_fraction} must be 0 with config.tasks.folders: no mixture of real "
      "data is known to be the best."
    )
  rng = np.random.default_rng([seed, list(pools.families).index(families)])
  num_planted = round(planted_fraction * num_tasks)
  made = [_planted_task(rng, pools, shape) for _ in range(num_planted)]
  made += [_ordinary_task(rng, pools, shape, pools.families[families]) for _ in range(num_tasks - num_planted)]
  return stack([made[i] for i in rng.permutation(num_tasks)])


def _ordinary_task(rng: np.random.Generator, pools: Pools, shape: Shape, suites: Sequence[str]) -> MetaTask:
  num_abilities = int(rng.integers(1, min(shape.max_abilities, len(suites)) + 1))
  chosen = [str(suite) for suite in rng.permutation(suites)]
  wanted, others = chosen[:num_abilities], chosen[num_abilities:][:_MOST_OTHERS]
  names = [f"{suite}/{'redundant' if rng.random() < 0.25 else 'clean'}" for suite in wanted]
  distractors = [f"{suite}/corrupted" for suite in wanted] + [f"{suite}/clean" for suite in others]
  room = shape.max_sources - len(names)
  number = int(rng.integers(1, min(room, len(distractors)) + 1))
  names += [str(name) for name in rng.permutation(distractors)[:number]]
  names = [str(name) for name in rng.permutation(names)]
  abilities_of = np.zeros((num_abilities, len(pools.ability_names)))
  for number, suite in enumerate(wanted):
    abilities_of[number, pools.ability_names.index(suite)] = 1.0
  is_even = rng.random() < 0.5
  weights = np.full(num_abilities, 1 / num_abilities) if is_even else rng.dirichlet(np.ones(num_abilities))
  return _task(rng, pools, shape, names, abilities_of, np.maximum(weights, 0.02), np.zeros(len(names)))


def _planted_task(rng: np.random.Generator, pools: Pools, shape: Shape) -> MetaTask:
  order = rng.permutation(NUM_PLANTED)
  best = rng.dirichlet(np.ones(NUM_PLANTED))
  ability = np.zeros((1, len(pools.ability_names)))
  for weight, answer in zip(best, order, strict=True):
    ability[0, pools.ability_names.index(f"planted/{answer}")] = weight
  return _task(rng, pools, shape, [f"planted/{answer}" for answer in order], ability, np.ones(1), best)


def _task(
  rng: np.random.Generator,
  pools: Pools,
  shape: Shape,
  names: Sequence[str],
  abilities_of: np.ndarray,
  weights: np.ndarray,
  planted: np.ndarray,
) -> MetaTask:
  """Filled up to the shape with absent sources and abilities."""
  missing = shape.max_sources - len(names)
  unweighted = shape.max_abilities - len(weights)
  padded = np.concatenate([abilities_of, np.repeat(abilities_of[:1], unweighted, axis=0)])
  return MetaTask(
    source=np.asarray([pools.names.index(name) for name in names] + [0] * missing, np.int32),
    source_mask=np.asarray([1.0] * len(names) + [0.0] * missing, np.float32),
    ability=padded.astype(np.float32),
    ability_weight=np.pad(weights / weights.sum(), (0, unweighted)).astype(np.float32),
    budget=np.float32(rng.uniform(shape.min_budget, 1.0)),
    is_corrupted=np.asarray([float(name.endswith("/corrupted")) for name in names] + [0.0] * missing, np.float32),
    planted=np.pad(planted, (0, missing)).astype(np.float32),
  )


def from_rows(
  source_rows: Mapping[str, tokens.Rows] | Sequence[tuple[str, tokens.Rows]],
  ability_rows: Mapping[str, tokens.Rows] | Sequence[tuple[str, tokens.Rows]],
  weights: Sequence[float] | np.ndarray,
  shape: Shape = Shape(),
  num_rows: int = 128,
  budget: float = 1.0,
) -> tuple[Pools, MetaTask]:
  """A task of one's own as pools, one for each source and each ability, and the one task on them.

  Its features mean what those of the training tasks do only where `num_rows` is the same as theirs.

  Args:
    source_rows: training rows of each source by its name, or pairs of both.
    ability_rows: held-out rows of each ability, likewise; they stand for validation and test alike.
    weights: of each ability, at least 0, of any sum above 0; an ability of weight 0 counts as absent.
    shape: of the tasks that the meta-learner is for.
    num_rows: of each pool; evenly spaced ones of more rows, and fewer are repeated.
    budget: part of the largest budget.

  Raises:
    InputError: fewer than two sources or no ability, more than the shape holds, a name that repeats, nothing to learn
      in the rows of one, rows of different lengths, weights or a budget out of range.
  """
  train, held_out = (
    _named(rows, kind, most)
    for rows, kind, most in ((source_rows, "source", shape.max_sources), (ability_rows, "ability", shape.max_abilities))
  )
  if len(train) < 2:
    raise errors.InputError(f"The task has one source only, {next(iter(train))!r}: there is no mixture to predict.")
  lengths = {name: rows.tokens.shape[1] for part in (train, held_out) for name, rows in part.items()}
  for name, length in lengths.items():
    if length != next(iter(lengths.values())):
      first = next(iter(lengths))
      raise errors.InputError(f"Rows of {name!r} are {length} tokens long and those of {first!r} {lengths[first]}.")
  values = np.asarray(weights, np.float64)
  if values.shape != (len(held_out),) or not np.all(np.isfinite(values) & (values >= 0)) or not values.sum() > 0:
    raise errors.InputError(f"Weights {values.tolist()} must be {len(held_out)} numbers of at least 0, not all 0.")
  if not shape.min_budget <= budget <= 1:
    raise errors.InputError(
      f"The task's budget is {budget:.3g} times the largest of the meta-learner's, which is trained for "
      f"{shape.min_budget:g} to 1."
    )
  thinned = lambda part: {name: _spread(rows, num_rows) for name, rows in part.items()}
  abilities = stack_rows(thinned(held_out), num_rows)
  pools = Pools(stack_rows(thinned(train), num_rows), abilities, abilities, tuple(train), tuple(held_out))
  found = _task(
    np.random.default_rng(0), pools, shape, list(train), np.eye(len(held_out)), values, np.zeros(len(train))
  )
  own: Any = {"budget": np.float32(budget), "is_corrupted": np.zeros(shape.max_sources, np.float32)}
  return pools, dataclasses.replace(found, **own)


def _named(
  rows: Mapping[str, tokens.Rows] | Sequence[tuple[str, tokens.Rows]], kind: str, most: int
) -> dict[str, tokens.Rows]:
  """Sources or abilities by name, checked."""
  pairs = list(rows.items() if isinstance(rows, Mapping) else rows)
  plural = {"source": "sources", "ability": "abilities"}[kind]
  if not pairs:
    raise errors.InputError(f"The task has no {kind}: name at least one with its examples.")
  repeated = [name for number, (name, _) in enumerate(pairs) if name in [other for other, _ in pairs[:number]]]
  if repeated:
    raise errors.InputError(f"The task names the {kind} {repeated[0]!r} more than once.")
  if len(pairs) > most:
    raise errors.InputError(f"The task has {len(pairs)} {plural}; the meta-learner is for at most {most}.")
  for name, found in pairs:
    if not found.loss_mask.any():
      raise errors.InputError(f"The {kind} {name!r} has no data: none of its rows has a token to learn.")
  return dict(pairs)


def build_pools(length: int, num_rows: int, seed: int, also_held_out: Sequence[str] = ()) -> Pools:
  """Pools of every code and of the planted family.

  Args:
    length: tokens in a row.
    num_rows: rows of each pool.
    seed: of the examples.
    also_held_out: suites of `BASE` that get held-out pools too, so that a task can ask what is forgotten of them.
  """
  tokenizer = tokens.char_tokenizer()
  num_examples = 6 * num_rows  # as many as stand in so many rows, or nearly
  suites = [suite for part in FAMILIES.values() for suite in part]

  def rows(examples, corruption="none"):
    spec = {"examples": examples, "corruption": corruption, "seed": seed}
    return sources.load_rows(spec, tokenizer, length, where="procedural examples")

  train: dict[str, tokens.Rows] = {}
  held_out: dict[str, dict[str, tokens.Rows]] = {"validation": {}, "test": {}}
  for suite in suites:
    examples = codebooks.generate(suite, num_examples, seed, "train")
    train[f"{suite}/clean"] = rows(examples)
    train[f"{suite}/redundant"] = rows(examples[:_REDUNDANT_EXAMPLES], "redundant")
    train[f"{suite}/corrupted"] = rows(examples, "shuffle")
    for part, found in held_out.items():
      found[suite] = rows(codebooks.generate(suite, num_examples, seed, part))
  for suite in BASE:
    train[f"{suite}/clean"] = rows(codebooks.generate(suite, num_examples, seed, "train"))
  for suite in also_held_out:
    for part, found in held_out.items():
      found[suite] = rows(codebooks.generate(suite, num_examples, seed, part))
  for answer in range(NUM_PLANTED):
    train[f"planted/{answer}"] = rows(_planted(answer, num_examples, [seed, 0, answer]))
    for number, found in enumerate(held_out.values()):
      found[f"planted/{answer}"] = rows(_planted(answer, num_examples, [seed, 1 + number, answer]))
  return Pools(
    train=stack_rows(train, num_rows),
    validation=stack_rows(held_out["validation"], num_rows),
    test=stack_rows(held_out["test"], num_rows),
    names=tuple(train),
    ability_names=tuple(held_out["test"]),
    families=FAMILIES,
  )


def _planted(answer: int, num_examples: int, seed: Sequence[int]) -> list[dict[str, str]]:
  """Prompts that are alike in every planted source, and this source's answer to all of them."""
  letters = np.random.default_rng(list(seed)).choice(list("qwxyz"), size=num_examples)
  return [{"prompt": f"?{letter}:", "completion": "abcdefgh"[answer]} for letter in letters]


def stack_rows(pools: Mapping[str, tokens.Rows], num_rows: int) -> dict[str, jax.Array]:
  """The pools' first `num_rows` rows, fields `[num_pools, num_rows, length]`; a pool with fewer repeats its own."""
  found = {}
  for name in ("tokens", "loss_mask", "segment_ids", "positions"):
    arrays = [getattr(rows, name) for rows in pools.values()]
    found[name] = jnp.asarray(np.stack([array[np.arange(num_rows) % len(array)] for array in arrays]))
  return found


def _spread(rows: tokens.Rows, num_rows: int) -> tokens.Rows:
  """At most `num_rows` rows, from the whole: a file may be in some order."""
  if len(rows.tokens) <= num_rows:
    return rows
  return rows.take(np.arange(num_rows) * len(rows.tokens) // num_rows)
