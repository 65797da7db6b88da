"""`trimtab forecast`: from stable runs to the learning rate, or the width, at which training breaks."""

from __future__ import annotations

import json as json_module
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli.show import Meter, console, number, print_json, resumable, say, table, use_threads
from trimtab.cli.sweep import whole_numbers
from trimtab.errors import UsageError

if TYPE_CHECKING:
    from trimtab.compare import Sweep
    from trimtab.tune import InstabilityForecast

_NEIGHBOURS = (-0.5, -0.25, 0.0, 0.25, 0.5)
"""Decades from the predicted learning rate at which --check trains."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("forecast")(forecast)


def forecast(
    workload: Annotated[str, typer.Argument(help="A workload with attention, as trimtab workloads lists them.")],
    lr: Annotated[
        str, typer.Option(help="Range LOW:HIGH of stable learning rates, evenly spaced in log.")
    ] = "1e-3:2e-2",
    points: Annotated[int, typer.Option(help="Learning rates in the range.")] = 6,
    arm: Annotated[str, typer.Option(help="Such as 'adamw,batch_size=8,with=qk-norm'; the workload's defaults.")] = "",
    width: Annotated[str, typer.Option(help="Widths to train at, such as 32,64; the workload's own.")] = "",
    at_width: Annotated[int | None, typer.Option(help="Forecast for this width, from all trained ones.")] = None,
    at_lr: Annotated[float | None, typer.Option(help="Forecast the width that breaks at this learning rate.")] = None,
    signal: Annotated[str, typer.Option(help="attention_max_logit, gradient_rms, ...")] = "attention_max_logit",
    threshold: Annotated[float | None, typer.Option(help="Where runs break; 1e3, or 1e-8 for gradient_rms.")] = None,
    degree: Annotated[int, typer.Option(help="1 for a line, 2 for a parabola, over logarithms.")] = 1,
    seeds: Annotated[int, typer.Option(help="Runs at each point.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Steps of every run.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Train around the forecast, say how far off it is.")] = False,
    workers: Annotated[int, typer.Option(help="Worker processes, one thread each.")] = 2,
    text: Annotated[Path | None, typer.Option(help="A file or folder of text, for language models.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of runs and results; runs/forecast-WORKLOAD.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Forecast from stable runs where training becomes unstable. Exit code 1 if it cannot be told."""
    use_threads()
    from trimtab.compare import log_grid, sweep
    from trimtab.compare.store import strict
    from trimtab.record.files import write_whole
    from trimtab.tune import forecast_instability, forecast_lr, forecast_width

    if at_lr is not None and (at_width is not None or check):
        raise UsageError("--at-lr forecasts a width: it goes without --at-width and --check.")
    grid = log_grid(lr, points)
    widths = whole_numbers(width, "width")
    _check_target(at_width, at_lr, widths)
    folder = out or Path("runs") / f"forecast-{workload}"
    crossed = (1e-8 if signal == "gradient_rms" else 1e3) if threshold is None else threshold
    options: dict[str, Any] = {"signal": signal, "threshold": crossed, "degree": degree}
    forecast_instability([], [], **options)  # a wrong option is refused before anything is trained
    trained: dict[str, Any] = {"arms": [arm] if arm else (), "seeds": seeds, "steps": steps}
    trained |= {"workers": workers, "text": text}
    with resumable(folder), Meter(f"training {workload} at stable learning rates") as meter:
        result = sweep(workload, grid, folder=folder, widths=widths, progress=meter.jobs, **trained)
    if at_lr is not None:
        found = [forecast_width(result, at_lr, **options)]
    else:
        targets: list[int | None] = [at_width] if at_width is not None else [*widths] or [None]
        found = [forecast_lr(result, width=target, **options) for target in targets]
    checks = []
    if check:
        for target, entry in zip(targets, found, strict=True):
            with resumable(folder), Meter(f"checking {workload}") as meter:
                near = _near(entry, grid)
                own = (
                    sweep(
                        workload, near, folder=folder, widths=[target] if target else (), progress=meter.jobs, **trained
                    )
                    if near
                    else None
                )
            checks.append(_checked(entry, own))
    data = strict(
        {
            "kind": "forecast",
            "workload": workload,
            "arm": arm,
            "lrs": grid,
            "widths": widths,
            "forecasts": [entry.to_json() for entry in found],
            "checks": checks,
        }
    )
    write_whole(folder / "forecast.json", json_module.dumps(data, indent=2, allow_nan=False) + "\n")
    if json:
        print_json(data)
    else:
        for place, entry in enumerate(found):
            where = f"width {targets[place]}" if at_lr is None and targets[place] else ""
            _print(workload, where, entry, checks[place] if checks else None)
        say(f"runs and forecast.json: {folder}")
    if all(entry.prediction is None for entry in found):
        raise typer.Exit(1)


