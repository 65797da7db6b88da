"""The attention studies: functions of the seed, options that act, and the numbers against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.errors import UsageError
from trimtab.studies.attention import _look, _sequences, backcopy, windows
from trimtab.workloads.lm import LanguageModel

_SHORT = {"steps": 2, "batch_size": 2}


def test_a_pure_function_of_the_seed_whose_options_act():
    first = backcopy(1, **_SHORT)
    torch.manual_seed(9)
    assert backcopy(1, **_SHORT) == first
    for other in (backcopy(2, **_SHORT), backcopy(1, **_SHORT, method="qk-norm"), backcopy(1, **_SHORT, lr=0.02)):
        assert all(other[name] != first[name] for name in first)
        assert all(math.isfinite(value) for value in other.values())
    # With the function preserved, the gate acts from the second step on.
    assert backcopy(1, **_SHORT, method="gated-attention")["loss"] != first["loss"]


def test_divergence_counts_as_the_start():
    found = backcopy(1, **_SHORT, lr=1e30)
    assert found["loss"] == found["trigger_loss"] == pytest.approx(math.log(256), abs=0.2)
    assert found["first_token_share"] == 1.0
    assert all(math.isfinite(value) for value in found.values())


def test_sequences():
    """After a trigger comes the token before it; after another token what the table gives."""
    table = torch.eye(63).roll(1, dims=1)
    table[10] = torch.nn.functional.one_hot(torch.tensor(1), 63)
    tokens = _sequences(table, 40, torch.Generator().manual_seed(0))
    assert tokens.shape == (40, 33)
    assert (tokens[:, 0] == 0).all()
    assert (tokens[:, 1] > 3).all()
    triggers = 0
    for row in tokens.tolist():
        for place in range(2, 33):
            last = row[place - 1]
            if last <= 3:
                triggers += 1
                assert row[place] == row[place - 2]
            elif last == 11:
                assert row[place] == 2
            else:
                assert row[place] == last % 63 + 1
    assert triggers > 40


def test_what_is_looked_at():
    """The first token's share from the block's own queries and keys, losses from its logits."""
    torch.manual_seed(0)
    model = LanguageModel(64, 32, layers=1, heads=1)
    model.blocks[0].attention.qkv.weight.data.mul_(10)
    tokens = _sequences(torch.ones(63, 63) / 63, 5, torch.Generator().manual_seed(3))
    found = _look(model, tokens)
    x = model.embedding(tokens[:, :-1]) + model.position.weight
    block = model.blocks[0]
    q, k, _ = block.attention.qkv(block.norm1(x)).chunk(3, dim=-1)
    shares, losses, at_triggers = [], [], []
    log_p = model(tokens[:, :-1]).log_softmax(-1)
    for b in range(5):
        for i in range(32):
            trigger = 1 <= tokens[b, i] <= 3
            losses.append(-log_p[b, i, tokens[b, i + 1]].item())
            if trigger:
                at_triggers.append(losses[-1])
            elif i >= 2:
                shares.append((k[b, : i + 1] @ q[b, i] / 8).softmax(0)[0].item())
    stream = block(x)
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["trigger_loss"] == pytest.approx(sum(at_triggers) / len(at_triggers), rel=1e-5)
    assert found["first_token_share"] == pytest.approx(sum(shares) / len(shares), rel=1e-5)
    assert found["activation_ratio"] == pytest.approx((stream.abs().max() / stream.abs().median()).item(), rel=1e-5)
    assert "attend" not in vars(block.attention)


def test_windows():
    options = {"length": 128, "window": 8, "repeats": 1}
    chunks, mask = windows(0, core="chunks", **options), windows(0, core="mask", **options)
    assert chunks["gigaflops"] * 128 == pytest.approx(mask["gigaflops"] * 16)
    assert max(chunks["difference"], mask["difference"]) < 3e-6
    with pytest.raises(UsageError, match="unknown core 'band'"):
        windows(0, core="band")
