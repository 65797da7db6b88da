"""Compare arms of a workload on the same seeds: same initialisation, same batches, one verdict for each treated arm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.compare.arm import Arm
from trimtab.compare.jobs import Progress
from trimtab.compare.pairs import LEVEL, Paired, paired
from trimtab.compare.store import strict, write_results
from trimtab.compare.training import final_loss, outcome_json, prepared, run_all, seed_list, training_job
from trimtab.errors import UsageError
from trimtab.workloads import Outcome

RESULTS = "comparison.json"


@dataclass(frozen=True)
class ArmResult:
    """An arm and its outcomes, one for each seed in order."""

    arm: Arm
    outcomes: tuple[Outcome, ...]

    def values(self, metric: str, *, higher_is_better: bool = False) -> list[float]:
        """Return a metric for each seed.

        The loss of a run that diverged, or ended above where it began, is the one at initialisation. Any other metric
        of a diverged run is the worst there is, 0 where higher is better, else infinite: no run is dropped.

        Raises:
            UsageError: if the runs have no such metric.
        """
        return [_value(outcome, metric, higher_is_better) for outcome in self.outcomes]

    @property
    def diverged(self) -> int:
        """How many runs diverged."""
        return sum(outcome.diverged for outcome in self.outcomes)

    @property
    def cpu_ms_per_step(self) -> float:
        """CPU time of a watched training step, in milliseconds: the median over seeds, as other work disturbs it."""
        return 1000 * statistics.median(outcome.cpu_seconds_per_step for outcome in self.outcomes)

    @property
    def mechanism(self) -> dict[str, float]:
        """The mean over seeds of each explaining signal's worst value; those that every run has."""
        names = set.intersection(*(set(outcome.mechanism) for outcome in self.outcomes))
        return {name: statistics.fmean(outcome.mechanism[name] for outcome in self.outcomes) for name in sorted(names)}


