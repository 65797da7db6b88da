"""Virgo against its formulas in NumPy, and against the variances of a graph network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.errors import UsageError
from trimtab.layers import gcn_adjacency, virgo_, virgo_variances

NODES = 60


def _generator(seed=7):
    return torch.Generator().manual_seed(seed)


def _hubs(nodes=NODES):
    """A graph of few hubs and many leaves: every node is joined to up to three before it, the first ones most often."""
    rng = np.random.default_rng(0)
    pairs = {(i, int(i * rng.random() ** 3)) for i in range(1, nodes) for _ in range(3)}
    edges = np.array([(a, b) for a, b in pairs] + [(b, a) for a, b in pairs]).T
    return torch.from_numpy(edges)


def _dense(edges, nodes=NODES):
    links = np.eye(nodes)
    for a, b in edges.T.tolist():
        links[b, a] += 1
    degree = links.sum(1)
    return links / np.sqrt(np.outer(degree, degree))


@pytest.mark.parametrize("mean", ["harmonic", "arithmetic"])
def test_equals_the_formulas_in_numpy(mean):
    edges, m = _hubs(), [7, 16, 16, 16, 5]
    a, x = _dense(edges), torch.rand(NODES, m[0], generator=_generator())
    power = [np.linalg.matrix_power(a, k) for k in range(5)]
    c = [float(((p @ x.double().numpy().mean(1)) ** 2).sum()) for p in power]
    b = [float(((p @ np.ones(NODES)) ** 2).sum()) for p in power]
    forward = [2 / 7, 2 / 16 * c[1] / c[2], 2 / 16 * c[2] / c[3], 2 / 16 * c[3] / c[4]]
    backward = [2 / 16 * b[3] / b[4], 2 / 16 * b[2] / b[3], 2 / 16 * b[1] / b[2], NODES / (4 * b[1])]
    both = [2 * f * g / (f + g) if mean == "harmonic" else (f + g) / 2 for f, g in zip(forward, backward, strict=True)]
    adjacency = gcn_adjacency(edges, NODES)
    np.testing.assert_allclose(adjacency.to_dense().numpy(), a, atol=1e-6)
    for direction, expected in (("forward", forward), ("backward", backward), ("both", both)):
        for messages in (adjacency, adjacency.to_dense(), lambda h: adjacency @ h):
            found = virgo_variances(m, messages, x, direction=direction, mean=mean)
            np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert virgo_variances(m, adjacency, x, classes=3)[-1] > virgo_variances(m, adjacency, x)[-1]


def test_weights_are_uniform_with_these_variances():
    weights = [torch.empty(200, 300), torch.empty(100, 200), torch.empty(50, 100)]
    x, adjacency = torch.rand(NODES, 300, generator=_generator()), gcn_adjacency(_hubs(), NODES)
    variances = virgo_(weights, adjacency, x, generator=_generator())
    for weight, variance in zip(weights, variances, strict=True):
        assert float(weight.var()) == pytest.approx(variance, rel=0.05)
        assert float(weight.abs().max()) <= (3 * variance) ** 0.5
        assert float(weight.abs().max()) == pytest.approx((3 * variance) ** 0.5, rel=0.01)
    again = [torch.empty_like(w) for w in weights]
    virgo_(again, adjacency, x, generator=_generator())
    assert all(torch.equal(one, other) for one, other in zip(weights, again, strict=True))
    assert virgo_variances([300, 200, 100, 50], adjacency, x) == variances


def _drift(draw, adjacency, x, depth=6, width=256):
    """Mean |log ratio| of successive layers, of embeddings and of gradients, in a network drawn by `draw`."""
    widths = [x.shape[1]] + [width] * depth
    weights = [torch.empty(width, widths[i]) for i in range(depth)]
    draw(weights)
    weights = [w.requires_grad_() for w in weights]
    h, layers = x, []
    for w in weights:
        layers.append(adjacency @ (h @ w.T))
        h = layers[-1].relu()
    targets = torch.arange(len(x)) % width
    gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(layers[-1], targets), layers)
    return [
        float(torch.stack([t.detach().square().mean().log() for t in of[:-1]]).diff().abs().mean())
        for of in (layers, gradients)
    ]


def _uniform(gain, seed):
    def draw(weights):
        generator = _generator(seed)
        for w in weights:
            bound = (3 * gain / w.shape[1]) ** 0.5
            w.uniform_(-bound, bound, generator=generator)

    return draw


def _drifts(adjacency, x, draw):
    return np.mean([_drift(lambda weights, s=s: draw(weights, s), adjacency, x) for s in (1, 2, 3)], axis=0)


def test_variance_is_nearer_to_equal_than_with_the_classics():
    """A graph convolution hardly changes the size of what is not negative: Glorot is off by its 2, He is not."""
    edges, x = _hubs(300), (torch.rand(300, 64, generator=_generator()) < 0.05).float()
    adjacency = gcn_adjacency(edges, 300).to_dense()
    glorot = _drifts(adjacency, x, lambda w, s: _uniform(1.0, s)(w))
    he = _drifts(adjacency, x, lambda w, s: _uniform(2.0, s)(w))
    forward = _drifts(adjacency, x, lambda w, s: virgo_(w, adjacency, x, direction="forward", generator=_generator(s)))
    both = _drifts(adjacency, x, lambda w, s: virgo_(w, adjacency, x, generator=_generator(s)))
    assert (forward < he).all()
    assert forward[0] < 0.3 * glorot[0]
    assert (both < 0.6 * glorot).all()


def test_sums_of_messages_need_the_graph():
    """Unnormalised sums multiply variances by the square of the graph's largest eigenvalue, and only Virgo knows it."""
    edges, x = _hubs(300), torch.rand(300, 64, generator=_generator())
    adjacency = torch.eye(300).index_put((edges[1], edges[0]), torch.ones(()), accumulate=True)
    largest = float(torch.linalg.eigvalsh(adjacency).max())
    he = _drifts(adjacency, x, lambda w, s: _uniform(2.0, s)(w))
    both = _drifts(adjacency, x, lambda w, s: virgo_(w, adjacency, x, generator=_generator(s)))
    assert he[0] == pytest.approx(2 * np.log(largest), rel=0.1)
    assert both[0] < 0.1 * he[0]
    assert both[1] < 0.3 * he[1]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda a, x: virgo_variances([3], a, x), "widths must be two or more"),
        (lambda a, x: virgo_variances([4, 2], a, x), r"features must be \[nodes, 4\]"),
        (lambda a, x: virgo_variances([3, 1], a, x), "classes must be at least 2, got 1"),
        (lambda a, x: virgo_variances([3, 2], a, x, direction="up"), "unknown direction 'up'"),
        (lambda a, x: virgo_variances([3, 2], a, x, mean="median"), "unknown mean 'median'"),
        (lambda a, x: virgo_variances([3, 2], 0 * a, x), "messages have the squared size"),
        (lambda a, x: virgo_([], a, x), "weights must be one matrix"),
        (lambda a, x: virgo_([torch.ones(3, 4), torch.ones(2, 4)], a, x), "layer 0 puts out 3 values"),
        (lambda a, x: gcn_adjacency(torch.tensor([[0], [9]]), 3), "nodes from 0 to 2"),
        (lambda a, x: gcn_adjacency(torch.ones(3, 2), 3), r"shape \[2, edges\]"),
    ],
)
def test_wrong_use_is_named(call, text):
    with pytest.raises(UsageError, match=text):
        call(torch.eye(5), torch.rand(5, 3, generator=_generator()))
