"""The study of preferences: an exact world, the same for every loss."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.errors import UsageError
from trimtab.studies.preferences import _LOSSES, _world, pairs, rounds

PLAIN = {"flips": 0.0, "certain": False, "length_bias": 0.0, "uncovered": False}


def test_the_world_is_exact():
    world = _world(3, **PLAIN)
    assert world.responses_RT.shape == (341, 4)
    assert len({tuple(row) for row in world.responses_RT.tolist()}) == 341
    pi = world.log_probs(world.reference).exp()
    torch.testing.assert_close(pi.sum(1), torch.ones(8))
    # The reward is standardised under the reference, and says nothing of length.
    torch.testing.assert_close((pi * world.reward_PR).sum(1), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close((pi * world.reward_PR.square()).sum(1), torch.ones(8))
    means = torch.stack([world.reward_PR[:, world.letters_R == n].mean(1) for n in range(5)])
    torch.testing.assert_close(means, means[:1].expand(5, -1), atol=1e-5, rtol=0)
    assert (world.chosen_B != world.rejected_B).all()


def test_options_change_the_judge_and_nothing_else():
    plain = _world(0, **PLAIN)

    def gap(**changes):
        world = _world(0, **{**PLAIN, **changes})
        assert torch.equal(world.reference.head, plain.reference.head)
        reward = world.reward_PR[world.prompts_B, world.chosen_B] - world.reward_PR[world.prompts_B, world.rejected_B]
        letters = world.letters_R[world.chosen_B] - world.letters_R[world.rejected_B]
        return float((reward > 0).float().mean()), float(letters.mean()), world

    assert gap(certain=True)[0] == 1
    right, longer, _ = gap()
    assert 0.7 < right < 0.95
    assert gap(flips=0.3)[0] < right - 0.1
    assert gap(length_bias=2.0)[1] > longer + 0.3
    world = gap(uncovered=True)[2]
    for drawn in (world.chosen_B, world.rejected_B):
        assert world.covered_R[drawn].all()


@pytest.mark.parametrize("loss", sorted(_LOSSES))
def test_every_loss_trains(loss):
    first = pairs(0, loss=loss, steps=5)
    assert first == pairs(0, loss=loss, steps=5)
    assert all(math.isfinite(value) for value in first.values())
    assert (first["kl"] > 1e-6) == (loss != "none")
    assert first != pairs(1, loss=loss, steps=5)


def test_rounds_approach_the_nash_mixture():
    few, many = rounds(0, steps=2), rounds(0, steps=40)
    assert 0 <= many["exploitability"] < few["exploitability"]
    for study in (pairs, rounds):
        with pytest.raises(UsageError, match="loss of"):
            study(0, loss="guess")
