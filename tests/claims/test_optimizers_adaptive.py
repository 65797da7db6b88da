"""The mechanisms that the adaptive optimizers' papers claim, at a size that a test can afford."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from trimtab.optim import CAME, SPAM, AdamW, AdamW8bit, Chain, Lion, adaptive_spike_clip
from trimtab.optim.adaptive.radam import rectification


def _state_bytes(make):
    p = nn.Parameter(torch.zeros(128, 64))
    optimizer = make([p])
    p.grad = torch.ones(128, 64)
    optimizer.step()
    return sum(x.numel() * x.element_size() for x in optimizer.state[p].values() if isinstance(x, torch.Tensor))


def test_lion_keeps_half_of_adamws_state():
    assert _state_bytes(Lion) * 2 == _state_bytes(AdamW) == 2 * 4 * 128 * 64


def test_came_keeps_one_moment_and_vectors():
    assert _state_bytes(CAME) == 4 * (128 * 64 + 2 * (128 + 64))


def _spam_through_a_spike(spike):
    """What a spike at step 100 moves the weights in its step and by step 150, and the bound on the former."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(200, dtype=torch.float64))
    optimizer = SPAM([p], lr=0.01)
    moved = bound = p.detach()
    for step in range(1, 151):
        p.grad = torch.randn(200, generator=generator, dtype=torch.float64)
        if step == 100:
            p.grad = p.grad.sign() * (p.grad.abs() + 0.1) * spike
            m, v = (optimizer.state[p][name].clone() for name in ("exp_avg", "exp_avg_sq"))
            # |m'| is at most 0.9 |m| + 0.1 sqrt(5000 v), and v' at least 0.999 v: with a spike 0.999 v + 0.001 5000 v.
            size = 0.01 * math.sqrt(1 - 0.999**100) / (1 - 0.9**100)
            bound = size * (0.9 * m.abs() + 0.1 * (5000 * v).sqrt()) / (5.999 * v).sqrt()
            before = p.detach().clone()
        optimizer.step()
        if step == 100:
            moved = (p.detach() - before).abs()
    return moved, bound, p.detach()


def test_spam_bounds_what_a_spike_moves():
    (moved, bound, end), (_, _, worse) = (_spam_through_a_spike(spike) for spike in (1e3, 1e6))
    assert (moved <= bound).all()
    assert (moved > 0.5 * bound).any()
    # All entries are clipped in both, so that a spike a thousand times as large changes nothing at all.
    torch.testing.assert_close(end, worse, rtol=1e-12, atol=1e-12)


def test_spam_recovers_from_a_spike_where_adam_stands_still():
    # Adam's v keeps a spike of 10^4 for a thousand steps, and its steps stay tiny; SPAM's grows to 6 times its size.
    def distance(make, spike):
        p = nn.Parameter(torch.full((50,), 5.0, dtype=torch.float64))
        optimizer = make([p])
        for step in range(300):
            p.grad = p.detach().sign() * (spike if step == 30 else 1.0)
            optimizer.step()
        return float(p.detach().abs().mean())

    adam = [distance(lambda ps: AdamW(ps, lr=0.02, weight_decay=0.0), spike) for spike in (1.0, 1e4)]
    spam = [distance(lambda ps: SPAM(ps, lr=0.02), spike) for spike in (1.0, 1e4)]
    assert adam[0] < 0.1
    assert spam[0] < 0.1
    assert adam[1] > 3.0
    assert spam[1] < adam[1] / 2


