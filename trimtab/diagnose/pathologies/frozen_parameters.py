"""frozen-parameters: parameters that are meant to train never change while others do."""

from __future__ import annotations

import numpy as np

from trimtab.diagnose.papers import AUTOTRAINER, DEEPDIAGNOSIS
from trimtab.diagnose.pathology import Match, Pathology, Signals

SIGNAL = "update_norm_by_module"
SAMPLES = 3
"""Samples in which others move before standing still says anything (exact zeros need no margin)."""


def rule(signals: Signals) -> Match | None:
    """Fire where a module's update is exactly zero whenever others move, or parameters are outside the optimizer."""
    series = signals.series(SIGNAL)
    moving = (np.nan_to_num(series.values) > 0).any(axis=1)
    if int(moving.sum()) < SAMPLES:
        return None
    steps, values = series.steps[moving], series.values[moving]
    intended = _names(signals, "frozen")
    outside = tuple(name for name in _names(signals, "outside_optimizer") if name not in intended)
    still = [
        label
        for label, column in zip(series.labels, values.T, strict=True)
        if np.isfinite(column).any() and not (np.abs(np.nan_to_num(column)) > 0).any() and not _owns(label, intended)
    ]
    if not still and not outside:
        return None
    without = [label for label in still if not _has_gradient(signals, label)]
    modules = tuple(dict.fromkeys([*still, *(name.rpartition(".")[0] for name in outside)]))
    evidence: dict[str, float | int | str] = {
        "signal": SIGNAL,
        "value": 0.0,
        "threshold": 0.0,
        "baseline": float(np.nanmedian(np.nanmax(values, axis=1))),
        "modules_still": len(still),
        "modules_without_gradient": len(without),
        "parameters_outside_optimizer": len(outside),
    }
    cause = f"{_said(still, without, outside)}, while other modules moved in all {len(steps)} samples."
    return Match("warning", int(steps[0]), int(steps[-1]), modules, evidence, cause)


def _said(still: list[str], without: list[str], outside: tuple[str, ...]) -> str:
    if outside:
        return f"{_some(outside)} never changed: no optimizer was given {'it' if len(outside) == 1 else 'them'}"
    if without:
        return (
            f"{_some(without)} never changed and never had a gradient: the loss does not reach "
            f"{'it' if len(without) == 1 else 'them'} (a detached tensor, an unused branch, a unit that is dead)"
        )
    return (
        f"{_some(still)} never changed although gradients reach {'it' if len(still) == 1 else 'them'}: left out of the "
        "optimizer, with a learning rate of 0, or with updates too small for the precision"
    )


def _some(names: tuple[str, ...] | list[str]) -> str:
    shown = ", ".join(name or "(the model)" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _names(signals: Signals, key: str) -> tuple[str, ...]:
    value = signals.meta.get(key)
    return tuple(str(name) for name in value) if isinstance(value, (list, tuple)) else ()


def _owns(module: str, names: tuple[str, ...]) -> bool:
    """Return whether one of the names is the module itself or a parameter of its own."""
    return any(name == module or name.rpartition(".")[0] == module for name in names)


def _has_gradient(signals: Signals, module: str) -> bool:
    series = signals.series("grad_norm_by_module")
    if module not in series.labels:
        return False
    return bool((np.nan_to_num(series.values[:, series.labels.index(module)]) > 0).any())


PATHOLOGY = Pathology(
    name="frozen-parameters",
    needs=(SIGNAL,),
    rule=rule,
    citations=(DEEPDIAGNOSIS, AUTOTRAINER),
    refutes="these parameters are kept fixed on purpose: set requires_grad to False on them and the finding goes away",
)
