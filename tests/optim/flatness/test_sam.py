"""SAM and ASAM against the papers in plain loops and pytorch_optimizer's; exact restoring, errors, checkpoints."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import ASAM, SAM, AdamW, sharpness
from trimtab.testing import OptimizerTestCase


class _SteadySAM(SAM):
    """SAM on a loss whose gradient is the same everywhere: the second pass may leave the gradients as they are."""

    def step(self, closure=None):
        loss = None if closure is None else closure()
        self.first_step()
        self.second_step()
        return loss


class TestSAM(OptimizerTestCase):
    paths, formats, policies = {}, (), False

    def optimizer(self, params, **options):
        return _SteadySAM(AdamW(params, **{"lr": self.lr, **options}), rho=0.05)

    def test_closures(self):
        model = self._model()
        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
        weights = []

        def closure():
            assert torch.is_grad_enabled()
            weights.append(model[0].weight.detach().clone())
            return self._backward(model, 0)

        with torch.no_grad():
            loss = optimizer.step(closure)
        assert len(weights) == 2
        assert not torch.equal(weights[0], weights[1])
        assert torch.equal(loss, self._backward(self._model(), 0))


class TestASAM(TestSAM):
    def optimizer(self, params, **options):
        base = torch.optim.SGD(params, **{"lr": self.lr, "momentum": 0.9, **options})
        return _SteadySAM(base, rho=0.5, adaptive=True)


# A loss with curvature: sum of a w^4 / 4 + b w over all entries, whose gradient is a w^3 + b.
def _problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    ws = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in [(4, 3), (5,), ()]]
    a = [torch.rand(w.shape, generator=generator).to(dtype) for w in ws]
    return ws, a


def _slopes(ws, step):
    generator = torch.Generator().manual_seed(1000 + step)
    size = 1000.0 if step % 40 == 30 else 1.0
    return [size * torch.randn(w.shape, generator=generator).to(w.dtype) for w in ws]


def _closure(ws, a, step):
    b = _slopes(ws, step)

    def closure():
        for w in ws:
            w.grad = None
        loss = sum((x * w**4 / 4 + y * w).sum() for w, x, y in zip(ws, a, b, strict=True))
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize(("adaptive", "rho", "eta"), [(False, 0.05, 0.01), (True, 0.5, 0.01), (True, 0.2, 0.0)])
def test_equals_the_papers_loop(adaptive, rho, eta):
    ws, a = _problem()
    w = [x.detach().numpy().copy() for x in ws]
    buffer = [np.zeros_like(x) for x in w]
    optimizer = SAM(torch.optim.SGD(ws, lr=1e-3, momentum=0.9, weight_decay=0.01), rho=rho, adaptive=adaptive, eta=eta)
    for step in range(120):
        optimizer.step(_closure(ws, a, step))
        b = [y.numpy() for y in _slopes(ws, step)]
        g = [x.numpy() * v**3 + y for x, v, y in zip(a, w, b, strict=True)]
        t = [np.abs(v) + eta if adaptive else np.ones_like(v) for v in w]
        norm = np.sqrt(sum(((s * y) ** 2).sum() for s, y in zip(t, g, strict=True)))
        for i in range(len(w)):
            v = w[i] + rho * t[i] ** 2 * g[i] / norm
            buffer[i] = 0.9 * buffer[i] + a[i].numpy() * v**3 + b[i] + 0.01 * w[i]
            w[i] = w[i] - 1e-3 * buffer[i]
    for x, expected in zip(ws, w, strict=True):
        np.testing.assert_allclose(x.detach().numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_pytorch_optimizer(adaptive, decay):
    peers = pytest.importorskip("pytorch_optimizer")
    (ours, a), (theirs, _) = _problem(), _problem()
    optimizer = SAM(torch.optim.AdamW(ours, lr=0.01, weight_decay=decay), rho=0.1, adaptive=adaptive, eta=0.0)
    other = peers.SAM(theirs, torch.optim.AdamW, rho=0.1, adaptive=adaptive, lr=0.01, weight_decay=decay, foreach=False)
    for step in range(120):
        optimizer.step(_closure(ours, a, step))
        closure = _closure(theirs, a, step)
        closure()
        other.step(closure)
    # The peer keeps the norm in float32.
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_two_halves_are_one_step():
    (ws, a), (others, _) = _problem(), _problem()
    one, two = SAM(AdamW(ws, lr=0.01)), SAM(AdamW(others, lr=0.01))
    for step in range(5):
        one.step(_closure(ws, a, step))
        closure = _closure(others, a, step)
        closure()
        two.first_step()
        with pytest.raises(UsageError, match="save after second_step"):
            two.state_dict()
        with pytest.raises(UsageError, match="called twice"):
            two.first_step()
        closure()
        two.second_step()
    assert all(torch.equal(x, y) for x, y in zip(ws, others, strict=True))
    with pytest.raises(UsageError, match="needs first_step"):
        two.second_step()
    with pytest.raises(UsageError, match="pass step a closure"):
        two.step()


def test_radius_zero_is_the_base_optimizer_and_the_gradient_is_the_second_pass():
    (ws, a), (others, _) = _problem(), _problem()
    sam, base = SAM(torch.optim.SGD(ws, lr=0.01), rho=0.0), torch.optim.SGD(others, lr=0.01)
    for step in range(5):
        sam.step(_closure(ws, a, step))
        base.step(_closure(others, a, step))
    assert all(torch.equal(x, y) for x, y in zip(ws, others, strict=True))

    ws, a = _problem()
    before = [w.detach().clone() for w in ws]
    SAM(torch.optim.SGD(ws, lr=1.0), rho=0.3).step(_closure(ws, a, 0))
    assert all(torch.equal(w, old - w.grad) for w, old in zip(ws, before, strict=True)), "weights were not restored"


def test_weights_are_restored_after_an_error():
    ws, a = _problem()
    before = [w.detach().clone() for w in ws]
    optimizer = SAM(AdamW(ws), rho=0.3)
    closure, calls = _closure(ws, a, 0), []

    def failing():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    assert all(torch.equal(w, old) for w, old in zip(ws, before, strict=True))
    ws[0].grad = None
    # A loss that is not finite: the base optimizer refuses the step, and the weights are w.
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        optimizer.step(lambda: [w.grad.fill_(float("nan")) for w in ws[1:]])
    assert all(torch.equal(w, old) for w, old in zip(ws, before, strict=True))


def test_asam_does_not_depend_on_the_scale_of_weights():
    """For L(u v), (c u, v / c) is the same function: ASAM's perturbed loss is the same, SAM's is not."""
    losses = {}
    for adaptive in (False, True):
        for c in (1.0, 10.0):
            u, v = nn.Parameter(torch.tensor(2.0 * c)), nn.Parameter(torch.tensor(0.5 / c))
            losses[adaptive, c] = sharpness(
                lambda u=u, v=v: (u * v - 3) ** 2, [u, v], rho=0.1, adaptive=adaptive, eta=0.0
            )
    assert losses[True, 10.0] == pytest.approx(losses[True, 1.0], rel=1e-4)
    assert losses[False, 10.0] > 2 * losses[False, 1.0]


def test_sharpness_leaves_weights_and_gradients():
    w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    w.grad = torch.ones_like(w)
    kept = w.grad
    # On c |w|^2 / 2 the worst point is exact: c (|w| rho + rho^2 / 2).
    found = sharpness(lambda: 1.5 * (w * w).sum(), [w], rho=0.2)
    assert found == pytest.approx(3 * (5**0.5 * 0.2 + 0.02), rel=1e-9)
    assert w.tolist() == [1.0, -2.0]
    assert w.grad is kept


def test_groups_of_their_own_radius():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = SAM(AdamW([first]), rho=0.1)
    optimizer.add_param_group({"params": [second], "rho": 0.0})
    first.grad, second.grad = torch.ones(2), torch.ones(2)
    optimizer.first_step()
    torch.testing.assert_close(first.detach(), torch.full((2,), 1.05))
    assert torch.equal(second, torch.ones(2))
    with pytest.raises(UsageError, match=r"rho must be in \[0, inf\), got -1"):
        ASAM(AdamW([first]), rho=-1)


def test_a_copy_made_after_a_scheduler_steps_its_own_parameters():
    p = nn.Parameter(torch.ones(3))
    optimizer = SAM(torch.optim.SGD([p], lr=0.1))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # it wraps optimizer.step
    q, twin = copy.deepcopy((p, optimizer))

    def closure():
        q.grad = torch.ones(3)

    twin.step(closure)
    assert torch.equal(p, torch.ones(3))
    assert (q != 1).all()


def test_adaptive_is_a_flag():
    with pytest.raises(UsageError, match="adaptive must be True or False, got 'no'"):
        SAM(torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1), adaptive="no")
