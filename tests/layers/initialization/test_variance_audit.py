"""The audit against NumPy and against the closed forms of the classic initialisations; it changes nothing."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.diagnose.pathologies import initial_loss_off
from trimtab.errors import UsageError
from trimtab.first_loss import highest_first_loss
from trimtab.layers import LowRankLinear, audit_initialization
from trimtab.record.reader import Series

WIDTH, DEPTH, SAMPLES = 512, 8, 512


def _generator(seed=7):
    return torch.Generator().manual_seed(seed)


def _network(draw, activation=None, width=WIDTH, depth=DEPTH):
    parts = []
    for _ in range(depth):
        layer = nn.Linear(width, width, bias=False)
        draw(layer.weight)
        parts += [layer] if activation is None else [layer, activation()]
    return nn.Sequential(*parts)


def _normal(gain):
    return lambda weight: nn.init.normal_(weight, 0.0, math.sqrt(gain / weight.shape[1]))


@pytest.mark.parametrize(
    ("draw", "activation", "rate"),
    [
        (_normal(1.0), None, 1.0),  # LeCun
        (nn.init.xavier_normal_, None, 1.0),
        (nn.init.orthogonal_, None, 1.0),
        (_normal(2.0), nn.ReLU, 1.0),  # He
        (_normal(1.0), nn.ReLU, 0.5),
        (_normal(1 / 3), None, 1 / 3),  # torch's own
        (_normal(1.2), None, 1.2),
    ],
    ids=["lecun", "glorot", "orthogonal", "he", "lecun-relu", "torch", "large"],
)
def test_gains_are_those_of_the_classics(draw, activation, rate):
    """Both variances change by n Var[W] a layer, halved by a ReLU, whatever the depth."""
    model = _network(draw, activation)
    audit = audit_initialization(model, torch.randn(SAMPLES, WIDTH, generator=_generator()))
    (trend,) = audit.trends
    layers = trend.layers - 1  # the output layer is not among them
    assert trend.layers == DEPTH - 1
    assert trend.forward ** (1 / layers) == pytest.approx(rate, rel=0.06)
    assert trend.backward ** (1 / layers) == pytest.approx(rate, rel=0.06)
    for layer in audit.layers[1:]:
        assert layer.weight_gain == pytest.approx(rate * (2 if activation else 1), rel=0.03)
        assert layer.gain == pytest.approx(layer.weight_gain, rel=0.15)
    if draw is nn.init.orthogonal_:
        assert all(layer.gain == pytest.approx(1, rel=1e-4) for layer in audit.layers)


def test_statistics_equal_numpy():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    x, y = torch.randn(7, 6, generator=_generator()), torch.randn(7, 4, generator=_generator(1))
    first, last = audit_initialization(model, x, targets=y).layers
    (w1, b1), (w2, b2) = ((m.weight.detach().double().numpy(), m.bias.detach().double().numpy()) for m in model[::2])
    x0, t = x.double().numpy(), y.double().numpy()
    h1 = x0 @ w1.T + b1
    a1 = np.maximum(h1, 0)
    h2 = a1 @ w2.T + b2
    d2 = 2 * (h2 - t) / h2.size
    d1 = (d2 @ w2) * (h1 > 0)
    for layer, h, given, d, w in ((first, h1, x0, d1, w1), (last, h2, a1, d2, w2)):
        assert layer.variance == pytest.approx(h.var(), rel=1e-5)
        assert layer.gain == pytest.approx(h.var() / (given**2).mean(), rel=1e-5)
        assert layer.gradient == pytest.approx((d**2).mean(), rel=1e-5)
        assert layer.weight_gain == pytest.approx(w.shape[1] * (w**2).mean(), rel=1e-6)
    assert first.dead == pytest.approx((~(h1 > 0).any(0)).mean())
    assert last.dead == 0


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0])
def test_first_loss_of_gaussian_logits(spread):
    """Logits of standard deviation s lift the loss to log V + s^2 / 2, and the verdict is the doctor's."""
    classes = 200
    model = nn.Linear(256, classes, bias=False)
    nn.init.normal_(model.weight, 0.0, spread / 16)
    x = torch.randn(2000, 256, generator=_generator())
    targets = torch.randint(classes, (2000,), generator=_generator(1))
    first = audit_initialization(model, x, targets=targets).first_loss
    assert (first.classes, first.expected) == (classes, math.log(classes))
    assert first.logit_std == pytest.approx(spread, rel=0.05)
    assert first.measured == pytest.approx(math.log(classes) + spread**2 / 2, abs=0.2)
    assert first.verdict == "good"


