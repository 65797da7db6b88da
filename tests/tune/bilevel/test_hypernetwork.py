"""Hypernetwork tuning against ridge regression, whose best response, hypergradient and optimum have closed forms."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.errors import UsageError
from trimtab.tune.bilevel.hypernetwork import Hyper, HypernetworkTuner

# Rows are a product, U times V: gradient descent leaves V = 0 slowly, Adam does not.
OPTIMIZERS = {
    "rows": lambda p: torch.optim.Adam(p, lr=0.01),
    "linear": lambda p, lr=0.03: torch.optim.SGD(p, lr=lr, momentum=0.9),
}


def _data(seed, n, outputs=1):
    generator = torch.Generator().manual_seed(seed)
    w = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None].expand(6, outputs)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return x, x @ w + 1.5 * torch.randn(n, outputs, generator=generator, dtype=torch.float64)


def _squares(net, batch, values=None):
    return (net(batch[0]) - batch[1]).square().sum(dim=1).mean() / 2


def _ridge(x, y, decay):
    """argmin 1/2n |Xw - y|^2 + decay/2 |w|^2, and its derivative by log decay, by plain linear algebra."""
    x, y = x.numpy(), y.numpy()
    a = x.T @ x / len(x) + decay * np.eye(x.shape[1])
    w = np.linalg.solve(a, x.T @ y / len(x))
    return w, -decay * np.linalg.solve(a, w)


def _tuner(response="rows", outputs=1, **options):
    torch.manual_seed(0)
    model = nn.Linear(6, outputs, bias=False, dtype=torch.float64)
    decay = Hyper("decay", options.pop("start", 0.3), 1e-4, 1e3, "log", options.pop("sigma", 0.1), decays=("weight",))
    defaults = {"samples": 2, "optimizer": OPTIMIZERS.get(response)}
    return HypernetworkTuner(
        model, [decay], train_loss=_squares, valid_loss=_squares, response=response, **{**defaults, **options}
    )


@pytest.mark.parametrize(("response", "outputs"), [("rows", 1), ("linear", 1), ("linear", 3), ("rows", 3)])
def test_best_response_is_that_of_ridge_regression(response, outputs):
    train = _data(0, 30, outputs)
    tuner = _tuner(response, outputs)
    for _ in range(1000):
        tuner.step(train)
    for factor in (0.9, 1.0, 1.1):
        found = tuner.best_response({"decay": 0.3 * factor})["weight"].T.numpy()
        exact, _ = _ridge(*train, 0.3 * factor)
        assert np.linalg.norm(found - exact) < 2e-3 * np.linalg.norm(exact)
    # Without the response, the error at 10 % more decay would be ten times that.
    fixed = tuner.best_response()["weight"].T.numpy()
    assert np.linalg.norm(fixed - exact) > 1e-2 * np.linalg.norm(exact)


@pytest.mark.parametrize("response", ["rows", "linear"])
def test_hypergradient_is_that_of_ridge_regression(response):
    train, valid = _data(0, 30), _data(1, 40)
    tuner = _tuner(response)
    for _ in range(1000):
        tuner.step(train)
    w, slope = _ridge(*train, 0.3)
    x, y = valid[0].numpy(), valid[1].numpy()
    exact = float(((x.T @ (x @ w - y)) / len(x) * slope).sum())
    assert tuner.hypergradient(valid)["decay"] == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize("start", [0.01, 10.0])
def test_reaches_the_best_decay_of_ridge_regression(start):
    train, valid = _data(0, 12), _data(1, 200)
    decays = np.exp(np.linspace(math.log(1e-3), math.log(100), 2001))
    x, y = valid[0].numpy(), valid[1].numpy()
    losses = [((x @ _ridge(*train, decay)[0] - y) ** 2).mean() / 2 for decay in decays]
    best = decays[int(np.argmin(losses))]
    assert 0.02 < best < 5
    sgd = OPTIMIZERS["linear"]
    tuner = _tuner("linear", start=start, hyper_lr=0.03, optimizer=lambda p: sgd(p, lr=0.01))
    for _ in range(1000):
        report = tuner.step(train, valid)
    assert math.log(tuner.values["decay"] / best) == pytest.approx(0, abs=0.03)
    assert report["valid_loss"] == pytest.approx(min(losses), rel=1e-3)


def test_one_step_by_hand():
    """One SGD step of the rows: W, U and V from the chain rule written out, then the move of the hyper-parameter."""
    tuner = _tuner(samples=1, outputs=2, hyper_lr=0.1, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    (x, y), (xv, yv) = _data(0, 5, 2), _data(1, 5, 2)
    before = tuner.state_dict()
    w, u = before["model"]["weight"].numpy(), before["response"]["weight/U"].numpy()
    generator = torch.Generator().manual_seed(0)
    generator.set_state(before["generator"])
    z = float(torch.randn(1, generator=generator, dtype=torch.float64)[0])
    v = np.full((2, 1), 0.2)  # per sigma, which is 0.1
    before["response"]["weight/V"].fill_(0.2)
    tuner.load_state_dict(before)
    tuner.step((x, y), (xv, yv))
    x, y, xv, yv = x.numpy(), y.numpy(), xv.numpy(), yv.numpy()
    at = w + (v * z) * u
    slope = (x @ at.T - y).T @ x / 5 + 0.3 * math.exp(0.1 * z) * at
    w, u, v = w - 0.1 * slope, u - 0.1 * slope * v * z, v - 0.1 * (slope * u).sum(1, keepdims=True) * z
    hyper = float((((xv @ w.T - yv).T @ xv / 5) * (v * u)).sum())
    move = -0.1 * np.sign(hyper)  # the first step of Adam
    after = tuner.state_dict()
    np.testing.assert_allclose(after["response"]["weight/U"].numpy(), u, rtol=1e-12)
    np.testing.assert_allclose(after["response"]["weight/V"].numpy(), v, rtol=1e-12)
    np.testing.assert_allclose(after["model"]["weight"].numpy(), w + v * move / 0.1 * u, rtol=1e-6)
    assert tuner.values["decay"] == pytest.approx(0.3 * math.exp(move), rel=1e-6)


def _net(conv=False):
    torch.manual_seed(1)
    if conv:
        first = [nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.Flatten()]
    else:
        first = [nn.Linear(4, 6)]
    return nn.Sequential(*first, nn.ReLU(), nn.Dropout(0.1), nn.Linear(6, 3))


HYPERS = (
    Hyper("first", 1e-3, 1e-6, 1.0, "log", decays=("0.*", "1.*")),
    Hyper("last", 1e-2, 1e-6, 1.0, "log", decays=("*.weight",)),
    Hyper("dropout", 0.2, 0.0, 0.8, "logit", drops=("*",)),
    Hyper("noise", 0.1, 1e-3, 2.0, "log"),
)


def _classes(net, batch, values=None):
    x, y = batch
    if values is not None:
        x = x + values["noise"] * torch.sin(50 * x)
    return F.cross_entropy(net(x), y)


def _classifier(conv=False, **options):
    hypers = [HYPERS[1], HYPERS[2], HYPERS[3]]
    return HypernetworkTuner(_net(conv), hypers, train_loss=_classes, valid_loss=_classes, hyper_lr=0.05, **options)


def _batches(n):
    generator = torch.Generator().manual_seed(5)
    for _ in range(n):
        x = torch.randn(16, 4, generator=generator)
        yield (x[:8], x[:8].argmax(1) % 3), (x[8:], x[8:].argmax(1) % 3)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("response", ["rows", "linear"])
def test_resumes_bit_for_bit(conv, response):
    def run(tuner, batches):
        return [tuner.step(train, valid if i % 2 else None) for i, (train, valid) in enumerate(batches)]

    batches = list(_batches(12))
    whole = _classifier(conv, response=response, samples=2)
    reports = run(whole, batches)
    first = _classifier(conv, response=response, samples=2)
    run(first, batches[:6])
    file, state = io.BytesIO(), first.state_dict()
    assert run(first, batches[6:]) == reports[6:]  # the state is a copy
    torch.save(state, file)
    file.seek(0)
    torch.rand(100)  # the tuner does not use the global generator
    second = _classifier(conv, response=response, samples=2, seed=9)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert run(second, batches[6:]) == reports[6:]
    assert second.values == whole.values
    assert second.model[-2].p == whole.values["dropout"]
    for a, b in zip(second.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_model_is_the_response_at_the_current_values_and_is_never_touched_by_a_probe():
    tuner = _classifier(warmup=2)
    kinds = [type(module) for module in tuner.model]
    values = tuner.values
    for i, (train, valid) in enumerate(_batches(5)):
        report = tuner.step(train, valid)
        assert ("valid_loss" in report) == (i >= 2)
        assert (tuner.values == values) == (i < 2)
    before = tuner.state_dict()
    tuner.hypergradient(valid)
    tuner.best_response({"noise": 0.5})
    for a, b in zip(before["model"].values(), tuner.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    now = tuner.best_response()
    assert all(torch.equal(now[name], parameter) for name, parameter in tuner.model.named_parameters())
    assert [type(module) for module in tuner.model] == kinds
    assert not any(module._forward_hooks for module in tuner.model)
    assert all(module.training for module in tuner.model.modules())


def test_moving_keeps_the_response():
    tuner = _classifier(response="linear")
    for train, valid in _batches(8):
        tuner.step(train, valid)
    probe = {"noise": 0.3, "dropout": 0.4, "last": 0.02}
    before = tuner.best_response(probe)
    tuner._tune(valid)
    assert all(torch.allclose(before[n], w, atol=1e-6) for n, w in tuner.best_response(probe).items())


def test_dropout_rate_is_the_sampled_one():
    model = nn.Sequential(nn.Dropout(0.1), nn.Linear(1, 1, bias=False))
    seen = []

    def loss(net, batch, values=None):
        out = net(batch)
        if values is not None:
            seen.append((float(values["rate"]), float((out == 0).float().mean())))
        return out.mean()

    tuner = HypernetworkTuner(
        model, [Hyper("rate", 0.5, 0.0, 0.95, "logit", 1.0, drops=("0",))], train_loss=loss, valid_loss=loss, seed=3
    )
    state = torch.get_rng_state()
    for _ in range(6):
        tuner.step(torch.ones(4000, 1))
    assert torch.equal(state, torch.get_rng_state())
    rates, zeros = zip(*seen, strict=True)
    assert max(rates) - min(rates) > 0.2
    np.testing.assert_allclose(zeros, rates, atol=0.03)


@pytest.mark.parametrize("transform", ["log", "logit"])
def test_values_stay_in_range(transform):
    def loss(net, batch, values=None):
        return net(batch).mean() - (0 if values is None else 0 * values["h"])

    tuner = HypernetworkTuner(
        nn.Linear(2, 1), [Hyper("h", 0.5, 0.1, 0.9, transform, 3.0)], train_loss=loss, valid_loss=loss, hyper_lr=5.0
    )
    for _ in range(20):
        tuner.step(torch.ones(3, 2), torch.ones(3, 2))
        assert 0.1 - 1e-6 <= tuner.values["h"] <= 0.9 + 1e-6


def test_frozen_parameters_stay():
    model = _net()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    tuner = HypernetworkTuner(model, [HYPERS[3]], train_loss=_classes, valid_loss=_classes)
    for train, valid in _batches(3):
        tuner.step(train, valid)
    assert torch.equal(before, model[0].weight)
    assert not any(name.startswith("0.") for name in tuner.state_dict()["response"])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Hyper("h", 0.1, 0.0, 1.0, "log"), "low must be above 0"),
        (lambda: Hyper("h", 2.0, 0.1, 1.0, "logit"), "low < start < high"),
        (lambda: Hyper("h", 0.5, 0.1, 1.0, "logit", drops=("*",)), "dropout rate"),
        (lambda: Hyper("h", 0.5, 0.1, 1.0, "sqrt"), "unknown transform"),
        (lambda: Hyper("h", 0.5, 0.1, 1.0, "log", 0.0), "sigma must be above 0"),
        (lambda: _tuner(samples=0), "samples 1 or above"),
        (lambda: _tuner("mlp", optimizer=torch.optim.SGD), "unknown response"),
        (lambda: _tuner().best_response({"decoy": 1.0}), "unknown hyper-parameter 'decoy'"),
        (lambda: _tuner().load_state_dict(_classifier().state_dict()), "make the tuner alike"),
        (
            lambda: HypernetworkTuner(_net(), [HYPERS[3], HYPERS[3]], train_loss=_classes, valid_loss=_classes),
            "each of its own name",
        ),
        (
            lambda: HypernetworkTuner(
                _net(), [Hyper("h", 0.5, 0.1, 1.0, "log", decays=("9.*",))], train_loss=_classes, valid_loss=_classes
            ),
            "no parameter is named '9",
        ),
    ],
)
def test_wrong_usage(make, text):
    with pytest.raises(UsageError, match=text):
        make()
