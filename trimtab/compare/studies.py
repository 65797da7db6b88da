"""Compare the arms of a study on the same seeds: a function in place of a workload, options in place of settings."""

from __future__ import annotations

import importlib
import inspect
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.compare.jobs import Job, Progress, run_jobs
from trimtab.compare.pairs import LEVEL, Paired, paired
from trimtab.compare.store import strict, write_results
from trimtab.compare.training import seed_list
from trimtab.errors import UsageError, choose
from trimtab.workloads.options import Scalar, checked


@dataclass(frozen=True)
class StudyComparison:
    """Two arms of a study, paired over seeds.

    Attributes:
        study: import path of its function.
        seeds: the seeds.
        metric: what is compared.
        higher_is_better: whether more of it is better.
        arms: options of the baseline and of the treated arm, as texts.
        values: for each arm, the metrics of each seed in order, CPU seconds among them.
        pairs: the treated arm's text and its verdict.
    """

    study: str
    seeds: tuple[int, ...]
    metric: str
    higher_is_better: bool
    arms: tuple[str, str]
    values: tuple[tuple[Mapping[str, float], ...], ...]
    pairs: dict[str, Paired]

    def has_signal(self, name: str) -> bool:
        """Whether every run has a metric."""
        return all(name in metrics for arm in self.values for metrics in arm)

    def paired(self, metric: str, *, higher_is_better: bool = False) -> dict[str, Paired]:
        """Compare another metric of the same runs."""
        baseline, treated = ([metrics[metric] for metrics in arm] for arm in self.values)
        return {self.arms[1]: paired(baseline, treated, higher_is_better=higher_is_better)}

    def mean(self, arm: int, metric: str) -> float:
        """Return the mean of a metric over the seeds of one arm."""
        return statistics.fmean(metrics[metric] for metrics in self.values[arm])

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as strict JSON data."""
        arms = [
            {"label": arm, "runs": [dict(run) for run in runs]}
            for arm, runs in zip(self.arms, self.values, strict=True)
        ]
        pairs = [{"arm": label, "baseline": self.arms[0], **pair.to_json()} for label, pair in self.pairs.items()]
        return strict(
            {
                "study": self.study,
                "metric": self.metric,
                "higher_is_better": self.higher_is_better,
                "level": LEVEL,
                "seeds": self.seeds,
                "arms": arms,
                "pairs": pairs,
            }
        )


def study_function(path: str) -> Callable[..., Mapping[str, float]]:
    """Return the function of a study.

    Raises:
        UsageError: if there is no such function, or it takes no `seed`.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except (ImportError, TypeError, ValueError) as error:  # the others of a path such as "" or ".x"
        raise UsageError(f"the study {path!r} cannot be imported: {error}.") from error
    if not callable(function) or "seed" not in inspect.signature(function).parameters:
        raise UsageError(f"the study {path!r} is no function of a seed.")
    return function


def study_options(path: str, text: str) -> dict[str, Scalar]:
    """Return the options that an arm of a study gives, such as `"loss=dpo,beta=0.1"`, each in its own type.

    Raises:
        UsageError: if the text is no list of options, or the study has no such option.
    """
    parameters = dict(inspect.signature(study_function(path)).parameters)
    del parameters["seed"]
    parts = [part.partition("=") for part in text.split(",") if part.strip()]
    if wrong := next((name for name, equals, _ in parts if not equals), None):
        raise UsageError(f"an option of a study is NAME=VALUE, got {wrong!r}.")
    return dict(checked(path.partition(":")[2], [(name.strip(), value) for name, _, value in parts], parameters))


def compare_study(
    study: str,
    arms: tuple[str, str],
    *,
    folder: str | Path,
    metric: str,
    higher_is_better: bool = False,
    seeds: int | Sequence[int] = 5,
    workers: int = 2,
    results: str = "study.json",
    progress: Callable[[Progress], None] | None = None,
) -> StudyComparison:
    """Run both arms of a study on every seed and compare them; finished runs in `folder` are not repeated.

    Args:
        study: import path of its function.
        arms: options of the baseline and of the treated arm, as texts.
        folder: where runs and results go.
        metric: what is compared.
        higher_is_better: whether more of it is better.
        seeds: how many pairs, or which seeds.
        workers: processes.
        results: name of the result file in the folder.
        progress: called as runs finish.

    Raises:
        UsageError: if the study, its options or the metric do not exist, or both arms are the same.
        RunFailedError: if runs failed.
        RecordError: if the folder cannot be written.
    """
    options = [study_options(study, arm) for arm in arms]
    parameters = inspect.signature(study_function(study)).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    if {**defaults, **options[0]} == {**defaults, **options[1]}:
        raise UsageError(f"arms {arms[0]!r} and {arms[1]!r} of {study} are the same: give two different ones.")
    chosen = seed_list(seeds)
    # Seeds outside, arms inside: whatever is finished when time runs out is paired.
    jobs = [_job(study, seed, given) for seed in chosen for given in options]
    runs = run_jobs(jobs, folder, workers=workers, progress=progress)
    values = (tuple(runs[::2]), tuple(runs[1::2]))
    choose("metric", metric, set.intersection(*(set(run) for run in runs)))
    unpaired = StudyComparison(study, chosen, metric, higher_is_better, arms, values, {})
    pairs = unpaired.paired(metric, higher_is_better=higher_is_better)
    found = StudyComparison(study, chosen, metric, higher_is_better, arms, values, pairs)
    write_results(Path(folder) / results, "study", found.to_json())
    return found


def _job(study: str, seed: int, options: Mapping[str, Scalar]) -> Job:
    words = "-".join([study.partition(":")[2], *(f"{key}{value}" for key, value in options.items()), f"seed{seed}"])
    return Job("trimtab.studies.running:run", {"study": study, "seed": seed, "options": dict(options)}, words)
