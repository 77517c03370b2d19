"""The continual-learning numbers on matrices worked out by hand, and the bootstrap against the normal interval."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from mftjax import metrics
from mftjax.errors import InputError


def test_by_hand():
  result = metrics.continual([[0.8, 0.2, 0.1], [0.9, 0.7, 0.3], [0.5, 0.6, 0.9]], baseline=[0.0, 0.1, 0.2])
  assert result.average_accuracy == pytest.approx((0.5 + 0.6 + 0.9) / 3)
  assert result.backward_transfer == pytest.approx(((0.5 - 0.8) + (0.6 - 0.7)) / 2)
  assert result.forward_transfer == pytest.approx(((0.2 - 0.1) + (0.3 - 0.2)) / 2)
  assert result.forgetting == pytest.approx(((0.9 - 0.5) + (0.7 - 0.6)) / 2)  # 0.9 is the best, not the diagonal
  assert result.plasticity == pytest.approx((0.8 + 0.7 + 0.9) / 3)


def test_losses_by_hand():
  result = metrics.continual_loss([[1.0, 3.0, 4.0], [0.5, 1.5, 3.5], [2.0, 1.25, 0.75]], baseline=[5.0, 4.0, 4.0])
  assert result.average_loss == pytest.approx((2.0 + 1.25 + 0.75) / 3)
  assert result.backward_transfer == pytest.approx(((1.0 - 2.0) + (1.5 - 1.25)) / 2)  # a loss that rose counts against
  assert result.forward_transfer == pytest.approx(((4.0 - 3.0) + (4.0 - 3.5)) / 2)
  assert result.forgetting == pytest.approx(((2.0 - 0.5) + (1.25 - 1.5)) / 2)  # from the lowest before the last task
  assert result.plasticity == pytest.approx((1.0 + 1.5 + 0.75) / 3)
  assert metrics.continual_loss([[1.0, 3.0], [1.0, 1.0]]).forward_transfer == -3.0  # no baseline


@hypothesis.given(
  hnp.arrays(np.float64, (4, 4), elements=st.floats(0, 1)), hnp.arrays(np.float64, (4,), elements=st.floats(0, 1))
)
def test_losses_are_the_accuracies_of_what_is_left(accuracy, baseline):
  of_accuracy = metrics.continual(accuracy, baseline)
  of_loss = metrics.continual_loss(1 - accuracy, 1 - baseline)
  for name in ("backward_transfer", "forward_transfer", "forgetting"):
    assert of_loss[name] == pytest.approx(of_accuracy[name], abs=1e-12)
  assert of_loss.average_loss == pytest.approx(1 - of_accuracy.average_accuracy)
  assert of_loss.plasticity == pytest.approx(1 - of_accuracy.plasticity)


def test_forgetting_counts_the_best_before_the_last_task():
  # Task 0 improves by the last task: its forgetting is negative, as in Chaudhry et al. (2018).
  result = metrics.continual([[0.2, 0.0], [0.6, 0.5]])
  assert result.forgetting == pytest.approx(-0.4)
  assert result.backward_transfer == pytest.approx(0.4)
  assert result.forward_transfer == 0.0


def test_one_task_and_mapping():
  result = metrics.continual([[0.4]], baseline=[0.3])
  assert dict(result) == {
    "average_accuracy": 0.4,
    "backward_transfer": 0.0,
    "forward_transfer": 0.0,
    "forgetting": 0.0,
    "plasticity": 0.4,
  }
  assert dict(metrics.continual_loss([[0.4]], baseline=[0.9])) == {
    "average_loss": 0.4,
    "backward_transfer": 0.0,
    "forward_transfer": 0.0,
    "forgetting": 0.0,
    "plasticity": 0.4,
  }
  assert result["average_accuracy"] == 0.4
  with pytest.raises(KeyError):
    result["keys"]
  with pytest.raises(AttributeError):
    result.forgetting = 1.0


@hypothesis.given(hnp.arrays(np.float64, (4, 4), elements=st.floats(0, 1)))
def test_forgetting_bounds_backward_transfer(accuracy):
  result = metrics.continual(accuracy)
  assert result.forgetting >= -result.backward_transfer - 1e-12
  learnt = np.diagonal(accuracy)
  by_loop = np.mean([accuracy[3, task] - learnt[task] for task in range(3)])
  assert result.backward_transfer == pytest.approx(by_loop)


@pytest.mark.parametrize("bad", [[[1.0, 2.0]], [], [[float("nan")]], [1.0]])
def test_refuses_matrices(bad):
  with pytest.raises(InputError, match="accuracy"):
    metrics.continual(bad)
  with pytest.raises(InputError, match="loss"):
    metrics.continual_loss(bad)


def test_refuses_baseline():
  with pytest.raises(InputError, match="baseline"):
    metrics.continual([[1.0]], baseline=[0.0, 0.0])
  with pytest.raises(InputError, match="baseline"):
    metrics.continual_loss([[1.0]], baseline=[float("inf")])


def test_bootstrap_matches_the_normal_interval():
  values = np.random.default_rng(1).normal(3.0, 2.0, 400)
  half = 1.96 * values.std() / np.sqrt(400)
  low, high = metrics.bootstrap_interval(values)
  assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
  assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
  narrow = metrics.bootstrap_interval(values, level=0.5)
  assert low < narrow[0] < narrow[1] < high


def test_bootstrap_is_deterministic_and_degenerate():
  values = [0.0, 1.0, 1.0, 0.0, 1.0]
  assert metrics.bootstrap_interval(values, seed=4) == metrics.bootstrap_interval(values, seed=4)
  assert metrics.bootstrap_interval([2.5]) == (2.5, 2.5)


@pytest.mark.parametrize(
  ("values", "level"), [([], 0.95), ([[1.0]], 0.95), ([float("inf")], 0.95), ([1.0], 1.0), ([1.0], 0.0)]
)
def test_bootstrap_refuses(values, level):
  with pytest.raises(InputError):
    metrics.bootstrap_interval(values, level)
