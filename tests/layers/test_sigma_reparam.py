"""sigmaReparam against exact singular values, torch's spectral_norm, and the layer contract."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from trimtab.errors import UsageError
from trimtab.layers import SigmaReparam
from trimtab.remedy import apply, remove
from trimtab.testing import LayerTestCase


def _spectral(weight):
    return torch.linalg.matrix_norm(weight.detach().double().flatten(1), 2).item()


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


class TestLinear(LayerTestCase):
    def layer(self):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        apply(model, "sigma-reparam", gamma_init=1.5)
        return model

    def inputs(self, samples):
        return (torch.randn(samples, 6, generator=_generator()),)


class TestConvolution(LayerTestCase):
    def layer(self):
        model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, groups=2), nn.Flatten())
        apply(model, "sigma-reparam")
        return model

    def inputs(self, samples):
        return (torch.randn(samples, 2, 5, 5, generator=_generator()),)


class TestMultiheadAttention(LayerTestCase):
    def layer(self):
        model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        apply(model, "sigma-reparam")
        return model

    def inputs(self, samples):
        return (torch.randn(samples, 5, 8, generator=_generator()),)


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    gamma=st.sampled_from([0.25, 1.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_spectral_norm_is_gamma(rows, columns, scale, gamma, seed):
    linear = nn.Linear(columns, rows, dtype=torch.float64)
    linear.weight.data.copy_(scale * torch.randn(rows, columns, generator=_generator(seed), dtype=torch.float64))
    original = linear.weight.detach().clone()
    apply(linear, "sigma-reparam", gamma_init=gamma)
    assert _spectral(linear.weight) == pytest.approx(gamma, rel=1e-4)
    torch.testing.assert_close(linear.weight, original * gamma / _spectral(original), rtol=1e-4, atol=0)


def test_spectral_norm_stays_gamma_in_training():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    apply(model, "sigma-reparam")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    x = torch.randn(64, 16, generator=_generator())
    before = model[0].parametrizations.weight.original.detach().clone()
    for _ in range(150):
        optimizer.zero_grad()
        (model(x) - x[:, :4].sin()).square().mean().backward()
        optimizer.step()
    model(x)
    moved = model[0].parametrizations.weight.original - before
    assert _spectral(moved) > 0.3 * _spectral(before)
    for linear in (model[0], model[2]):
        gamma = linear.parametrizations.weight[0].gamma.item()
        assert gamma != 1.0
        assert _spectral(linear.weight) == pytest.approx(gamma, rel=0.03)


def test_gradient_is_that_of_the_exact_spectral_norm():
    weight = torch.randn(5, 7, dtype=torch.float64, generator=_generator())
    upstream = torch.randn(5, 7, dtype=torch.float64, generator=_generator(1))
    linear = nn.Linear(7, 5, bias=False, dtype=torch.float64)
    linear.weight.data.copy_(weight)
    apply(linear, "sigma-reparam", gamma_init=0.7)
    for _ in range(300):
        linear(torch.zeros(1, 7, dtype=torch.float64))  # more power iterations: u and v to full precision
    (linear.weight * upstream).sum().backward()
    exact, gamma = weight.clone().requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (gamma * exact / torch.linalg.matrix_norm(exact, 2) * upstream).sum().backward()
    torch.testing.assert_close(linear.parametrizations.weight.original.grad, exact.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(linear.parametrizations.weight[0].gamma.grad[0], gamma.grad, rtol=1e-9, atol=1e-12)


def _assert_one_iteration(reparam, weight, before):
    u = nn.functional.normalize(weight.flatten(1) @ before, dim=0)
    torch.testing.assert_close(reparam.u, u)
    torch.testing.assert_close(reparam.v, nn.functional.normalize(weight.flatten(1).T @ u, dim=0))


def test_one_power_iteration_per_training_forward():
    linear = nn.Linear(6, 9)
    apply(linear, "sigma-reparam")
    weight, reparam = linear.parametrizations.weight.original, linear.parametrizations.weight[0]
    weight.data.normal_(generator=_generator())
    for _ in range(3):
        before = reparam.v.clone()
        linear(torch.zeros(1, 6))
        _assert_one_iteration(reparam, weight.detach(), before)
    linear.eval()
    before = reparam.u.clone(), reparam.v.clone()
    linear(torch.zeros(1, 6))
    assert torch.equal(reparam.u, before[0])
    assert torch.equal(reparam.v, before[1])


def test_one_power_iteration_per_forward_of_multihead_attention():
    """It reads in_proj_weight several times a forward."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    apply(attention, "sigma-reparam")
    x = torch.zeros(1, 3, 8)
    for owner, name in ((attention, "in_proj_weight"), (attention.out_proj, "weight")):
        weight, reparam = owner.parametrizations[name].original, owner.parametrizations[name][0]
        weight.data.normal_(generator=_generator())
        for _ in range(2):
            before = reparam.v.clone()
            attention(x, x, x)
            _assert_one_iteration(reparam, weight.detach(), before)


