"""RAdam against the paper's algorithm, torch's and the authors' rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import RAdam
from trimtab.optim.adaptive.radam import rectification
from trimtab.testing import OptimizerTestCase

_SETTINGS = [
    {"lr": 1e-3},
    {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1},
    {"lr": 3e-2, "betas": (0.9, 0.9999), "weight_decay": 0.01},
    {"lr": 1e-3, "betas": (0.9, 0.5)},  # rho_inf = 3: never rectified
]


class TestRAdam(OptimizerTestCase):
    def optimizer(self, params, **options):
        return RAdam(params, **{"lr": self.lr, "weight_decay": 0.01, "betas": (0.9, 0.99), **options})


def test_rectification_in_closed_form():
    # beta2 = 0.5 has rho_inf = 3, so no variance ever; beta2 = 0.9 has rho_inf = 19, and rho_t by hand:
    # rho_5 = 19 - 10 * 0.59049 / 0.40951 = 4.58057...
    assert rectification(100, 0.5, "paper") is None
    rho = 19 - 10 * 0.9**5 / (1 - 0.9**5)
    assert rho == pytest.approx(4.58057, abs=1e-5)
    r = math.sqrt((rho - 4) * (rho - 2) * 19 / ((19 - 4) * (19 - 2) * rho))
    assert rectification(5, 0.9, "paper") == pytest.approx(r, rel=1e-12)
    assert rectification(5, 0.9, "code") is None
    assert [rectification(t, 0.999, "paper") is None for t in (4, 5)] == [True, False]
    assert [rectification(t, 0.999, "code") is None for t in (5, 6)] == [True, False]
    # It grows to 1: the rectified step becomes Adam's.
    rs = [rectification(t, 0.999, "paper") for t in (10, 100, 1000, 100_000)]
    assert rs == sorted(rs)
    assert rs[-1] == pytest.approx(1, abs=1e-12)


def _paper(streams, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, code=False, sgd=True):
    """Algorithm 2 (with the eps and decay of the authors' code), or with `code` the rule of their class."""
    beta1, beta2 = betas
    values = [x.numpy().copy() for x in streams.start()]
    ms, vs = ([np.zeros_like(x) for x in values] for _ in range(2))
    rho_inf = 2 / (1 - beta2) - 1
    path = []
    for t, step in enumerate(streams.gradients(), start=1):
        for index, g in enumerate(step):
            g = g.numpy()
            ms[index] = beta1 * ms[index] + (1 - beta1) * g
            vs[index] = beta2 * vs[index] + (1 - beta2) * g**2
            rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
            m_hat = ms[index] / (1 - beta1**t)
            if rho >= 5 if code else rho > 4:
                r = math.sqrt(((rho - 4) * (rho - 2) * rho_inf) / ((rho_inf - 4) * (rho_inf - 2) * rho))
                update = r * m_hat * math.sqrt(1 - beta2**t) / (np.sqrt(vs[index]) + eps)
            elif sgd:
                update = m_hat
            else:
                continue
            values[index] = values[index] * (1 - lr * weight_decay) - lr * update
        path.append([torch.tensor(x) for x in values])
    return path


@pytest.mark.parametrize("options", _SETTINGS, ids=str)
def test_equals_the_papers_loop(streams, options):
    ours = streams.run(lambda params: RAdam(params, **options))
    assert streams.deviation(ours, _paper(streams, **options)) < 1e-12


@pytest.mark.parametrize("sgd", [True, False])
@pytest.mark.parametrize("options", _SETTINGS[:3], ids=str)
def test_equals_the_authors_rule(streams, options, sgd):
    ours = streams.run(lambda params: RAdam(params, follow="code", degenerated_to_sgd=sgd, **options))
    assert streams.deviation(ours, _paper(streams, code=True, sgd=sgd, **options)) < 1e-12


@pytest.mark.parametrize("options", _SETTINGS, ids=str)
def test_equals_torch(streams, options):
    ours = streams.run(lambda params: RAdam(params, follow="code", **options))
    theirs = streams.run(
        lambda params: torch.optim.RAdam(params, decoupled_weight_decay=True, foreach=False, **options)
    )
    assert streams.deviation(ours, theirs) < 1e-12


def test_steps_before_the_threshold_leave_weights_alone():
    p = nn.Parameter(torch.ones(2))
    optimizer = RAdam([p], lr=0.1, weight_decay=0.5, follow="code", degenerated_to_sgd=False)
    moved = []
    for _ in range(7):
        before = p.detach().clone()
        p.grad = torch.ones(2)
        optimizer.step()
        moved.append(bool((p != before).any()))
    assert moved == [False] * 5 + [True] * 2


def test_refuses():
    for options, text in (({"follow": "torch"}, "unknown source"), ({"eps": -1.0}, "eps must be")):
        with pytest.raises(UsageError, match=text):
            RAdam([nn.Parameter(torch.ones(1))], lr=0.1, **options)
