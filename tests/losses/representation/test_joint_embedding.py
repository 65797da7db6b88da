"""LeJEPA against closed forms, numerical integration by SciPy and NumPy; ranks against one process."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate

from trimtab.errors import UsageError
from trimtab.losses import epps_pulley, lejepa_loss, random_slices, sigreg
from trimtab.testing import run_ranks


def _closed_form(x):
    """N int |phi_N - phi|^2 w over the real line with w = exp(-t^2 / 2), as a double sum over samples."""
    x = np.asarray(x, dtype=np.float64)
    pairs = np.exp(-((x[:, None] - x[None, :]) ** 2) / 2).sum() * math.sqrt(2 * math.pi) / len(x)
    cross = 2 * math.sqrt(math.pi) * np.exp(-(x**2) / 4).sum()
    return pairs - cross + len(x) * math.sqrt(2 * math.pi / 3)


def _numpy_loss(views, directions, targets, weight, t_max=5.0, knots=17):
    """Algorithms 1 and 2 of the paper with complex exponentials, one view and one slice at a time."""
    t = np.linspace(-t_max, t_max, knots)
    phi = np.exp(-(t**2) / 2)
    statistics = []
    for z in views:
        for a in directions.T:
            ecf = np.exp(1j * np.outer(z @ a, t)).mean(0)
            error = np.abs(ecf - phi) ** 2 * phi
            statistics.append(len(z) * integrate.trapezoid(error, t))
    center = views[:targets].mean(0)
    return (1 - weight) * ((views - center) ** 2).mean() + weight * np.mean(statistics)


@pytest.mark.parametrize("spread", [0.01, 0.5, 1.0])
def test_quadrature_equals_the_closed_form(spread):
    x = spread * np.random.default_rng(0).normal(size=40) + 0.3
    found = epps_pulley(torch.from_numpy(x).unsqueeze(1)).item()
    assert found == pytest.approx(_closed_form(x), rel=2e-4)
    wide = epps_pulley(torch.from_numpy(x).unsqueeze(1), t_max=10.0, knots=201).item()
    assert wide == pytest.approx(_closed_form(x), rel=1e-10)


def test_closed_form_equals_scipy_quadrature():
    x = np.random.default_rng(1).normal(size=7)

    def integrand(t):
        phi = math.exp(-(t**2) / 2)
        return abs(np.exp(1j * t * x).mean() - phi) ** 2 * phi

    value, _ = integrate.quad(integrand, -12, 12, epsabs=1e-13)
    assert len(x) * value == pytest.approx(_closed_form(x), rel=1e-9)
    assert epps_pulley(torch.from_numpy(x).unsqueeze(1)).item() == pytest.approx(len(x) * value, rel=2e-4)


@pytest.mark.parametrize("size", [8, 96])
def test_expectation_under_the_normal_distribution(size):
    """sqrt(2 pi) (1 - 1 / sqrt(3)) for any N, over 4,000 samples of N."""
    x = torch.randn(size, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    statistic = epps_pulley(x)
    error = statistic.std() / math.sqrt(4000)
    expected = math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3))
    assert abs(statistic.mean().item() - expected) < 4 * error.item() < 0.1


@pytest.mark.parametrize("knots", [2, 5, 6, 17, 18])
@pytest.mark.parametrize("targets", [None, 1, 2])
def test_loss_equals_numpy(knots, targets):
    views = torch.randn(3, 12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = random_slices(5, 9, generator=7)
    np.testing.assert_allclose(a.norm(dim=0).numpy(), 1, rtol=1e-6)
    found = lejepa_loss(views, 7, global_views=targets, weight=0.2, slices=9, knots=knots)
    expected = _numpy_loss(views.numpy(), a.double().numpy(), targets or 3, 0.2, knots=knots)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_gradcheck():
    views = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: lejepa_loss(z, 0, global_views=1, slices=4, weight=0.3), (views,))


def test_gaussian_collapsed_and_anisotropic_embeddings():
    z = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    gaussian = sigreg(z, 0)
    assert gaussian < 1.5
    assert sigreg(z * torch.linspace(0.1, 3, 16), 0) > 5 * gaussian
    assert sigreg(z[:1].expand(256, 16), 0) > 50 * gaussian
    # A collapsed batch is pushed apart: its gradient is not 0 as soon as samples differ at all.
    nearly = (1e-3 * z).requires_grad_()
    sigreg(nearly, 0).backward()
    assert (nearly.grad * nearly).sum() < 0


def test_slices_come_from_the_seed_alone():
    state = torch.get_rng_state()
    z = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sigreg(z, 5), sigreg(z, 5))
    assert not torch.equal(sigreg(z, 5), sigreg(z, 6))
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(sigreg(z, generator), sigreg(z, 5))
    assert not torch.equal(sigreg(z, generator), sigreg(z, 5)), "a generator moves on"
    assert torch.equal(torch.get_rng_state(), state), "the loss draws from the global generator"


def test_ranks_equal_the_single_process():
    """Uneven halves: value and averaged gradient of an encoder's weight are those of all samples in one process."""
    x = torch.randn(2, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def step(inputs, **options):
        w = weight.clone().requires_grad_()
        loss = lejepa_loss(inputs @ w, 11, global_views=1, weight=0.3, slices=16, **options)
        loss.backward()
        return loss.detach(), w.grad

    def work(rank):
        mine = x[:, :3] if rank == 0 else x[:, 3:]
        loss, gradient = step(mine, all_ranks=True)
        torch.distributed.all_reduce(gradient)
        return loss, gradient / 2

    whole, expected = step(x)
    for loss, gradient in run_ranks(work):
        torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_computed_in_float32_or_better(dtype):
    views = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    loss = lejepa_loss(views, 0)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.item() == pytest.approx(lejepa_loss(views.detach().double(), 0).item(), rel=1e-5)
    loss.backward()
    assert views.grad.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(lejepa_loss(views, 0), loss)
        statistic = epps_pulley(views)
    assert torch.equal(statistic, epps_pulley(views)), "autocast lowers the precision"


def test_no_samples_and_diverged_ones():
    views = torch.zeros(2, 0, 3, requires_grad=True)
    loss = lejepa_loss(views, 0)
    loss.backward()
    assert loss.item() == 0
    assert not lejepa_loss(torch.full((2, 4, 3), math.inf), 0).isfinite()
    huge = torch.full((2, 4, 3), 1e15, requires_grad=True)
    sigreg(huge, 0).backward()
    assert huge.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda z: lejepa_loss(z, 0, weight=1.5), "weight must be at least 0 and at most 1, got 1.5"),
        (lambda z: lejepa_loss(z, 0, global_views=3), "global_views must be at least 1 and at most 2, got 3"),
        (lambda z: lejepa_loss(z[0], 0), "views must be floating point with at least 3 dimensions"),
        (lambda z: lejepa_loss(z, 0, knots=1), "knots must be a whole number of at least 2, got 1"),
        (lambda z: sigreg(z, 0, slices=0), "at least one direction"),
        (lambda z: lejepa_loss(z, 0, all_ranks=True), "needs an initialised torch.distributed"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(UsageError, match=text):
        call(torch.zeros(2, 4, 3))
