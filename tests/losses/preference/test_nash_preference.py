"""DNO against NumPy, its minimiser, and cyclic preferences, which lead it to a mixture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.errors import UsageError
from trimtab.losses import dno_loss, dpo_loss
from trimtab.testing import PreferenceLossTestCase


class TestDNOPractical(PreferenceLossTestCase):
    loss = staticmethod(dno_loss)
    scores = ("policy_first", "policy_second", "last_first", "last_second")


class TestDNO(TestDNOPractical):
    def arguments(self, dtype=torch.float64):
        rates = torch.rand(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return {**super().arguments(dtype), "win_rate_first": rates[0], "win_rate_second": rates[1]}


def test_equals_numpy():
    generator = np.random.default_rng(0)
    (p1, p2, t1, t2), (r1, r2) = generator.normal(-5, 2, (4, 7)), generator.random((2, 7))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    h = 0.3 * (np.log(np.exp(p1) / np.exp(t1)) - np.log(np.exp(p2) / np.exp(t2)))
    expected = -sigmoid(r1 - r2) * np.log(sigmoid(h)) - sigmoid(r2 - r1) * np.log(sigmoid(-h))
    found = dno_loss(
        *map(torch.tensor, (p1, p2, t1, t2)),
        win_rate_first=torch.tensor(r1),
        win_rate_second=torch.tensor(r2),
        eta=0.3,
        reduction="none",
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-11)


def test_without_win_rates_it_is_dpo():
    scores = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dno_loss(*scores, eta=0.3), dpo_loss(*scores, beta=0.3))


def _round(last, rates, eta):
    """Minimise the loss over all pairs of arms."""
    logits = last.clone().requires_grad_()
    first, second = torch.combinations(torch.arange(len(last))).T
    optimizer = torch.optim.LBFGS([logits], max_iter=30, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        policy = torch.log_softmax(logits, 0)
        loss = dno_loss(
            *(policy[first], policy[second], last[first], last[second]),
            win_rate_first=rates[first],
            win_rate_second=rates[second],
            eta=eta,
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.log_softmax(logits.detach(), 0)


def test_minimiser_is_one_step_of_policy_iteration():
    last = torch.log_softmax(torch.tensor([0.5, 0.0, 1.0, -1.0], dtype=torch.float64), 0)
    rates = torch.tensor([0.2, 0.6, 0.5, 0.9], dtype=torch.float64)
    expected = torch.log_softmax(last + rates / 0.4, 0)
    torch.testing.assert_close(_round(last, rates, 0.4), expected, rtol=1e-5, atol=1e-6)


def test_cyclic_preferences_lead_to_the_nash_mixture():
    """Skewed rock-paper-scissors, whose Nash policy is (1/2, 1/4, 1/4): the mean of the rounds' policies nears it."""
    beats = torch.tensor([[0.5, 0.3, 0.7], [0.7, 0.5, 0.1], [0.3, 0.9, 0.5]], dtype=torch.float64)
    nash = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    torch.testing.assert_close(beats @ nash, torch.full((3,), 0.5, dtype=torch.float64))
    policy = torch.log_softmax(torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), 0)
    total = torch.zeros(3, dtype=torch.float64)
    for _ in range(150):
        total += policy.exp()
        policy = _round(policy, beats @ policy.exp(), eta=2.0)
    mean = total / 150
    # The best answer to the mean policy wins by hardly more than a half; that to the first policy wins 0.7 of the time.
    assert float((beats @ mean).max()) < 0.52
    # A reward that explains the preferences' means best has a single best arm, which loses to another.
    best = int(beats.mean(1).argmax())
    assert float(beats[:, best].max()) >= 0.7


def test_win_rates_are_checked():
    zero, rate = torch.zeros(2), torch.tensor([0.2, 1.2])
    with pytest.raises(UsageError, match="win rates come in pairs"):
        dno_loss(zero, zero, zero, zero, win_rate_first=zero)
    with pytest.raises(UsageError, match="win_rate_first must hold a rate"):
        dno_loss(zero, zero, zero, zero, win_rate_first=rate, win_rate_second=zero)
