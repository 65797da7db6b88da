"""CKA against centred Gram matrices and HSIC estimators in NumPy; hooks that change nothing."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.losses import Guidance, guidance_loss, linear_cka, match_layers


def _activations(samples=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, 2, 2, generator=generator, dtype=torch.float64)
    return x, torch.randn(samples, 7, generator=generator, dtype=torch.float64) + x.flatten(1)[:, :7]


def _hsic(gram, other, unbiased):
    """HSIC of Gram matrices: trace(K H L H), or Song et al. 2012, equation 5, up to a factor that CKA cancels."""
    n = len(gram)
    if not unbiased:
        h = np.eye(n) - np.ones((n, n)) / n
        return np.trace(gram @ h @ other @ h)
    k, m, one = gram - np.diag(np.diag(gram)), other - np.diag(np.diag(other)), np.ones(n)
    mean = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return np.trace(k @ m) + mean - 2 / (n - 2) * (one @ k @ m @ one)


def _numpy_cka(x, y, unbiased=False):
    x, y = (np.asarray(z, dtype=np.float64).reshape(len(z), -1) for z in (x, y))
    k, m = x @ x.T, y @ y.T
    return _hsic(k, m, unbiased) / np.sqrt(_hsic(k, k, unbiased) * _hsic(m, m, unbiased))


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("samples", [4, 9, 40])
def test_equals_numpy(unbiased, samples):
    x, y = _activations(samples)
    assert linear_cka(x, y, unbiased=unbiased).item() == pytest.approx(_numpy_cka(x, y, unbiased), rel=1e-9)


def test_equals_the_form_of_features():
    """|Y^T X|^2 / (|X^T X| |Y^T Y|) of centred features, as Kornblith et al. write it."""
    x, y = (z.flatten(1).numpy() - z.flatten(1).numpy().mean(0) for z in _activations())
    expected = np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    assert linear_cka(torch.from_numpy(x), torch.from_numpy(y)).item() == pytest.approx(expected, rel=1e-10)


def test_unbiased_is_zero_on_average_for_unrelated_activations():
    generator = torch.Generator().manual_seed(0)
    pairs = [[torch.randn(8, 64, generator=generator, dtype=torch.float64) for _ in range(2)] for _ in range(300)]
    unbiased = torch.stack([linear_cka(x, y, unbiased=True) for x, y in pairs])
    assert abs(unbiased.mean()) < 4 * unbiased.std() / 300**0.5
    assert all(linear_cka(x, y) > 0.7 for x, y in pairs), "the biased estimate is near 1 for wide layers"


@pytest.mark.parametrize("unbiased", [False, True])
def test_invariances(unbiased):
    x, y = _activations()
    rotation = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    whole = linear_cka(x, y, unbiased=unbiased)
    torch.testing.assert_close(linear_cka(y, x, unbiased=unbiased), whole)
    torch.testing.assert_close(linear_cka(x, y @ rotation * 3 + 1, unbiased=unbiased), whole)
    torch.testing.assert_close(linear_cka(x, x, unbiased=unbiased).item(), 1.0)


@pytest.mark.parametrize("unbiased", [False, True])
def test_gradcheck(unbiased):
    x, y = (z.flatten(1).requires_grad_() for z in _activations(6))
    assert torch.autograd.gradcheck(lambda a, b: linear_cka(a, b, unbiased=unbiased), (x, y))


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
def test_faint_and_strong_signals_in_float32(scale):
    """A deep network's signal is faint: its squares underflow, and an offset hides it in the Gram matrix."""
    x, y = (z.float() for z in _activations())
    faint = (scale * x).requires_grad_()
    found = linear_cka(faint, y)
    assert found.item() == pytest.approx(_numpy_cka(x.double(), y.double()), rel=1e-4)
    found.backward()
    reference = x.clone().requires_grad_()
    linear_cka(reference, y).backward()
    torch.testing.assert_close(faint.grad * scale, reference.grad, rtol=1e-3, atol=1e-5)
    shifted = linear_cka(1e-3 * x + 100, y)
    assert shifted.item() == pytest.approx(_numpy_cka(x.double(), y.double()), abs=0.01)


@pytest.mark.parametrize(("samples", "value"), [(6, 1.0), (7, 0.1), (33, 1000.1)])  # the mean of the latter is rounded
def test_constant_activations_have_no_gradient(samples, value):
    for unbiased in (False, True):
        x = torch.full((samples, 3), value, requires_grad=True)
        cka = linear_cka(x, _activations(samples)[1].float(), unbiased=unbiased)
        cka.backward()
        assert cka.item() == 0
        assert not x.grad.any()
        assert linear_cka(x, x, unbiased=unbiased).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_computed_in_float32_or_better(dtype):
    x, y = (z.to(dtype).requires_grad_() for z in _activations())
    cka = linear_cka(x, y)
    assert cka.dtype == torch.float32
    assert cka.item() == pytest.approx(_numpy_cka(x.detach().double(), y.detach().double()), rel=1e-5)
    cka.backward()
    assert x.grad.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(linear_cka(x, y), cka)


