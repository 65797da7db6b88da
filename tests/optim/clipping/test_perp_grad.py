"""perpGrad: orthogonality, its closed-form first step, and pytorch_optimizer's OrthoGrad on the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.optim import Chain, PerpGradAdamW, PerpGradSGD, perp_grad
from trimtab.testing import OptimizerTestCase


class TestPerpGradAdamW(OptimizerTestCase):
    elementwise = False

    def optimizer(self, params, **options):
        # Decay moves the parameters of one entry, which have no orthogonal direction.
        return PerpGradAdamW(params, **{"lr": self.lr, "weight_decay": 0.01, **options})


class TestPerpGradSGD(OptimizerTestCase):
    lr = 0.01
    elementwise = False

    def optimizer(self, params, **options):
        return PerpGradSGD(params, **{"lr": self.lr, "momentum": 0.9, "weight_decay": 0.01, **options})


def _parameters(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator)) for shape in shapes]


def _gradients(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator) * (1000 if step % 40 == 30 else 1)


@pytest.mark.parametrize("foreach", [False, True])
def test_is_orthogonal_and_keeps_the_length(foreach):
    params = _parameters([(5, 4), (7,), (3, 2, 3, 3), (6, 5)])
    params.append(nn.Parameter(_parameters([(4, 3)], seed=1)[0].detach().T))
    for step in range(40):
        _gradients(params, step)
        # Nearly along the weights, as late in training.
        params[3].grad = 1e3 * params[3].detach() + 1e-2 * params[3].grad
        before = [p.detach().clone() for p in params]
        Chain(params, [perp_grad()], lr=1.0, foreach=foreach).step()
        for p, w in zip(params, before, strict=True):
            u = w - p.detach()
            bound = 1e-7 * float(u.norm() * w.norm())
            assert abs(float((u * w).sum())) <= bound
            assert float(u.norm()) == pytest.approx(float(p.grad.norm()), rel=1e-9)
            p.data.copy_(w)


def test_first_step_is_closed_form():
    w, g = [1.0, 2.0, 2.0], [3.0, 0.0, 3.0]
    p = nn.Parameter(torch.tensor(w, dtype=torch.float64))
    p.grad = torch.tensor(g, dtype=torch.float64)
    PerpGradSGD([p], lr=0.5).step()
    # w . g = 9 = w . w, so g_perp = (2, -2, 1) of length 3, and |g| = sqrt(18).
    expected = [a - 0.5 * 18**0.5 / 3 * b for a, b in zip(w, (2, -2, 1), strict=True)]
    assert p.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_equals_pytorch_optimizer(base, decay):
    peers = pytest.importorskip("pytorch_optimizer")
    shapes = [(5, 4), (7,), (3, 2, 3, 3)]
    ours, theirs = _parameters(shapes), _parameters(shapes)
    if base == "adamw":
        optimizer = PerpGradAdamW(ours, lr=0.01, betas=(0.8, 0.95), weight_decay=decay)
        inner = torch.optim.AdamW(theirs, lr=0.01, betas=(0.8, 0.95), weight_decay=decay)
    else:
        optimizer = PerpGradSGD(ours, lr=0.01, momentum=0.9)
        inner = torch.optim.SGD(theirs, lr=0.01, momentum=0.9)
    peer = peers.OrthoGrad(inner, foreach=False)
    for step in range(120):
        _gradients(ours, step)
        _gradients(theirs, step)
        optimizer.step()
        peer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_gradient_along_the_weights_gives_no_step(dtype):
    w = torch.randn(50, 40, dtype=dtype, generator=torch.Generator().manual_seed(2))
    p = nn.Parameter(w.clone())
    p.grad = -0.37 * w
    scalar = nn.Parameter(torch.tensor(0.3, dtype=dtype))
    scalar.grad = torch.tensor(0.7, dtype=dtype)
    Chain([p, scalar], [perp_grad()], lr=1.0).step()
    assert torch.equal(p, w)
    assert scalar == torch.tensor(0.3, dtype=dtype)


def test_weights_of_zero_move_along_the_gradient():
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1.0, -2.0, 3.0])
    Chain([p], [perp_grad()], lr=1.0).step()
    torch.testing.assert_close(p.detach(), -p.grad)


def test_it_has_no_options():
    with pytest.raises(TypeError, match="bogus"):
        perp_grad(bogus=1)
