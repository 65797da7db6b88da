"""Forward-Forward against Hinton's update in plain numpy, its measures by hand, and its units on digits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim.rules.forward_forward import ForwardForward, class_selectivity, hoyer_sparsity


def _mlp(*sizes, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*(part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())))


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    y = torch.tensor(data.target)[order]
    return x[:1297], y[:1297], x[1297:], y[1297:]


def _logistic(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("place", ["over", "before"])
def test_step_equals_hintons_update(place):
    """His pass written out: dC/din with (1 - p) a and -p a, peer normalisation ungated, both batches' means."""
    model = _mlp(9 if place == "over" else 12, 8, 6).double()
    x, y = torch.randn(5, 9, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    W = [model[i].weight.detach().numpy().copy() for i in (0, 2)]
    b = [model[i].bias.detach().numpy().copy() for i in (0, 2)]
    # Plain SGD, so that one step shows the gradient; half his rate of 0.01, as the class says.
    rule = ForwardForward(model, 3, place=place, optimizer=lambda p: torch.optim.SGD(p, lr=0.005), seed=6)
    rule.step(x, y)
    shift = torch.randint(1, 3, (5,), generator=torch.Generator().manual_seed(6)).numpy()
    labels = {"positive": y.numpy(), "negative": (y.numpy() + shift) % 3}
    assert (labels["negative"] != labels["positive"]).all()
    gW, gb = [np.zeros_like(w) for w in W], [np.zeros_like(v) for v in b]
    for sign, label in labels.items():
        data = np.concatenate([np.eye(3)[label], x.numpy()[:, 3:] if place == "over" else x.numpy()], axis=1)
        for i in range(2):
            data = data / np.sqrt((data**2).mean(axis=1, keepdims=True))
            states = np.maximum(0, data @ W[i].T + b[i])
            p = _logistic((states**2).sum(axis=1, keepdims=True) - states.shape[1])
            if sign == "positive":
                means = 0.9 * 0.5 + 0.1 * states.mean(axis=0)
                better = (1 - p) * states + 0.03 * (means.mean() - means)
            else:
                better = -p * states
            gW[i] += better.T @ data / 5
            gb[i] += better.sum(axis=0) / 5
            data = states
    for i in range(2):
        np.testing.assert_allclose(model[2 * i].weight.detach().numpy(), W[i] + 0.01 * gW[i], rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(model[2 * i].bias.detach().numpy(), b[i] + 0.01 * gb[i], rtol=1e-9, atol=1e-11)


def test_variant_of_tosato():
    """Goodness is the norm, threshold 3, inputs of unit length; the loss is the mean of both softplus terms' sums."""
    model = _mlp(12, 8).double()
    x, y = torch.randn(5, 9, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    rule = ForwardForward(
        model, 3, place="before", goodness="norm", normalize="l2", threshold=3, peer_normalization=0, seed=6
    )
    shift = torch.randint(1, 3, (5,), generator=torch.Generator().manual_seed(6))
    terms = []
    for label, sign in ((y, -1), ((y + shift) % 3, 1)):
        data = torch.cat([F.one_hot(label, 3).double(), x], dim=1)
        g = model(data / data.norm(dim=1, keepdim=True)).norm(dim=1)
        terms.append(torch.log(1 + torch.exp(sign * (g - 3))).mean())
    assert rule.step(x, y).item() == pytest.approx(sum(terms).item(), rel=1e-9)


def test_measures_by_hand():
    a = torch.tensor([[3.0, 4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    # (2 - 7/5) / 1 = 0.6 and 0; the silent sample does not count.
    assert hoyer_sparsity(a).item() == pytest.approx(0.3)
    y = torch.tensor([0, 1, 2])
    # Class means are the rows: units 0 to 3 have best 3, 4, 1, 1 and others 0.5, 0.5, 0, 0.
    expected = np.mean([2.5 / 3.5, 3.5 / 4.5, 1.0, 1.0])
    assert class_selectivity(a, y).item() == pytest.approx(expected)
    assert class_selectivity(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])).item() == 0
    with pytest.raises(UsageError, match="two classes"):
        class_selectivity(a, torch.zeros(3))
    with pytest.raises(UsageError, match="H of at least 2"):
        hoyer_sparsity(torch.ones(3))


def test_a_layer_sees_no_goodness_of_the_one_below():
    rule = ForwardForward(_mlp(9, 8, 6), 3, seed=0)
    x, y = torch.randn(4, 9), torch.tensor([0, 1, 2, 0])
    louder = ForwardForward(_mlp(9, 8, 6), 3, seed=0)
    with torch.no_grad():
        louder.model[0].weight *= 10
        louder.model[0].bias *= 10
    assert not torch.allclose(rule.hidden(x, y)[0], louder.hidden(x, y)[0])
    torch.testing.assert_close(rule.hidden(x, y)[1], louder.hidden(x, y)[1])


def test_scores_leave_out_the_first_of_several_layers():
    x = torch.randn(4, 9)
    one, two = ForwardForward(_mlp(9, 8), 3), ForwardForward(_mlp(9, 8, 6), 3)
    for rule in (one, two):
        for label in range(3):
            h = rule.hidden(x, torch.full((4,), label))[-1]
            torch.testing.assert_close(rule.scores(x)[:, label], h.square().sum(dim=1))
    assert torch.equal(two.predict(x), two.scores(x).argmax(dim=1))


def _train(digits, rule, epochs=20):
    x, y, x_test, y_test = digits
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            rule.step(x[batch], y[batch])
    return (rule.predict(x_test) == y_test).float().mean().item()


@pytest.fixture(scope="module")
def trained(digits):
    optimizer = lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.9, weight_decay=0.002)  # noqa: E731
    rule = ForwardForward(_mlp(74, 128, 128), 10, place="before", optimizer=optimizer)
    return rule, _train(digits, rule)


def test_learns_digits(trained):
    assert trained[1] > 0.88


def test_units_are_sparse_and_selective(digits, trained):
    """More so than those of a cross-entropy net of the same size, in the last hidden layer."""
    x, y, x_test, y_test = digits
    rule, _ = trained
    torch.manual_seed(0)
    body = _mlp(64, 128, 128)
    model = nn.Sequential(*body, nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        ours, theirs = rule.hidden(x_test, y_test)[-1], body(x_test)
        assert (model(x_test).argmax(-1) == y_test).float().mean() > 0.95
    assert hoyer_sparsity(ours) > 0.6 > 0.45 > hoyer_sparsity(theirs)
    assert class_selectivity(ours, y_test) > 0.8 > 0.6 > class_selectivity(theirs, y_test)


def test_no_gradient_crosses_layers(digits):
    x, y = digits[0][:16], digits[1][:16]
    rule = ForwardForward(_mlp(64, 16, 16), 10, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    seen = []
    for block in rule.blocks:
        block.layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].requires_grad))
    other = ForwardForward(_mlp(64, 16, 16), 10, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    with torch.no_grad():
        other.model[2].weight.neg_()
    rule.step(x, y)
    other.step(x, y)
    assert seen == [False, False]
    assert torch.equal(rule.model[0].weight, other.model[0].weight)


def test_resumes_bit_for_bit(digits, tmp_path):
    """Wrong labels, momentum and the running means go on as they were."""
    x, y = digits[0][:32], digits[1][:32]
    rule, other = (ForwardForward(_mlp(64, 16, 16, seed=seed), 10, seed=seed) for seed in (0, 1))
    for _ in range(3):
        rule.step(x, y)
    torch.save(rule.state_dict(), tmp_path / "state.pt")
    state = torch.get_rng_state()
    losses = [rule.step(x, y) for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(a, other.step(x, y)) for a in losses)
    assert all(torch.equal(a, b) for a, b in zip(rule.model.parameters(), other.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"classes": 1}, "classes must be at least 2, got 1"),
        ({"threshold": 0.0}, "threshold must be above 0"),
        ({"peer_normalization": -1.0}, "peer_normalization must be 0 or more"),
        ({"place": "after"}, "unknown place"),
        ({"goodness": "l2"}, "unknown goodness"),
        ({"normalize": "max"}, "unknown normalize"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(UsageError, match=text):
        ForwardForward(_mlp(9, 8), **{"classes": 3, **options})


def test_takes_linear_layers_only():
    with pytest.raises(UsageError, match="this rule trains Linear"):
        ForwardForward(nn.Sequential(nn.Conv2d(1, 1, 1)), 3)
    with pytest.raises(UsageError, match="must start at a Linear layer, got LayerNorm"):
        ForwardForward(nn.Sequential(nn.LayerNorm(9), nn.Linear(9, 8)), 3)
