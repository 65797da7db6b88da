"""Forecasts from a sweep: which of its runs count as stable, what they say, and what then happened."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.errors import UsageError
from trimtab.record import Run
from trimtab.tune.scaling.forecast import THRESHOLD, InstabilityForecast, forecast_instability

if TYPE_CHECKING:
    from trimtab.compare import Curve, Sweep
    from trimtab.workloads import Outcome

__all__ = ["breaks_at", "forecast_lr", "forecast_width", "gradient_rms"]

GRADIENT_RMS = "gradient_rms"
SHARE = 0.1
"""Share of the progress l0 - l* that a run loses when it counts as unstable. Ours: seeds differ by about 1%, and a rate
three times too high costs up to 5%."""
_TAIL = 0.1


def breaks_at(x: Sequence[float], losses: Sequence[float], initial: float, *, share: float = SHARE) -> float | None:
    """Return the x from which on runs are unstable: beyond the best one, min(l, l0) - l* > share (l0 - l*).

    Between two runs it is interpolated over log x.

    Args:
        x: learning rates or widths, in any order.
        losses: the final loss at each; one that is not finite counts as l0.
        initial: l0, the loss at initialisation.
        share: of the progress, in (0, 1).

    Returns:
        The x, or None if no run beyond the best is unstable.

    Raises:
        UsageError: if the share is out of its range, or points do not match.

    Example:
        >>> f"{breaks_at([0.001, 0.01, 0.1], [2.0, 1.0, 3.0], 5.0):.4f}"
        '0.0158'
    """
    if not 0 < share < 1:
        raise UsageError(f"share of the progress must be between 0 and 1, got {share}.")
    if len(x) != len(losses) or not x:
        raise UsageError(f"a curve needs one loss for each point: got {len(x)} and {len(losses)}.")
    curve = sorted(
        (at, min(loss, initial) if math.isfinite(loss) else initial) for at, loss in zip(x, losses, strict=True)
    )
    best, place = min((loss, place) for place, (_, loss) in enumerate(curve))
    limit = best + share * (initial - best)
    for (before, low), (after, high) in zip(curve[place:], curve[place + 1 :], strict=False):
        if high > limit:
            part = (limit - low) / (high - low)
            return float(math.exp(math.log(before) + part * (math.log(after) - math.log(before))))
    return None


def forecast_lr(
    sweep: Sweep,
    side: str | None = None,
    *,
    width: int | None = None,
    signal: str = "attention_max_logit",
    threshold: float = THRESHOLD,
    share: float = SHARE,
    below: float = math.inf,
    **options: Any,
) -> InstabilityForecast:
    """Forecast the learning rate at which an arm becomes unstable, from the stable runs of a sweep.

    Stable are runs that did not diverge, stay below the threshold, and come before the learning rate at which the loss
    of their curve breaks (`breaks_at`).

    Args:
        sweep: of learning rates.
        side: the arm's label without its size; the sweep's first arm if left out.
        width: to forecast for. One of the sweep's: its own curve alone is fitted. Another one: all widths are, with the
            width beside the learning rate. Left out in a sweep of one width.
        signal: an explaining signal of the runs, or "gradient_rms" for the smallest root mean square of a module's
            gradient, which falls.
        threshold: the signal's value at which runs break; Adam's epsilon for "gradient_rms".
        share: of the progress, see `breaks_at`.
        below: only learning rates up to this one are used.
        **options: of `forecast_instability`: degree, reach, level.

    Returns:
        The forecast.

    Raises:
        UsageError: if the sweep has no such arm, its runs have no such signal, or it needs a width to be chosen.
    """
    curves = _curves(sweep, side)
    own = [curve for curve in curves if curve.size.width == width]
    if width is None and len(curves) > 1:
        raise UsageError(f"the sweep has {len(curves)} curves of this arm: say for which width to forecast.")
    chosen = curves if width is None else (own or curves)
    if width is not None and not own and len(curves) < 2:
        raise UsageError(f"a forecast for width {width} needs a sweep at it, or over two or more other widths.")
    points = _stable(chosen, signal, threshold, share, below)
    beside = [at for at, _, _ in points] if width is not None and not own else []
    return forecast_instability(
        [lr for _, lr, _ in points],
        [value for _, _, value in points],
        signal=signal,
        threshold=threshold,
        falling=signal == GRADIENT_RMS,
        beside=beside,
        at=float(width) if beside and width is not None else None,
        **options,
    )


def forecast_width(
    sweep: Sweep,
    lr: float,
    side: str | None = None,
    *,
    signal: str = "attention_max_logit",
    threshold: float = THRESHOLD,
    share: float = SHARE,
    below: float = math.inf,
    **options: Any,
) -> InstabilityForecast:
    """Forecast the width at which an arm becomes unstable at one learning rate, from the stable runs of a sweep.

    Args:
        sweep: of learning rates over several widths. If `lr` is one of its rates and was stable at enough widths, these
            runs alone are fitted; otherwise all stable ones, with the learning rate beside the width.
        lr: the learning rate to forecast for.
        side: as in `forecast_lr`, and so are the other arguments.
        signal: see there.
        threshold: see there.
        share: see there.
        below: see there.
        **options: of `forecast_instability`: degree, reach, level.

    Returns:
        The forecast, over the width.

    Raises:
        UsageError: if the sweep has no such arm, its runs no such signal, or it has fewer than two widths.
    """
    if len(sweep.widths) < 2:
        raise UsageError("a forecast of the width needs a sweep over two or more widths.")
    points = _stable(_curves(sweep, side), signal, threshold, share, below)
    alone = [(width, value) for width, rate, value in points if math.isclose(rate, lr, rel_tol=1e-9)]
    common: dict[str, Any] = {"over": "width", "signal": signal, "threshold": threshold, **options}
    common["falling"] = signal == GRADIENT_RMS
    if len({width for width, _ in alone}) >= options.get("degree", 1) + 2:
        return forecast_instability([width for width, _ in alone], [value for _, value in alone], **common)
    return forecast_instability(
        [width for width, _, _ in points],
        [value for _, _, value in points],
        beside=[rate for _, rate, _ in points],
        at=lr if points else None,
        **common,
    )


def gradient_rms(folder: str | Path) -> dict[str, float]:
    """Return the root mean square that the optimizer sees of each module's gradient, at the end of a recorded run.

    The norm over a module's own parameters, divided by the square root of their number, after clipping; the median over
    the last tenth of the samples. Modules whose gradient is 0 are left out.

    Args:
        folder: of the run.

    Returns:
        By module.

    Raises:
        RecordError: if there is no readable record.
    """
    with Run(folder) as run:
        norms, total = run.series("grad_norm_by_module"), run.series("grad_norm")
        clip = float(run.meta.get("config", {}).get("clip", 0.0))
        numbers: dict[str, int] = {}
        for name, count in run.meta.get("parameters", {}).items():
            module = name.rpartition(".")[0]
            numbers[module] = numbers.get(module, 0) + int(count)
    if not len(norms):
        return {}
    keep = max(1, round(_TAIL * len(norms)))
    values = norms.values[-keep:]
    if clip > 0 and len(total):
        whole = total.flat[np.isin(total.steps, norms.steps[-keep:])]
        if len(whole) == keep:
            values = values * np.minimum(1.0, clip / np.maximum(whole, 1e-300))[:, None]
    found = {
        label: float(np.median(values[:, column])) / math.sqrt(numbers[label])
        for column, label in enumerate(norms.labels)
        if numbers.get(label)
    }
    return {label: value for label, value in found.items() if math.isfinite(value) and value > 0}


def _curves(sweep: Sweep, side: str | None) -> list[Curve]:
    name = sweep.curves[0].side if side is None else side
    found = [curve for curve in sweep.curves if curve.side == name]
    if not found:
        known = ", ".join(dict.fromkeys(curve.side for curve in sweep.curves))
        raise UsageError(f"the sweep has no arm {name!r}. Valid: {known}.")
    if len({curve.size.depth for curve in found}) > 1:
        raise UsageError("a forecast is for one depth: sweep one.")
    return found


def _stable(
    curves: Iterable[Curve], signal: str, threshold: float, share: float, below: float
) -> list[tuple[int, float, float]]:
    """Return (width, learning rate, value of the signal) of the stable runs.

    Raises:
        UsageError: if no run has the signal, stable or not.
    """
    points = []
    falling = signal == GRADIENT_RMS
    curves = list(curves)
    outcomes = [outcome for curve in curves for row in curve.outcomes for outcome in row]
    if all(_value(outcome, signal) is None for outcome in outcomes):
        known = ", ".join(sorted({name for outcome in outcomes for name in outcome.mechanism})) or "none"
        raise UsageError(f"the runs have no signal {signal!r} above 0. Recorded: {known}.")
    for curve in curves:
        initial = curve.outcomes[0][0].initial_loss
        breaks = breaks_at(curve.lrs, curve.mean_losses, initial, share=share)
        for lr, row in zip(curve.lrs, curve.outcomes, strict=True):
            if lr > below * (1 + 1e-9) or (breaks is not None and lr > breaks):
                continue
            for outcome in row:
                value = _value(outcome, signal)
                if outcome.diverged or value is None or (value <= threshold if falling else value >= threshold):
                    continue
                points.append((curve.size.width, lr, value))
    return points


def _value(outcome: Outcome, signal: str) -> float | None:
    if signal == GRADIENT_RMS:
        found = gradient_rms(outcome.folder) if outcome.folder else {}
        return min(found.values(), default=None)
    value = outcome.mechanism.get(signal)
    return value if value is not None and value > 0 else None
