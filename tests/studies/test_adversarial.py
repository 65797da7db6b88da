"""The study of adversarial training: its attack, and that options act and nothing else does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from trimtab.studies.adversarial import overfitting, perturbed


def test_attack_stays_in_its_bounds_and_raises_the_loss():
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.rand(32, 6, generator=generator), torch.randint(3, (32,), generator=generator)
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    moved = perturbed(model, inputs, targets, epsilon=0.1, steps=8, generator=generator)
    assert float((moved - inputs).abs().max()) <= 0.1 + 1e-6
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1
    assert F.cross_entropy(model(moved), targets) > F.cross_entropy(model(inputs), targets) + 0.02
    # A linear model's worst point is a corner of the box, where ascent of the sign ends.
    at_edge = torch.isclose((moved - inputs).abs(), torch.tensor(0.1)) | (moved == 0) | (moved == 1)
    assert float(at_edge.float().mean()) > 0.9


def test_deterministic_and_options_act():
    plain = overfitting(3, steps=3)
    assert plain == overfitting(3, steps=3)
    assert plain != overfitting(3, steps=3, targets="adr")
    assert plain != overfitting(4, steps=3)
    assert set(plain) == {"robust_accuracy", "gap", "accuracy"}
