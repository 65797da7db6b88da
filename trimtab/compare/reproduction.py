"""Run a Card's claims again: each experiment as a paired comparison, with the mechanism's own metric beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.card import Card, Experiment
from trimtab.compare.arm import Arm
from trimtab.compare.comparison import Comparison, compare
from trimtab.compare.jobs import Progress
from trimtab.compare.pairs import Paired
from trimtab.compare.store import write_results
from trimtab.compare.studies import StudyComparison, compare_study
from trimtab.compare.training import prepared
from trimtab.errors import UsageError

RESULTS = "reproduction.json"


@dataclass(frozen=True)
class Reproduction:
    """One experiment and what came out this time.

    Attributes:
        experiment: as the Card states it.
        comparison: the paired runs.
        mechanism: the mechanism's metric, treated against baseline (lower counts as better), or None where the Card
            names none or an arm does not record it.
    """

    experiment: Experiment
    comparison: Comparison | StudyComparison
    mechanism: Paired | None

    @property
    def verdict(self) -> Paired:
        """The treated arm against the baseline."""
        return next(iter(self.comparison.pairs.values()))

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "experiment": vars(self.experiment).copy(),
            "verdict": self.verdict.to_json(),
            "mechanism": None if self.mechanism is None else self.mechanism.to_json(),
            "comparison": self.comparison.to_json(),
        }


def reproduce(
    card: Card,
    *,
    folder: str | Path,
    seeds: int | None = None,
    workers: int = 2,
    progress: Callable[[Progress], None] | None = None,
) -> list[Reproduction]:
    """Run every experiment of a Card; runs that are already in `folder` are not repeated.

    Args:
        card: the method's Card.
        folder: where runs and results (`reproduction.json`) go.
        seeds: pairs, instead of the number that each experiment states.
        workers: processes.
        progress: called as steps and runs finish.

    Returns:
        One result for each experiment, in the Card's order.

    Raises:
        UsageError: if the Card has no experiment.
        RunFailedError: if runs failed.
        RecordError: if the folder cannot be written.
    """
    if not card.experiments:
        raise UsageError(f"the card of {card.name} states no experiment: there is nothing to reproduce.")
    found = []
    for number, experiment in enumerate(card.experiments):
        comparison = _run(
            experiment,
            folder=folder,
            results=f"experiment-{number + 1}.json",
            seeds=experiment.seeds if seeds is None else seeds,
            workers=workers,
            metric=experiment.metric,
            higher_is_better=experiment.higher_is_better,
            progress=progress,
        )
        mechanism = None
        if experiment.mechanism and comparison.has_signal(experiment.mechanism):
            mechanism = comparison.paired(experiment.mechanism)[experiment.treated]
        found.append(Reproduction(experiment, comparison, mechanism))
    results = {"method": card.name, "results": [entry.to_json() for entry in found]}
    write_results(Path(folder) / RESULTS, "reproduction", results)
    return found


def _run(experiment: Experiment, **options: Any) -> Comparison | StudyComparison:
    if experiment.is_study:
        return compare_study(experiment.workload, (experiment.baseline, experiment.treated), **options)
    defaults = prepared(experiment.workload).defaults
    arms = [Arm.parse(experiment.baseline, defaults), Arm.parse(experiment.treated, defaults)]
    return compare(experiment.workload, arms, **options)