def test_loss_is_a_sum_over_pairs():
    x, y = (z.requires_grad_() for z in _activations())
    parts = [1 - _numpy_cka(x.detach(), y.detach()), 1 - _numpy_cka(y.detach(), x.detach() ** 2)]
    loss = guidance_loss([x, y], [y, x**2])
    assert loss.item() == pytest.approx(sum(parts))
    assert guidance_loss([x, y], [y, x**2], reduction="mean").item() == pytest.approx(sum(parts) / 2)
    np.testing.assert_allclose(guidance_loss([x, y], [y, x**2], reduction="none").tolist(), parts)
    guide = y.detach().requires_grad_()
    guidance_loss([x], [guide]).backward()
    assert guide.grad is None


@pytest.mark.parametrize(("targets", "guides"), [(5, 3), (3, 5), (49, 6), (4, 1), (1, 4), (4, 4)])
def test_layers_are_matched_evenly(targets, guides):
    found = match_layers([str(i) for i in range(targets)], [f"g{i}" for i in range(guides)])
    expected = {}
    for i in range(guides):
        position = i * (targets - 1) / (guides - 1) if guides > 1 else 0
        expected[f"g{i}"] = str(int(np.rint(position)))
    assert found == expected


def _networks():
    torch.manual_seed(0)
    target = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    guide = nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(), nn.Flatten()
    )
    return target, guide, torch.randn(10, 6, generator=torch.Generator().manual_seed(1))


def test_guidance_captures_both_networks():
    target, guide, x = _networks()
    before = copy.deepcopy(guide.state_dict())
    plain = target(x).detach()
    with Guidance(target, guide, {"1": "1", "3": "3"}) as guidance:
        assert torch.equal(target(x).detach(), plain), "hooks change the target"
        loss = guidance.loss(x)
        loss.backward()
    hidden = [target[:2](x), target[:4](x)]
    guide.eval()
    expected = sum(1 - _numpy_cka(h.detach(), guide[: i + 1](x).detach()) for h, i in zip(hidden, (1, 3), strict=True))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert target[0].weight.grad.any()
    assert target[2].weight.grad.any()
    assert target[4].weight.grad is None, "the head is not guided"
    assert all(parameter.grad is None for parameter in guide.parameters())
    for name, value in guide.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(module._forward_hooks for module in [*target.modules(), *guide.modules()])


def test_guide_is_left_in_its_modes_and_evaluations_are_not_captured():
    target, guide, x = _networks()
    guide.train()
    guide[2].eval()
    guidance = Guidance(target, guide, {"3": "1"})
    target(x)
    with torch.no_grad():
        target(torch.zeros(2, 6))
    assert guidance.loss(x).requires_grad
    assert guide.training
    assert guide[4].training
    assert not guide[2].training
    with pytest.raises(UsageError, match="target's '1' gave no tensor"):
        guidance.loss(x)
    guidance.remove()


def test_layers_that_return_tuples():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRU(3, 4, batch_first=True)

        def forward(self, x):
            return self.cell(x.view(-1, 2, 3))[0][:, -1]

    target, x = Recurrent(), _networks()[2]
    with Guidance(target, target, {"cell": "cell"}) as guidance:
        target(x)
        assert guidance.loss(x).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda t, g, x: Guidance(t, g, {"1": "33"}), "unknown layer of the target '33'"),
        (lambda t, g, x: Guidance(t, g, {"11": "3"}), "unknown layer of the guide '11'"),
        (lambda t, g, x: Guidance(t, g, {}), "layers must name at least one layer"),
        (lambda t, g, x: linear_cka(x, x[:3]), "CKA compares the same samples, got 10 and 3"),
        (lambda t, g, x: linear_cka(x[:3], x[:3], unbiased=True), "at least 4 samples"),
        (lambda t, g, x: guidance_loss([x], []), "got 1 of the target and 0 guides"),
        (lambda t, g, x: guidance_loss([x], [x], reduction="total"), "unknown reduction 'total'"),
        (lambda t, g, x: match_layers([], ["1"]), "only where both networks have some"),
    ],
)
def test_wrong_arguments(call, text):
    target, guide, x = _networks()
    with pytest.raises(UsageError, match=text):
        call(target, guide, x)
    assert not any(module._forward_hooks for module in [*target.modules(), *guide.modules()])
