"""Adaptive gradient clipping against the paper's equation in plain loops, and timm's."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import Chain, adam, adaptive_clip
from trimtab.testing import OptimizerTestCase

SHAPES = [(4, 3), (5,), (3, 2, 2, 2), (), (1, 6)]


class TestAdaptiveClip(OptimizerTestCase):
    elementwise = False

    def optimizer(self, params, **options):
        return Chain(params, [adaptive_clip(), adam()], **{"lr": self.lr, **options})


def _parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator)) for shape in SHAPES]


def _gradients(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    scale = 1000 if step % 40 == 30 else 0.03
    for p in params:
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator) * scale


def _expected(w, g, factor, eps):
    """Equation 3, unit by unit."""
    if w.ndim < 2:
        w, g = w.reshape(1, -1), g.reshape(1, -1)
    rows = []
    for w_i, g_i in zip(w.reshape(len(w), -1).tolist(), g.reshape(len(g), -1).tolist(), strict=True):
        weight = max(math.sqrt(sum(x * x for x in w_i)), eps)
        norm = math.sqrt(sum(x * x for x in g_i))
        rows.append([x * factor * weight / norm for x in g_i] if norm / weight > factor else g_i)
    return torch.tensor(rows, dtype=w.dtype)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("factor", [0.01, 0.3])
def test_equals_the_papers_loop(factor, foreach):
    params = _parameters()
    params[1].data.zero_()
    clipped = 0
    for step in range(40):
        _gradients(params, step)
        before = [p.detach().clone() for p in params]
        Chain(params, [adaptive_clip(clip_factor=factor, clip_eps=1e-3)], lr=1.0, foreach=foreach).step()
        for p, w in zip(params, before, strict=True):
            expected = _expected(w, p.grad, factor, 1e-3).reshape(w.shape)
            torch.testing.assert_close(w - p.detach(), expected, rtol=1e-9, atol=1e-12)
            clipped += int(not torch.equal(expected, p.grad))
            p.data.copy_(w)
    assert clipped > 40


def test_equals_timm():
    if (spec := importlib.util.find_spec("timm")) is None or spec.origin is None:
        pytest.skip("timm is not installed")
    # The file alone: the package needs torchvision.
    file = spec.origin.replace("__init__.py", "utils/agc.py")
    peer = importlib.util.spec_from_file_location("timm_agc", file)
    module = importlib.util.module_from_spec(peer)
    peer.loader.exec_module(module)
    ours, theirs = _parameters(), _parameters()
    optimizer = Chain(ours, [adaptive_clip(clip_factor=0.02), adam()], lr=0.01, weight_decay=0.1)
    other = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1)
    for step in range(120):
        _gradients(ours, step)
        _gradients(theirs, step)
        module.adaptive_clip_grad(theirs, clip_factor=0.02)
        optimizer.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def test_the_head_is_not_clipped():
    p, head = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    groups = [{"params": [p], "role": "matrix"}, {"params": [head], "role": "head"}]
    optimizer = Chain(groups, [adaptive_clip()], lr=1.0)
    p.grad = head.grad = torch.full((2, 2), 5.0)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((2, 2), 0.99))
    torch.testing.assert_close(head.detach(), torch.full((2, 2), -4.0))


def test_wrong_values_are_refused():
    for name in ("clip_factor", "clip_eps"):
        with pytest.raises(UsageError, match=rf"{name} must be in \(0, inf\), got 0"):
            Chain([nn.Parameter(torch.ones(2))], [adaptive_clip(**{name: 0})])
