"""VeLO's rule against the published one written out in numpy, its meta-gradient, and the optimizer's state."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch

from trimtab.errors import UsageError
from trimtab.optim.learned.velo import VeLO, VeLORule


def _rule(hidden=5, bank=3):
    """A rule in float64 whose biases and first states are not 0, and whose steps are visible."""
    rule = VeLORule(hidden=hidden, bank=bank).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in rule.named_parameters():
            if name.startswith("b") or name.endswith(("bias", "0")):
                p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return rule


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


class _Oracle:
    """The published rule for lists of numpy arrays, one feature and one decay at a time."""

    def __init__(self, rule, params, num_steps):
        self.w = {name: p.detach().numpy() for name, p in rule.named_parameters()}
        self.p, self.num_steps, self.t = [p.copy() for p in params], num_steps, 0
        self.m = [[np.zeros(p.shape) for _ in range(3)] for p in params]
        self.v = [np.zeros(p.shape) for p in params]
        self.row, self.col = [[0.0] * 3 for _ in params], [[0.0] * 3 for _ in params]
        self.h = [self.w["hidden0"][0] for _ in params]
        self.c = [self.w["cell0"][0] for _ in params]
        self.means, self.lows = np.zeros(10), np.full(10, 999999999999.0)
        self.decays = np.exp(-1.0 / np.logspace(1, np.log10(num_steps), 10))

    def loss_features(self, loss):
        if self.t > 0:
            loss = min(2 * abs(np.max(self.means / (1 - self.decays ** (self.t + 1)))), loss)
        self.means = self.means * self.decays + loss * (1 - self.decays)
        mean = self.means / (1 - self.decays ** (self.t + 1))
        self.lows = np.minimum(self.lows, mean)
        if self.t + 1 <= 2:
            return [0.0] * 9
        return [
            float(np.clip((mean[k] - self.lows[k]) / max(1e-8, mean[k + 1] - self.lows[k]) - 1, -1, 1))
            for k in range(9)
        ]

    def tensor_features(self, k, progress):
        p = self.p[k]
        norm = 1 / np.sqrt(max(1e-9, np.mean(p**2)))
        squash = lambda x: 0.5 * np.clip(np.log(1e-8 + abs(10 * x)), -5, 5)  # noqa: E731
        x = [math.tanh(10 * (self.t / self.num_steps - s)) for s in (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)]
        x += progress
        x.append(squash(np.mean(norm * self.v[k])))
        x += [float(sum(size > 1 for size in p.shape) == r) for r in range(5)]
        x += [squash(np.var(norm * m)) for m in self.m[k]]
        x += [squash(np.mean((norm * self.v[k] - np.mean(norm * m)) ** 2)) for m in self.m[k]]
        return np.array(x)

    def step(self, grads, loss):
        w, progress = self.w, self.loss_features(loss)
        seen = [self.tensor_features(k, progress) for k in range(len(self.p))]
        mixed = np.max([np.maximum(x @ w["mix_weight"] + w["mix_bias"], 0) for x in seen], axis=0)
        for k, g in enumerate(grads):
            g = np.clip(g, -1000, 1000)
            x = np.concatenate([seen[k] @ w["base_weight"] + w["base_bias"] + mixed, self.h[k]])
            i, cell, f, o = np.split(x @ w["lstm_weight"] + w["lstm_bias"], 4)
            self.c[k] = _sigmoid(f + 1) * self.c[k] + _sigmoid(i) * np.tanh(cell)
            self.h[k] = _sigmoid(o) * np.tanh(self.c[k])
            control = self.h[k] @ w["controls_weight"] + w["controls_bias"]
            size = (self.h[k] @ w["step_size_weight"] + w["step_size_bias"])[0]
            self.p[k] = self.p[k] - size * self.move(k, g, control)
        self.t += 1

    def move(self, k, g, control):
        p = self.p[k]
        self.m[k] = [d * m + (1 - d) * g for d, m in zip((0.9, 0.99, 0.999), self.m[k], strict=True)]
        self.v[k] = 0.999 * self.v[k] + 0.001 * g**2
        inverse = 1 / np.sqrt(self.v[k] + 1e-6)
        fac_g, rows, cols, fac_m = [], [], [], []
        rsqrt = lambda x: 1 / np.sqrt(np.maximum(x, 1e-9))  # noqa: E731
        for j, d in enumerate((0.9, 0.99, 0.999)):
            square = g**2 + 1e-30
            if p.ndim < 2:
                v = self.row[k][j] = d * self.row[k][j] + (1 - d) * square
                fac_g.append(g * rsqrt(v + 1e-9))
                fac_m.append(self.m[k][j] / np.sqrt(v))
                rows.append(v)
                cols.append(v)
            else:
                d1, d0 = np.argsort(p.shape, kind="stable")[-2:]
                row = self.row[k][j] = d * self.row[k][j] + (1 - d) * square.mean(axis=d0, keepdims=True)
                col = self.col[k][j] = d * self.col[k][j] + (1 - d) * square.mean(axis=d1, keepdims=True)
                factor = rsqrt(row / (row.mean(axis=d1, keepdims=True) + 1e-9)) * rsqrt(col)
                fac_g.append(g * factor)
                fac_m.append(self.m[k][j] * factor)
                rows.append(np.broadcast_to(row, p.shape))
                cols.append(np.broadcast_to(col, p.shape))
        features = [g, np.clip(g, -0.1, 0.1), p, *self.m[k], self.v[k], *(m * inverse for m in self.m[k]), inverse]
        features += [*fac_g, g * inverse, *rows, *cols]
        features += [1 / np.sqrt(x + 1e-8) for x in (*rows, *cols)] + fac_m
        x = np.stack([f / np.sqrt(1e-5 + np.mean(f**2)) for f in features], axis=-1)
        for layer in range(3):
            blend = lambda a: 100 * np.mean([c * part for c, part in zip(control, a, strict=True)], axis=0)  # noqa: E731
            x = x @ blend(self.w[f"w{layer}"]) + blend(self.w[f"b{layer}"])
            x = np.maximum(x, 0) if layer < 2 else x
        return np.sqrt(np.mean(p**2) + 1e-9) * x[..., 0] * np.exp(0.001 * x[..., 1]) * 0.001


def _problem():
    generator = torch.Generator().manual_seed(2)
    shapes = ((4, 3), (5,), (2, 3, 6), (3, 3), (1, 1))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def _backward(params):
    for p in params:
        p.grad = None
    loss = sum(((p - 1) ** 2 * (1 + k)).sum() for k, p in enumerate(params)) / 10
    loss.backward()
    return loss


def test_equals_its_equations():
    rule, params = _rule(), _problem()
    optimizer = VeLO(params, num_steps=40, rule=rule)
    oracle = _Oracle(rule, [p.detach().numpy() for p in params], 40)
    start = [p.detach().clone() for p in params]
    for _ in range(8):
        loss = _backward(params)
        oracle.step([p.grad.numpy() for p in params], loss.item())
        optimizer.step(lambda: loss)  # noqa: B023
    for p, first, expected in zip(params, start, oracle.p, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-9, atol=1e-12)
        assert (p - first).abs().max() > 1e-4


def test_meta_gradient_is_right():
    """The loss after three steps, differentiated through the rule, against finite differences."""
    rule = _rule(hidden=3, bank=2)

    def after(**weights):
        def run():
            w = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
            state = rule.start([w], num_steps=5)
            for _ in range(3):
                loss = w.square().sum()
                (w,), state = rule.update([w], [2 * w], loss, state, num_steps=5)
            return 100 * w.square().sum()

        old = {name: getattr(rule, name) for name in weights}
        for name, value in weights.items():
            rule._parameters[name] = value
        try:
            return run()
        finally:
            for name, value in old.items():
                rule._parameters[name] = value

    for name in ("w0", "w2", "b1", "controls_weight", "mix_weight", "cell0"):
        value = getattr(rule, name).detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, n=name: after(**{n: x}), (value,), atol=1e-5, rtol=1e-3)


def test_scalars_and_missing_gradients():
    rule = VeLORule(hidden=4, bank=2)
    a, b = torch.tensor(2.0, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = VeLO([a, b], num_steps=3, rule=rule)

    def closure():
        optimizer.zero_grad()
        loss = a.square()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4
    assert a.item() != 2
    assert torch.equal(b.detach(), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_resumes_bit_for_bit(dtype):
    def make(values):
        params = [v.detach().clone().to(dtype).requires_grad_() for v in values]
        return params, VeLO(params, num_steps=20, rule=VeLORule(hidden=4, bank=2))

    params, optimizer = make(_problem())
    for _ in range(4):
        optimizer.step(lambda: _backward(params))
    buffer = io.BytesIO()
    torch.save((optimizer.state_dict(), [p.detach() for p in params]), buffer)
    for _ in range(4):
        optimizer.step(lambda: _backward(params))
    buffer.seek(0)
    state, values = torch.load(buffer, weights_only=True)
    resumed, again = make(values)
    again.load_state_dict(state)
    for _ in range(4):
        again.step(lambda: _backward(resumed))
    for p, q in zip(params, resumed, strict=True):
        assert torch.equal(p, q)


def test_takes_weights_by_name():
    rule, other = VeLORule(hidden=4, bank=2), VeLORule(hidden=4, bank=2, generator=torch.Generator().manual_seed(9))
    assert not torch.equal(rule.w0, other.w0)
    other.load_state_dict(rule.state_dict())
    assert torch.equal(rule.w0, other.w0)
    assert rule.state_dict()["lstm_weight"].shape == (8, 16)


def test_refusals():
    with pytest.raises(UsageError, match="num_steps must be at least 1, got 0"):
        VeLO([torch.zeros(1)], num_steps=0)
    with pytest.raises(UsageError, match="hidden and bank must be at least 1"):
        VeLORule(hidden=0)
