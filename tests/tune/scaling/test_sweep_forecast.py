"""Forecasts from sweeps made by hand: which runs count, for which width, and where losses break."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from trimtab.compare import Arm, Curve, Size, Sweep
from trimtab.errors import UsageError
from trimtab.record import Recorder
from trimtab.tune import breaks_at, forecast_lr, forecast_width, gradient_rms
from trimtab.workloads import Outcome, Settings

_LRS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
_LOSSES = (3.0, 2.5, 2.0, 2.2, 3.5, 5.0)
"""With l0 = 5: best 2.0, a tenth of the progress is lost at 2.3."""


def _logit(lr, width):
    return 2 * (lr / 1e-3) ** 1.2 * (width / 32) ** 0.8


def _outcome(lr, width, loss):
    mechanism = {"attention_max_logit": _logit(lr, width)}
    return Outcome("lm-small", {"lr": lr, "seed": 0}, loss, {}, 5.0, loss >= 5.0, 100, 0.01, mechanism)


def _sweep(widths=(32, 64)):
    arm = Arm("adamw", Settings(lr=0.1, steps=100))
    curves = tuple(
        Curve(
            Arm(f"adamw, width {width}", arm.settings),
            _LRS,
            tuple((_outcome(lr, width, loss),) for lr, loss in zip(_LRS, _LOSSES, strict=True)),
            "adamw",
            Size(width),
        )
        for width in widths
    )
    return Sweep("lm-small", _LRS, (0,), curves, {}, tuple(widths))


def test_only_stable_runs_are_fitted():
    found = forecast_lr(_sweep(), width=64)
    assert found.x == _LRS[:4]
    assert found.y == pytest.approx([_logit(lr, 64) for lr in _LRS[:4]])
    assert found.prediction == pytest.approx(1e-3 * (500 / 2**0.8) ** (1 / 1.2), rel=1e-6)
    assert forecast_lr(_sweep(), width=64, below=1e-2).x == _LRS[:3]
    assert forecast_lr(_sweep(), width=64, threshold=30.0).x == _LRS[:2]


def test_a_width_not_trained_takes_all_widths():
    found = forecast_lr(_sweep(), width=128)
    assert (len(found.x), set(found.beside), found.at) == (8, {32, 64}, 128)
    assert found.prediction == pytest.approx(1e-3 * (500 / 4**0.8) ** (1 / 1.2), rel=1e-6)


def test_the_width_that_breaks_at_a_rate():
    expected = 32 * (500 / 30**1.2) ** (1 / 0.8)
    both = forecast_width(_sweep(), 3e-2)
    assert set(both.beside) == set(_LRS[:4])
    alone = forecast_width(_sweep((16, 32, 64)), 3e-2)
    assert (alone.x, alone.beside) == ((16.0, 32.0, 64.0), ())
    for found in (both, alone):
        assert found.over == "width"
        assert found.prediction == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: forecast_lr(_sweep()), "say for which width"),
        (lambda: forecast_lr(_sweep(), "adam", width=32), "no arm 'adam'. Valid: adamw"),
        (lambda: forecast_lr(_sweep((32,)), width=64), "two or more other widths"),
        (lambda: forecast_width(_sweep((32,)), 0.01), "two or more widths"),
        (lambda: forecast_lr(_sweep(), width=32, signal="nope"), "no signal 'nope' above 0. Recorded: attention_max"),
        (lambda: breaks_at([], [], 5.0), "one loss for each point"),
        (lambda: breaks_at([0.1], [1.0], 5.0, share=1.0), "between 0 and 1"),
    ],
)
def test_wrong_use_is_refused(call, match):
    with pytest.raises(UsageError, match=match):
        call()


def test_where_losses_break_by_hand():
    # The limit of 2.3 lies a thirteenth of the way from 2.2 at 0.03 to 3.5 at 0.1, over log lr.
    expected = math.exp(math.log(0.03) + (0.1 / 1.3) * math.log(0.1 / 0.03))
    assert breaks_at(_LRS, _LOSSES, 5.0) == pytest.approx(expected)
    assert breaks_at(_LRS[::-1], _LOSSES[::-1], 5.0) == pytest.approx(expected)
    assert breaks_at(_LRS[:4], _LOSSES[:4], 5.0) is None
    assert breaks_at([0.1, 1.0], [2.0, math.nan], 5.0) == pytest.approx(10**-0.9)
    assert breaks_at([0.1, 1.0], [2.0, 2.5], 5.0) == pytest.approx(0.1 * 10**0.6)
    # Too low a rate is not unstable, however little it learned.
    assert breaks_at([0.001, 0.1], [5.0, 2.0], 5.0) is None


def test_gradient_rms_is_what_the_optimizer_sees(tmp_path):
    with Recorder(tmp_path) as recorder:
        recorder.meta("parameters", {"a.weight": 12, "a.bias": 4, "b.weight": 25, "c.weight": 9})
        recorder.meta("config", {"clip": 1.0})
        for step in range(20):
            recorder.log(step, "grad_norm", 10.0 if step < 18 else 2.0)
            values = np.array([8.0, 5.0, 0.0]) if step >= 18 else np.array([1e3, 1e3, 1e3])
            recorder.log(step, "grad_norm_by_module", values, labels=["a", "b", "c"])
    # The last tenth alone counts; clipped from 2 to 1; over 16 and 25 parameters; c has no gradient.
    assert gradient_rms(tmp_path) == pytest.approx({"a": 8 / 2 / 4, "b": 5 / 2 / 5})


def test_a_sweep_of_the_smallest_gradient(tmp_path):
    sweep = _sweep((32,))
    for lr, row in zip(_LRS, sweep.curves[0].outcomes, strict=True):
        folder = tmp_path / str(lr)
        object.__setattr__(row[0], "folder", str(folder))
        with Recorder(folder) as recorder:
            recorder.meta("parameters", {"a.weight": 100, "b.weight": 100})
            rms = 1e-6 * (lr / 1e-3) ** -1.5
            recorder.log(0, "grad_norm_by_module", np.array([1.0, 10 * rms]), labels=["a", "b"])
    found = forecast_lr(sweep, signal="gradient_rms", threshold=1e-9, below=1e-2)
    assert found.prediction == pytest.approx(1e-3 * 1000 ** (1 / 1.5), rel=1e-6)


def test_a_forecast_is_strict_json():
    data = json.loads(json.dumps(forecast_lr(_sweep(), width=64).to_json(), allow_nan=False))
    assert {"prediction", "low", "high", "x", "y", "residuals", "reason"} <= set(data)