@pytest.mark.parametrize(("factor", "verdict"), [(0.9999, "good"), (1.0001, "too high")])
def test_the_doctor_fires_where_the_audit_does(factor, verdict):
    """Both judge by one rule: the loss is set, by a constant, just below and above its level."""
    level = factor * highest_first_loss(10)
    model, x = nn.Linear(4, 10), torch.randn(8, 4, generator=_generator())
    targets = torch.arange(8)
    found = audit_initialization(model, x, loss=lambda z, t: 0 * z.sum() + level, targets=targets)
    assert found.first_loss.verdict == verdict

    class Signals:
        meta = {"n_classes": 10}

        def series(self, name):
            return Series(name, np.arange(5), np.full((5, 1), level))

    assert (initial_loss_off.rule(Signals()) is not None) == (verdict == "too high")


def test_verdicts():
    def verdicts(change, depth=6, activation=nn.ReLU, targets=None):
        torch.manual_seed(0)
        model = _network(_normal(2.0), activation, width=64, depth=depth)
        with torch.no_grad():
            change(model)
        x = torch.randn(64, 64, generator=_generator())
        return {layer.name: layer.verdict for layer in audit_initialization(model, x, targets=targets).layers}

    assert set(verdicts(lambda m: None).values()) == {"good"}
    assert verdicts(lambda m: m[4].weight.zero_())["4"] == "silent"
    assert verdicts(lambda m: m[4].weight.zero_())["2"] == "no gradient"
    assert verdicts(lambda m: m[4].weight.fill_(math.inf))["4"] == "not finite"
    assert verdicts(lambda m: m[4].weight.mul_(11))["4"] == "too large"
    assert verdicts(lambda m: m[4].weight.div_(20))["4"] == "too small"
    assert verdicts(lambda m: [part.weight.mul_(2) for part in m[::2]], depth=8)["12"] == "explodes"
    assert verdicts(lambda m: [part.weight.div_(2) for part in m[::2]], depth=8)["12"] == "vanishes"
    assert verdicts(lambda m: [part.weight.div_(2) for part in m[::2]], depth=8)["0"] == "gradient vanishes"

    def kill(model):
        model[2].weight[:48] = -model[2].weight[:48].abs()  # of inputs that are never negative

    assert verdicts(kill)["2"] == "dead units"
    for sink in (lambda y: y.detach(), lambda y: y.argmax(-1)):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model.register_forward_hook(lambda module, args, output, sink=sink: sink(output))
        audit = audit_initialization(model, torch.randn(8, 4, generator=_generator()))
        assert [layer.verdict for layer in audit.layers] == ["no gradient", "no gradient"]
        assert not audit.healthy


