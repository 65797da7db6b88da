"""Bootstrapped meta-gradients against finite differences, closed forms and torch's SGD, and their exact resumes."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.errors import RunFailedError, UsageError
from trimtab.record.checkpoint import load_checkpoint, save_checkpoint
from trimtab.tune.bilevel.bootstrapped_meta import BootstrappedMetaLR


def _model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def _batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, 4, generator=generator).double(), torch.randint(3, (8,), generator=generator))
        for _ in range(count)
    ]


def _loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def _sgd(model, batches, lr, momentum, momenta=None):
    """Steps of torch's own SGD on a copy: model and momenta."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    for parameter, value in zip(model.parameters(), momenta or [], strict=False):
        optimizer.state[parameter]["momentum_buffer"] = value.clone()
    for batch in batches:
        optimizer.zero_grad()
        _loss(model, batch).backward()
        optimizer.step()
    return model, [optimizer.state[p].get("momentum_buffer") for p in model.parameters()] if momentum else None


def _target(model, batches, K, lr, momentum, alpha, momenta):
    """theta~ by torch's SGD: L - 1 further steps, then one without momentum."""
    model, momenta = _sgd(model, batches[:-1], lr, momentum, momenta)
    return _sgd(model, batches[-1:], alpha, 0.0)[0]


def _mu(metric, target, learner, batch):
    if metric == "parameters":
        pairs = zip(target.parameters(), learner.parameters(), strict=True)
        return sum(0.5 * float((p - q).detach().square().sum()) for p, q in pairs)
    with torch.no_grad():
        ahead, now = target(batch[0]).numpy(), learner(batch[0]).numpy()
    if metric == "gaussian":
        return 0.5 * float(((ahead - now) ** 2).sum(1).mean())
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (ahead, now))
    return float((p * np.log(p / q)).sum(1).mean())


@pytest.mark.parametrize("metric", ["parameters", "softmax", "gaussian", "loss"])
@pytest.mark.parametrize(("K", "L", "momentum"), [(1, 1, 0.0), (3, 1, 0.6), (2, 4, 0.6)])
def test_meta_gradient_equals_central_differences(metric, K, L, momentum):
    lr, alpha = 0.3, 0.07
    model = _model()
    tuner = BootstrappedMetaLR(
        model, _loss, lr=lr, K=K, L=L, metric=metric, momentum=momentum, learn_momentum=momentum > 0, alpha=alpha,
    )  # fmt: skip
    start = None
    if momentum:  # momenta that are not 0, so that the first step depends on the momentum
        tuner.step(_batches(K + L, seed=9))
        tuner.step(_batches(K + L, seed=8))
        lr, momentum = tuner.lr, tuner.momentum
        start = list(tuner.state_dict()["momenta"].values())
    batches = _batches(K + L)
    learner, momenta = _sgd(model, batches[:K], lr, momentum, start)
    target = _target(learner, batches[K:], K, lr, momentum, alpha, momenta)

    def mu(log_lr, logit):
        lr, beta = math.exp(log_lr), 1 / (1 + math.exp(-logit)) if momentum else 0.0
        learner, _ = _sgd(model, batches[:K], lr, beta, start)
        if metric == "loss":
            return float(_loss(learner, batches[K]).detach())
        return _mu(metric, target, learner, batches[-1])

    log_lr, logit = math.log(lr), math.log(momentum / (1 - momentum)) if momentum else 0.0
    found = tuner.meta_gradient(batches)
    h = 1e-5
    expected = {"log_lr": (mu(log_lr + h, logit) - mu(log_lr - h, logit)) / (2 * h)}
    if momentum:
        expected["logit_momentum"] = (mu(log_lr, logit + h) - mu(log_lr, logit - h)) / (2 * h)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-10)
    assert abs(found["log_lr"]) > 1e-6


