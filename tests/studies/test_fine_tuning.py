"""The studies of fine-tuning: the same for the same seed, and each option acts."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.losses.tuning.unlikelihood_training import unlikelihood_loss
from trimtab.studies._sequence_model import SequenceModel
from trimtab.studies.fine_tuning import calls, deviation, mixup, preferences, trajectories
from trimtab.studies.tails import constraints, coverage

_CASES = {
    "conditional": (preferences, {"steps": 3}, {"method": "conditional"}),
    "unlikelihood": (preferences, {"steps": 3}, {"method": "unlikelihood"}),
    "advantage": (preferences, {"steps": 3}, {"method": "advantage"}),
    "negatives": (trajectories, {"steps": 6}, {"negative_weight": 1.0}),
    "calls": (calls, {"steps": 4}, {"max_weight": 9.0, "drop_errors": True}),
    "mixup": (mixup, {"steps": 3, "rows": 48}, {"mu": 0.2}),
    "deviation": (deviation, {"steps": 3, "before": 3, "lr": 0.01}, {"beta": 0.5}),
    "constraints": (constraints, {"steps": 20}, {"dual_lr": 1.0}),
    "coverage": (coverage, {"steps": 5}, {"samples": 8}),
}


@pytest.mark.parametrize("name", _CASES)
def test_deterministic_and_options_act(name):
    study, small, treated = _CASES[name]
    torch.manual_seed(1)
    plain = study(3, **small)
    torch.manual_seed(2)
    assert plain == study(3, **small), "it draws from the global generator"
    changed = study(3, **small, **treated)
    assert changed != plain
    assert set(changed) == set(plain)
    assert all(math.isfinite(value) for value in (*plain.values(), *changed.values()))


def test_a_prefix_of_its_own_is_what_tells_failures_apart():
    with_prefix, without = (trajectories(3, negative_weight=1.0, prefixes=flag, steps=6) for flag in (True, False))
    assert with_prefix != without


def test_drawn_text_follows_the_model():
    """Continuations have the frequencies of the softmax, and greedy ones its largest entry, along the state."""
    model = SequenceModel(5, 8, 0)
    prompts = torch.tensor([[1, 2]]).expand(4000, 2)
    p = torch.softmax(model(prompts[:1])[0, -1], -1)
    drawn = model.continued(prompts, 1, torch.Generator().manual_seed(0))[:, 0]
    torch.testing.assert_close(torch.bincount(drawn, minlength=5) / 4000, p.detach(), rtol=0, atol=0.03)
    greedy = model.continued(prompts[:1], 6)
    along = model(torch.cat([prompts[:1], greedy], 1))[0, 1:-1].argmax(-1)
    assert along.tolist() == greedy[0].tolist()


def test_plain_is_the_neutral_setting_of_unlikelihood():
    """A text without bad words is trained alike by both methods."""
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(4, (2, 3), generator=torch.Generator().manual_seed(1))
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(unlikelihood_loss(logits, targets, targets >= 10), plain)
