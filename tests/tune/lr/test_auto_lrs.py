"""AutoLRS: its forecasts, its Gaussian process, a plain loop, trials without a trace, exact resumes."""

from __future__ import annotations

import copy
import math
import os
import signal

import numpy as np
import pytest
import torch
from scipy.optimize import curve_fit
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trimtab.errors import RunFailedError, UsageError
from trimtab.record.checkpoint import load_checkpoint, save_checkpoint
from trimtab.tune.lr._batches import Batches
from trimtab.tune.lr._exponential_forecast import exponential_forecast, jumped
from trimtab.tune.lr._next_lr import _posterior, next_lr
from trimtab.tune.lr.auto_lrs import AutoLRS

pytest.importorskip("sklearn")


@pytest.mark.parametrize(("length", "b"), [(100, -0.02), (100, -0.002), (16, -0.05), (800, -0.001), (30, -1.0)])
def test_forecast_recovers_known_exponentials(length, b):
    for a, c in ((2.0, 1.0), (-0.7, 3.0)):
        curve = exponential_forecast([a * math.exp(b * t) + c for t in range(length)], 10 * length)
        assert (curve.a, curve.b, curve.c) == pytest.approx((a, b, c), rel=1e-3)
        assert curve(10 * length) == pytest.approx(a * math.exp(b * 10 * length) + c, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_forecast_stands_outliers_and_noise(seed):
    generator = np.random.default_rng(seed)
    series = 2 * np.exp(-0.02 * np.arange(100)) + 1
    clean = exponential_forecast(series + 0.02 * generator.standard_normal(100), 1000)
    assert clean(1000) == pytest.approx(1.0, abs=0.1)
    series[generator.choice(np.arange(1, 49), 4, replace=False)] += 3.0
    assert exponential_forecast(series, 1000)(1000) == pytest.approx(1.0, abs=1e-3)
    assert abs(exponential_forecast(series, 1000, rounds=0)(1000) - 1.0) > 0.01


def _least_squares(y, start):
    t = np.arange(len(y))
    return curve_fit(lambda t, a, b, c: a * np.exp(b * t) + c, t, y, p0=start, xtol=1e-14, ftol=1e-14)[0]


@pytest.mark.parametrize("seed", range(4))
def test_forecast_fit_is_the_least_squares_one(seed):
    noise = 0.1 * np.random.default_rng(seed).standard_normal(60)
    y = 2 * np.exp(-0.06 * np.arange(60)) + 1 + noise
    curve = exponential_forecast(y, 600, rounds=0)
    assert (curve.a, curve.b, curve.c) == pytest.approx(tuple(_least_squares(y, (2, -0.06, 1))), rel=1e-4)
    # The authors' way: errors this small let their spline be one parabola.
    parabola = np.polyval(np.polyfit(np.arange(60), y, 2), np.arange(60))
    curve = exponential_forecast(y, 600, rounds=0, fit="smoothed")
    assert (curve.a, curve.b, curve.c) == pytest.approx(tuple(_least_squares(parabola, (2, -0.06, 1))), rel=1e-4)


def test_a_loss_that_leaps_up_and_falls_again_counts_as_it_ends():
    falling = [1 + 2 * math.exp(-0.03 * step) for step in range(60)]
    assert jumped(falling) is None
    leap = [2.3 + 40 * (step / 6) * math.exp(1 - step / 6) for step in range(60)]
    assert exponential_forecast(leap, 600)(600) < 2.3
    assert jumped(leap) == pytest.approx(sum(leap[-6:]) / 6)


def test_forecast_of_what_is_no_decay():
    assert exponential_forecast([1.5] * 20, 200)(200) == pytest.approx(1.5)
    falling = exponential_forecast([3 - 0.01 * t for t in range(20)], 200)
    assert falling(200) == pytest.approx(1.0, abs=0.15)  # the slowest decay is nearly a line
    assert exponential_forecast([math.exp(0.3 * t) for t in range(20)], 200)(200) > 100
    with pytest.raises(UsageError, match="at least 5 finite losses"):
        exponential_forecast([1.0, 2.0, math.nan, 1.0, 1.0, 1.0], 10)


def _gp(x, y, at, amplitude, length, noise):
    """Mean and deviation of the function from the textbook's formulas, for y normalised and scaled back."""
    shift, scale = np.mean(y), np.std(y)

    def matern(p, q):
        r = math.sqrt(5) * np.abs(p[:, None] - q) / length
        return amplitude * (1 + r + r**2 / 3) * np.exp(-r)

    covariance = matern(x, x) + (noise + 1e-10) * np.eye(len(x))
    z = (y - shift) / scale
    cross = matern(at, x)
    mean = shift + scale * cross @ np.linalg.inv(covariance) @ z
    variance = amplitude - np.einsum("ij,jk,ik->i", cross, np.linalg.inv(covariance), cross)
    likelihood = -0.5 * z @ np.linalg.inv(covariance) @ z - 0.5 * np.linalg.slogdet(covariance)[1]
    return mean, scale * np.sqrt(np.maximum(variance, 0)), likelihood


@pytest.mark.parametrize("kappa", [0.0, 2.0, 1e6])
def test_next_lr_is_the_lowest_bound_of_an_independent_gp(kappa):
    low, high = 1e-4, 1.0
    lrs = [2e-4, 1e-3, 2e-2, 0.5, 0.08]
    losses = [2.2, 1.7, 0.9, 3.0, 1.3]
    x, grid = np.log(np.array(lrs) / low) / math.log(high / low), np.linspace(0, 1, 1001)
    _, _, kernel = _posterior(x, np.array(losses), grid, 3)
    facts = (kernel.k1.k1.constant_value, kernel.k1.k2.length_scale, kernel.k2.noise_level)
    mean, sigma, likelihood = _gp(x, np.array(losses), grid, *facts)
    chosen = next_lr(lrs, losses, lr_min=low, lr_max=high, kappa=kappa, seed=3)
    bound = mean - kappa * sigma
    place = math.log(chosen / low) / math.log(high / low)
    assert bound[round(place * 1000)] <= bound.min() + 1e-4 * (bound.max() - bound.min())
    # The kernel itself is the likeliest.
    for other in np.random.default_rng(0).uniform(-2, 2, (50, 3)):
        amplitude, length, noise = np.array(facts) * np.exp(other)
        if 0.01 <= amplitude <= 1000 and 0.01 <= length <= 100:
            assert _gp(x, np.array(losses), grid, amplitude, length, noise)[2] <= likelihood + 1e-3
    if kappa:
        assert chosen not in lrs


def test_next_lr_explores_and_then_settles():
    def loss(lr):
        return (math.log10(lr) + 2) ** 2

    lrs = []
    for _ in range(9):
        lrs.append(next_lr(lrs, [loss(lr) for lr in lrs], lr_min=1e-5, lr_max=1, kappa=1e6))
    gaps = np.diff(np.sort(np.log10([1e-5, *lrs, 1.0])))
    assert gaps.max() < 1.3
    for _ in range(6):
        lrs.append(next_lr(lrs, [loss(lr) for lr in lrs], lr_min=1e-5, lr_max=1, kappa=1.0))
    assert min(abs(math.log10(lr) + 2) for lr in lrs) < 0.05
    assert len(set(lrs)) == len(lrs)


class _Net(nn.Module):
    """Running statistics and draws, which a trial must not leave changed."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))

    def forward(self, x):
        return self.layers(x)


def _loss(model, batch):
    inputs, targets = batch
    return (model(inputs) - targets).square().mean()


def _setting(seed=0, **options):
    torch.manual_seed(seed)
    model = _Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    inputs = torch.randn(40, 4)
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True).sin())
    loader = DataLoader(data, batch_size=8, shuffle=True)
    options = {"lr_min": 1e-3, "lr_max": 1.0, "tau": 30, "tau_max": 60, "k": 3, "ratio": 5, **options}
    return AutoLRS(model, optimizer, _loss, loader, **options)


def test_equals_the_algorithm_in_a_plain_loop():
    torch.manual_seed(0)
    batches = [(torch.randn(16, 3), torch.randn(16, 1)) for _ in range(400)]
    model = nn.Linear(3, 1)
    tuned = copy.deepcopy(model)
    k, ratio, seed = 3, 5, 7

    def run(start, momenta, first, count, lr):
        weights, momenta = [w.clone() for w in start], [m.clone() for m in momenta]
        losses = []
        for x, y in batches[first : first + count]:
            w = [p.clone().requires_grad_() for p in weights]
            loss = (x @ w[0].T + w[1] - y).square().mean()
            losses.append(float(loss.detach()))
            for i, g in enumerate(torch.autograd.grad(loss, w)):
                momenta[i] = 0.9 * momenta[i] + g
                weights[i] = weights[i] - lr * momenta[i]
        return weights, momenta, losses

    weights = [p.detach().clone() for p in model.parameters()]
    momenta = [torch.zeros_like(w) for w in weights]
    done, losses, rates = 0, [], []
    for stage, tau in enumerate((30, 60, 60), 1):
        lrs, forecasts = [], []
        for _ in range(k):
            lr = next_lr(lrs, forecasts, lr_min=1e-3, lr_max=0.1, kappa=2.0, seed=seed + stage)
            series = run(weights, momenta, done, tau // ratio, lr)[2]
            lrs.append(lr)
            forecasts.append(exponential_forecast(series, tau)(tau))
        rates.append(lrs[forecasts.index(min(forecasts))])
        weights, momenta, new = run(weights, momenta, done, tau, rates[-1])
        losses += new
        done += tau

    tuner = AutoLRS(
        tuned, torch.optim.SGD(tuned.parameters(), lr=0.01, momentum=0.9), _loss, lambda step: batches[step],
        lr_min=1e-3, lr_max=0.1, tau=30, tau_max=60, k=k, ratio=ratio, kappa=2.0, seed=seed,
    )  # fmt: skip
    tuner.train(150 + 150 * k // ratio)
    assert [stage.lr for stage in tuner.stages] == pytest.approx(rates, rel=1e-6)
    assert tuner.losses == pytest.approx(losses, rel=1e-4)
    assert tuner.stages[-1].reached == pytest.approx(sum(losses[-10:]) / 10, rel=1e-4)
    torch.testing.assert_close(list(tuned.parameters()), weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("steps", "expected"), [(160, 160), (201, 201)])
def test_search_costs_what_the_paper_counts(steps, expected):
    tuner = _setting()
    seen = []
    tuner.train(steps, progress=lambda done, total, loss: seen.append((done, total)))
    assert tuner.spent == expected == tuner.search_steps + len(tuner.losses)
    assert tuner.search_steps == sum(3 * stage.tau_trial for stage in tuner.stages)
    assert [stage.tau for stage in tuner.stages[:2]] == [30, 60]
    assert [stage.tau_trial for stage in tuner.stages[:2]] == [6, 12]
    assert seen == [(done, steps) for done in range(1, steps + 1)]


def test_trials_leave_no_trace():
    tuner = _setting()
    tuner.train(160)
    plain = _setting()
    plain.model.train()
    torch_loader = Batches(plain.batches.source)  # made where the tuner's was: same generators, same order
    torch_loader._random = plain.batches._random
    for stage in tuner.stages:
        for _ in range(stage.tau):
            plain.optimizer.param_groups[0]["lr"] = stage.lr
            plain.optimizer.zero_grad()
            _loss(plain.model, torch_loader.take()).backward()
            plain.optimizer.step()
    for name, value in tuner.model.state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[name]), name
    assert [stage.tau for stage in tuner.stages] == [30, 60, 16]


@pytest.fixture(scope="module")
def whole():
    tuner = _setting()
    tuner.train(160)
    return tuner


@pytest.mark.parametrize(("stop", "way"), [(3, "stop"), (19, "stop"), (64, "stop"), (90, "saved"), (159, "saved")])
def test_resumes_bit_for_bit(stop, way, whole, tmp_path):
    tuner = _setting()
    saved = []

    def progress(done, total, loss):
        if done == stop:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tuner.train(
            160,
            progress=progress,
            checkpoint=lambda at: saved.append(save_checkpoint(tmp_path / "way", at.spent, at.state_dict())),
            checkpoint_every=7,
        )
    if way == "stop":
        saved = [save_checkpoint(tmp_path / "end", 0, tuner.state_dict())]
    again = _setting(seed=5)  # other weights, momenta, data order; the data itself as it was
    again.batches.source.dataset.tensors = tuner.batches.source.dataset.tensors
    again.load_state_dict(load_checkpoint(saved[-1])[1])
    again.train(160)
    assert again.losses == whole.losses
    assert again.stages == whole.stages
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


def test_a_trial_that_is_not_finite_is_the_worst():
    def loss(model, batch):
        value = _loss(model, batch)
        return value * (math.nan if tuner.optimizer.param_groups[0]["lr"] > 0.03 else 1.0)

    tuner = _setting(k=6)
    tuner.loss_fn = loss
    tuner.train(70)
    stage = tuner.stages[0]
    assert any(forecast is None for forecast in stage.forecasts)
    assert all((forecast is None) == (lr > 0.03) for lr, forecast in zip(stage.lrs, stage.forecasts, strict=True))
    assert stage.lr < 0.03
    tuner = _setting(k=6, lr_min=0.1)
    tuner.loss_fn = loss
    before = copy.deepcopy(tuner.model.state_dict())
    with pytest.raises(RunFailedError, match=r"no rate from 0\.1 to 1\.0 trains: lower lr_min"):
        tuner.train(70)
    assert all(torch.equal(value, before[name]) for name, value in tuner.model.state_dict().items())
    assert tuner.spent == 0


def test_validation_losses_are_placed_on_the_stage():
    """A validation that is an exponential of the steps taken is forecast exactly, whatever its spacing."""
    steps = []

    def validate(model):
        return 2 * math.exp(-0.02 * len(steps)) + 1

    def loss(model, batch):
        steps.append(1)
        return _loss(model, batch)

    tuner = _setting(k=1, tau=200, tau_max=200, validate=validate)
    tuner.loss_fn = loss
    tuner._begin(240)
    before = len(steps)
    assert before == 0
    with torch.enable_grad():
        forecast = tuner._try(tuner.stages[0], 0.01, type("Never", (), {"asked": False})(), 240, None)
    assert len(steps) == 40
    assert forecast == pytest.approx(2 * math.exp(-0.02 * 200) + 1, rel=1e-4)
    assert tuner._level(tuner.stages[0]) == validate(None)


def test_batches_looked_at_are_the_batches_taken():
    data = TensorDataset(torch.arange(10))
    loader = DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1))
    twin = DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1))
    expected = [batch[0] for _ in range(3) for batch in twin]
    batches = Batches(loader)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    taken = []
    for _ in range(8):
        ahead = batches.ahead()
        seen = [next(ahead)[0] for _ in range(2)]
        taken.append(batches.take()[0])
        assert torch.equal(seen[0], taken[-1])
    assert all(torch.equal(one, two) for one, two in zip(taken, expected, strict=False))
    assert torch.equal(torch.get_rng_state(), before)
    for source, message in ((iter([1]), "only once"), ([], "empty")):
        with pytest.raises(UsageError, match=message):
            Batches(source).take()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_min": 0.0}, "rates must rise"),
        ({"lr_min": 2.0}, "rates must rise"),
        ({"tau": 20}, "tau must be a whole number, at least 25"),
        ({"tau_max": 20}, "tau_max must be"),
        ({"k": 0}, "k must be"),
        ({"kappa": -1.0}, "kappa must be"),
        ({"validate_always": True}, "validate_always needs validate"),
        ({"fit": "mean"}, "unknown fit"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(UsageError, match=message):
        _setting(**options)


def test_refuses_too_few_steps():
    with pytest.raises(UsageError, match="at least 48 for one stage"):
        _setting().train(47)