def test_equals_torch_spectral_norm():
    """With gamma fixed at 1 it is torch's spectral_norm, step by step, from the same vectors."""
    x = torch.randn(4, 2, 6, 6, generator=_generator(), dtype=torch.float64)
    ours = nn.Conv2d(2, 3, 3, dtype=torch.float64)
    theirs = parametrizations.spectral_norm(copy.deepcopy(ours))
    apply(ours, "sigma-reparam")
    reparam, normed = ours.parametrizations.weight[0], theirs.parametrizations.weight[0]
    reparam.gamma.requires_grad_(False)
    normed._u.copy_(reparam.u)
    normed._v.copy_(reparam.v)
    for _ in range(3):
        for model in (ours, theirs):
            model.zero_grad()
            model(x).square().sum().backward()
            with torch.no_grad():
                original = model.parametrizations.weight.original
                original -= 0.01 * original.grad
        torch.testing.assert_close(ours.parametrizations.weight.original, theirs.parametrizations.weight.original)
        torch.testing.assert_close(reparam.u, normed._u)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))


def test_spectral_start_keeps_the_function():
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 8, generator=_generator())
    expected = model(x)
    applied = apply(model, "sigma-reparam", gamma_init="spectral")
    assert applied.changes["linear1"] == "weight = gamma / sigma(W) * W, gamma = sigma(W)"
    torch.testing.assert_close(model(x), expected)


def test_remove_keeps_the_function():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Linear(8, 8))
    names = set(model.state_dict())
    x = torch.randn(2, 5, 8, generator=_generator())
    apply(model, "sigma-reparam")
    model(x).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    model(x)
    expected = copy.deepcopy(model).eval()(x)
    removed = remove(model, "sigma-reparam")
    assert removed.changes["0.self_attn"] == "in_proj_weight merged"
    assert set(model.state_dict()) == names
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training
    torch.testing.assert_close(model.eval()(x), expected)
    with pytest.raises(UsageError, match="nothing to remove"):
        remove(model, "sigma-reparam")


def test_consumes_no_random_numbers():
    linear = nn.Linear(3, 3)
    before = torch.get_rng_state()
    apply(linear, "sigma-reparam")
    assert torch.equal(torch.get_rng_state(), before)


def test_inference_fast_path_uses_the_reparametrised_weight():
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    apply(model, "sigma-reparam", gamma_init=2.0)
    model.eval()
    x = torch.randn(2, 5, 8, generator=_generator())
    expected = model(x)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)


def test_tied_weights_are_left_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.body = nn.Linear(4, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    assert list(apply(model, "sigma-reparam").changes) == ["body"]
    assert model.head.weight is model.embedding.weight
    tied_only = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied_only[1].weight = tied_only[0].weight
    with pytest.raises(UsageError, match="no weight to change"):
        apply(tied_only, "sigma-reparam")


def test_a_module_used_twice_is_changed_once():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert list(apply(model, "sigma-reparam").changes) == ["0"]
    assert len(shared.parametrizations.weight) == 1


def test_gpt2_conv1d_and_skip():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 12, generator=_generator()))

        def forward(self, x):
            return x @ self.weight

    model = nn.ModuleDict({"c_attn": Conv1D(), "head": nn.Linear(4, 5), "norm": nn.LayerNorm(4)})
    assert list(apply(model, "sigma-reparam", skip=("head",)).changes) == ["c_attn"]
    assert _spectral(model["c_attn"].weight) == pytest.approx(1, rel=1e-4)


