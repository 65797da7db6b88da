"""Training-free scores against finite differences and loops in numpy; the sampler against the algorithm's steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.errors import UsageError
from trimtab.tune.proxies.training_free import RobotSampler, _posterior, training_free_scores

ALL = ("grad_norm", "snip", "grasp", "fisher", "synflow", "jacov", "naswot", "ntk")
N = 5


def _data():
    x = np.random.default_rng(0).standard_normal((N, 3))
    return x, np.array([0, 1, 1, 0, 1])


class _Numpy:
    """A network 3 -> 4 -> 2 and its mean cross-entropy in numpy; `gates` multiply the outputs of the layers."""

    def __init__(self, relu):
        draw = np.random.default_rng(1).standard_normal
        self.relu = relu
        self.shapes = ((4, 3), (2, 4))
        self.biases = (draw(4), draw(2))
        self.flat = 0.7 * draw(20)

    def split(self, flat):
        return flat[:12].reshape(4, 3), flat[12:].reshape(2, 4)

    def hidden(self, flat, x):
        return x @ self.split(flat)[0].T + self.biases[0]

    def logits(self, flat, x, gates=(1.0, 1.0)):
        h = gates[0] * self.hidden(flat, x)
        h = np.maximum(h, 0) if self.relu else h
        return gates[1] * (h @ self.split(flat)[1].T + self.biases[1])

    def loss(self, flat, x, y, gates=(1.0, 1.0)):
        z = self.logits(flat, x, gates)
        return np.mean([math.log(sum(math.exp(v) for v in row)) - row[t] for row, t in zip(z, y, strict=True)])

    def torch(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU() if self.relu else nn.Identity(), nn.Linear(4, 2)).double()
        for layer, weight, bias in zip((model[0], model[2]), self.split(self.flat), self.biases, strict=True):
            layer.weight.data, layer.bias.data = torch.tensor(weight), torch.tensor(bias)
        return model


def _slope(f, at, h=1e-5):
    at = np.array(at, float)
    result = np.zeros_like(at)
    for i in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[i] += h
        down[i] -= h
        result[i] = (f(up) - f(down)) / (2 * h)
    return result


def _expected(net, x, y):
    w = net.flat
    g = _slope(lambda flat: net.loss(flat, x, y), w)
    step = 1e-4
    up, down = (_slope(lambda flat: net.loss(flat, x, y), w + sign * step * g) for sign in (1, -1))
    curved = (up - down) / (2 * step)
    scores = {
        "grad_norm": np.linalg.norm(g[:12]) + np.linalg.norm(g[12:]),
        "snip": abs(w * g).sum(),
        "grasp": -(w * curved).sum(),
    }
    ones = np.ones((N, 4)), np.ones((N, 2))
    first = _slope(lambda gate: net.loss(w, x, y, (gate, ones[1])), ones[0])
    second = _slope(lambda gate: net.loss(w, x, y, (ones[0], gate)), ones[1])
    scores["fisher"] = (first**2).mean(axis=0).sum() / 2 + (second**2).mean(axis=0).sum() / 2
    w1, w2 = (abs(part) for part in net.split(w))
    scores["synflow"] = (w2 @ w1).sum() + (w2 @ (w1.sum(axis=1) + abs(net.biases[0]))).sum()
    jacobian = _slope(lambda inputs: net.logits(w, inputs).sum(), x)
    v = np.linalg.eigvals(np.corrcoef(jacobian)).real.clip(min=0) + 1e-5
    scores["jacov"] = -sum(math.log(value) + 1 / value for value in v)
    on = net.hidden(w, x) > 0
    agree = [[sum(a == b for a, b in zip(on[i], on[j], strict=True)) for j in range(N)] for i in range(N)]
    scores["naswot"] = math.log(abs(np.linalg.det(agree))) if abs(np.linalg.det(agree)) > 1e-6 else None
    rows = [_slope(lambda flat, n=n: net.logits(flat, x[n : n + 1])[0, y[n]], w) for n in range(N)]
    eigenvalues = np.linalg.eigvalsh(np.array(rows) @ np.array(rows).T)
    scores["ntk"] = -math.log10(eigenvalues[-1] / eigenvalues[0])
    return scores


def _scores(net, names):
    x, y = _data()
    table = training_free_scores([net.torch], torch.tensor(x), torch.tensor(y), F.cross_entropy, scores=names)
    return dict(zip(names, table[0], strict=True))


def test_scores_of_a_relu_network():
    net = _Numpy(relu=True)
    expected = _expected(net, *_data())
    for name, value in _scores(net, ALL).items():
        if expected[name] is not None:
            # Eigenvalues of 0 make jacov's 1 / k; the finite differences' error moves the small ones.
            rel = 1e-3 if name in ("jacov", "grasp", "ntk") else 1e-6
            assert value == pytest.approx(expected[name], rel=rel), name


def test_scores_of_a_linear_network():
    net = _Numpy(relu=False)
    names = [name for name in ALL if name not in ("naswot", "jacov")]
    expected = _expected(net, *_data())
    for name, value in _scores(net, names).items():
        assert value == pytest.approx(expected[name], rel=1e-3 if name in ("grasp", "ntk") else 1e-6), name
    assert math.isnan(_scores(net, ["naswot"])["naswot"])


def test_naswot_counts_agreeing_relus():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(x)

    x = torch.tensor([[1.0, 1, 1, -1], [1, -1, -1, 1], [-1, -1, 1, 1]])
    table = training_free_scores([Fixed], x, torch.tensor([0, 1, 2]), F.cross_entropy, scores=["naswot"])
    assert table[0, 0] == pytest.approx(math.log(np.linalg.det([[4, 1, 1], [1, 4, 2], [1, 2, 4]])))


def _conv():
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)).double()


def test_convolutions_and_batch_normalisation():
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(6, 1, 5, 5, generator=generator, dtype=torch.float64), torch.arange(6) % 3
    table = training_free_scores([_conv], x, y, F.cross_entropy, scores=ALL)
    assert np.isfinite(table).all()
    model = _conv()
    gates = torch.ones(6, 2, dtype=torch.float64, requires_grad=True)
    hidden = F.conv2d(x, model[0].weight, model[0].bias) * gates[:, :, None, None]
    last = torch.ones(6, 3, dtype=torch.float64, requires_grad=True)
    hidden = F.batch_norm(hidden, None, None, model[1].weight, model[1].bias, training=True).relu().flatten(1)
    F.cross_entropy(F.linear(hidden, model[4].weight, model[4].bias) * last, y).backward()
    expected = sum(float(gate.grad.square().mean(0).sum() / 2) for gate in (gates, last))
    assert table[0, ALL.index("fisher")] == pytest.approx(expected, rel=1e-9)
    path = F.conv2d(torch.ones(1, 1, 5, 5).double(), model[0].weight.abs())
    whole = (path + model[0].bias.abs()[:, None, None]).flatten(1)
    out = model[4].weight.abs()
    expected = ((path.flatten(1) @ out.T).sum() + (whole @ out.T).sum()).item()
    assert table[0, ALL.index("synflow")] == pytest.approx(expected, rel=1e-9)


def test_the_network_is_left_as_it_is():
    model = _conv()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(6, 1, 5, 5, generator=torch.Generator().manual_seed(3)).double()
    training_free_scores([lambda: model], x, torch.arange(6) % 3, F.cross_entropy, scores=ALL)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def _run(sampler, quality):
    asked = []
    while (candidate := sampler.ask()) is not None:
        asked.append(candidate)
        sampler.tell(candidate, quality[candidate])
    return asked


def _table(seed=0, n=40):
    generator = np.random.default_rng(seed)
    quality = generator.uniform(size=n)
    columns = [quality + noise * generator.standard_normal(n) for noise in (0.3, 0.5)]
    return np.stack([*columns, generator.standard_normal(n), -quality], axis=1), quality


def test_search_follows_the_algorithm():
    table, quality = _table()
    sampler = RobotSampler(table, budget=10, scaling="linear")
    scaled = (table - table.min(0)) / (table.max(0) - table.min(0))
    np.testing.assert_allclose(sampler.scaled, scaled)
    asked = _run(sampler, quality)
    assert len(asked) == len(set(asked)) == 10
    tops = [int(np.argmax(scaled @ w)) for w in sampler._weights]
    explored = list(dict.fromkeys(tops))
    assert len(tops) == 10  # T rounds, those that repeat a candidate included
    assert asked[: len(explored)] == explored
    assert [quality[top] for top in tops] == sampler._values
    best = sampler._weights[max(i for i, value in enumerate(sampler._values) if value == max(sampler._values))]
    np.testing.assert_array_equal(sampler.weights, best)
    rest = [int(i) for i in np.argsort(-(scaled @ best)) if i not in explored]
    assert asked[len(explored) :] == rest[: 10 - len(explored)]
    assert sampler.best == max(asked, key=lambda i: quality[i])
    np.testing.assert_allclose(sampler.combined, scaled @ best)


def test_same_seed_same_search():
    table, quality = _table(1)
    first, again, other = (_run(RobotSampler(table, budget=8, seed=seed), quality) for seed in (0, 0, 1))
    assert first == again != other


def test_finds_better_than_random_where_a_score_informs():
    better = []
    for seed in range(12):
        table, quality = _table(seed)
        # The expected best of 8 drawn from 40: the k-th smallest is the best in C(k - 1, 7) of C(40, 8) draws.
        chance = sum(q * math.comb(k, 7) for k, q in enumerate(np.sort(quality))) / math.comb(40, 8)
        better.append(quality[_run(RobotSampler(table, budget=8, seed=seed), quality)].max() - chance)
    assert np.mean(better) > 2 * np.std(better, ddof=1) / math.sqrt(len(better))


def test_posterior_is_that_of_a_gaussian_process():
    """At a given length the textbook formulas; the length is the likeliest of the grid."""
    generator = np.random.default_rng(0)
    points, at = generator.uniform(-1, 1, (6, 2)), generator.uniform(-1, 1, (4, 2))
    values = np.sin(3 * points[:, 0]) + points[:, 1]
    y = (values - values.mean()) / values.std()

    def kernel(a, b, length):
        s = math.sqrt(5) * math.dist(a, b) / length
        return (1 + s + s * s / 3) * math.exp(-s)

    def log_likelihood(length):
        k = np.array([[kernel(a, b, length) for b in points] for a in points]) + 1e-6 * np.eye(6)
        return -0.5 * y @ np.linalg.inv(k) @ y - 0.5 * math.log(np.linalg.det(k))

    length = max(np.logspace(-1, 1, 21), key=log_likelihood)
    k = np.array([[kernel(a, b, length) for b in points] for a in points]) + 1e-6 * np.eye(6)
    cross = np.array([[kernel(a, b, length) for b in points] for a in at])
    mean, deviation = _posterior(points, values, at)
    np.testing.assert_allclose(mean, cross @ np.linalg.solve(k, y), rtol=1e-6)
    np.testing.assert_allclose(deviation**2, 1 - np.diag(cross @ np.linalg.solve(k, cross.T)), rtol=1e-4, atol=1e-9)


def test_posterior_equals_scikit_learn():
    gaussian_process = pytest.importorskip("sklearn.gaussian_process")
    generator = np.random.default_rng(1)
    points, at = generator.uniform(-1, 1, (8, 3)), generator.uniform(-1, 1, (5, 3))
    values = points @ [1.0, -2.0, 0.5] + 0.1 * generator.standard_normal(8)
    mean, deviation = _posterior(points, values, at)
    errors = []
    for length in np.logspace(-1, 1, 21):
        kernel = gaussian_process.kernels.Matern(length, nu=2.5)
        peer = gaussian_process.GaussianProcessRegressor(kernel, alpha=1e-6, optimizer=None, normalize_y=True)
        theirs, sigma = peer.fit(points, values).predict(at, return_std=True)
        errors.append(
            abs((theirs - values.mean()) / values.std() - mean).max() + abs(sigma / values.std() - deviation).max()
        )
    assert min(errors) < 1e-5
    assert sorted(errors)[1] > 1e-3


@pytest.mark.parametrize("scaling", ["log", "rank"])
def test_scaling(scaling):
    table = np.array([[-99.0, 1.0, np.nan], [0.0, 1.0, 5.0], [9.0, 1.0, 7.0], [99.0, 1.0, 9.0]])
    scaled = RobotSampler(table, scaling=scaling).scaled
    middle = {"log": [0, 0.5, 0.75, 1], "rank": [0, 1 / 3, 2 / 3, 1]}[scaling]
    np.testing.assert_allclose(scaled[:, 0], middle)
    assert not scaled[:, 1].any()
    assert scaled[0, 2] == 0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: RobotSampler([[1.0], [2.0]], budget=1), "budget must be 2"),
        (lambda: RobotSampler([1.0, 2.0]), r"scores must be \[N, M\]"),
        (lambda: RobotSampler([[1.0]], scaling="sqrt"), "unknown scaling"),
        (lambda: RobotSampler([[1.0], [2.0]]).tell(0, 1.0), "was not asked for"),
        (lambda: training_free_scores([], torch.zeros(2, 3), torch.zeros(2).long(), F.cross_entropy), "no candidate"),
        (lambda: training_free_scores([_conv], torch.zeros(2, 3), torch.zeros(2), F.cross_entropy), "class indices"),
        (
            lambda: training_free_scores(
                [_conv], torch.zeros(2, 3), torch.zeros(2).long(), F.cross_entropy, scores=["snap"]
            ),
            "unknown score 'snap'. Did you mean 'snip'",
        ),
    ],
)
def test_wrong_usage(call, text):
    with pytest.raises(UsageError, match=text):
        call()


def test_ask_and_tell_take_turns():
    sampler = RobotSampler(_table()[0], budget=3)
    candidate = sampler.ask()
    with pytest.raises(UsageError, match="was asked for and not told"):
        sampler.ask()
    with pytest.raises(UsageError, match="must be finite"):
        sampler.tell(candidate, math.nan)
    sampler.tell(candidate, 1.0)
    assert sampler.best == candidate
