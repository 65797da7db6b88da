"""TAG against its equations in plain loops, torch's RMSprop, Adagrad and Adam for one task, and on opposed tasks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import TAG
from trimtab.testing import OptimizerTestCase

SHAPES = [(4, 3), (5,), (3, 2, 2), ()]


class TestTAG(OptimizerTestCase):
    elementwise = False

    def optimizer(self, params, **options):
        return TAG(params, **{"lr": self.lr, "tasks": 2, **options})


class TestTAGInSecondTask(OptimizerTestCase):
    elementwise = False

    def optimizer(self, params, **options):
        optimizer = TAG(params, **{"lr": self.lr, "tasks": 2, "base": "adam", **options})
        optimizer.set_task(1)
        return optimizer


def _parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator)) for shape in SHAPES]


def _gradients(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator) * (1000 if step % 40 == 30 else 1)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("base", ["rmsprop", "adagrad", "adam"])
def test_equals_a_plain_loop(base, foreach):
    params = _parameters()
    optimizer = TAG(params, lr=0.01, tasks=3, base=base, b=2.0, foreach=foreach)
    beta2 = 0.999 if base == "adam" else 0.99
    for i in range(len(params)):
        # One parameter at a time: tasks do not meet across parameters.
        p = _parameters()[i].detach().numpy().copy()
        mean, second = [np.zeros_like(p)] * 3, [np.zeros_like(p)] * 3
        for step in range(120):
            task, n = divmod(step, 40)
            if i == 0:
                optimizer.set_task(task)
            _gradients(params, step)
            g = params[i].grad.numpy()
            mean[task] = 0.9 * mean[task] + 0.1 * g
            second[task] = second[task] + g**2 if base == "adagrad" else beta2 * second[task] + (1 - beta2) * g**2
            total = np.zeros_like(p)
            for s in range(task + 1):
                a, b = mean[task].ravel(), mean[s].ravel()
                cosine = a @ b / math.sqrt(a @ a) / math.sqrt(b @ b)
                total += (math.exp(-2 * cosine) if task else 1.0) * second[s]
            root = np.sqrt(total)
            if base == "adam":
                g = mean[task] / (1 - 0.9 ** (n + 1))
                root = root / math.sqrt(1 - beta2 ** (n + 1))
            p = p - 0.01 * g / (root + 1e-8)
            if i == 0:
                optimizer.step()
        np.testing.assert_allclose(params[i].detach().numpy(), p, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("base", ["rmsprop", "adagrad", "adam"])
def test_one_task_is_rmsprop(base):
    ours, theirs = _parameters(), _parameters()
    optimizer = TAG(ours, lr=0.01, tasks=1, base=base)
    other = {
        "rmsprop": lambda: torch.optim.RMSprop(theirs, lr=0.01, alpha=0.99, eps=1e-8),
        "adagrad": lambda: torch.optim.Adagrad(theirs, lr=0.01, eps=1e-8),
        "adam": lambda: torch.optim.Adam(theirs, lr=0.01),
    }[base]()
    for step in range(120):
        _gradients(ours, step)
        _gradients(theirs, step)
        optimizer.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


def test_an_opposed_task_shortens_the_step():
    moved = {}
    for sign in (1.0, -1.0):
        p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        optimizer = TAG([p], lr=1.0, tasks=2, b=3.0, eps=0.0)
        p.grad = torch.full_like(p, sign)
        optimizer.step()
        optimizer.set_task(1)
        before = p.detach().clone()
        p.grad = torch.ones_like(p)
        optimizer.step()
        moved[sign] = float((before - p.detach())[0])
    # V_1 = V_2 = 0.01, and the present task's own cosine is 1.
    assert moved[1.0] == pytest.approx(1 / math.sqrt(0.01 * 2 * math.exp(-3)), rel=1e-9)
    assert moved[-1.0] == pytest.approx(1 / math.sqrt(0.01 * (math.exp(3) + math.exp(-3))), rel=1e-9)


def test_the_task_is_saved():
    params, others = _parameters(), _parameters()
    optimizer, resumed = TAG(params, tasks=2), TAG(others, tasks=2)
    for step in range(4):
        optimizer.set_task(step // 2)
        _gradients(params, step)
        optimizer.step()
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["task"] == 1
    for ps, one in ((params, optimizer), (others, resumed)):
        _gradients(ps, 9)
        one.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_wrong_values_are_refused():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(UsageError, match="task must be a whole number from 0 to 1, got 2: build TAG with more tasks"):
        TAG([p], tasks=2).set_task(2)
    with pytest.raises(UsageError, match="tasks must be a whole number, at least 1, got 0"):
        TAG([p], tasks=0)
    with pytest.raises(UsageError, match=r"unknown base of TAG 'rms'\. Did you mean 'rmsprop'"):
        TAG([p], tasks=1, base="rms")
