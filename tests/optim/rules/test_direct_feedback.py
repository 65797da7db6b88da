"""Direct feedback alignment against plain numpy, against backpropagation with true feedback, and on digits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim.rules.direct_feedback import DirectFeedbackAlignment


def _sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def _mlp(*sizes, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def _batch(width=6, classes=3, n=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, width, generator=generator, dtype=dtype), torch.arange(n) % classes


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    y = torch.tensor(data.target)[order]
    return x[:1297], y[:1297], x[1297:], y[1297:]


def _train(rule, digits, epochs=15, seed=0):
    x, y, x_test, y_test = digits
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            rule.step(x[batch], y[batch])
    return (rule.predict(x_test) == y_test).float().mean().item()


@pytest.mark.parametrize("feedback", ["shared", "independent"])
@pytest.mark.parametrize("follow", ["paper", "code"])
def test_step_equals_plain_numpy(follow, feedback):
    """Nokland's update for two hidden tanh layers and softmax cross-entropy."""
    model, (x, y) = _mlp(6, 7, 5, 3, dtype=torch.float64), _batch()
    W = [model[i].weight.detach().numpy().copy() for i in (0, 2, 4)]
    b = [model[i].bias.detach().numpy().copy() for i in (0, 2, 4)]
    rule = DirectFeedbackAlignment(model, optimizer=_sgd(0.3), feedback=feedback, follow=follow, seed=3)
    loss = rule.step(x, y)

    generator = torch.Generator().manual_seed(3)
    draw = [torch.randn(3, n, generator=generator).double().numpy() for n in ((7,) if feedback == "shared" else (7, 5))]
    B = [draw[0][:, :7] / math.sqrt(7 * 3), (draw[0][:, :5] if feedback == "shared" else draw[1]) / math.sqrt(5 * 3)]
    h0 = x.numpy()
    h1 = np.tanh(h0 @ W[0].T + b[0])
    h2 = np.tanh(h1 @ W[1].T + b[1])
    logits = h2 @ W[2].T + b[2]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    e = (p - np.eye(3)[y.numpy()]) / len(x)
    scale = len(x) if follow == "code" else 1
    d1, d2 = scale * e @ B[0] * (1 - h1**2), scale * e @ B[1] * (1 - h2**2)
    for index, delta, h in ((0, d1, h0), (2, d2, h1), (4, e, h2)):
        expected = W[index // 2] - 0.3 * delta.T @ h
        np.testing.assert_allclose(model[index].weight.detach().numpy(), expected, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(
            model[index].bias.detach().numpy(), b[index // 2] - 0.3 * delta.sum(axis=0), rtol=1e-6, atol=1e-8
        )
    assert loss.item() == pytest.approx(-np.log(p[np.arange(len(x)), y.numpy()]).mean())


def test_true_feedback_is_backpropagation():
    """With B_l the transposed product of the weights above, a linear net's step is that of backpropagation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5), nn.Linear(5, 3)).double()
    x, y = _batch()
    rule = DirectFeedbackAlignment(model, optimizer=_sgd(1.0), feedback="independent")
    rule.alignment(x, y)
    upper = model[2].weight.detach()
    rule.tensors = [upper @ model[1].weight.detach() * math.sqrt(7 * 3), upper * math.sqrt(5 * 3)]
    np.testing.assert_allclose(rule.alignment(x, y), [1.0, 1.0], rtol=1e-12)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    rule.step(x, y)
    for old, gradient, new in zip(before, gradients, model.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old - gradient, rtol=1e-10, atol=1e-12)


def test_no_graph_spans_two_blocks():
    model, (x, _) = _mlp(6, 7, 5, 3, dtype=torch.float64), _batch()
    rule = DirectFeedbackAlignment(model)
    outputs = rule._forward(x)
    for index, out in enumerate(outputs):
        own = {id(parameter) for parameter in rule.blocks[index].parameters()}
        gradients = torch.autograd.grad(out.sum(), list(model.parameters()), allow_unused=True)
        reached = {id(p) for p, g in zip(model.parameters(), gradients, strict=True) if g is not None}
        assert reached == own


def test_a_module_may_stand_in_several_places():
    torch.manual_seed(0)
    tanh = nn.Tanh()
    model = nn.Sequential(nn.Linear(6, 7), tanh, nn.Linear(7, 5), tanh, nn.Linear(5, 3)).double()
    x, _ = _batch()
    torch.testing.assert_close(DirectFeedbackAlignment(model)._forward(x)[-1], model(x))


def test_convolutions_and_frozen_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 10)
    )
    model[0].requires_grad_(False)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    rule = DirectFeedbackAlignment(model, optimizer=_sgd(0.1))
    x, y = torch.rand(5, 1, 8, 8), torch.arange(5)
    rule.step(x, y)
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert changed == [False, False, True, True, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(rule.alignment(x, y)) == 2


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_resumes_bit_for_bit(tmp_path, momentum):
    x, y = _batch(dtype=torch.float32)
    make = lambda seed: DirectFeedbackAlignment(  # noqa: E731
        _mlp(6, 7, 5, 3, seed=seed), optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum), seed=seed
    )
    rule, other = make(0), make(1)
    for _ in range(3):
        rule.step(x, y)
    torch.save(rule.state_dict(), tmp_path / "state.pt")
    state = torch.get_rng_state()
    losses = [rule.step(x, y) for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(a, other.step(x, y)) for a in losses)
    for a, b in zip(rule.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_aligns_and_learns_digits(digits):
    """Within 4 points of backpropagation of the same net; both hidden layers turn to the true gradient."""
    rule = DirectFeedbackAlignment(_mlp(64, 128, 128, 10), optimizer=_sgd(1.0))
    start = rule.alignment(digits[2], digits[3])
    assert max(np.abs(start)) < 0.15
    accuracy = _train(rule, digits)
    angles = np.degrees(np.arccos(rule.alignment(digits[2], digits[3])))
    assert max(angles) < 70, angles

    model = _mlp(64, 128, 128, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)

    class Backpropagation:
        predict = staticmethod(lambda x: model(x).argmax(-1))

        @staticmethod
        def step(x, y):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    goal = _train(Backpropagation, digits)
    assert goal > 0.95
    assert accuracy > goal - 0.04


def test_a_narrow_layer_blocks_alignment(digits):
    """The layer below a layer of two units aligns less than below a wide one, on three seeds."""
    cosines = {}
    for width in (2, 128):
        rules = [DirectFeedbackAlignment(_mlp(64, 128, width, 10, seed=s), optimizer=_sgd(0.5)) for s in range(3)]
        for seed, rule in enumerate(rules):
            _train(rule, digits, seed=seed)
        cosines[width] = [rule.alignment(digits[2], digits[3])[0] for rule in rules]
    assert max(cosines[2]) < min(cosines[128]), cosines
    assert np.mean(cosines[2]) < 0.6 * np.mean(cosines[128]), cosines


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: DirectFeedbackAlignment(nn.Linear(2, 2)), "needs an nn.Sequential, got Linear"),
        (lambda: DirectFeedbackAlignment(nn.Sequential(nn.Tanh())), "needs layers of weights"),
        (lambda: DirectFeedbackAlignment(nn.Sequential(nn.Linear(2, 2))), "needs a hidden layer"),
        (lambda: DirectFeedbackAlignment(nn.Sequential(nn.RNN(2, 2), nn.Linear(2, 2))), "layer 0 is a RNN"),
        (lambda: DirectFeedbackAlignment(_mlp(2, 2, 2), feedback="none"), "unknown feedback"),
        (lambda: DirectFeedbackAlignment(_mlp(2, 2, 2), follow="text"), "unknown follow"),
        (lambda: DirectFeedbackAlignment(nn.Sequential(*[nn.Linear(2, 2)] * 2)), "two layers share one"),
        (
            lambda: DirectFeedbackAlignment(_mlp(2, 2, 2)).load_state_dict({"optimizers": []}),
            "the state is of 0 layers, the model has 2",
        ),
    ],
)
def test_wrong_use(build, text):
    with pytest.raises(UsageError, match=text):
        build()