def test_bfloat16_weight_has_spectral_norm_gamma():
    linear = nn.Linear(64, 64).to(torch.bfloat16)
    apply(linear, "sigma-reparam")
    linear(torch.zeros(1, 64, dtype=torch.bfloat16))
    assert linear.weight.dtype == torch.bfloat16
    assert _spectral(linear.weight) == pytest.approx(1, rel=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CPU autocast has no matrix-vector product to lower")
def test_autocast_on_a_gpu_does_not_lower_the_power_iteration():
    linear = nn.Linear(256, 256, device="cuda")
    apply(linear, "sigma-reparam")
    weight = linear.weight
    with torch.autocast("cuda", dtype=torch.bfloat16):
        lowered = linear.weight
    torch.testing.assert_close(lowered, weight, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (nn.LayerNorm(3), {}, "no weight to change in LayerNorm. Looked for nn.Linear"),
        (nn.Linear(3, 3), {"gamma_init": 0.0}, "gamma_init must be above 0, got 0.0"),
        (nn.Linear(3, 3), {"gamma_init": "sigma"}, "gamma_init must be a number above 0 or 'spectral', got 'sigma'"),
        (nn.Linear(3, 3, device="meta"), {}, "Linear.weight: .* on the meta device"),
    ],
)
def test_what_cannot_be_done_is_named(model, options, text):
    with pytest.raises(UsageError, match=text):
        apply(model, "sigma-reparam", **options)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_weight_without_a_spectral_norm_changes_nothing(value):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    nn.init.constant_(model[1].weight, value)
    with pytest.raises(UsageError, match=r"1\.weight: .*non-zero, finite weight"):
        apply(model, "sigma-reparam")
    assert not any(parametrize.is_parametrized(part) for part in model)


def test_applying_twice_is_refused():
    model = nn.Linear(3, 3)
    apply(model, "sigma-reparam")
    with pytest.raises(UsageError, match="that is not reparametrised already"):
        apply(model, "sigma-reparam")


def test_vectors_are_refused():
    with pytest.raises(UsageError, match=r"needs a matrix, got shape \(3,\)"):
        SigmaReparam(torch.ones(3))


@pytest.mark.parametrize(("length", "gamma"), [(4, 0.3), (16, 1.0), (16, 3.0), (64, 1.5)])
def test_attention_entropy_stays_above_the_papers_bound(length, gamma):
    """Theorem 3.1: with sigma = ||W_K W_Q^T||_2 ||X X^T||_2, the entropy of every row is at least the bound."""
    torch.manual_seed(0)
    width = 8
    query, key = (nn.Linear(width, width, bias=False).double() for _ in range(2))
    for linear in (query, key):
        parametrize.register_parametrization(linear, "weight", SigmaReparam(linear.weight, gamma=gamma))
    x = torch.randn(length, width, dtype=torch.float64) / length**0.5
    entropy = torch.special.entr((query(x) @ key(x).T).softmax(-1)).sum(-1)
    # Of the two weights only the product of their norms is known: gamma squared bounds that of the product.
    sigma = gamma**2 * torch.linalg.matrix_norm(x @ x.T, 2)
    beta = torch.exp(-sigma * math.sqrt(length / (length - 1)))
    others = (length - 1) * beta
    bound = torch.log1p(others) + sigma * math.sqrt(length * (length - 1)) * beta / (1 + others)
    assert (entropy >= bound).all()
    # The bound is reached: by one logit of sigma sqrt((T-1) / T) among others that are equal and negative.
    logits = torch.full((length,), -1 / math.sqrt(length * (length - 1)), dtype=torch.float64)
    logits[0] = math.sqrt((length - 1) / length)
    torch.testing.assert_close(torch.special.entr((sigma * logits).softmax(0)).sum(), bound)