def _check_target(at_width: int | None, at_lr: float | None, widths: list[int]) -> None:
    """Refuse what the runs could not tell, before they are trained.

    Raises:
        UsageError: if the forecast is for a rate or a width that a fit cannot reach from these widths.
    """
    if at_lr is not None and not 0 < at_lr < math.inf:
        raise UsageError(f"--at-lr must be finite and above 0, got {at_lr}.")
    if len(widths) < 2 and (at_lr is not None or (at_width is not None and at_width not in widths)):
        wanted = "--at-lr" if at_lr is not None else f"--at-width {at_width}"
        raise UsageError(f"{wanted} needs runs at two or more widths: give them, as in --width 32,64.")


def _near(found: InstabilityForecast, grid: tuple[float, ...]) -> tuple[float, ...]:
    """Return the stable learning rates and those around the predicted one; none without a prediction."""
    if found.prediction is None:
        return ()
    around = (float(f"{found.prediction * 10**step:.3g}") for step in _NEIGHBOURS)
    return tuple(sorted({*grid, *around}))


def _checked(found: InstabilityForecast, curve: Sweep | None) -> dict[str, Any]:
    """Return what happened around a forecast, and how far off it is."""
    from trimtab.tune import breaks_at

    if curve is None:
        return {"measured": None, "error_decades": None, "reason": found.reason}
    own = curve.curves[0]
    measured = breaks_at(own.lrs, own.mean_losses, own.outcomes[0][0].initial_loss)
    values = [max(outcome.mechanism.get(found.signal, math.nan) for outcome in row) for row in own.outcomes]
    return {
        "lrs": own.lrs,
        "losses": own.mean_losses,
        "values": values,
        "measured": measured,
        "error_decades": found.error(measured) if measured else None,
        "reason": "" if measured else f"no run up to {own.lrs[-1]:g} lost a tenth of its progress",
    }


def _print(workload: str, where: str, found: InstabilityForecast, check: dict[str, Any] | None) -> None:
    """Print the points of the fit, the forecast and its check."""
    rows = []
    for place, (x, y) in enumerate(zip(found.x, found.y, strict=True)):
        residual = found.residuals[place] if found.residuals else None
        beside = [number(found.beside[place])] if found.beside else []
        rows.append([f"{x:.3g}", *beside, number(y), number(found.value(x)) if not beside else "", number(residual, 2)])
    heads = [found.over, *(["beside"] if found.beside else []), found.signal, "fit", "off by (decades)"]
    title = ", ".join(part for part in (workload, where, "stable runs") if part)
    console().print(table(title, heads, rows, left=0))
    say(str(found))
    if check is None:
        return
    if check["measured"] is None:
        say(f"check: {check['reason']}")
        return
    cells = zip(check["lrs"], check["losses"], check["values"], strict=True)
    shown = [[f"{lr:.3g}", number(loss), number(None if math.isnan(value) else value)] for lr, loss, value in cells]
    console().print(table("check", ["learning rate", "final loss", found.signal], shown, left=0))
    say(
        f"check: a tenth of the progress is lost from {check['measured']:.3g} on; "
        f"the forecast is off by {check['error_decades']:+.2f} decades"
    )