@pytest.mark.parametrize("K", [1, 4])
def test_one_step_of_target_is_the_ordinary_meta_gradient(K):
    batches, alpha = _batches(K + 1), 0.05
    kinds = {
        metric: BootstrappedMetaLR(
            _model(), _loss, lr=0.2, K=K, metric=metric, momentum=0.5, learn_momentum=True, alpha=alpha
        )
        for metric in ("parameters", "loss")
    }
    bootstrapped, ordinary = (kinds[name].meta_gradient(batches) for name in ("parameters", "loss"))
    assert bootstrapped == pytest.approx({name: alpha * value for name, value in ordinary.items()}, rel=1e-10)
    further = BootstrappedMetaLR(_model(), _loss, lr=0.2, K=K, L=3, momentum=0.5, learn_momentum=True, alpha=alpha)
    ratio = further.meta_gradient([*batches, *batches[:2]])["log_lr"] / ordinary["log_lr"]
    assert abs(ratio / alpha - 1) > 0.1


@pytest.mark.parametrize(("K", "L"), [(1, 1), (3, 1), (2, 5)])
def test_meta_gradient_of_a_quadratic_in_closed_form(K, L):
    """f = h x^2 / 2: theta_n = (1 - lr h)^n x, and mu = (theta~ - theta_K)^2 / 2 with theta~ held."""
    h, lr, alpha, x = 0.7, 0.4, 0.3, 2.0
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(x)
    tuner = BootstrappedMetaLR(
        model, lambda net, _: 0.5 * h * net.weight.square().sum(), lr=lr, K=K, L=L, alpha=alpha, meta_lr=0.1
    )
    q = 1 - lr * h
    theta_K, target = q**K * x, (1 - alpha * h) * q ** (K + L - 1) * x
    expected = -(target - theta_K) * (K * q ** (K - 1) * -h * x) * lr
    done = tuner.step([None] * (K + L))
    assert done.gradients["log_lr"] == pytest.approx(expected, rel=1e-12)
    assert done.meta_loss == pytest.approx(0.5 * (target - theta_K) ** 2, rel=1e-12)
    assert model.weight.item() == pytest.approx(q ** (K + L - 1) * x, rel=1e-12)
    # Adam's first step is meta_lr against the sign: downhill with a larger rate, so that it rises.
    assert tuner.lr == pytest.approx(lr * math.exp(-0.1 * math.copysign(1, expected)), rel=1e-6)
    assert tuner.lr > lr


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_steps_are_those_of_sgd(momentum):
    model = _model()
    tuner = BootstrappedMetaLR(model, _loss, lr=0.1, K=2, L=3, momentum=momentum, meta_lr=0.0)
    batches = _batches(9)
    expected, _ = _sgd(model, batches[:8], 0.1, momentum)
    rounds = [tuner.step(batches[:5]), tuner.step(batches[4:9])]  # the target's batch begins the next round
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-12, atol=1e-14)
    assert [len(done.losses) for done in rounds] == [4, 4]
    assert rounds[0].losses[0] == pytest.approx(float(_loss(_model(), batches[0]).detach()))
    assert tuner.lr == pytest.approx(0.1)


