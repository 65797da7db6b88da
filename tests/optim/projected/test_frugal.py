"""FRUGAL against the authors' rule, its limits, and the size of its state."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import FRUGAL, AdamW, Chain, split_gradient
from trimtab.optim.transform import Transform
from trimtab.testing import OptimizerTestCase

_PROJECTIONS = ("columns", "rows", "entries", "svd", "random")


class TestBlockwise(OptimizerTestCase):
    lr = 0.003
    elementwise = False

    def optimizer(self, params, **options):
        # With this seed the larger matrix has state first, which is large enough to be kept in 8 bits.
        return FRUGAL(params, **{"lr": self.lr, "update_gap": 3, "seed": 2, **options})


class TestColumns(OptimizerTestCase):
    lr = 0.003
    elementwise = False

    def optimizer(self, params, **options):
        return FRUGAL(params, **{"lr": self.lr, "update_gap": 3, "projection": "columns", **options})


class TestStrongest(OptimizerTestCase):
    lr = 0.003
    elementwise = False
    paths = {"plain": {"foreach": False}, "foreach": {"foreach": True}}

    def optimizer(self, params, **options):
        return FRUGAL(params, **{"lr": self.lr, "update_gap": 3, "projection": "svd", **options})


class _Same(Transform):
    def update(self, u, p, state, h):
        return u


@pytest.mark.parametrize("projection", _PROJECTIONS)
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_parts_sum_to_the_gradient(projection, shape):
    p = nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    Chain([p], [split_gradient(_Same(), projection=projection, rest="sgd")], lr=1.0).step()
    if projection in ("svd", "random"):
        torch.testing.assert_close(-p.detach(), p.grad)
    else:
        assert torch.equal(-p.detach(), p.grad)


@pytest.mark.parametrize("projection", _PROJECTIONS)
def test_state_has_the_density(projection):
    p = nn.Parameter(torch.zeros(16, 24))
    optimizer = FRUGAL([p], projection=projection, density=0.25)
    p.grad = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].numel() == optimizer.state[p]["exp_avg_sq"].numel() == 0.25 * p.numel()


def test_rounding_errors_are_no_rest():
    p = nn.Parameter(torch.zeros(9, 6))
    p.grad = torch.outer(torch.randn(9, generator=torch.Generator().manual_seed(0)), torch.linspace(1, 2, 6))
    FRUGAL([p], lr=1.0, projection="svd", density=0.5, rest_scale=100.0).step()
    assert float(p.detach().abs().max()) < 10


def _matrices(count=8):
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(6, 6, generator=generator, dtype=torch.float64)) for _ in range(count)]


def _step(optimizer, params, step, skip=()):
    for place, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + place)
        p.grad = None if place in skip else torch.randn(p.shape, generator=generator, dtype=p.dtype)
    optimizer.step()


def _active(optimizer, params):
    return [place for place, p in enumerate(params) if "exp_avg" in optimizer.state[p]]


def test_blocks_have_the_density_and_change():
    params = _matrices()
    optimizer = FRUGAL(params, density=0.25, update_gap=2)
    seen = []
    for step in range(40):
        _step(optimizer, params, step)
        seen.append(_active(optimizer, params))
    assert all(len(active) == 2 for active in seen)
    assert seen[0::2] == seen[1::2]
    assert {place for active in seen for place in active} == set(range(8))


@pytest.mark.parametrize("projection", ["blockwise", "columns", "rows", "entries", "svd", "random"])
@pytest.mark.parametrize(("rest", "rest_scale"), [("sign", 1.0), ("sgd", 0.1), ("none", 1.0)])
def test_equals_the_authors_rule(projection, rest, rest_scale):
    params = _matrices(4)
    start = [p.detach().clone() for p in params]
    options = {"density": 0.5, "update_gap": 4, "rest": rest, "rest_scale": rest_scale, "weight_decay": 0.1}
    optimizer = FRUGAL(params, lr=0.01, projection=projection, **options)
    moments = {}
    for step in range(30):
        _step(optimizer, params, step)
        for place, w in enumerate(start):
            g = torch.randn(w.shape, generator=torch.Generator().manual_seed(100 * step + place), dtype=w.dtype)
            # The choice is read from the state; all that follows from it is computed here, with dense projectors.
            left, right = _projectors(projection, optimizer.state[params[place]], w.shape)
            mask = torch.ones_like(g)
            if projection == "entries":
                mask.zero_().view(-1)[optimizer.state[params[place]]["index"].long()] = 1
            full = left.T @ (g * mask) @ right
            age = step % 4 + 1
            m, v = moments.get(place, (0.0, 0.0)) if age > 1 else (0.0, 0.0)
            m, v = moments[place] = 0.9 * m + 0.1 * full, 0.999 * v + 0.001 * full**2
            adam = m / (1 - 0.9**age) / ((v / (1 - 0.999**age)).sqrt() + 1e-8)
            free = g - left @ full @ right.T
            if projection in ("columns", "rows", "entries", "blockwise"):
                free[free.abs() < 1e-14] = 0
            moved = {"sign": free.sign(), "sgd": free, "none": 0 * free}[rest]
            w.mul_(1 - 0.01 * 0.1).sub_(0.01 * (left @ adam @ right.T + rest_scale * moved))
    for p, w in zip(params, start, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-9, atol=1e-11)


def _projectors(projection, state, shape):
    m, n = (torch.eye(size, dtype=torch.float64) for size in shape)
    if projection == "blockwise":
        return (m, n) if "exp_avg" in state else (0 * m, n)
    if projection == "columns":
        return m, n[:, state["index"].long()]
    if projection == "rows":
        return m[:, state["index"].long()], n
    return (m, n) if projection == "entries" else (m, state["basis"])


@pytest.mark.parametrize("projection", ["blockwise", *_PROJECTIONS])
def test_density_one_is_adam(projection):
    ours, plain = _matrices(2), _matrices(2)
    one = FRUGAL(ours, lr=0.01, projection=projection, density=1.0, update_gap=2)
    two = AdamW(plain, lr=0.01, weight_decay=0.0)
    for step in range(6):
        _step(one, ours, step)
        _step(two, plain, step)
    assert all(torch.equal(x, y) for x, y in zip(ours, plain, strict=True))


@pytest.mark.parametrize("projection", ["blockwise", *_PROJECTIONS])
def test_density_zero_is_sign_descent(projection):
    params = _matrices(2)
    start = [p.detach().clone() for p in params]
    optimizer = FRUGAL(params, lr=0.01, projection=projection, density=0.0)
    _step(optimizer, params, 0)
    for p, w in zip(params, start, strict=True):
        torch.testing.assert_close(p.detach(), w - 0.01 * p.grad.sign())
        assert optimizer.state[p] == {"step": 1}


@pytest.mark.parametrize("projection", ["blockwise", *_PROJECTIONS])
def test_resumes_bit_exactly_across_a_choice(projection):
    params = _matrices(4)
    optimizer = FRUGAL(params, projection=projection, update_gap=4)
    for step in range(6):
        _step(optimizer, params, step)
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    others = copy.deepcopy(params)
    resumed = FRUGAL(others, projection=projection, update_gap=4)
    resumed.load_state_dict(torch.load(stream, weights_only=True))
    for step in range(6, 20):
        _step(optimizer, params, step)
        _step(resumed, others, step)
    assert all(torch.equal(x, y) for x, y in zip(params, others, strict=True))
    assert _active(optimizer, params) == _active(resumed, others)


def test_a_failed_load_changes_nothing():
    params = _matrices(4)
    optimizer = FRUGAL(params, density=0.5)
    _step(optimizer, params, 0)
    saved, idle = optimizer.state_dict(), set(optimizer.idle)
    broken = copy.deepcopy(saved)
    broken["state"] = {place: {"step": 1, "other": torch.zeros(1)} for place in range(4)}
    with pytest.raises(UsageError):
        optimizer.load_state_dict(broken)
    assert optimizer.idle == idle
    _step(optimizer, params, 1)


def test_gradients_missed_at_a_choice():
    params = _matrices(4)
    optimizer = FRUGAL(params, density=0.5, update_gap=3)
    for step in range(12):
        _step(optimizer, params, step, skip={0} if step in (3, 7) else {1, 2} if step == 6 else ())
        active = [p for p in params if p not in optimizer.idle]
        assert len(active) == 2
        assert all(("exp_avg" in optimizer.state[p]) == (p not in optimizer.idle) for p in params if p.grad is not None)
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"density": 1.5}, "density must be in"),
        ({"projection": "blocks"}, "unknown projection"),
        ({"rest": "adam"}, "unknown rule for the rest"),
        ({"rest_scale": -1.0}, "rest_scale must be in"),
        ({"update_gap": 0}, "update_gap must be"),
    ],
)
def test_refuses(options, text):
    with pytest.raises(UsageError, match=text):
        FRUGAL([nn.Parameter(torch.ones(3, 3))], **options)
