"""SPAM against the paper's algorithm, the authors' rule and pytorch_optimizer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import SPAM, AdamW, Chain, adam, spike_clip
from trimtab.testing import OptimizerTestCase

_SETTINGS = [
    {"lr": 1e-3, "threshold": 30.0},  # no reset within the run
    {"lr": 1e-2, "interval": 40, "warmup": 15, "clip_after": 10, "threshold": 20.0, "weight_decay": 0.1},
    {"lr": 1e-2, "interval": 30, "warmup": 50, "clip_after": 5, "threshold": 5000.0, "betas": (0.8, 0.99), "eps": 1e-3},
]
_PAPER = {"betas": (0.9, 0.999), "eps": 1e-6, "threshold": 5000.0, "interval": 500, "warmup": 150, "clip_after": 20}


class TestSPAM(OptimizerTestCase):
    def optimizer(self, params, **options):
        return SPAM(
            params, **{"lr": self.lr, "interval": 7, "warmup": 3, "clip_after": 2, "weight_decay": 0.01, **options}
        )


def test_a_reset_forgets_squares_that_overflowed():
    p = nn.Parameter(torch.ones(4))
    optimizer = SPAM([p], interval=4)
    for step in range(6):
        p.grad = torch.ones(4)
        p.grad[0] = 1e25 if step == 1 else 1.0
        optimizer.step()
    assert p.isfinite().all()
    assert torch.equal(optimizer.state[p]["exp_avg_sq"], optimizer.state[p]["exp_avg_sq"][1].expand(4))


class TestSparseSPAM(OptimizerTestCase):
    elementwise = False

    def optimizer(self, params, **options):
        sparse = {"lr": self.lr, "density": 0.5, "interval": 7, "warmup": 2}
        return SPAM(params, **{**sparse, **options})

    # Entries without moments stay.
    test_odd_shapes = None


def _oracle(streams, *, code, lr, weight_decay=0.0, **options):
    """Algorithm 1 in numpy, dense; with `code`, what the authors' class computes."""
    o = {**_PAPER, **options}
    beta1, beta2 = o["betas"]
    values = [x.numpy().copy() for x in streams.start()]
    ms, vs = ([np.zeros_like(x) for x in values] for _ in range(2))
    path, since = [], 0
    for t, step in enumerate(streams.gradients(), start=1):
        reset = t % o["interval"] == 0
        since = 1 if reset else since + 1
        after = t % o["interval"]
        scale = 1.0
        if t >= o["interval"] and after < o["warmup"]:
            scale = 1 - 0.99 * (1 + math.cos(math.pi * after / (o["warmup"] + 1))) / 2
        for i, g in enumerate(step):
            g = g.numpy().copy()
            if reset:
                ms[i], vs[i] = np.zeros_like(g), np.zeros_like(g)
            if t >= o["clip_after"] and after >= o["clip_after"]:
                spikes = g**2 > o["threshold"] * vs[i]
                g = np.where(spikes, np.sign(g) * np.sqrt(o["threshold"] * vs[i]), g)
            ms[i] = beta1 * ms[i] + (1 - beta1) * g
            vs[i] = beta2 * vs[i] + (1 - beta2) * g**2
            if code:
                size = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
                values[i] = values[i] - scale * size * ms[i] / (np.sqrt(vs[i]) + o["eps"])
                values[i] = values[i] - lr * weight_decay * values[i]
            else:
                m_hat, v_hat = ms[i] / (1 - beta1**since), vs[i] / (1 - beta2**since)
                values[i] = values[i] * (1 - lr * weight_decay) - lr * scale * m_hat / (np.sqrt(v_hat) + o["eps"])
        path.append([torch.tensor(x) for x in values])
    return path


@pytest.mark.parametrize("options", _SETTINGS, ids=str)
def test_equals_the_papers_loop(streams, options):
    ours = streams.run(lambda params: SPAM(params, **options))
    assert streams.deviation(ours, _oracle(streams, code=False, **options)) < 1e-12


@pytest.mark.parametrize("options", _SETTINGS, ids=str)
def test_equals_the_authors_rule(streams, options):
    ours = streams.run(lambda params: SPAM(params, follow="code", **options))
    assert streams.deviation(ours, _oracle(streams, code=True, **options)) < 1e-12


def test_equals_pytorch_optimizer_without_a_reset(streams):
    # With one, its warm-up is a step ahead of the authors' and its bias correction counts on, as theirs.
    peer = pytest.importorskip("pytorch_optimizer")
    ours = streams.run(lambda params: SPAM(params, lr=1e-2, threshold=30.0, weight_decay=0.1, follow="code"))
    theirs = streams.run(
        lambda params: peer.SPAM(params, lr=1e-2, threshold=30, weight_decay=0.1, foreach=False, update_proj_gap=500)
    )
    assert streams.deviation(ours, theirs) < 1e-12


