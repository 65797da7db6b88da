"""Target projection SGD against plain numpy, its memory, and digits learnt by dense, conv and recurrent nets."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim.rules.target_projection import HiddenStates, TargetProjection


def _sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def _nets():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
    conv = nn.Sequential(
        *(nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )
    rnn = nn.Sequential(nn.RNN(8, 64, batch_first=True), HiddenStates(), nn.Linear(64, 10))
    return {"mlp": (mlp, 0.003), "conv": (conv, 0.01), "rnn": (rnn, 0.003)}


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(data.images, dtype=torch.float32)[order] / 16
    y = torch.tensor(data.target)[order]
    return x[:1297], y[:1297], x[1297:], y[1297:]


def _projection(seed, *widths, classes=3):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.rand(classes, width, generator=generator).double().numpy() - 1 for width in widths]


@pytest.mark.parametrize("loss", ["l2", "l1"])
def test_step_equals_plain_numpy(loss):
    """w <- w + eta (P y* - y) sigma'(z) x^T, with the sign of the residual for l1; softmax regression at the top."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Sigmoid(), nn.Linear(5, 3)).double()
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % 3
    W = [model[i].weight.detach().numpy().copy() for i in (0, 2, 4)]
    b = [model[i].bias.detach().numpy().copy() for i in (0, 2, 4)]
    top = TargetProjection(model, 3, optimizer=_sgd(0.1), loss=loss, seed=4).step(x, y)
    P, code = _projection(4, 7, 5), np.eye(3)[y.numpy()]
    h0 = x.numpy()
    h1 = np.tanh(h0 @ W[0].T + b[0])
    h2 = 1 / (1 + np.exp(-(h1 @ W[1].T + b[1])))
    logits = h2 @ W[2].T + b[2]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    residual = np.sign if loss == "l1" else lambda r: r
    deltas = (residual(code @ P[0] - h1) * (1 - h1**2), residual(code @ P[1] - h2) * h2 * (1 - h2), code - p)
    for i, (delta, h) in enumerate(zip(deltas, (h0, h1, h2), strict=True)):
        weight = W[i] + 0.1 * delta.T @ h / 8
        np.testing.assert_allclose(model[2 * i].weight.detach().numpy(), weight, rtol=1e-7, atol=1e-9)
        bias = b[i] + 0.1 * delta.mean(axis=0)
        np.testing.assert_allclose(model[2 * i].bias.detach().numpy(), bias, rtol=1e-7, atol=1e-9)
    assert top.item() == pytest.approx(-np.log(p[np.arange(8), y.numpy()]).mean())


