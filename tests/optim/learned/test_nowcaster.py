"""The nowcaster against its equations in loops, its symmetry, and its predictions on unseen runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim.learned.extrapolation import LineFit, Nowcasting
from trimtab.optim.learned.nowcaster import Nowcaster, Trajectory, linear_chain, train_nowcaster


def _loud(**options):
    """A nowcaster whose weights are large enough to matter."""
    nowcaster = Nowcaster(**options, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        for p in nowcaster.parameters():
            p.copy_(0.4 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel())))
    return nowcaster


def _checkpoints(c, shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(c, *shape, dtype=torch.float64, generator=generator) for shape in shapes]


def _silu(x):
    return x / (1 + np.exp(-x))


def test_equals_its_equations():
    shapes = [(3, 2), (3,), (2, 3)]  # 2 -> 3 (bias) -> 2 (none)
    nowcaster = _loud(context=4, horizon=5, hidden=6, layers=1)
    checkpoints = _checkpoints(4, shapes)
    chain = [(0, 1), (2, None)]
    result = nowcaster.predict(checkpoints, 3, chain=chain)

    p = {name: value.detach().numpy() for name, value in nowcaster.named_parameters()}
    arrays = [c.numpy() for c in checkpoints]
    m = [a.mean() for a in arrays]
    sd = [a.std(ddof=1) + 1e-6 for a in arrays]
    x = [(a - mean) / s for a, mean, s in zip(arrays, m, sd, strict=True)]
    edge = {}
    for tensor, shape in enumerate(shapes):
        for index in np.ndindex(shape):
            embedded = p["embed.weight"] @ x[tensor][(slice(None), *index)] + p["embed.bias"]
            edge[tensor, index] = embedded + p["types"][len(shape)]
    zero = np.zeros(6)
    node = {}
    for i in range(2):  # inputs
        out = np.mean([edge[0, (o, i)] for o in range(3)], axis=0)
        node[0, i] = np.concatenate([zero, zero, out])
    for i in range(3):  # hidden
        into = np.mean([edge[0, (i, j)] for j in range(2)], axis=0)
        out = np.mean([edge[2, (o, i)] for o in range(2)], axis=0)
        node[1, i] = np.concatenate([into, edge[1, (i,)], out])
    for i in range(2):  # outputs
        node[2, i] = np.concatenate([np.mean([edge[2, (i, j)] for j in range(3)], axis=0), zero, zero])
    node = {key: _silu(p["nodes.0.weight"] @ v + p["nodes.0.bias"]) for key, v in node.items()}
    ends = {0: lambda i: (node[1, i[0]], node[0, i[1]]), 1: lambda i: (node[1, i[0]], zero)}
    ends[2] = lambda i: (node[2, i[0]], node[1, i[1]])
    for (tensor, index), e in edge.items():
        both = np.concatenate([e, *ends[tensor](index)])
        e = e + _silu(p["edges.0.weight"] @ both + p["edges.0.bias"])
        change = p["head.2.weight"] @ _silu(p["head.0.weight"] @ e + p["head.0.bias"]) + p["head.2.bias"]
        expected = m[tensor] + sd[tensor] * (x[tensor][(-1, *index)] + change[2])
        assert result[tensor][index].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("layers", [0, 2])
def test_commutes_with_permutations_of_neurons(layers):
    nowcaster = _loud(context=3, horizon=2, hidden=5, layers=layers)
    w1, b1, w2 = _checkpoints(3, [(4, 3), (4,), (2, 4)])
    chain = [(0, 1), (2, None)]
    order = torch.tensor([2, 0, 3, 1])
    plain = nowcaster.predict([w1, b1, w2], 2, chain=chain)
    permuted = nowcaster.predict([w1[:, order], b1[:, order], w2[:, :, order]], 2, chain=chain)
    torch.testing.assert_close(permuted, [plain[0][order], plain[1][order], plain[2][:, order]])
    # Messages carry: another bias changes a weight's prediction, except without any rounds.
    other = nowcaster.predict([w1, 2 * b1 + torch.arange(3).double().unsqueeze(1) ** 2, w2], 2, chain=chain)
    assert torch.equal(other[0], plain[0]) == (layers == 0)


def test_follows_shift_and_scale():
    nowcaster = _loud(context=3, horizon=2, hidden=5, layers=1)
    (w,) = _checkpoints(3, [(4, 3)])
    (plain,) = nowcaster.predict([w], 1)
    (moved,) = nowcaster.predict([50 * w + 7], 1)
    torch.testing.assert_close(moved, 50 * plain + 7, rtol=1e-5, atol=1e-4)


def _decays(seed, length=60):
    """Runs whose weights decay at a common rate to their ends: predictable, but not by a line."""
    generator = torch.Generator().manual_seed(seed)
    rate = 0.8 + 0.15 * torch.rand((), generator=generator)
    t = torch.arange(length, dtype=torch.float32)
    states = []
    for shape in ((6, 4), (6,), (3, 6)):
        end, gap = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        states.append(end + gap * (rate**t).reshape(-1, *[1] * len(shape)))
    return Trajectory(states, [(0, 1), (2, None)])


def test_predicts_unseen_runs_better_than_a_line(tmp_path):
    nowcaster = Nowcaster(horizon=10, hidden=24, layers=1)
    losses = train_nowcaster(
        nowcaster, [_decays(s) for s in range(16)], generator=torch.Generator().manual_seed(0), steps=400
    )
    assert np.mean(losses[-50:]) < 0.5 * np.mean(losses[:10])
    nowcaster.save(tmp_path / "nowcaster.pt")
    nowcaster = Nowcaster.load(tmp_path / "nowcaster.pt")

    def error(predict):
        return np.mean(
            [
                (future - theta[start + 4 + 8]).abs().mean().item()
                for run in map(_decays, range(100, 110))
                for start in (0, 4)
                for future, theta in zip(
                    predict([theta[start : start + 5] for theta in run.states], run.chain), run.states, strict=True
                )
            ]
        )

    learned = error(lambda states, chain: nowcaster.predict(states, 8, chain=chain))
    line = error(lambda states, chain: LineFit().predict(states, 8))
    still = error(lambda states, chain: [theta[-1] for theta in states])
    assert learned < 0.6 * min(line, still)


def test_training_is_reproducible():
    runs = [_decays(0)]
    trained = []
    for _ in range(2):
        nowcaster = Nowcaster(horizon=3, hidden=4, layers=1)
        train_nowcaster(nowcaster, runs, generator=torch.Generator().manual_seed(3), steps=3)
        trained.append(nowcaster.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_drives_the_wrapper():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    assert linear_chain(model) == [(0, 1), (2, 3)]
    nowcaster = _loud(context=2, horizon=3, hidden=4, layers=1).float()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = Nowcasting(base, nowcaster.on(model), period=4, context=2, horizon=3, max_steps=8)
    saved = []
    for step in range(4):
        model(torch.ones(2, 3)).sum().backward()
        if step in (1, 3):
            saved.append([p.detach().clone() for p in model.parameters()])
        optimizer.step()
    stacked = [torch.stack(pair) for pair in zip(*saved, strict=True)]
    expected = nowcaster.predict(stacked, 3, chain=[(0, 1), (2, 3)])
    for p, value in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p, value)


def test_refusals():
    with pytest.raises(UsageError, match="context must be at least 2"):
        Nowcaster(context=1)
    nowcaster = Nowcaster(context=3, horizon=2, hidden=4)
    with pytest.raises(UsageError, match="needs 3 checkpoints, got 2"):
        nowcaster.predict([torch.zeros(2, 1)], 1)
    with pytest.raises(UsageError, match="between 1 and the nowcaster's horizon 2, got 3"):
        nowcaster.predict([torch.zeros(3, 1)], 3)
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(UsageError, match="at least one run"):
        train_nowcaster(nowcaster, [], generator=generator)
    with pytest.raises(UsageError, match="at least 4 checkpoints, got one with 3"):
        train_nowcaster(nowcaster, [Trajectory([torch.zeros(3, 1)])], generator=generator)
    assert linear_chain(nn.ModuleList([nn.Linear(2, 3), nn.Linear(4, 1)])) == []
