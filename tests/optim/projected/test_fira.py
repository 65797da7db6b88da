"""Fira against the paper's algorithm 1 and, by its formulas, the authors' code."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import AdamW, Fira
from trimtab.testing import OptimizerTestCase

_SETTINGS = [
    {"rank": 2, "update_gap": 20, "weight_decay": 0.1},
    {"rank": 3, "update_gap": 7, "scale": 1.0, "gamma": 1.2, "betas": (0.8, 0.95), "eps": 1e-4},
    {"rank": 1, "update_gap": 1},
]


class TestFira(OptimizerTestCase):
    elementwise = False

    def optimizer(self, params, **options):
        return Fira(params, **{"lr": self.lr, "rank": 2, "scale": 1.0, "update_gap": 3, **options})


def _oracle(streams, *, code, rank, update_gap, lr=0.01, scale=0.25, gamma=1.01, **adam):
    """The update rules in numpy; `code` as the authors' fira_adamw.py has it, else the paper's algorithm 1."""
    (b1, b2), eps, weight_decay = adam.get("betas", (0.9, 0.999)), adam.get("eps", 1e-6), adam.get("weight_decay", 0.0)
    ends = []
    for place, start in enumerate(streams.start()):
        w, m, v, last = start.numpy().copy(), 0.0, 0.0, None
        for t, gradients in enumerate(streams.gradients()):
            g = r = gradients[place].numpy()
            if matrix := g.ndim == 2:
                if tall := g.shape[0] >= g.shape[1]:
                    g = g.T
                if t % update_gap == 0:
                    p = _directions(g, tall, rank, code)
                r = p.T @ g
            m, v = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r * r
            c1, c2 = 1 - b1 ** (t + 1), np.sqrt(1 - b2 ** (t + 1))
            n = m / (np.sqrt(v) + eps) if code else m / c1 / (np.sqrt(v) / c2 + eps)
            u = n
            if matrix:
                k = np.linalg.norm(n, axis=0) / (np.linalg.norm(r, axis=0) + 1e-8)
                s = k * (g - (scale if code else 1) * p @ r)
                size = np.linalg.norm(s)
                limit = 1.0 if last is None else gamma / max(size / (last + 1e-8), gamma)
                s, last = s * limit, size * limit
                u = scale * p @ n + s if code else scale * (p @ n + s)
                u = u.T if tall else u
            w = (w - lr * c2 / c1 * u) * (1 - lr * weight_decay) if code else w * (1 - lr * weight_decay) - lr * u
        ends.append(torch.tensor(w))
    return ends


def _directions(g, tall, rank, code):
    if not code:
        u = np.linalg.svd(g)[0][:, :rank]
        return u * np.sign(u[np.abs(u).argmax(0), range(rank)])
    single = torch.tensor(g.T if tall else g).float()
    u, _, vh = torch.linalg.svd(single, full_matrices=False)
    return (vh[:rank].T if tall else u[:, :rank]).double().numpy()


@pytest.mark.parametrize("options", _SETTINGS, ids=str)
def test_equals_the_papers_loop(streams, options):
    ours = streams.run(lambda params: Fira(params, **options))
    # The limiter's eps of 1e-8 is left out of ours: a relative 1e-8 of the rest, compounded over the steps it acts in.
    assert streams.drift(ours, _oracle(streams, code=False, **options)) < 1e-6


@pytest.mark.parametrize("options", _SETTINGS, ids=str)
def test_equals_the_authors_rule(streams, options):
    ours = streams.run(lambda params: Fira(params, follow="code", **options))
    assert streams.drift(ours, _oracle(streams, code=True, **options)) < 1e-11


def _steps(follow="paper", **options):
    """Yield the rest of each update, by difference of a step with and without the part in the subspace."""
    p = nn.Parameter(torch.zeros(5, 9, dtype=torch.float64))
    optimizer = Fira([p], lr=1.0, scale=1.0, rank=2, follow=follow, **options)
    generator = torch.Generator().manual_seed(0)
    for step in range(30):
        p.grad = torch.randn(5, 9, generator=generator, dtype=torch.float64) * (1000.0 if step in (10, 20) else 1.0)
        before = p.detach().clone()
        optimizer.step()
        basis = optimizer.state[p]["projector_left"]
        update = before - p.detach()
        yield update, basis, p.grad, float(optimizer.state[p]["rest_norm"])


def test_the_limiter_bounds_growth():
    norms = []
    for update, basis, _, kept in _steps(gamma=1.05):
        rest = update - basis @ (basis.T @ update)
        norms.append(float(rest.norm()))
        assert norms[-1] == pytest.approx(kept, rel=1e-9)
    growth = [b / a for a, b in itertools.pairwise(norms)]
    assert max(growth) <= 1.05 * (1 + 1e-9)
    assert max(growth) == pytest.approx(1.05, rel=1e-9)  # it acts in this stream


def test_the_rest_is_orthogonal_to_the_subspace():
    for update, basis, gradient, _ in _steps():
        rest = update - basis @ (basis.T @ update)
        free = gradient - basis @ (basis.T @ gradient)
        # Column by column it has the direction of the gradient's part outside the subspace.
        cosine = torch.nn.functional.cosine_similarity(rest, free, dim=0)
        torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_full_rank_is_adam():
    a, b = (nn.Parameter(torch.ones(4, 6)) for _ in range(2))
    fira, adam = Fira([a], lr=0.1, rank=4, eps=1e-8), AdamW([b], lr=0.1, weight_decay=0.0)
    for step in range(4):
        a.grad = b.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        fira.step()
        adam.step()
    assert torch.equal(a, b)


def test_the_rest_recovers_from_a_gradient_of_zero():
    p = nn.Parameter(torch.zeros(4, 6))
    optimizer = Fira([p], lr=0.1, rank=2)
    for step in range(3):
        p.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)) * (step != 1)
        optimizer.step()
    assert float(optimizer.state[p]["rest_norm"]) > 0.1


def test_memory_is_galores_and_one_number():
    p = nn.Parameter(torch.zeros(24, 40))
    optimizer = Fira([p], rank=4)
    p.grad = torch.ones(24, 40)
    optimizer.step()
    numbers = sum(x.numel() for x in optimizer.state[p].values() if isinstance(x, torch.Tensor))
    assert numbers == 24 * 4 + 2 * 40 * 4 + 1  # the paper's table 2: m r + 2 n r + 1


@pytest.mark.parametrize(
    ("options", "text"), [({"gamma": 0.9}, "gamma must be in"), ({"proj_type": "full"}, "unknown")]
)
def test_refuses(options, text):
    with pytest.raises(UsageError, match=text):
        Fira([nn.Parameter(torch.ones(3, 3))], **options)
