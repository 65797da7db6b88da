"""Performance profiles: the share of tasks on which a contender is within a factor tau of the fastest.

    r(task, contender) = t(task, contender) / min over contenders of t(task, .)
    rho(tau) = share of tasks with r <= tau

t is the time to the task's target, infinite where it is never reached. The benchmark score is the mean of rho over tau
from 1 to 4. Dolan and Moré 2002 (arXiv:cs/0102001); Dahl et al. 2023 (arXiv:2306.07179).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

TAU_MAX = 4.0


def ratios(times: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return each contender's time on each task relative to the fastest there; infinite where it does not arrive.

    Args:
        times: by contender and task, above 0; infinite where the target is never reached. A task that a contender does
            not have counts as one that it never reaches.

    Returns:
        By contender and task. Tasks on which nobody arrives are left out.

    Example:
        >>> ratios({"a": {"x": 2.0}, "b": {"x": 3.0}})
        {'a': {'x': 1.0}, 'b': {'x': 1.5}}
    """
    names = list(dict.fromkeys(task for own in times.values() for task in own))
    best = {task: min(own.get(task, math.inf) for own in times.values()) for task in names}
    return {
        label: {task: own.get(task, math.inf) / best[task] for task in names if math.isfinite(best[task])}
        for label, own in times.items()
    }


def share_within(own: Mapping[str, float], tau: float) -> float:
    """Return rho(tau): the share of tasks whose ratio is at most tau; NaN without tasks.

    Example:
        >>> share_within({"x": 1.0, "y": 2.0}, 1.5)
        0.5
    """
    return sum(ratio <= tau for ratio in own.values()) / len(own) if own else math.nan


def score(own: Mapping[str, float], *, tau_max: float = TAU_MAX) -> float:
    """Return the mean of rho over tau in [1, tau_max], exactly; NaN without tasks.

    A task with ratio r adds the part of the range in which it counts, (tau_max - r) / (tau_max - 1).

    Example:
        >>> score({"x": 1.0, "y": 2.5})
        0.75
    """
    if not own:
        return math.nan
    return sum(max(0.0, tau_max - ratio) for ratio in own.values()) / (tau_max - 1) / len(own)


def steps_of(own: Sequence[float], *, tau_max: float = TAU_MAX) -> list[tuple[float, float]]:
    """Return the corners (tau, rho) of a profile from 1 to tau_max, ascending: each starts a level.

    Example:
        >>> steps_of([1.0, 2.0])
        [(1.0, 0.5), (2.0, 1.0), (4.0, 1.0)]
    """
    if not own:
        return []
    inside = sorted({1.0, *(ratio for ratio in own if ratio <= tau_max)})
    corners = [(tau, sum(ratio <= tau for ratio in own) / len(own)) for tau in inside]
    return [*corners, (tau_max, corners[-1][1])] if corners[-1][0] < tau_max else corners