def test_warm_up_after_a_reset(streams):
    # A constant gradient makes every step of Adam 1: what is left is the warm-up.
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = SPAM([p], lr=1.0, interval=10, warmup=4, eps=0.0)
    steps = []
    for _ in range(16):
        before = float(p.detach())
        p.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
        steps.append(before - float(p.detach()))
    warm = [1 - 0.99 * (1 + math.cos(math.pi * j / 5)) / 2 for j in range(4)]
    assert warm[0] == pytest.approx(0.01)
    assert steps == pytest.approx([1.0] * 9 + warm + [1.0] * 3, abs=1e-12)


def test_a_spike_is_clipped_to_the_bound():
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = SPAM([p], lr=0.1, betas=(0.0, 0.5), threshold=4.0, clip_after=3)
    for gradient in ([1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1000.0, -1.0, 5.0]):
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    # v = 3/4 before: the spike counts sqrt(4 * 3/4) = sqrt(3), -1 passes, and what has no history passes too.
    torch.testing.assert_close(
        optimizer.state[p]["exp_avg"], torch.tensor([math.sqrt(3), -1.0, 5.0], dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_an_entry_without_history_can_learn():
    moved = {}
    for follow in ("paper", "code"):
        p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = SPAM([p], lr=0.1, follow=follow)
        for step in range(40):
            p.grad = torch.full((1,), float(step >= 25), dtype=torch.float64)
            optimizer.step()
        moved[follow] = float(p.detach())
    assert moved["paper"] < -0.1
    assert moved["code"] == 0.0


def test_density_updates_a_random_part():
    matrix, vector = nn.Parameter(torch.zeros(40, 50)), nn.Parameter(torch.zeros(50))
    optimizer = SPAM([matrix, vector], lr=1e-3, density=0.25, interval=10, warmup=0)
    touched = []
    for _ in range(20):
        before = matrix.detach().clone()
        matrix.grad, vector.grad = torch.ones(40, 50), torch.ones(50)
        optimizer.step()
        touched.append(matrix.detach() != before)
    assert all(int(mask.sum()) == 500 for mask in touched)
    assert all(torch.equal(mask, touched[0]) for mask in touched[:9])
    assert all(torch.equal(mask, touched[9]) for mask in touched[9:19])
    # Two random quarters share a quarter of their entries: 125 of 500, give or take 5 standard deviations of 8.4.
    assert abs(int((touched[0] & touched[9]).sum()) - 125) < 42
    assert optimizer.state[matrix]["exp_avg"].shape == (500,)
    assert (vector != 0).all()


@pytest.mark.parametrize("follow", ["paper", "code"])
def test_density_is_adam_on_the_part(streams, follow):
    # Between resets, the drawn entries follow the dense rule and the rest decays, or in the authors' code does not.
    shape = ((12, 10),)
    options = {"lr": 1e-2, "follow": follow, "threshold": 30.0}
    dense = streams.run(lambda params: SPAM(params, **options), shape)
    sparse = streams.run(lambda params: SPAM(params, density=0.3, weight_decay=0.0, **options), shape)
    part = sparse[-1][0] != streams.start(shape)[0]
    assert int(part.sum()) == 36
    torch.testing.assert_close(sparse[-1][0][part], dense[-1][0][part], rtol=0, atol=1e-12)
    decayed = streams.run(lambda params: SPAM(params, density=0.3, weight_decay=0.5, **options), shape)
    kept = 1.0 if follow == "code" else (1 - 1e-2 * 0.5) ** 130
    torch.testing.assert_close(decayed[-1][0][~part], kept * streams.start(shape)[0][~part], rtol=1e-12, atol=0)


def test_without_its_parts_it_is_adam(streams):
    ours = streams.run(lambda params: SPAM(params, lr=0.01, threshold=0.0, interval=0, eps=1e-8, weight_decay=0.1))
    theirs = streams.run(lambda params: AdamW(params, lr=0.01, weight_decay=0.1))
    assert streams.deviation(ours, theirs) < 1e-12


def test_spike_clip_before_adam_is_spam_without_resets(streams):
    clip = spike_clip(spike_threshold=30.0)
    ours = streams.run(lambda params: Chain(params, [clip, adam(eps=1e-6)], lr=0.01))
    theirs = streams.run(lambda params: SPAM(params, lr=0.01, threshold=30.0, interval=0))
    assert streams.deviation(ours, theirs) < 1e-12


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"density": 0.0}, "density must be in"),
        ({"density": 1.5}, "density must be in"),
        ({"clip_after": 1}, "clip_after must be a whole number"),
        ({"interval": -1}, "interval must be a whole number"),
        ({"follow": "paper2"}, "unknown source"),
    ],
)
def test_refuses(options, text):
    with pytest.raises(UsageError, match=text):
        SPAM([nn.Parameter(torch.ones(1))], lr=0.1, **options)


def test_refuses_a_density_below_the_optimizers():
    with pytest.raises(UsageError, match="pass the lower density to the optimizer"):
        SPAM([{"params": [nn.Parameter(torch.ones(2, 2))], "density": 0.5}], lr=0.1)
    SPAM([{"params": [nn.Parameter(torch.ones(2, 2))], "density": 1.0}], lr=0.1, density=0.5)