def _language_loss(make, *, spikes, steps=350):
    """The last losses of a small model of a Markov chain; a spike is a tenth of a step's entries, a thousandfold."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(64, 32), nn.Flatten(), nn.Linear(512, 128), nn.GELU(), nn.Linear(128, 64))
    generator = torch.Generator().manual_seed(1)
    chances = torch.softmax(2.5 * torch.randn(64, 64, generator=generator), dim=-1)
    tokens = [torch.randint(64, (4096,), generator=generator)]
    for _ in range(16):
        tokens.append(torch.multinomial(chances[tokens[-1]], 1, generator=generator)[:, 0])
    data = torch.stack(tokens, dim=1)
    optimizer = make(model.parameters())
    losses = []
    for step in range(steps):
        batch = data[torch.randint(4096, (64,), generator=generator)]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch[:, :-1]), batch[:, -1])
        loss.backward()
        losses.append(float(loss.detach()))
        for p in model.parameters():
            hit = torch.rand(p.shape, generator=generator) < 0.1
            if spikes and step > 25 and step % 50 == 0:
                p.grad[hit] *= 1000
        optimizer.step()
    return sum(losses[-30:]) / 30


def test_spam_learns_faster_through_spikes_and_as_fast_without():
    adam, spam = (
        [_language_loss(lambda ps, make=make: make(ps, lr=3e-3, weight_decay=0.0), spikes=on) for on in (False, True)]
        for make in (AdamW, SPAM)
    )
    # 600 steps and three seeds: 0.05 for both without spikes; with them 0.20 to 0.27 for AdamW, 0.09 to 0.12 for SPAM.
    assert spam[0] == pytest.approx(adam[0], rel=0.1)
    assert spam[1] < 0.85 * adam[1]
    assert adam[1] > adam[0]


def test_stable_spam_bounds_what_a_spike_moves():
    # By Cauchy and Schwarz the norm that AdaGN passes on, a mean over a root mean square of norms, is at most
    # sqrt(sum of w_k^2 / q_k) for their weights w_k = 0.3 0.7^k and q_k = 0.1 0.9^k: 1.41, whatever the spike.
    bound = math.sqrt(0.3**2 / 0.1 / (1 - 0.7**2 / 0.9))
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(200, dtype=torch.float64))
    optimizer = Chain([p], [adaptive_spike_clip()], lr=1.0)
    norms = []
    for step in range(150):
        p.grad = torch.randn(200, generator=generator, dtype=torch.float64)
        p.grad *= {60: 1e3, 100: 1e6, 101: 1e9}.get(step, 1.0)
        before = p.detach().clone()
        optimizer.step()
        norms.append(float((p.detach() - before).norm()))
    assert bound == pytest.approx(1.4056, abs=1e-4)
    assert max(norms[30:]) < bound
    assert max(norms) > 1


def test_radam_rectifies_the_variance_of_early_steps():
    """The variance of sqrt((1 - beta2^t) / v_t) on normal gradients falls as 1 / r_t^2 does."""
    beta2, samples = 0.99, 200_000
    generator = torch.Generator().manual_seed(0)
    v = torch.zeros(samples, dtype=torch.float64)
    found = {}
    for t in range(1, 201):
        v = beta2 * v + (1 - beta2) * torch.randn(samples, generator=generator, dtype=torch.float64).square()
        if t in (8, 20, 50, 200):
            psi = ((1 - beta2**t) / v).sqrt()
            found[t] = (float(psi.var()), rectification(t, beta2, "paper"))
    # Unrectified, the variance at step 8 is many times that at the end; rectified, it is about the same throughout.
    end = found[200][0] * found[200][1] ** 2
    assert found[8][0] / found[200][0] > 10
    for variance, r in found.values():
        assert variance * r**2 == pytest.approx(end, rel=0.35)


def test_eight_bit_adamw_fits_as_adamw_does():
    def loss(make):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
        optimizer = make(model.parameters())
        generator = torch.Generator().manual_seed(1)
        target = torch.randn(64, 64, generator=generator) / 8
        values = []
        for _ in range(300):
            x = torch.randn(64, 64, generator=generator)
            optimizer.zero_grad()
            value = (model(x) - torch.tanh(x @ target)).square().mean()
            value.backward()
            optimizer.step()
            values.append(float(value.detach()))
        return sum(values[:5]), sum(values[-5:])

    exact, rounded = (loss(lambda ps, make=make: make(ps, lr=3e-3)) for make in (AdamW, AdamW8bit))
    assert exact[1] < exact[0] / 5
    assert rounded[1] == pytest.approx(exact[1], rel=0.05)
