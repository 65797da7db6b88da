"""The doctor's part in a tuning: why a trial went as it did, and whether it is worth going on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.diagnose.doctor import Doctor
from trimtab.diagnose.finding import Finding
from trimtab.diagnose.pathologies import loss_divergence
from trimtab.record import Event, Recorder, Series
from trimtab.record.schema import record_path

FATAL = ("loss-divergence", "non-finite")
"""Critical findings that end a trial: it counts as its loss at initialisation."""

_FIRST = 20
_GROWTH = 1.05


class Losses:
    """Losses so far, as the doctor reads signals; it looks at them again when there are a twentieth more.

    Args:
        meta: facts about the run, such as `n_classes`.
    """

    def __init__(self, meta: Mapping[str, Any] | None = None) -> None:
        self.meta: Mapping[str, Any] = meta or {}
        self.steps: list[int] = []
        self.values: list[float] = []
        self._judged = 0

    def add(self, step: int, value: float) -> None:
        """Append a loss."""
        self.steps.append(step)
        self.values.append(value)

    def series(self, name: str) -> Series:
        """Return the losses as the signal `loss`; any other is empty."""
        if name != "loss" or not self.steps:
            return Series(name, np.empty(0, np.int64), np.empty((0, 1)))
        return Series(name, np.array(self.steps, np.int64), np.array(self.values, np.float64)[:, None])

    def events(self, kind: str | None = None) -> Sequence[Event]:
        """Return no event."""
        return ()

    def fatal(self) -> dict[str, Any] | None:
        """Return the finding that ends the run, or None."""
        if self.values and not math.isfinite(self.values[-1]):
            cause = f"The value reported at step {self.steps[-1]} is {self.values[-1]}."
            return _entry("non-finite", "critical", self.steps[-1], cause)
        if len(self.values) < max(_FIRST, _GROWTH * self._judged):
            return None
        self._judged = len(self.values)
        match = loss_divergence.rule(self)
        if match is None or match.severity != "critical":
            return None
        return _entry(loss_divergence.PATHOLOGY.name, match.severity, match.first_step, match.cause)


def findings_in(folder: Path) -> list[dict[str, Any]]:
    """Return what the doctor finds in a run's record, the most severe first; nothing where there is no record."""
    if not record_path(folder, 0).is_file():
        return []
    return [brief(finding) for finding in Doctor().examine(folder).findings]


def brief(finding: Finding) -> dict[str, Any]:
    """Return a finding's name, severity, first step and cause as JSON data."""
    return _entry(finding.name, finding.severity, finding.first_step, finding.cause)


def fatal_in(findings: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the first critical finding that means that the run is lost, or None."""
    return next((entry for entry in findings if entry["severity"] == "critical" and entry["name"] in FATAL), None)


def merged(findings: Sequence[dict[str, Any]], more: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return findings with one more at their head, unless it is there by that name."""
    if more is None or any(entry["name"] == more["name"] for entry in findings):
        return list(findings)
    return [more, *findings]


def record_losses(folder: Path, losses: Losses) -> None:
    """Write reported losses as a run's record where the run has written none itself, for the doctor and for reports."""
    if not losses.steps or record_path(folder, 0).exists():
        return
    with Recorder(folder) as recorder:
        for step, value in zip(losses.steps, losses.values, strict=True):
            recorder.log(step, "loss", value)


def mark_stopped(folder: Path, step: int, reason: str, *, lost: bool) -> None:
    """Note in a run's record that the tuning stopped it, and why."""
    if not record_path(folder, 0).exists():
        return
    recorder = Recorder(folder, resume=True)
    recorder.event(step, "pruned", reason)
    recorder.close("diverged" if lost else "interrupted")


def _entry(name: str, severity: str, step: int, cause: str) -> dict[str, Any]:
    return {"name": name, "severity": severity, "first_step": int(step), "cause": " ".join(cause.split())}
