"""What a tuning found: its trials with the doctor's findings, the best of them, and which values mattered."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import require
from trimtab.tune.search.journal import quiet

if TYPE_CHECKING:
    from trimtab.tune.search.desk import Desk

__all__ = ["TrialResult", "Tuning"]


@dataclass(frozen=True)
class TrialResult:
    """One trial.

    Attributes:
        number: from 0.
        status: "finished", "pruned" (stopped, or lost: then it counts as its value at initialisation), "failed" (it
            gave no value) or "running".
        value: what it counts as, or None.
        values: of the space, by name.
        findings: the doctor's, the most severe first: name, severity, first step, cause.
        reason: why it was pruned or failed, in a line; empty for others.
        arm: its settings as an arm, for trials of a workload.
        metrics: every metric at its end.
        ranked: whether it may be the best: it has a value that was not cut short by the median rule.
        seconds: it took.
        worker: who ran it.
        attempt: 1, or more if workers died over it.
        folder: of its run, below the tuning's.
    """

    number: int
    status: str
    value: float | None
    values: dict[str, Any]
    findings: tuple[dict[str, Any], ...] = ()
    reason: str = ""
    arm: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    ranked: bool = False
    seconds: float = 0.0
    worker: str = ""
    attempt: int = 1
    folder: str = ""


@dataclass(frozen=True)
class Tuning:
    """What came out of a tuning.

    Attributes:
        plan: what was tuned: `kind`, the subject, `space`, `metric`, `maximize`, `sampler`, `seed`, ...
        trials: by number.
        importance: share of each value of the space in how much results differ (PED-ANOVA, Watanabe et al. 2023,
            arXiv:2304.10255), the largest first; empty where there are too few trials.
        folder: of the tuning.
    """

    plan: dict[str, Any]
    trials: tuple[TrialResult, ...]
    importance: dict[str, float]
    folder: str

    @property
    def subject(self) -> str:
        """What was tuned: the workload's name, the script's or the function's."""
        return str(Path(self.plan["script"]).name if self.plan["kind"] == "script" else self.plan[self.plan["kind"]])

    @property
    def ranking(self) -> list[TrialResult]:
        """The trials that have a value, the best first; of equal ones those that were finished."""
        sign = -1.0 if self.plan["maximize"] else 1.0
        ranked = [trial for trial in self.trials if trial.ranked and trial.value is not None]
        return sorted(ranked, key=lambda trial: (sign * (trial.value or 0.0), trial.status, trial.number))

    @property
    def best(self) -> TrialResult | None:
        """The best trial; None if no trial has a value."""
        return next(iter(self.ranking), None)

    @property
    def counts(self) -> dict[str, int]:
        """How many trials there are of each status."""
        return dict(Counter(trial.status for trial in self.trials))

    @property
    def findings(self) -> dict[str, dict[str, Any]]:
        """Each finding by name, the most frequent first: its severity at worst, its trials and their count."""
        found: dict[str, dict[str, Any]] = {}
        for trial in self.trials:
            for entry in trial.findings:
                row = found.setdefault(entry["name"], {"severity": entry["severity"], "trials": []})
                row["trials"].append(trial.number)
                if entry["severity"] == "critical":
                    row["severity"] = "critical"
        order = sorted(found, key=lambda name: (-len(found[name]["trials"]), name))
        return {name: {"count": len(found[name]["trials"]), **found[name]} for name in order}

    def to_json(self) -> dict[str, Any]:
        """Return the tuning as JSON data."""
        best = self.best
        return {
            "subject": self.subject,
            "plan": self.plan,
            "counts": self.counts,
            "best": None if best is None else asdict(best),
            "importance": self.importance,
            "findings": self.findings,
            "trials": [asdict(trial) for trial in self.trials],
        }


def read_tuning(desk: Desk) -> Tuning:
    """Return what a tuning's journal holds so far.

    Raises:
        UsageError: if its folder holds no tuning.
    """
    trials = []
    for entry in desk.trials():
        ending = dict(entry.user_attrs.get("ending") or {})
        claim = entry.user_attrs.get("claim") or {}
        drawn = ending.get("values") or entry.params
        ended = entry.state.is_finished()
        value = ending.get("value") if ended else None
        trials.append(
            TrialResult(
                number=entry.number,
                status=str(ending.get("status", "failed")) if ended else "running",
                value=value,
                values=dict(drawn),
                findings=tuple(ending.get("findings") or ()),
                reason=str(ending.get("reason", "")),
                arm=str(ending.get("arm", "")),
                metrics={name: float(number) for name, number in (ending.get("metrics") or {}).items()},
                ranked=value is not None and math.isfinite(value) and not ending.get("behind"),
                seconds=float(ending.get("seconds", 0.0)),
                worker=str(claim.get("worker", "")),
                attempt=int(claim.get("attempt", 1)),
                folder=f"runs/trial-{entry.number}",
            )
        )
    return Tuning(desk.plan, tuple(trials), _importance(desk, trials), str(desk.folder))


def _importance(desk: Desk, trials: Sequence[TrialResult]) -> dict[str, float]:
    """Return each value's share; of those alone that every trial with a result has."""
    importance = require("optuna.importance", extra="tune")
    if len({trial.value for trial in trials if trial.ranked}) < 2:
        return {}
    try:
        with quiet():
            found: Mapping[str, float] = importance.get_param_importances(
                desk.study, evaluator=importance.PedAnovaImportanceEvaluator()
            )
    except (ValueError, RuntimeError):
        return {}
    return {name: float(share) for name, share in found.items() if math.isfinite(share)}
