"""The study without norms: they are gone, and only sigma-reparam differs."""

from __future__ import annotations

import pytest
from torch import nn

from trimtab.studies import normless
from trimtab.studies.normless import digits
from trimtab.workloads import workload


def test_deterministic_and_finite():
    first = digits(0, steps=3)
    assert first == digits(0, steps=3)
    assert first != digits(0, steps=3, sigma_reparam=True)
    assert 0 <= first["accuracy"] <= 1


def test_a_run_that_diverged_counts_as_it_began():
    assert digits(0, steps=4, lr=1e6)["loss"] == pytest.approx(digits(0, steps=1, lr=0.0)["loss"], rel=1e-6)


def test_no_norm_is_left(monkeypatch):
    seen = []
    monkeypatch.setattr(normless, "fit", lambda parameters, loss_at, **options: seen.append(list(parameters)) or [1.0])
    digits(0)
    digits(0, sigma_reparam=True)
    plain, treated = (sum(p.numel() for p in parameters) for parameters in seen)
    model = workload("digits-vit").model(0)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    of_norms = sum(p.numel() for norm in norms for p in norm.parameters())
    assert of_norms > 0
    assert plain == sum(p.numel() for p in model.parameters()) - of_norms
    assert treated > plain
