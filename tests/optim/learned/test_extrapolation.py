"""The line fit against numpy, and the wrapper's clock, jumps and resumption."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from trimtab.errors import UsageError
from trimtab.optim.learned.extrapolation import LineFit, Nowcasting, horizon_schedule


def test_line_is_least_squares():
    theta = torch.randn(5, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (predicted,) = LineFit().predict([theta], k=4)
    for index in np.ndindex(3, 2):
        line = np.polyfit(np.arange(5), theta[(slice(None), *index)].numpy(), 1)
        assert predicted[index].item() == pytest.approx(np.polyval(line, 8), rel=1e-12)


def test_horizons_are_those_of_the_authors():
    assert horizon_schedule(40, max_steps=10_000, period=1000) == [40, 33, 26, 21, 16, 11, 8, 5, 3, 1]
    expected = (np.linspace(17**0.5, 1, num=7) ** 2).round().astype(int)
    assert horizon_schedule(17, max_steps=79, period=11) == expected.tolist()
    assert horizon_schedule(6, max_steps=10, period=100) == [6]


class _Recorder:
    def __init__(self):
        self.calls = []

    def predict(self, checkpoints, k):
        self.calls.append(([c.clone() for c in checkpoints], k))
        return [c[-1] + 100 for c in checkpoints]


def test_jumps_when_and_where_it_should():
    w, v = torch.zeros(2, requires_grad=True), torch.zeros((), requires_grad=True)
    recorder = _Recorder()
    base = torch.optim.SGD([{"params": [w]}, {"params": [v], "lr": 2.0}], lr=1.0)
    optimizer = Nowcasting(base, recorder, period=6, context=3, horizon=9, max_steps=18)
    jumps, expected, values = [], 0.0, []
    for step in range(18):
        w.grad, v.grad = -torch.ones(2), -torch.ones(())
        jumps.append(optimizer.jumps_next)
        optimizer.step()
        expected += 100 if step % 6 == 5 else 1
        assert w.tolist() == [expected, expected]
        values.append(expected)
    assert [step for step, jump in enumerate(jumps) if jump] == [5, 11, 17]
    assert [k for _, k in recorder.calls] == [9, 4, 1]
    # A checkpoint is taken before the second, fourth and sixth step of a period, so one sees 1, 3, 5 steps.
    assert recorder.calls[0][0][0][:, 0].tolist() == [1, 3, 5]
    assert recorder.calls[0][0][1].tolist() == [2, 6, 10]
    assert recorder.calls[1][0][0][:, 0].tolist() == [values[6], values[8], values[10]]


def _model(dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=dtype, generator=generator).requires_grad_() for shape in ((4, 3), (4,), ())]


def _train(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        for p in params:
            target = torch.randn(p.shape, generator=generator).to(p)
            (p - target).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("stop", [3, 9, 10, 14])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_resumes_bit_for_bit(dtype, stop):
    def make(params):
        adam = torch.optim.AdamW(params, lr=0.05)
        return Nowcasting(adam, period=10, context=5, horizon=3, max_steps=40)

    params = _model(dtype)
    optimizer = make(params)
    _train(optimizer, params, stop)
    buffer = io.BytesIO()
    torch.save((optimizer.state_dict(), [p.detach() for p in params]), buffer)
    buffer.seek(0)
    state, values = torch.load(buffer, weights_only=True)
    _train(optimizer, params, 25 - stop, stop)
    resumed = [value.clone().requires_grad_() for value in values]
    again = make(resumed)
    again.load_state_dict(state)
    _train(again, resumed, 25 - stop, stop)
    for a, b in zip(params, resumed, strict=True):
        assert torch.equal(a, b)


def test_shortens_a_straight_descent():
    """On a narrow quadratic, gradient steps crawl along the valley and the line goes down it."""
    scale = torch.tensor([1.0, 0.01], dtype=torch.float64)

    def run(nowcast):
        w = torch.ones(2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=0.5)
        if nowcast:
            optimizer = Nowcasting(optimizer, period=20, context=5, horizon=6, max_steps=200)
        for _ in range(200):
            optimizer.zero_grad()
            loss = 0.5 * (scale * w.square()).sum()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert run(True) < 0.5 * run(False)


def test_unusable_prediction_is_skipped_and_closure_is_called_once():
    class Broken:
        def predict(self, checkpoints, k):
            return [c[-1] * float("nan") for c in checkpoints]

    w = torch.ones(1, requires_grad=True)
    optimizer = Nowcasting(torch.optim.SGD([w], lr=0.0), Broken(), period=2, context=2)
    calls = []

    def closure():
        calls.append(1)
        return w.sum()

    assert [optimizer.step(closure).item() for _ in range(2)] == [1, 1]
    assert (len(calls), w.item()) == (2, 1)


def test_refusals():
    base = torch.optim.SGD([torch.zeros(2)], lr=0.1)
    with pytest.raises(UsageError, match="context must be at least 2, got 1"):
        Nowcasting(base, context=1)
    with pytest.raises(UsageError, match="period must be a multiple of context = 5, got 12"):
        Nowcasting(base, period=12)
    with pytest.raises(UsageError, match="horizon and max_steps must be at least 1"):
        Nowcasting(base, horizon=0)
    optimizer = Nowcasting(base, period=5)
    state = optimizer.state_dict() | {"checkpoints": [[torch.zeros(3)]]}
    with pytest.raises(UsageError, match="do not have the parameters"):
        optimizer.load_state_dict(state)
