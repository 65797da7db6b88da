"""Holm's correction over tasks, and the bootstrap interval of a geometric mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from trimtab.compare import Paired
from trimtab.errors import UsageError

RESAMPLES = 2000
LEVEL = 0.95


def p_value(pair: Paired) -> float:
    """Return the two-sided p of a paired t test, read from its mean and interval; 1 where there is no evidence to test.

    Example:
        >>> from trimtab.compare import paired
        >>> round(p_value(paired([1.0, 2.0, 3.0], [1.5, 2.6, 3.4])), 4)
        0.0131
    """
    from scipy.stats import t  # half a second to import, needed only once results are in

    if not math.isfinite(pair.low):
        return 1.0
    freedom = pair.n - 1
    error = (pair.high - pair.low) / 2 / float(t.ppf((1 + pair.level) / 2, freedom))
    if not error:
        return 0.0 if pair.mean else 1.0
    return float(2 * t.sf(abs(pair.mean) / error, freedom))


def holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number by Holm's step-down rule.

    With p sorted ascending, p'_(i) = max over j <= i of min(1, (m - j + 1) p_(j)), i and j counted from 1: the chance
    that any of the m true null hypotheses is rejected stays below the level.

    Args:
        values: in [0, 1].

    Returns:
        Corrected values, in the order given.

    Raises:
        UsageError: if a value is not in [0, 1].

    Example:
        >>> [round(value, 3) for value in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]

    References:
        Holm 1979, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6.
    """
    if not all(0 <= value <= 1 for value in values):
        raise UsageError(f"p values are between 0 and 1, got {list(values)}.")
    corrected = [0.0] * len(values)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(values)), key=lambda at: values[at])):
        largest = max(largest, min(1.0, (len(values) - place) * values[index]))
        corrected[index] = largest
    return corrected


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of positive numbers; NaN of none.

    Example:
        >>> geometric_mean([0.5, 2.0])
        1.0
    """
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else math.nan


def bootstrap(
    draws: Sequence[Sequence[float]],
    generator: np.random.Generator,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Return the percentile interval of a geometric mean over tasks, resampled over tasks and over seeds.

    Each resample takes as many tasks as there are, with replacement, and one draw of each: the interval is about tasks
    like these, not about these alone.

    Args:
        draws: for each task, values above 0 from resampled seeds.
        generator: the source of every choice.
        resamples: how many.
        level: of the interval, in (0, 1).

    Returns:
        Its ends; NaN without tasks.

    Example:
        >>> bootstrap([[2.0, 2.0], [2.0, 2.0]], np.random.default_rng(0), resamples=10)
        (2.0, 2.0)
    """
    if not draws:
        return math.nan, math.nan
    logs = np.log(np.asarray(draws, dtype=np.float64))
    tasks = generator.integers(len(logs), size=(resamples, len(logs)))
    columns = generator.integers(logs.shape[1], size=tasks.shape)
    means = np.exp(logs[tasks, columns].mean(1))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
