"""How much sooner: steps to a level that both arms reach, on the median curve over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from trimtab.bench.runs import Ended
from trimtab.bench.suite import Task

CREDIBLE = (1.0, 1.4)
"""Speed-ups over a tuned AdamW that the literature's fair comparisons find (Wen et al. 2025; Dahl et al. 2023)."""


def median_curve(runs: Sequence[Ended]) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and the median over seeds of the metric there; at the end, of the values that count.

    Example:
        >>> run = Ended(0, 0.5, 0.5, 2.0, False, (0, 5, 10), (2.0, 1.0, 0.5), 0.001, {})
        >>> median_curve([run])[1].tolist()
        [2.0, 1.0, 0.5]
    """
    return np.array(runs[0].steps, dtype=np.float64), np.median(_courses(runs), axis=0)


def time_to(steps: np.ndarray, curve: np.ndarray, target: float, *, higher_is_better: bool = False) -> float:
    """Return the step at which a curve first reaches a target, between evaluations by straight lines; inf if never.

    Args:
        steps: [N], ascending.
        curve: [N].
        target: the level.
        higher_is_better: whether it is reached from below.

    Example:
        >>> time_to(np.array([0.0, 10.0, 20.0]), np.array([3.0, 2.0, 1.0]), 1.5)
        15.0
    """
    sign = -1.0 if higher_is_better else 1.0
    above = sign * curve - sign * target
    reached = np.flatnonzero(above <= 0)
    if not len(reached):
        return math.inf
    place = int(reached[0])
    if not place:
        return float(steps[0])
    before, after = float(above[place - 1]), float(above[place])
    share = before / (before - after)
    return float(steps[place - 1] + share * (steps[place] - steps[place - 1]))


def speed_up(task: Task, reference: Sequence[Ended], treated: Sequence[Ended]) -> float:
    """Return how many times fewer steps the treated arm needs than the reference, to a level that both reach.

    That level is the worse of the two median final values. One arm reaches it at the end of the budget S, by
    definition, the other at some step before:

        S / T_treated(reference's final value)     if the treated arm ends at least as well,
        T_reference(treated's final value) / S     otherwise,

    with T the first step on the median curve. Both cases read alike, so that two equal arms are as likely to come out
    above 1 as below, and an arm that never gets there is neither dropped nor infinitely slow. Where both solve the task
    (`Task.enough`), it is the ratio of the times to that level. A time counts as at least the first evaluation's.

    Args:
        task: whose metric it is.
        reference: its runs, one for each seed.
        treated: the other arm's, with evaluations at the same steps.

    Example:
        >>> from trimtab.bench import task
        >>> slow = Ended(0, 1.0, 1.0, 3.0, False, (0, 10, 20), (3.0, 2.0, 1.0), 0.001, {})
        >>> fast = Ended(0, 0.5, 0.5, 3.0, False, (0, 10, 20), (3.0, 1.0, 0.5), 0.001, {})
        >>> speed_up(task("digits-mlp"), [slow], [fast]), speed_up(task("digits-mlp"), [fast], [slow])
        (2.0, 0.5)
    """
    steps, base = median_curve(reference)
    _, other = median_curve(treated)
    return _ratio(task, steps, base, other)


def resampled(
    task: Task, reference: Sequence[Ended], treated: Sequence[Ended], generator: np.random.Generator, count: int
) -> list[float]:
    """Return the speed-ups of `count` pairs of arms whose seeds are drawn with replacement."""
    steps, _ = median_curve(reference)
    base, other = (
        np.median(courses[generator.integers(len(courses), size=(count, len(courses)))], axis=1)
        for courses in (_courses(reference), _courses(treated))
    )
    return [_ratio(task, steps, *pair) for pair in zip(base, other, strict=True)]


def _courses(runs: Sequence[Ended]) -> np.ndarray:
    """Return the metric at each evaluation, [seeds, evaluations], with the value that counts at the end."""
    return np.array([[*run.course[:-1], run.value] for run in runs])


def _ratio(task: Task, steps: np.ndarray, base: np.ndarray, other: np.ndarray) -> float:
    """Return the speed-up between two median curves."""
    total, first = float(steps[-1]), float(steps[1])
    sign = -1.0 if task.higher_is_better else 1.0

    def time(curve: np.ndarray, level: float) -> float:
        return max(first, time_to(steps, curve, level, higher_is_better=task.higher_is_better))

    worse = sign * max(sign * float(base[-1]), sign * float(other[-1]))
    level = task.target(worse)
    if level != worse:
        return time(base, level) / time(other, level)
    if sign * float(other[-1]) <= sign * float(base[-1]):
        return total / time(other, level)
    return time(base, level) / total