class _Net(nn.Module):
    """Running statistics, a buffer that is replaced, dropout, tied and frozen weights."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.frozen = nn.Linear(4, 3)
        self.frozen.requires_grad_(False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.seen = self.seen + int(self.training)
        return self.frozen(F.dropout(self.last(self.norm(self.first(x)).relu()), 0.3, self.training))


def test_buffers_and_ties_are_as_after_plain_steps():
    torch.manual_seed(0)
    model = _Net()
    plain = copy.deepcopy(model)
    batches = [(x.float(), y) for x, y in _batches(6)]
    torch.manual_seed(3)
    tuner = BootstrappedMetaLR(model, _loss, lr=0.1, K=2, L=4, momentum=0.9, metric="softmax", meta_lr=0.1)
    tuner.step(batches)
    torch.manual_seed(3)
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for batch in batches[:5]:
        optimizer.zero_grad()
        _loss(plain, batch).backward()
        optimizer.step()
    assert model.seen.item() == 5
    assert model.last.weight is model.first.weight
    assert model.training
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_resumes_bit_for_bit(dtype, tmp_path):
    batches = [(x.to(dtype), y) for x, y in _batches(40)]
    options = {"lr": 0.05, "K": 2, "L": 2, "metric": "softmax", "momentum": 0.5, "learn_momentum": True, "meta_lr": 0.2}

    def tuner_of(seed):
        model = _model(seed).to(dtype)
        return model, BootstrappedMetaLR(model, _loss, **options)

    whole, tuner = tuner_of(0)
    for place in range(0, 40, 4):
        if place == 20:
            saved = {"model": dict(whole.state_dict()), "tuner": tuner.state_dict()}
            path = save_checkpoint(tmp_path, place, saved)
        tuner.step(batches[place : place + 4])
    again, resumed = tuner_of(4)
    state = load_checkpoint(path)[1]
    again.load_state_dict(state["model"])
    resumed.load_state_dict(state["tuner"])
    for place in range(20, 40, 4):
        resumed.step(batches[place : place + 4])
    assert (resumed.lr, resumed.momentum, resumed.rounds) == (tuner.lr, tuner.momentum, 10)
    assert resumed.lr != pytest.approx(0.05, rel=0.01)
    for one, two in zip(whole.parameters(), again.parameters(), strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, two)


@pytest.mark.parametrize("start", [1e-3, 1.0])
def test_finds_the_rate_of_a_noisy_bowl(start):
    """f = x' diag(1, 4) x / 2 with fresh starts: the learning rate goes near the best fixed one from either side."""
    model = nn.Linear(2, 1, bias=False).double()
    curvature = torch.tensor([[1.0, 4.0]]).double()
    tuner = BootstrappedMetaLR(
        model, lambda net, _: 0.5 * (curvature * net.weight.square()).sum(), lr=start * 0.45, K=2, L=4, meta_lr=0.05
    )
    for _ in range(200):
        with torch.no_grad():
            model.weight.fill_(1.0)
        tuner.step([None] * 6)
    assert 0.25 < tuner.lr < 0.5


def test_a_round_that_is_not_finite_changes_nothing():
    model = _model()
    tuner = BootstrappedMetaLR(model, _loss, lr=0.1, K=1, L=2, momentum=0.5)
    tuner.step(_batches(3))
    before = copy.deepcopy((model.state_dict(), tuner.state_dict()))
    bad = _batches(3)
    bad[1] = (bad[1][0] * math.inf, bad[1][1])
    with pytest.raises(RunFailedError, match=r"round 1 at lr .* is not finite: start from a lower lr"):
        tuner.step(bad)
    tuner.meta_gradient(_batches(3))
    torch.testing.assert_close((model.state_dict(), tuner.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be above 0"),
        ({"K": 0}, "K must be a whole number"),
        ({"L": 1.5}, "L must be a whole number"),
        ({"metric": "kl"}, "unknown metric 'kl'"),
        ({"momentum": 1.0}, "momentum must be in"),
        ({"learn_momentum": True}, "learn_momentum needs"),
        ({"meta_lr": -1.0}, "meta_lr must be"),
        ({"alpha": 0.0}, "alpha must be above 0"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(UsageError, match=message):
        BootstrappedMetaLR(_model(), _loss, **{"lr": 0.1, **options})


def test_refuses_wrong_batches_and_losses():
    with pytest.raises(UsageError, match="needs K \\+ L = 3 batches, got 2"):
        BootstrappedMetaLR(_model(), _loss, lr=0.1, L=2).step(_batches(2))
    with pytest.raises(UsageError, match="one element"):
        BootstrappedMetaLR(_model(), lambda net, b: net(b[0]), lr=0.1).step(_batches(2))
    with pytest.raises(UsageError, match="nothing to train"):
        BootstrappedMetaLR(_model().requires_grad_(False), _loss, lr=0.1)
