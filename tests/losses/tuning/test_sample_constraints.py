"""Feasible learning against NumPy, its fixed points, its state, and the worst loss on a toy."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch

from trimtab.errors import UsageError
from trimtab.losses import FeasibleLearning


@pytest.mark.parametrize("price", [None, 2.0])
def test_equals_numpy(price):
    generator = np.random.default_rng(0)
    feasible = FeasibleLearning(6, epsilon=0.4, dual_lr=0.3, price=price, initial=0.2)
    multipliers = np.full(6, 0.2)
    for _ in range(20):
        index, losses = generator.permutation(6)[:4], generator.random(4)
        feasible.ascend(torch.tensor(losses), torch.tensor(index))
        for i, loss in zip(index, losses, strict=True):
            relax = 0.0 if price is None else multipliers[i] / price
            multipliers[i] = max(0.0, multipliers[i] + 0.3 * (loss - 0.4 - relax))
        np.testing.assert_allclose(feasible.multipliers.numpy(), multipliers, rtol=1e-5, atol=1e-7)
        found = feasible(torch.tensor(losses), torch.tensor(index))
        assert float(found) == pytest.approx(np.mean(multipliers[index] * (losses - 0.4)), rel=1e-4, abs=1e-7)


def test_constant_multipliers_are_the_plain_mean():
    feasible = FeasibleLearning(4, epsilon=0.5, dual_lr=0.0, initial=1.0)
    losses = torch.tensor([0.1, 2.0, 0.6], requires_grad=True)
    index = torch.tensor([3, 0, 1])
    feasible.ascend(losses, index)
    (found,) = torch.autograd.grad(feasible(losses, index), losses)
    (expected,) = torch.autograd.grad(losses.mean(), losses)
    assert torch.equal(found, expected)


def test_multipliers_of_satisfied_samples_vanish():
    feasible = FeasibleLearning(2, epsilon=0.5, dual_lr=0.1, initial=1.0)
    for _ in range(50):
        feasible.ascend(torch.tensor([0.2, 0.9]), torch.tensor([0, 1]))
    assert feasible.multipliers.tolist() == pytest.approx([0.0, 3.0])


def test_resilient_multipliers_end_at_price_times_violation():
    feasible = FeasibleLearning(2, epsilon=0.5, dual_lr=0.5, price=3.0)
    index = torch.tensor([0, 1])
    for _ in range(300):
        feasible.ascend(torch.tensor([0.2, 0.9]), index)
    assert feasible.multipliers.tolist() == pytest.approx([0.0, 1.2], rel=1e-5)
    assert feasible.slack(index).tolist() == pytest.approx([0.0, 0.4], rel=1e-5)
    assert FeasibleLearning(2, epsilon=0.5).slack(index).tolist() == [0.0, 0.0]


def test_a_loss_that_is_not_finite_leaves_its_multiplier():
    feasible = FeasibleLearning(2, epsilon=0.5, initial=1.0)
    feasible.ascend(torch.tensor([math.nan, math.inf]), torch.tensor([0, 1]))
    assert feasible.multipliers.tolist() == [1.0, 1.0]


def test_state_is_saved_and_loaded():
    feasible = FeasibleLearning(3, epsilon=0.5)
    feasible.ascend(torch.tensor([0.9]), torch.tensor([1]))
    file = io.BytesIO()
    torch.save(feasible.state_dict(), file)
    file.seek(0)
    other = FeasibleLearning(3, epsilon=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.multipliers, feasible.multipliers)


def test_worst_loss_is_lower_than_under_the_mean():
    """A line through nine points on a line and one off it: the mean sacrifices that one, the bound does not."""
    x = torch.linspace(-1, 1, 10)
    y = x.clone()
    y[-1] = -1.0

    def train(feasible):
        weight, index = torch.zeros(2, requires_grad=True), torch.arange(10)
        for _ in range(1500):
            losses = (weight[0] * x + weight[1] - y).square()
            if feasible is not None:
                feasible.ascend(losses, index)
            loss = losses.mean() if feasible is None else feasible(losses, index)
            (gradient,) = torch.autograd.grad(loss, weight)
            weight = (weight - 0.1 * gradient).detach().requires_grad_()
        return (weight[0] * x + weight[1] - y).detach().square()

    plain, bounded = train(None), train(FeasibleLearning(10, epsilon=1.2, dual_lr=0.05))
    assert float(plain.max()) > 1.6
    assert float(bounded.max()) < 1.25
    assert float(bounded.mean()) > float(plain.mean())  # what it costs


def test_options_and_shapes_are_checked():
    with pytest.raises(UsageError, match="samples must be a whole number"):
        FeasibleLearning(0, epsilon=0.1)
    with pytest.raises(UsageError, match="price must be above 0"):
        FeasibleLearning(2, epsilon=0.1, price=0)
    with pytest.raises(UsageError, match=r"losses must be \[B\]"):
        FeasibleLearning(2, epsilon=0.1)(torch.zeros(2), torch.zeros(2))
