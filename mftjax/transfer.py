"""Learning rates carried to another width of the model and to another budget of the run."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mftjax import errors, sft

HIDDEN = ("attention", "mlp")  # groups of `sft.GROUPS` whose matrices grow with the width on both sides


def width_multipliers(width: float, base_width: float) -> dict[str, float]:
  """Multipliers of the learning rate by group of parameters, for a rate that was chosen at another width.

  `base_width / width` for the hidden matrices, 1 for embeddings and norms; for Adam. It is applied by the SFT step's
  own multipliers (`learning_rate_attention` and the others of `sft.DEFAULTS`), so the one rate stays as it is. A bias
  and a LoRA adapter go with their matrix there, which the source's table does not ask for. Weight decay, which is
  multiplied by the rate, shrinks along with it.

  Only the rule for the rate is taken: the source also initialises by width and divides the output by it, which a base
  model that is trained already has no place for. So it is a hypothesis here, which `loops.transfer` measures. A head's
  size is taken to stay, which leaves attention's own scale alone.

  Args:
    width: hidden size to carry the rate to, above 0.
    base_width: hidden size at which it was chosen, above 0.

  Returns:
    `learning_rate_GROUP` -> multiplier, for every group.

  Raises:
    InputError: a width that is not a positive number.

  Source: Yang et al. (2022), Tensor Programs V, Table 8 (Adam LR); it gives embeddings that are tied to the output, as
  here, the rate of input weights, and agrees with Table 3 on hidden matrices, input weights and biases.
  """
  _positive("width", [width])
  _positive("base_width", [base_width])
  return {f"learning_rate_{group}": base_width / width if group in HIDDEN else 1.0 for group in sft.GROUPS}


def to_width(values: Mapping[str, Any], width: float, base_width: float) -> dict[str, Any]:
  """Hyperparameters (`name -> scalar or array`) with `width_multipliers` times the multipliers that they have.

  Raises:
    InputError: a width that is not a positive number.
  """
  factors = width_multipliers(width, base_width)
  return {**values, **{name: values.get(name, sft.DEFAULTS[name]) * factor for name, factor in factors.items()}}


@dataclasses.dataclass(frozen=True)
class BudgetLaw:
  """`log(learning rate) = intercept + exponent * log(tokens)`, with the standard errors of the two."""

  intercept: float
  exponent: float
  intercept_error: float  # NaN of two tasks, which leave no residual
  exponent_error: float  # likewise
  spread: float  # standard deviation of log(learning rate) about the law, likewise
  num_tasks: int
  least_tokens: float  # of the tasks: beyond it and `most_tokens` the law extrapolates
  most_tokens: float


def fit_budget_law(rates: Sequence[float] | np.ndarray, tokens: Sequence[float] | np.ndarray) -> BudgetLaw:
  """Least squares over tasks, in logarithms.

  Args:
    rates: `[num_tasks]` learning rates, above 0.
    tokens: `[num_tasks]` budgets of the runs that they are for, above 0.

  Raises:
    InputError: of different lengths, a rate or a budget that is not a positive number, fewer than 2 distinct budgets.
  """
  x, y = np.asarray(tokens, np.float64), np.asarray(rates, np.float64)
  if x.ndim != 1 or x.shape != y.shape:
    raise errors.InputError(f"rates and tokens must be [num_tasks] alike, got shapes {y.shape} and {x.shape}.")
  _positive("tokens", x)
  _positive("rates", y)
  x, y = np.log(x), np.log(y)
  if np.ptp(x) < 1e-6 if len(x) else True:  # features are f32, so one budget may differ from itself by rounding
    raise errors.InputError("A law over the budget needs tasks of at least 2 distinct budgets.")
  from_mean = x - x.mean()
  squares = from_mean @ from_mean
  exponent = from_mean @ (y - y.mean()) / squares
  residual = y - y.mean() - exponent * from_mean
  freedom = len(x) - 2
  spread = math.sqrt(residual @ residual / freedom) if freedom else math.nan
  return BudgetLaw(
    intercept=float(y.mean() - exponent * x.mean()),
    exponent=float(exponent),
    intercept_error=spread * math.sqrt(1 / len(x) + x.mean() ** 2 / squares),
    exponent_error=spread / math.sqrt(squares),
    spread=spread,
    num_tasks=len(x),
    least_tokens=float(np.exp(x.min())),
    most_tokens=float(np.exp(x.max())),
  )


def rate_at(law: BudgetLaw, tokens: float) -> float:
  """The law's learning rate at a budget in tokens.

  Raises:
    InputError: a budget that is not a positive number.
  """
  _positive("tokens", [tokens])
  return math.exp(law.intercept + law.exponent * math.log(tokens))


def to_budget(law: BudgetLaw, rates: Any, tokens: Any, to_tokens: Any) -> np.ndarray:
  """`rates * (to_tokens / tokens) ** exponent`: what single tasks have of their own stays.

  Args:
    rates: learning rates for runs of `tokens`; all three are scalars or arrays that broadcast, above 0.

  Raises:
    InputError: a rate or a budget that is not a positive number.
  """
  for name, values in (("rates", rates), ("tokens", tokens), ("to_tokens", to_tokens)):
    _positive(name, values)
  ratio = np.asarray(to_tokens, np.float64) / np.asarray(tokens, np.float64)
  return np.asarray(rates, np.float64) * ratio**law.exponent


def _positive(name: str, values: Any) -> None:
  """Raises `InputError` unless all values are finite and above 0."""
  found = np.ravel(np.asarray(values, np.float64))
  wrong = found[~(np.isfinite(found) & (found > 0))]
  if len(wrong):
    raise errors.InputError(f"{name} must be positive numbers, got {wrong[0]:g}.")