@dataclass(frozen=True)
class Comparison:
    """Arms of one workload, paired over seeds; the first arm is the baseline.

    Attributes:
        workload: its name.
        seeds: the seeds.
        metric: what is compared.
        higher_is_better: whether more of it is better.
        results: arms with their outcomes.
        pairs: each treated arm's label and its verdict against the baseline.
    """

    workload: str
    seeds: tuple[int, ...]
    metric: str
    higher_is_better: bool
    results: tuple[ArmResult, ...]
    pairs: dict[str, Paired]

    @property
    def baseline(self) -> ArmResult:
        """The first arm."""
        return self.results[0]

    def paired(self, metric: str, *, higher_is_better: bool = False) -> dict[str, Paired]:
        """Compare another metric of the same runs, such as `"attention_max_logit"`."""
        first = self.baseline.values(metric, higher_is_better=higher_is_better)
        return {
            result.arm.label: paired(
                first,
                result.values(metric, higher_is_better=higher_is_better),
                higher_is_better=higher_is_better,
            )
            for result in self.results[1:]
        }

    def has_signal(self, name: str) -> bool:
        """Whether every run recorded a signal: a loss that is no cross-entropy has no softmax to look at."""
        return all(name in outcome.mechanism for result in self.results for outcome in result.outcomes)

    @property
    def runs(self) -> list[Path]:
        """The folders of all runs, arm by arm."""
        return [Path(outcome.folder) for result in self.results for outcome in result.outcomes if outcome.folder]

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as strict JSON data."""
        arms = [
            {
                "label": result.arm.label,
                "settings": result.arm.settings.model_dump(mode="json", exclude={"seed"}),
                "values": (values := result.values(self.metric, higher_is_better=self.higher_is_better)),
                "mean": statistics.fmean(values),
                "diverged": result.diverged,
                "cpu_ms_per_step": result.cpu_ms_per_step,
                "mechanism": result.mechanism,
                "outcomes": [outcome_json(outcome) for outcome in result.outcomes],
            }
            for result in self.results
        ]
        pairs = [
            {"arm": label, "baseline": self.baseline.arm.label, **pair.to_json()} for label, pair in self.pairs.items()
        ]
        return strict(
            {
                "workload": self.workload,
                "metric": self.metric,
                "higher_is_better": self.higher_is_better,
                "level": LEVEL,
                "seeds": self.seeds,
                "baseline": self.baseline.arm.label,
                "arms": arms,
                "pairs": pairs,
            }
        )


def compare(
    workload: str,
    arms: Sequence[Arm | str],
    *,
    folder: str | Path,
    seeds: int | Sequence[int] = 5,
    steps: int | None = None,
    workers: int = 2,
    metric: str = "loss",
    higher_is_better: bool = False,
    text: str | Path | None = None,
    results: str = RESULTS,
    progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """Train every arm on every seed and compare each with the first one.

    Runs that are already in `folder` are not repeated. The result is also written there, to `comparison.json`.

    Args:
        workload: a workload's name.
        arms: arms, or their texts (`"adamw,lr=3e-2,with=qk-norm"`); the first is the baseline.
        folder: where runs and results go.
        seeds: how many pairs, or which seeds.
        steps: training steps of arms given as texts, instead of the workload's own.
        workers: processes.
        metric: `"loss"`, another test metric (`"accuracy"`), or a signal that explains (`"attention_max_logit"`).
        higher_is_better: whether more of the metric is better.
        text: a file or folder of text for language models.
        results: name of the result file in the folder.
        progress: called as steps and runs finish.

    Returns:
        The comparison.

    Raises:
        UsageError: if the arms, seeds, metric or workload are not usable.
        RunFailedError: if runs failed.
        RecordError: if the folder cannot be written.

    Example:
        >>> import tempfile
        >>> arms = ["lr=0.001", "lr=0.002"]
        >>> result = compare("digits-mlp", arms, folder=tempfile.mkdtemp(), seeds=1, steps=5, workers=1)
        >>> print(result.pairs["lr=0.002"])
        no evidence (n=1, 95% interval unbounded)
    """
    home = Path(folder)
    job_of = prepared(workload, text)
    defaults = job_of.defaults if steps is None else job_of.defaults.replace(steps=steps)
    parsed = [arm if isinstance(arm, Arm) else Arm.parse(arm, defaults) for arm in arms]
    labels = [arm.label for arm in parsed]
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise UsageError(
            f"a comparison needs two or more different arms, got {', '.join(map(repr, labels)) or 'none'}."
        )
    for arm in parsed:
        arm.check(job_of)
    chosen = seed_list(seeds)
    # Seeds outside, arms inside: whatever is finished when time runs out is paired.
    jobs = [training_job(job_of, arm.settings.replace(seed=seed), text) for seed in chosen for arm in parsed]
    outcomes = run_all(jobs, home, workers=workers, progress=progress)
    found = tuple(ArmResult(arm, tuple(outcomes[place :: len(parsed)])) for place, arm in enumerate(parsed))
    unpaired = Comparison(workload, chosen, metric, higher_is_better, found, {})
    pairs = unpaired.paired(metric, higher_is_better=higher_is_better)
    comparison = Comparison(workload, chosen, metric, higher_is_better, found, pairs)
    write_results(home / results, "comparison", comparison.to_json())
    return comparison


def _value(outcome: Outcome, metric: str, higher_is_better: bool) -> float:
    if metric == "loss":
        return final_loss(outcome)
    if metric in outcome.mechanism:
        return outcome.mechanism[metric]
    if outcome.diverged:
        return 0.0 if higher_is_better else math.inf
    if metric in outcome.metrics:
        return outcome.metrics[metric]
    known = sorted({"loss", *outcome.metrics, *outcome.mechanism})
    raise UsageError(f"runs of {outcome.workload} have no metric {metric!r}. Valid: {', '.join(known)}.")
