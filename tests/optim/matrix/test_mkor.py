"""MKOR against factors that are inverted outright, in float64, and its hooks, stabiliser and switch."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import MKOR, Chain, rank_one_inverse
from trimtab.testing import OptimizerTestCase
from trimtab.testing.ranks import run_ranks


class TestMKOR(OptimizerTestCase):
    elementwise = False

    def _model(self, dtype=torch.float32):
        return self._remember(super()._model(dtype))

    def _wide(self, dtype=torch.float32):
        return self._remember(super()._wide(dtype))

    def _remember(self, model):
        self.models = [*getattr(self, "models", []), model]
        return model

    def optimizer(self, params, **options):
        params = list(params)
        first = params[0] if params else None
        first = first["params"][0] if isinstance(first, dict) else first
        known = reversed(getattr(self, "models", []))
        model = next((m for m in known if any(p is first for p in m.parameters())), None)
        return MKOR(params, **{"lr": self.lr, "model": model, "factor_frequency": 2, "factor_warmup": 2, **options})


class TestMKORWithAdam(TestMKOR):
    paths = {"plain": {"foreach": False}, "foreach": {}}

    def optimizer(self, params, **options):
        return super().optimizer(params, **{"backend": "adam", **options})


def _directions(count, size, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("gamma", [0.5, 0.95, 0.999])
def test_rank_one_inverse_is_the_inverse(gamma):
    factor, inverse = torch.eye(7, dtype=torch.float64), torch.eye(7, dtype=torch.float64)
    for x in 3 * _directions(40, 7):
        factor = gamma * factor + (1 - gamma) * torch.outer(x, x)
        inverse = rank_one_inverse(inverse, x, gamma)
        torch.testing.assert_close(inverse, torch.linalg.inv(factor), rtol=1e-7, atol=1e-7)


def test_rank_one_inverse_in_float32():
    factor, inverse = torch.eye(32, dtype=torch.float64), torch.eye(32)
    for x in _directions(200, 32):
        factor = 0.95 * factor + 0.05 * torch.outer(x, x)
        inverse = rank_one_inverse(inverse, x.float(), 0.95)
    expected = torch.linalg.inv(factor)
    assert (inverse - expected).norm() < 1e-5 * expected.norm()


def test_other_formulas_are_what_they_say():
    x, gamma = _directions(1, 5)[0], 0.9
    A = torch.eye(5, dtype=torch.float64) + torch.outer(_directions(1, 5, 1)[0], _directions(1, 5, 1)[0])
    y = A @ x
    printed = gamma * A + (1 - gamma) / (gamma**2 * (1 + gamma * (1 - gamma) * x @ y)) * torch.outer(y, y)
    torch.testing.assert_close(rank_one_inverse(A, x, gamma, "paper"), printed)
    blended = torch.linalg.inv(gamma * A + (1 - gamma) * torch.eye(5, dtype=torch.float64))
    code = torch.linalg.inv(blended + torch.outer(x, x))
    torch.testing.assert_close(rank_one_inverse(A, x, gamma, "code"), code)
    exact = torch.linalg.inv(gamma * torch.linalg.inv(A) + (1 - gamma) * torch.outer(x, x))
    torch.testing.assert_close(rank_one_inverse(A, x, gamma), exact)
    assert (printed - exact).norm() > exact.norm() / 2  # the printed formula is not the inverse, by far


def _net(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)).double()


def _batch(step, size=16):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 5, generator=generator, dtype=torch.float64) + 0.5
    return x, torch.randn(size, 3, generator=generator, dtype=torch.float64)


class _Factor:
    """One factor by the paper, inverted outright."""

    def __init__(self, size):
        self.F = np.eye(size)

    def see(self, x, gamma, threshold, zeta):
        inverse = np.linalg.inv(self.F)
        if np.abs(inverse).max() > threshold:
            self.F = np.linalg.inv(zeta * inverse + (1 - zeta) * np.eye(len(x)))
        self.F = gamma * self.F + (1 - gamma) * np.outer(x, x)


@pytest.mark.parametrize("threshold", [1.2, 1e9], ids=["stabilised", "free"])
def test_equals_the_equations(threshold):
    model = _net()
    settings = {"gamma": 0.9, "threshold": threshold, "zeta": 0.8}
    optimizer = MKOR(
        model.parameters(),
        lr=0.01,
        model=model,
        momentum=0.8,
        factor_frequency=3,
        factor_warmup=4,
        weight_decay=0.1,
        **settings,
    )
    W, b, V = (p.detach().numpy().copy() for p in model.parameters())
    buffers = [np.zeros((6, 6)), np.zeros((3, 6))]
    factors = [(_Factor(6), _Factor(6)), (_Factor(3), _Factor(6))]
    for step in range(40):
        x, target = _batch(step)
        optimizer.zero_grad()
        (model(x) - target).square().sum(1).mean().backward()
        optimizer.step()

        X, Y = x.numpy(), target.numpy()
        H = np.tanh(X @ W.T + b)
        dO = 2 * (H @ V.T - Y) / len(X)
        dZ = (dO @ V) * (1 - H**2)
        ones = np.ones((len(X), 1))
        layers = [(dZ, np.hstack([X, ones])), (dO, H)]
        moves = []
        for (left, right), (d, a), buffer in zip(factors, layers, buffers, strict=True):
            G = d.T @ a
            if step < 4 or step % 3 == 0:
                left.see(d.sum(0), **settings)
                right.see(a.mean(0), **settings)
            D = np.linalg.inv(left.F) @ G @ np.linalg.inv(right.F)
            D *= np.linalg.norm(G) / np.linalg.norm(D)
            buffer[:] = 0.8 * buffer + D
            moves.append(buffer)
        keep = 1 - 0.01 * 0.1
        W, b, V = keep * W - 0.01 * moves[0][:, :-1], keep * b - 0.01 * moves[0][:, -1], keep * V - 0.01 * moves[1]
    for p, expected in zip(model.parameters(), (W, b, V), strict=True):
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-8, atol=1e-9)


def test_hooks_change_nothing():
    watched, plain = _net(), _net()
    optimizer = MKOR(watched.parameters(), model=watched)
    x, target = _batch(0)
    for model in (watched, plain):
        (model(x) - target).square().mean().backward()
    for p, q in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    with torch.no_grad():
        watched(x)
    optimizer.remove_hooks()
    assert not any(module._forward_hooks for module in watched.modules())
    before = copy.deepcopy([p.grad for p in watched.parameters()])
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(watched.parameters(), before, strict=True))


def test_is_its_back_end_without_factors():
    model, other = _net(), _net()
    ours = MKOR(model.parameters(), lr=0.05, model=model, first_order=("0", "2"), momentum=0.9)
    peer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    for step in range(120):
        x, target = _batch(step)
        for net, optimizer in ((model, ours), (other, peer)):
            optimizer.zero_grad()
            ((1000 if step == 50 else 1) * 0.01 * (net(x) - target).square().mean()).backward()
            optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


def test_micro_batches_are_one_batch():
    whole, parts = _net(), _net()
    one = MKOR(whole.parameters(), lr=0.05, model=whole)
    two = MKOR(parts.parameters(), lr=0.05, model=parts)
    for step in range(6):
        x, target = _batch(step)
        one.zero_grad()
        two.zero_grad()
        (whole(x) - target).square().mean().backward()
        for i in (0, 4):
            cut = slice(i, 4 if i == 0 else 16)
            ((parts(x[cut]) - target[cut]).square().mean() * len(x[cut]) / 16).backward()
        one.step()
        two.step()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


def test_a_refused_gradient_does_not_reach_the_factors():
    model = _net()
    optimizer = MKOR(model.parameters(), model=model, nonfinite="skip")
    x, target = _batch(0)
    (model(x) - target).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    (model(x * torch.inf) - target).square().mean().backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    optimizer.zero_grad()
    (model(x) - target).square().mean().backward()
    optimizer.step()
    assert all(v.isfinite().all() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v))


def test_ranks_average_their_directions():
    def work(rank):
        model = _net()
        optimizer = MKOR(model.parameters(), lr=0.05, model=model)
        net = nn.parallel.DistributedDataParallel(model)
        for step in range(4):
            x, target = (part[8 * rank : 8 * rank + 8] for part in _batch(step))
            optimizer.zero_grad()
            (net(x) - target).square().mean().backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    alone = _net()
    optimizer = MKOR(alone.parameters(), lr=0.05, model=alone)
    for step in range(4):
        x, target = _batch(step)
        optimizer.zero_grad()
        (alone(x) - target).square().mean().backward()
        optimizer.step()
    for values in run_ranks(work):
        for p, q in zip(values, alone.parameters(), strict=True):
            torch.testing.assert_close(p, q.detach(), rtol=1e-9, atol=1e-10)


def test_hybrid_switches_when_the_loss_stops_falling_and_remembers_it():
    model = _net()
    optimizer = MKOR(model.parameters(), model=model, hybrid=True, patience=5)
    x, target = _batch(0)

    def closure_with(value):
        def closure():
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            return torch.tensor(value)

        return closure

    for loss in (10 - 0.5 * step for step in range(12)):
        optimizer.step(closure_with(loss))
    assert optimizer.second_order
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    for _ in range(8):
        optimizer.step(closure_with(4.5))
    assert not optimizer.second_order
    inverse = optimizer.state[model[0].weight]["left_inverse"].clone()
    before = model[2].weight.detach().clone()
    optimizer.step(closure_with(4.5))
    assert torch.equal(inverse, optimizer.state[model[0].weight]["left_inverse"])
    assert (model[2].weight != before).any()
    saved.seek(0)
    resumed = MKOR(model.parameters(), model=model, hybrid=True, patience=5)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    for number in range(8):
        assert resumed.second_order == (number < 8)
        resumed.observe(4.5)
    assert not resumed.second_order


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.0}, "gamma must be in"),
        ({"zeta": 1.5}, "zeta must be in"),
        ({"threshold": 0.0}, "threshold must be in"),
        ({"factor_frequency": 0}, "factor_frequency must be a whole number"),
        ({"backend": "lamb"}, "unknown backend"),
        ({"follow": "notes"}, "unknown formula"),
        ({"first_order": ("head",)}, "unknown linear layer"),
        ({"patience": 1}, "patience must be"),
        ({"momentum": 1.0}, "momentum must be in"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, message):
    model = _net()
    with pytest.raises(UsageError, match=message):
        MKOR(model.parameters(), model=model, **options)


def test_step_hooks_run_once_whatever_was_built_before():
    model = nn.Linear(3, 2)
    Chain([nn.Parameter(torch.ones(2))], [], lr=0.1)  # torch puts hooks around the step of each class it meets
    optimizer = MKOR(model.parameters(), model=model)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert calls == [1]
