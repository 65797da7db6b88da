"""Schedule-Free AdamW and SGD against the paper's three sequences and the authors' package."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import Chain, ScheduleFreeAdamW, ScheduleFreeSGD, schedule_free
from trimtab.testing import OptimizerTestCase

SHAPES = [(4, 3), (5,), (3, 2, 2), ()]


class _ScheduleFreeCase(OptimizerTestCase):
    def test_schedulers_set_the_learning_rate(self):
        """At a learning rate of 0, z stays; y goes on towards it, as the average counts each step."""
        model = self._model()
        optimizer = self.optimizer(model.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 0.0)

        def z():
            return [p.detach() + optimizer.state[p]["offset"] for p in model.parameters()]

        seen = []
        for step in range(5):
            self._backward(model, step)
            optimizer.step()
            scheduler.step()
            seen.append(z())
        assert all((x != y).any() for x, y in zip(seen[0], seen[1], strict=True))
        for x, y in zip(seen[1], seen[4], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


class TestScheduleFreeAdamW(_ScheduleFreeCase):
    def optimizer(self, params, **options):
        return ScheduleFreeAdamW(params, **{"lr": self.lr, "weight_decay": 0.01, **options})


class TestScheduleFreeSGD(_ScheduleFreeCase):
    lr = 0.1
    formats = ()  # z - y is not a moment: fewer bits would lose steps

    def optimizer(self, params, **options):
        return ScheduleFreeSGD(params, **{"lr": self.lr, "warmup_steps": 2, **options})


def _parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator)) for shape in SHAPES]


def _gradients(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator) * (1000 if step % 40 == 30 else 1)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("beta1", "decay", "warmup", "r"), [(0.9, 0.0, 0, 0.0), (0.6, 0.1, 20, 0.5)])
def test_equals_the_papers_loop(beta1, decay, warmup, r, foreach):
    params = _parameters()
    optimizer = ScheduleFreeAdamW(
        params, lr=0.02, betas=(beta1, 0.95), weight_decay=decay, warmup_steps=warmup, r=r, foreach=foreach
    )
    x = [p.detach().numpy().copy() for p in params]
    z, y = [v.copy() for v in x], [v.copy() for v in x]
    second = [np.zeros_like(v) for v in x]
    total = 0.0
    for k in range(1, 121):
        _gradients(params, k)
        lr = 0.02 * (min(1.0, k / warmup) if warmup else 1.0)
        weight = k**r * lr**2
        total += weight
        c = weight / total
        for i, p in enumerate(params):
            g = p.grad.numpy()
            second[i] = 0.95 * second[i] + 0.05 * g**2
            d = g / (np.sqrt(second[i] / (1 - 0.95**k)) + 1e-8)
            z[i] = z[i] - lr * (d + decay * y[i])
            x[i] = (1 - c) * x[i] + c * z[i]
            y[i] = (1 - beta1) * z[i] + beta1 * x[i]
        optimizer.step()
    for expected in (y, x, y):
        for p, value in zip(params, expected, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), value, rtol=1e-9, atol=1e-10)
        optimizer.eval() if expected is y else optimizer.train()


def test_average_is_the_mean_of_the_iterates():
    params = _parameters()
    optimizer = ScheduleFreeSGD(params, lr=0.1, momentum=0.8)
    zs = []
    for step in range(20):
        _gradients(params, step)
        optimizer.step()
        zs.append([p.detach() + optimizer.state[p]["offset"] for p in params])
    optimizer.eval()
    for index, p in enumerate(params):
        torch.testing.assert_close(p.detach(), torch.stack([z[index] for z in zs]).mean(0), rtol=1e-9, atol=1e-10)


def _agree(ours, optimizer, theirs, other):
    other.train()
    for step in range(130):
        if step == 100:  # a learning rate that falls
            for group in optimizer.param_groups + other.param_groups:
                group["lr"] *= 0.3
        _gradients(ours, step)
        _gradients(theirs, step)
        optimizer.step()
        other.step()
        if step % 50 == 20:
            for one in (optimizer, other):
                one.eval()
            for p, q in zip(ours, theirs, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
            for one in (optimizer, other):
                one.train()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "warmup_steps": 30, "betas": (0.95, 0.99), "r": 1.0}])
@pytest.mark.parametrize("peer", ["AdamWScheduleFree", "AdamWScheduleFreeReference"])
def test_equals_schedulefree_adamw(peer, options, capsys):
    peers = pytest.importorskip("schedulefree")
    ours, theirs = _parameters(), _parameters()
    other = getattr(peers, peer)(theirs, lr=0.01, **options)
    _agree(ours, ScheduleFreeAdamW(ours, lr=0.01, **options), theirs, other)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.01, "warmup_steps": 30, "momentum": 0.7}])
def test_equals_schedulefree_sgd(options):
    peers = pytest.importorskip("schedulefree")
    ours, theirs = _parameters(), _parameters()
    _agree(ours, ScheduleFreeSGD(ours, lr=0.1, **options), theirs, peers.SGDScheduleFree(theirs, lr=0.1, **options))


def test_steps_only_in_training_mode_and_resumes_in_evaluation_mode():
    params = _parameters()
    optimizer = ScheduleFreeAdamW(params, lr=0.01)
    for step in range(3):
        _gradients(params, step)
        optimizer.step()
    optimizer.eval()
    optimizer.eval()
    at_average = [p.detach().clone() for p in params]
    with pytest.raises(UsageError, match=r"call the optimizer's train\(\)"):
        optimizer.step()
    assert all(torch.equal(p, x) for p, x in zip(params, at_average, strict=True))

    others = [nn.Parameter(x.clone()) for x in at_average]
    resumed = ScheduleFreeAdamW(others, lr=0.01)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, ps in ((optimizer, params), (resumed, others)):
        one.train()
        _gradients(ps, 7)
        one.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_wrong_values_are_refused():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(UsageError, match=r"momentum must be in \(0, 1\), got 0"):
        ScheduleFreeSGD([p], momentum=0)
    with pytest.raises(UsageError, match=r"warmup_steps must be a whole number, at least 0, got -1"):
        Chain([p], [schedule_free(warmup_steps=-1)])
