"""Whether runs at low learning rates tell at which higher one, and at which width, lm-small breaks.

Run: python benchmarks/forecast.py [--out FOLDER] [--workers 1] [--stages 3]
Writes benchmarks/results/forecast.json; runs that are already in FOLDER are not repeated. About 7 CPU-minutes.

lm-small for 300 steps of batch 8, eleven learning rates a quarter of a decade apart from 1e-3 to 3.16e-1, seed 0, at
widths 32 and 64; every second of these rates at width 128, and with QK-norm at width 64 as a control. A line through
the logarithms of the largest attention logits at the stable rates up to 1.78e-2 gives the rate at which logits reach
the threshold.
Measured is the rate from which on a run loses a tenth of its progress against the best rate of its curve, and the one
at which the logits themselves cross the threshold; the error is log10(forecast / measured), in decades. The threshold
(1e3), the line and the six rates were chosen on the runs at width 64, so that only the other widths test them.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
from _common import one_thread, write

from trimtab.compare import Curve, Sweep, log_grid, sweep
from trimtab.compare.store import strict
from trimtab.tune import InstabilityForecast, breaks_at, forecast_lr, forecast_width

NAME = "forecast"
WORKLOAD = "lm-small"
ARM = "steps=300,batch_size=8"
GRID = log_grid("1e-3:3.16e-1", 11)
COARSE = GRID[::2]
WIDTHS = (32, 64)
WIDE = 128
OWN = 64
BELOW = GRID[5]
SIGNAL = "attention_max_logit"
THRESHOLDS = (1e3, 1e4)
EPSILON = 1e-8


def measured(curve: Curve, threshold: float) -> dict[str, float | None]:
    """Return where the loss breaks, and where the logits cross the threshold by interpolation."""
    logits = [outcomes[0].mechanism[SIGNAL] for outcomes in curve.outcomes]
    crossed = None
    for place in range(1, len(logits)):
        if logits[place] >= threshold:
            ends = np.log10([logits[place - 1], logits[place]])
            rates = np.log10([curve.lrs[place - 1], curve.lrs[place]])
            crossed = float(10 ** np.interp(math.log10(threshold), ends, rates))
            break
    initial = curve.outcomes[0][0].initial_loss
    return {"loss": breaks_at(curve.lrs, curve.mean_losses, initial), "logit": crossed}


def judged(found: InstabilityForecast, truth: dict[str, float | None]) -> dict[str, Any]:
    """Return a forecast with its errors against what was measured."""
    return {
        **found.to_json(),
        "text": str(found),
        "measured": truth,
        "error_decades": {name: found.error(value) if value else None for name, value in truth.items()},
        "within_interval": {
            name: None
            if value is None or found.low is None
            else found.low <= value <= (math.inf if found.high is None else found.high)
            for name, value in truth.items()
        },
    }


def row_of(curve: Curve) -> dict[str, Any]:
    """Return a curve's losses and logits."""
    return {
        "curve": curve.arm.label,
        "lrs": curve.lrs,
        "losses": curve.mean_losses,
        "attention_max_logit": [outcomes[0].mechanism[SIGNAL] for outcomes in curve.outcomes],
        "diverged": [outcomes[0].diverged for outcomes in curve.outcomes],
        "S": curve.s,
        "S_plus": curve.s_plus,
    }


def summary(plain: Sweep, wide: Sweep | None, treated: Sweep | None) -> dict[str, Any]:
    """Return forecasts and what was measured, of the sweeps that are done."""
    every = plain
    if wide is not None:
        every = Sweep(WORKLOAD, GRID, plain.seeds, (*plain.curves, *wide.curves), {}, (*WIDTHS, WIDE))
    own_width, at_new_width = [], []
    for threshold in THRESHOLDS:
        for degree in (1, 2):
            for curve in every.curves:
                found = forecast_lr(every, width=curve.size.width, threshold=threshold, below=BELOW, degree=degree)
                row = judged(found, measured(curve, threshold))
                own_width.append({"width": curve.size.width, "threshold": threshold, "degree": degree, **row})
        if wide is not None:
            found = forecast_lr(plain, width=WIDE, threshold=threshold, below=BELOW)
            row = judged(found, measured(wide.curves[0], threshold))
            at_new_width.append({"from": WIDTHS, "to": WIDE, "threshold": threshold, **row})
    by_width = [
        {"lr": lr, "text": str(found), **found.to_json()}
        for lr in GRID[4:8]
        for found in [forecast_width(plain, lr, below=BELOW)]
    ]
    epsilon = [
        {"over": "lr", "width": width, "text": str(found), **found.to_json()}
        for width in every.widths
        for found in [forecast_lr(every, width=width, signal="gradient_rms", threshold=EPSILON, reach=6.0)]
    ]
    epsilon += [
        {"over": "width", "lr": lr, "text": str(found), **found.to_json()}
        for lr in (GRID[0], GRID[4])
        for found in [forecast_width(every, lr, signal="gradient_rms", threshold=EPSILON, reach=6.0)]
    ]
    control = None
    if treated is not None:
        found = forecast_lr(treated, "qk-norm", width=OWN, below=BELOW)
        control = judged(found, measured(treated.curves[1], THRESHOLDS[0]))
    curves = [*every.curves, *(treated.curves[1:] if treated else ())]
    return {
        "workload": WORKLOAD,
        "arm": ARM,
        "lrs": GRID,
        "fitted_up_to": BELOW,
        "curves": [row_of(curve) for curve in curves],
        "lr_at_own_width": own_width,
        "lr_at_a_new_width": at_new_width,
        "width_at_an_lr": by_width,
        "control_with_qk_norm": control,
        "epsilon": epsilon,
        "cpu_seconds": sum(
            outcome.cpu_seconds_per_step * outcome.steps
            for curve in curves
            for outcomes in curve.outcomes
            for outcome in outcomes
        ),
    }


def main() -> None:
    """Run the sweeps, forecast, and write what came of it, sweep by sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / NAME)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--stages", type=int, default=3, choices=(1, 2, 3))
    given = parser.parse_args()
    one_thread()
    options: dict[str, Any] = {"folder": given.out, "workers": given.workers, "arms": [ARM]}
    plain = sweep(WORKLOAD, GRID, widths=WIDTHS, **options)
    wide = sweep(WORKLOAD, COARSE, widths=[WIDE], **options) if given.stages > 1 else None
    path = write(NAME, strict(summary(plain, wide, None)))
    if given.stages > 2:
        treated = sweep(WORKLOAD, COARSE, widths=[OWN], remedies=[["qk-norm"]], **options)
        path = write(NAME, strict(summary(plain, wide, treated)))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
