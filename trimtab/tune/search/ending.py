"""How a trial ended, as plain JSON data: what it counts as, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_LONGEST = 300


def finished(
    plan: Mapping[str, Any], value: float, initial: float | None, findings: Sequence[Mapping[str, Any]], **more: Any
) -> dict[str, Any]:
    """Return the ending of a run that came to its end.

    No run counts for less than where it began: one that got worse counts as its initial value, and is kept.

    Args:
        plan: the tuning's.
        value: the metric at the end.
        initial: the metric at initialisation, or None if it is not known.
        findings: the doctor's, as JSON data.
        **more: further JSON data for the ending.
    """
    worse = initial is not None and (value < initial if plan["maximize"] else value > initial)
    return {"status": "finished", "value": initial if worse else value, "findings": list(findings), **more}


def lost(
    value: float | None, finding: Mapping[str, Any] | None, findings: Sequence[Mapping[str, Any]], **more: Any
) -> dict[str, Any]:
    """Return the ending of a run that diverged: pruned, at the value it began with.

    Args:
        value: the metric at initialisation.
        finding: what ended it.
        findings: the doctor's, as JSON data.
        **more: further JSON data for the ending.
    """
    if value is None or not math.isfinite(value):
        return failed("its metric is not finite, and no finite value was reported before", findings, **more)
    name = finding["name"] if finding else "non-finite"
    cause = finding["cause"] if finding else "its metric is not finite"
    reason = _line(f"{name}: {cause}")
    return {"status": "pruned", "value": value, "finding": name, "reason": reason, "findings": list(findings), **more}


def behind(value: float, reason: str, findings: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """Return the ending of a run that was stopped because others were ahead of it.

    Args:
        value: the last one that it reported.
        reason: one line.
        findings: the doctor's, as JSON data.
        **more: further JSON data for the ending.
    """
    return {
        "status": "pruned", "behind": True, "value": value, "reason": _line(reason), "findings": list(findings), **more
    }  # fmt: skip


def failed(reason: str, findings: Sequence[Mapping[str, Any]] = (), **more: Any) -> dict[str, Any]:
    """Return the ending of a run without a result.

    Args:
        reason: one line.
        findings: the doctor's, as JSON data.
        **more: further JSON data for the ending.
    """
    return {"status": "failed", "value": None, "reason": _line(reason), "findings": list(findings), **more}


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
