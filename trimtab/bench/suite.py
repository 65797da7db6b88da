"""The suite: seven small training jobs, each there for one thing that optimizers differ in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trimtab.errors import choose
from trimtab.workloads import Settings
from trimtab.workloads.workload import workload

_QUICK = 10
"""By how much the quick profile shortens every run."""


@dataclass(frozen=True)
class Task:
    """A workload with a budget of steps and what counts at its end.

    Attributes:
        name: its name in the suite.
        workload: the workload's name.
        shows: what it is there for, in words.
        changes: settings that differ from the workload's own; the schedule is a cosine to 0 everywhere.
        evaluations: evaluations along a run, evenly spaced: the times to a target are read from them.
        metric: `"loss"` or `"accuracy"`, on held-out data at the end of the schedule.
        decays: whether weight decay is part of the search space.
        learned: what the metric must have reached for a time to it to mean anything: for a loss a share of the one at
            initialisation, for an accuracy its value.
        enough: the value at which a task counts as solved: times are to it where both arms get there, as above it
            a metric at its ceiling only measures noise. None where there is no such value.
    """

    name: str
    workload: str
    shows: str
    changes: Mapping[str, Any]
    evaluations: int
    metric: Literal["loss", "accuracy"] = "loss"
    decays: bool = True
    learned: float = 0.95
    enough: float | None = None

    def evaluated(self, *, quick: bool = False) -> int:
        """Return the evaluations along a run."""
        return min(2, self.evaluations) if quick else self.evaluations

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the metric is better."""
        return self.metric == "accuracy"

    def settings(self, *, quick: bool = False) -> Settings:
        """Return the task's settings, before an arm changes them.

        Args:
            quick: whether the run is shortened to a tenth, to try the machinery out.

        Example:
            >>> task("grokking").settings().steps, task("grokking").settings(quick=True).steps
            (600, 60)
        """
        found = workload(self.workload).defaults.replace(schedule="cosine", **self.changes)
        return found.replace(steps=max(1, found.steps // _QUICK)) if quick else found

    def target(self, value: float) -> float:
        """Return the level that a median final value sets as a target: the value itself, or what is enough."""
        return min(value, self.enough) if self.enough is not None else value

    def has_learned(self, value: float, initial: float) -> bool:
        """Return whether a final value is one that time to it can be asked for."""
        return value >= self.learned if self.higher_is_better else value <= self.learned * initial


SUITE: tuple[Task, ...] = (
    Task(
        "attention-growth",
        "lm-small",
        "attention logits grow with the learning rate (Wortsman et al. 2023)",
        {"width": 32, "depth": 2, "batch_size": 8, "steps": 240},
        evaluations=6,
    ),
    Task(
        "heavy-tailed",
        "lm-zipf",
        "most classes are rare, where gradient descent is slow and Adam is not (Kunstner et al. 2024)",
        {"steps": 200},
        evaluations=10,
    ),
    Task(
        "grokking",
        "modadd",
        "the training set is fitted early; held-out accuracy follows late, or not within the budget",
        {"width": 128, "batch_size": 512, "steps": 600},
        evaluations=20,
        metric="accuracy",
        learned=0.5,
        enough=0.95,
    ),
    Task(
        "softmax-collapse",
        "modadd-nodecay",
        "without weight decay logits drift until the softmax saturates (Prieto et al. 2025)",
        {"width": 128, "batch_size": 512, "steps": 600},
        evaluations=20,
        metric="accuracy",
        decays=False,
        learned=0.5,
        enough=0.95,
    ),
    Task("digits-vit", "digits-vit", "a small vision transformer", {"batch_size": 32, "steps": 300}, evaluations=10),
    Task("digits-cnn", "digits-cnn", "convolutions with batch normalisation", {"steps": 200}, evaluations=10),
    Task("digits-mlp", "digits-mlp", "a plain ReLU network", {"steps": 300}, evaluations=10),
)


def task(name: str) -> Task:
    """Return a task of the suite.

    Raises:
        UsageError: if there is none of that name.
    """
    return next(found for found in SUITE if found.name == choose("task", name, [found.name for found in SUITE]))


def tasks(names: Sequence[str] | None = None) -> tuple[Task, ...]:
    """Return the tasks of these names in the suite's order, or all.

    Raises:
        UsageError: if there is none of a name.
    """
    if names is None:
        return SUITE
    chosen = {task(name).name for name in names}
    return tuple(found for found in SUITE if found.name in chosen)