@pytest.mark.parametrize("last", [True, False])
def test_recurrent_step_equals_plain_numpy(last):
    """Without `through_time`, a state learns with the one before it held fixed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.RNN(4, 5, batch_first=True), HiddenStates(last=last)).double()
    head = [nn.Linear(5, 3)] if last else [nn.RNN(5, 3, batch_first=True), HiddenStates()]
    model = nn.Sequential(*model, *head).double()
    x, y = torch.randn(6, 3, 4, dtype=torch.float64), torch.arange(6) % 3
    rnn = model[0]
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    W, U, bw, bu = (getattr(rnn, name).detach().numpy().copy() for name in names)
    expected_output = model[1](rnn(x)).detach()
    rule = TargetProjection(model, 3, optimizer=_sgd(0.1), through_time=False, seed=4)
    torch.testing.assert_close(rule._forward(0, x), expected_output)
    rule.step(x, y)
    target, h = np.eye(3)[y.numpy()] @ _projection(4, 5)[0], np.zeros((6, 5))
    gW, gU, gb = np.zeros_like(W), np.zeros_like(U), np.zeros_like(bw)
    for t in range(3):
        new = np.tanh(x[:, t].numpy() @ W.T + bw + h @ U.T + bu)
        if t == 2 or not last:
            delta = (target - new) * (1 - new**2) / 6 / (1 if last else 3)
            gW, gU, gb = gW + delta.T @ x[:, t].numpy(), gU + delta.T @ h, gb + delta.sum(axis=0)
        h = new
    for name, old, gradient in zip(names, (W, U, bw, bu), (gW, gU, gb, gb), strict=True):
        np.testing.assert_allclose(getattr(rnn, name).detach().numpy(), old + 0.1 * gradient, rtol=1e-7, atol=1e-9)


def test_convolution_averages_over_positions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.randn(5, 2, 4, 4, dtype=torch.float64), torch.arange(5) % 3
    weight, out = model[0].weight.detach().clone(), torch.tanh(model[0](x)).detach()
    target = torch.tensor(np.eye(3)[y.numpy()] @ _projection(4, 12)[0]).reshape(5, 3, 2, 2)
    TargetProjection(model, 3, optimizer=_sgd(0.1), seed=4).step(x, y)
    delta = (target - out) * (1 - out**2) / (5 * 4)
    for i in range(2):
        for j in range(2):
            weight += 0.1 * torch.einsum("bo,bcqr->ocqr", delta[:, :, i, j], x[:, :, i : i + 3, j : j + 3])
    torch.testing.assert_close(model[0].weight.detach(), weight, rtol=1e-7, atol=1e-9)


class _Meter:
    """Counts the bytes of saved activations that are alive at once; parameters do not count."""

    def __init__(self, model):
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.alive: dict[int, int] = {}
        self.peak = 0

    def hooks(self):
        class Held:
            def __init__(held, tensor):
                held.tensor = tensor

        def pack(tensor):
            held, key = Held(tensor), tensor.untyped_storage().data_ptr()
            if key not in self.parameters:
                self.alive[id(held)] = tensor.numel() * tensor.element_size()
                weakref.finalize(held, self.alive.pop, id(held))
                self.peak = max(self.peak, sum(self.alive.values()))
            return held

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor)


@pytest.mark.parametrize("depth", [2, 8])
def test_holds_one_layer_of_activations(depth):
    """The peak of saved activations does not grow with depth; under backpropagation it does."""
    torch.manual_seed(0)
    x, y, width = torch.randn(16, 32), torch.arange(16) % 4, 32
    model = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())), nn.Linear(width, 4))
    peaks = {}
    for name in ("backpropagation", "tpsgd"):
        meter = _Meter(model)
        with meter.hooks():
            if name == "tpsgd":
                TargetProjection(model, 4).step(x, y)
            else:
                F.cross_entropy(model(x), y).backward()
        assert not meter.alive
        peaks[name] = meter.peak
    one = 4 * 16 * width
    # One layer: its input, its tanh's output (once more in the squared residual). Backpropagation: every layer.
    assert 2 * one <= peaks["tpsgd"] <= 4 * one
    assert peaks["backpropagation"] >= (depth + 1) * one


@pytest.mark.parametrize("name", ["mlp", "conv", "rnn"])
def test_no_graph_spans_two_layers(digits, name):
    model, seen = _nets()[name][0], []
    rule = TargetProjection(model, 10)
    for block in rule.blocks:
        block.layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].requires_grad))
    rule.step(digits[0][:8], digits[1][:8])
    assert seen == [False] * len(rule.blocks)


def test_one_layer_at_a_time():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    rule = TargetProjection(model, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = rule.step(x, y, only=1)
    assert loss > 0
    assert {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])} == {"2.weight", "2.bias"}
    # The same projections as those of a rule that trains all at once.
    other = TargetProjection(nn.Sequential(*model), 3)
    other.step(x, y)
    assert all(torch.equal(a, b) for a, b in zip(rule.tensors, other.tensors, strict=True))
    with pytest.raises(UsageError, match="from 0 to 2, got 3"):
        rule.step(x, y, only=3)


def test_any_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    seen = []
    rule = TargetProjection(model, 3, loss=lambda out, target: seen.append(target) or F.huber_loss(out, target))
    rule.step(torch.randn(4, 6), torch.arange(4) % 3)
    assert [tuple(target.shape) for target in seen] == [(4, 7)]
    assert seen[0].abs().max() <= 1


@pytest.mark.parametrize("name", ["mlp", "conv", "rnn"])
def test_learns_digits(digits, name):
    """Within 5 points of backpropagation of the same net, Adam in both, each at a rate that suits it."""
    x, y, x_test, y_test = digits
    model, lr = _nets()[name]
    rule = TargetProjection(model, 10, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=lr))
    reference = _nets()[name][0]
    optimizer = torch.optim.Adam(reference.parameters(), lr=0.003)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30 if name == "rnn" else 15):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            rule.step(x[batch], y[batch])
            optimizer.zero_grad()
            F.cross_entropy(reference(x[batch]), y[batch]).backward()
            optimizer.step()
    accuracy, goal = ((net == y_test).float().mean() for net in (rule.predict(x_test), reference(x_test).argmax(-1)))
    assert goal > 0.95
    assert accuracy > goal - 0.05, (accuracy, goal)


@pytest.mark.parametrize("name", ["mlp", "conv", "rnn"])
def test_resumes_bit_for_bit(digits, tmp_path, name):
    x, y = digits[0][:64], digits[1][:64]
    adam = lambda parameters: torch.optim.Adam(parameters, lr=0.01)  # noqa: E731
    rule, other = (TargetProjection(_nets()[name][0], 10, optimizer=adam, seed=seed) for seed in (0, 1))
    for _ in range(2):
        rule.step(x, y)
    torch.save(rule.state_dict(), tmp_path / "state.pt")
    losses = [rule.step(x, y) for _ in range(2)]
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(a, other.step(x, y)) for a in losses)
    assert all(torch.equal(a, b) for a, b in zip(rule.model.parameters(), other.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (nn.Sequential(nn.Linear(2, 2)), {"classes": 1}, "classes must be at least 2, got 1"),
        (nn.Sequential(nn.Linear(2, 2)), {"loss": "l3"}, "unknown loss 'l3'"),
        (nn.Sequential(nn.RNN(2, 2), HiddenStates()), {}, "batch_first=True"),
        (nn.Sequential(nn.RNN(2, 2, batch_first=True), nn.Linear(2, 2)), {}, "needs HiddenStates after"),
    ],
)
def test_wrong_use(model, options, text):
    with pytest.raises(UsageError, match=text):
        TargetProjection(model, **{"classes": 2, **options})