class Everything(nn.Module):
    """Batch normalisation, dropout, spectral norm, convolutions, attention, a frozen layer, an unused one."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose1d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.act = nn.ReLU(inplace=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        self.unused = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        h = self.act(self.norm(self.up(self.conv(x)))).transpose(1, 2)
        h = h + self.attention(h, h, h, need_weights=False)[0] + self.rnn(h)[0]
        return {"hidden": h, "logits": self.head(self.drop(self.spectral(self.frozen(h))).mean(1))}


def test_nothing_is_changed():
    model = Everything()
    model.norm.eval()
    for part in model.parameters():
        part.grad = torch.ones_like(part)
        if part.requires_grad:
            part.register_post_accumulate_grad_hook(lambda p: p.data.zero_())
    before, mode = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]
    x, targets = torch.randn(6, 3, 9, generator=_generator()), torch.arange(6) % 5
    hooks = [len(part._forward_hooks) for part in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with torch.no_grad():
        first = audit_initialization(model, x, targets=targets)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(part.grad, torch.ones_like(part)) for part in model.parameters())
    assert [part.training for part in model.modules()] == mode
    assert [len(part._forward_hooks) for part in model.modules()] == hooks
    torch.manual_seed(3)
    assert audit_initialization(model, {"x": x}, targets=targets) == first
    named = {layer.name: layer for layer in first.layers}
    assert list(named) == ["conv", "up", "attention", "rnn", "frozen", "spectral", "head"]
    assert [named[name].fan_in for name in ("conv", "up", "attention")] == [9, 24, 8]
    assert named["frozen"].verdict == "good"
    assert first.first_loss.classes == 5
    assert json.loads(json.dumps(first.to_json(), allow_nan=False))["first_loss"]["expected"] == math.log(5)


def test_a_layer_that_counts_its_forwards_is_not_moved_on():
    model = nn.Sequential(LowRankLinear(4, 4, 2, guided_steps=10), nn.Linear(4, 4))
    audit_initialization(model, torch.randn(8, 4, generator=_generator()))
    assert model[0].guide_step == 0


def _divides_by_zero(outputs, targets):
    return 1 / 0


class Picky(nn.Linear):
    def forward(self, x):
        assert x.shape[1] == 5, "five columns"
        return super().forward(x)


def test_language_models_segmentation_and_shared_layers():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.layer = nn.Embedding(11, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            h = self.embedding(tokens)
            for _ in range(3):
                h = self.layer(h)
            return self.head(h)

    tokens = torch.randint(11, (4, 6), generator=_generator())
    audit = audit_initialization(Tied(), tokens, targets=tokens)
    assert [layer.name for layer in audit.layers] == ["embedding", "layer", "head"]
    assert audit.layers[0].fan_in is None
    assert audit.first_loss.classes == 11
    image, mask = torch.randn(2, 3, 4, 5, generator=_generator()), torch.zeros(2, 4, 5, dtype=torch.long)
    assert audit_initialization(nn.Conv2d(3, 7, 1), image, targets=mask).first_loss.classes == 7


def test_a_loss_that_is_summed_and_one_that_cheats():
    model, x = nn.Linear(4, 10), torch.randn(64, 4, generator=_generator())
    targets = torch.arange(64) % 10

    def summed(outputs, classes):
        return F.cross_entropy(outputs, classes, reduction="sum")

    audit = audit_initialization(model, x, loss=summed, targets=targets)
    assert (audit.first_loss.verdict, audit.healthy) == ("too high", False)
    knows = nn.Linear(10, 10, bias=False)
    nn.init.eye_(knows.weight).data.mul_(20)
    seen = audit_initialization(knows, F.one_hot(targets, 10).float(), targets=targets)
    assert seen.first_loss.verdict == "lower than a guess"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: audit_initialization(nn.Linear(4, 2), torch.randn(3, 5)), "cannot be run on these inputs"),
        (lambda: audit_initialization(Picky(4, 2), torch.randn(3, 4)), "these inputs: five columns"),
        (
            lambda: audit_initialization(
                nn.Linear(4, 2), torch.randn(3, 4), loss=_divides_by_zero, targets=torch.zeros(3)
            ),
            "cannot be taken of these outputs and targets: division by zero",
        ),
        (lambda: audit_initialization(nn.Linear(4, 2, device="meta"), torch.randn(3, 4)), "on the meta device"),
        (lambda: audit_initialization(nn.LazyLinear(2), torch.randn(3, 5)), "lazy parameters"),
        (lambda: audit_initialization(nn.ReLU(), torch.randn(3, 5)), "no layer with a weight"),
        (lambda: audit_initialization(nn.Linear(4, 2), torch.randn(3, 4), loss=F.mse_loss), "a loss needs targets"),
        (
            lambda: audit_initialization(nn.Linear(4, 2), torch.randn(3, 4), targets=torch.zeros(5, dtype=torch.long)),
            "do not fit",
        ),
        (
            lambda: audit_initialization(
                nn.Linear(4, 2), torch.randn(3, 4), loss=lambda y, t: y, targets=torch.zeros(3)
            ),
            r"one element, got shape \(3, 2\)",
        ),
    ],
)
def test_wrong_use_is_named(call, text):
    with pytest.raises(UsageError, match=text):
        call()
