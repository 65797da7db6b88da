"""The runs that a report is about: each with its record, its findings and a name of its own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trimtab.names import FINDING_NAMES
from trimtab.record import Run, Series

# What a comparison appends to a run's folder to tell its settings apart.
_KEY = re.compile(r"-[0-9a-f]{12}$")
SEVERITIES = ("critical", "warning", "info")


class Examiner(Protocol):
    """What examines a run: `trimtab.Doctor`, or anything with its `examine`."""

    def examine(self, run: Run) -> Any:
        """Return a diagnosis: an object whose `findings` have a `to_json`."""


@dataclass(frozen=True)
class Sign:
    """A finding as the report shows it, numbered through the whole report (F1, F2, ...)."""

    number: int
    run: str
    name: str
    severity: str
    first_step: int | None
    last_step: int | None
    modules: tuple[str, ...]
    evidence: Mapping[str, Any]
    cause: str
    remedies: tuple[Any, ...]
    citations: tuple[Any, ...]
    refuted_by: str = ""

    @property
    def tag(self) -> str:
        """The short name that charts and text share."""
        return f"F{self.number}"

    @property
    def signal(self) -> str:
        """The signal that its evidence is on, or an empty string."""
        return str(self.evidence.get("signal", ""))

    @property
    def known(self) -> bool:
        """Whether the name is one of trimtab's fixed names."""
        return self.name in FINDING_NAMES

    @property
    def steps(self) -> str:
        """The range of steps in words."""
        if self.first_step is None:
            return "whole run"
        if self.last_step is None or self.last_step == self.first_step:
            return f"step {self.first_step}"
        return f"steps {self.first_step}\u2013{self.last_step}"


@dataclass(frozen=True)
class Subject:
    """One run of the report."""

    name: str
    run: Run
    tone: int = 0
    signs: tuple[Sign, ...] = ()
    unexamined: tuple[str, ...] = ()
    _cache: dict[str, Series] = field(default_factory=dict, compare=False, repr=False)

    def series(self, signal: str) -> Series:
        """Return one signal, read from the record once."""
        if signal not in self._cache:
            self._cache[signal] = self.run.series(signal)
        return self._cache[signal]

    @property
    def config(self) -> dict[str, Any]:
        """The run's settings."""
        found = self.run.meta.get("config")
        return dict(found) if isinstance(found, Mapping) else {}

    @property
    def environment(self) -> dict[str, Any]:
        """Where the run was made."""
        found = self.run.meta.get("environment")
        return dict(found) if isinstance(found, Mapping) else {}


def subjects(folders: Sequence[str | Path], doctor: Examiner) -> list[Subject]:
    """Open and examine runs; two that share a folder name get their parents' names too.

    Raises:
        RecordError: if one of them is not a readable run.
    """
    runs = [Run(folder) for folder in folders]
    found: list[Subject] = []
    number = 0
    for name, run in zip(_names(runs), runs, strict=True):
        signs: list[Sign] = []
        diagnosis = doctor.examine(run)
        refutes = getattr(diagnosis, "refutes", {})
        for finding in diagnosis.findings:
            number += 1
            data = finding.to_json()
            signs.append(_sign(number, name, data, str(refutes.get(data.get("name"), ""))))
        found.append(Subject(name, run, len(found), tuple(signs), tuple(getattr(diagnosis, "unexamined", ()))))
    return found


def _names(runs: Sequence[Run]) -> list[str]:
    names = [run.name for run in runs]
    short = [_KEY.sub("", name) for name in names]
    names = short if len(set(short)) == len(short) else names
    if len(set(names)) < len(names):
        names = ["/".join(run.folder.resolve().parts[-2:]) for run in runs]
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return unique


def _sign(number: int, run: str, finding: Mapping[str, Any], refuted_by: str) -> Sign:
    severity = str(finding.get("severity", "info"))
    return Sign(
        number=number,
        run=run,
        name=str(finding.get("name", "")),
        severity=severity if severity in SEVERITIES else "info",
        first_step=_step(finding.get("first_step")),
        last_step=_step(finding.get("last_step")),
        modules=tuple(str(module) for module in finding.get("modules") or ()),
        evidence=dict(finding.get("evidence") or {}),
        cause=str(finding.get("cause", "")),
        remedies=tuple(finding.get("remedies") or ()),
        citations=tuple(finding.get("citations") or ()),
        refuted_by=refuted_by,
    )


def _step(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) and value >= 0 else None
