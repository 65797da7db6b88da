"""The diffusion studies: deterministic in the seed, changed by their options, and right in their measures."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from trimtab.errors import UsageError
from trimtab.studies import diffusion

pytest.importorskip("sklearn")


@pytest.fixture
def _few_samples(monkeypatch):
    monkeypatch.setattr(diffusion, "_sample", functools.partial(diffusion._sample, count=70, steps=3))


def test_long_skips_are_deterministic_and_the_options_act():
    first = diffusion.long_skips(3, steps=10)
    assert diffusion.long_skips(3, steps=10) == first
    assert first.keys() == {"loss", "steps_to_target", "feature_oscillation", "gradient_oscillation"}
    assert all(math.isfinite(value) for value in first.values())
    assert 0 < first["loss"] < 1.5
    for scaling in ("constant", "learnable"):
        assert diffusion.long_skips(3, scaling=scaling, steps=10)["loss"] != first["loss"]
    same = diffusion.long_skips(3, scaling="constant", kappa=1.0, steps=10)
    assert same == pytest.approx(first)  # the same data, weights and noise, whatever the options


def test_a_diverged_run_counts_at_its_worst():
    found = diffusion.long_skips(3, lr=1e20, steps=10)
    assert all(math.isfinite(value) for value in found.values())
    assert found["steps_to_target"] == 10
    assert all(math.isfinite(value) for value in diffusion.weighting(3, lr=1e20, steps=3).values())


@pytest.mark.usefixtures("_few_samples")
def test_weighting_is_deterministic_and_the_options_act():
    first = diffusion.weighting(3, steps=3)
    assert diffusion.weighting(3, steps=3) == first
    assert first.keys() == {"frechet", "loss", "gradient_spread"}
    assert all(math.isfinite(value) for value in first.values())
    losses = {diffusion.weighting(3, weight=weight, steps=3)["loss"] for weight in ("clipped", "min-snr")}
    assert len(losses | {first["loss"]}) == 3


def test_frechet_distance_of_gaussians():
    """|m1 - m2|^2 + sum (s1 - s2)^2 for diagonal covariances, and 0 from itself."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    scale = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    assert diffusion._frechet(x, x) == pytest.approx(0, abs=1e-9)
    expected = 3 * 0.3**2 + float((scale - 1).square().sum())
    assert diffusion._frechet(x, x * scale + 0.3) == pytest.approx(expected, rel=0.03)


def test_schedule_and_sampler():
    t = torch.linspace(0, 1, 5)
    expected = np.cos((t.numpy() + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(diffusion._alpha_bar(t).numpy(), expected, atol=1e-6)

    class Oracle(torch.nn.Module):
        def forward(self, x, t):
            return torch.full_like(x, 0.25)

    samples = diffusion._sample(Oracle(), 0, count=2)
    torch.testing.assert_close(samples, torch.full_like(samples, 0.25), atol=0.1, rtol=0)


@pytest.mark.parametrize(
    "call",
    [lambda: diffusion.long_skips(0, scaling="constnat"), lambda: diffusion.weighting(0, weight="clip")],
)
def test_wrong_options(call):
    with pytest.raises(UsageError, match="Did you mean"):
        call()
