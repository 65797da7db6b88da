"""The studies of generation, images and generated points: the same for the same seed, and each option acts."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.errors import UsageError
from trimtab.studies.gan import gaussians
from trimtab.studies.generation import lookahead, repetition
from trimtab.studies.images import autoencoder

_TUNED = {"steps": 2, "tuned": 2, "width": 8}
_CASES = {
    "unlikelihood": (repetition, _TUNED, {"alpha": 1.0}),
    "policy gradient": (repetition, {**_TUNED, "alpha": 1.0}, {"beta": 3.0}),
    "lookahead": (lookahead, {"steps": 4}, {"n": 2}),
    "images": (autoencoder, {"steps": 3}, {"loss": "ms-ssim"}),
    "clip": (gaussians, {"steps": 3, "width": 8}, {"loss": "clip", "clip": 0.01}),
    "standard": (gaussians, {"steps": 3, "width": 8}, {"loss": "standard"}),
}


@pytest.mark.parametrize("name", _CASES)
def test_deterministic_and_options_act(name):
    study, small, treated = _CASES[name]
    torch.manual_seed(1)
    plain = study(3, **small)
    torch.manual_seed(2)
    assert plain == study(3, **small), "it draws from the global generator"
    changed = study(3, **{**small, **treated})
    assert changed != plain
    assert set(changed) == set(plain)
    assert all(math.isfinite(value) for value in (*plain.values(), *changed.values()))


def test_a_diverged_run_counts_at_its_worst():
    for study, options in [
        (gaussians, {"steps": 5, "lr": 1e30, "width": 8}),
        (autoencoder, {"steps": 4, "lr": 1e30}),
        (lookahead, {"steps": 4, "lr": 1e30}),
    ]:
        assert all(math.isfinite(value) for value in study(0, **options).values()), study


def test_unknown_choices_are_refused():
    with pytest.raises(UsageError, match="unknown loss 'l2'"):
        autoencoder(0, loss="l2")
    with pytest.raises(UsageError, match="unknown loss 'wgan'"):
        gaussians(0, loss="wgan")
