"""The convolution studies: deterministic in the seed, changed by their options, and right in their measures."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.errors import UsageError
from trimtab.studies import convolution

pytest.importorskip("sklearn")

CALLS = [
    (
        convolution.orthogonal,
        {"penalty": 0.1},
        {"accuracy", "singular_deviation", "largest_deviation", "gradient_drift"},
    ),
    (convolution.recurrent, {"alpha": 0.9}, {"growth", "loss", "spectral_norm", "diverged"}),
    (convolution.transfer, {"mode": "deploy"}, {"loss", "accuracy", "saved_bytes"}),
]


@pytest.mark.parametrize(("study", "options", "names"), CALLS, ids=["orthogonal", "recurrent", "transfer"])
def test_deterministic_and_the_options_act(study, options, names):
    first = study(3, steps=2)
    assert study(3, steps=2) == first
    assert first.keys() == names
    assert all(math.isfinite(value) for value in first.values())
    assert study(3, steps=2, **options) != first


@pytest.mark.parametrize("study", [call[0] for call in CALLS], ids=["orthogonal", "recurrent", "transfer"])
def test_a_diverged_run_counts_at_its_worst(study):
    found = study(3, steps=6, lr=1e30)
    assert all(math.isfinite(value) for value in found.values())
    assert found.get("accuracy", 0.0) <= 0.4


def test_deviation_is_that_of_the_operator():
    kernel = torch.zeros(2, 2, 3, 3)
    kernel[0, 0, 1, 1] = kernel[1, 1, 0, 2] = 1  # two shifts: orthogonal
    torch.testing.assert_close(convolution._deviations(kernel), torch.zeros(128, dtype=torch.float64))
    torch.testing.assert_close(convolution._deviations(1.25 * kernel), torch.full((128,), 0.25, dtype=torch.float64))


def test_the_search_makes_an_unstable_network_diverge_and_not_a_stable_one():
    """A recurrent operator of norm 2 doubles the state each frame; one of norm 0.5 forgets it."""
    found = {}
    for gain in (0.5, 2.0):
        torch.manual_seed(0)
        model = convolution._Denoiser()
        with torch.no_grad():
            model.inner.weight.zero_()
            model.inner.weight[range(8), range(8), 1, 1] = gain
        state = convolution._search(model, 0, rounds=3)
        with torch.no_grad():
            found[gain] = float(model(torch.zeros(20, 1, 1, 8, 8), state)[1].norm() / state.norm())
    assert found[2.0] > 1e5
    assert found[0.5] < 10


def test_tune_mode_keeps_less_and_trains_as_eval_mode():
    eval_mode, tune = (convolution.transfer(3, mode=mode, steps=8) for mode in ("eval", "tune"))
    assert tune["saved_bytes"] < 0.7 * eval_mode["saved_bytes"]
    assert tune["loss"] == pytest.approx(eval_mode["loss"], rel=1e-3)


def test_wrong_options():
    with pytest.raises(UsageError, match="Did you mean 'tune'"):
        convolution.transfer(0, mode="tun")
