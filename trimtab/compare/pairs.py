"""Paired comparison: the mean difference of two arms on the same seeds, its t interval, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trimtab.errors import UsageError

Verdict = Literal["better", "no evidence", "worse"]

LEVEL = 0.95
"""Confidence level of the intervals."""


@dataclass(frozen=True)
class Paired:
    """The treated arm against the baseline.

    Attributes:
        n: pairs.
        mean: mean of treated - baseline; NaN if a pair is not finite.
        low: lower end of the interval of that mean; -inf where n or the values allow none.
        high: its upper end.
        verdict: `"better"`, `"no evidence"` or `"worse"`.
        level: confidence level of the interval.
    """

    n: int
    mean: float
    low: float
    high: float
    verdict: Verdict
    level: float = LEVEL

    def to_json(self) -> dict[str, Any]:
        """Return plain data; an end that is not finite is None."""
        return {
            "n": self.n,
            "mean": _finite(self.mean),
            "low": _finite(self.low),
            "high": _finite(self.high),
            "verdict": self.verdict,
            "level": self.level,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Paired:
        """Rebuild what `to_json` returned."""
        unbounded = {"mean": math.nan, "low": -math.inf, "high": math.inf}
        ends = {key: value if data[key] is None else float(data[key]) for key, value in unbounded.items()}
        return cls(n=data["n"], verdict=data["verdict"], level=data["level"], **ends)

    def __str__(self) -> str:
        if not math.isfinite(self.low):
            return f"{self.verdict} (n={self.n}, {self.level:.0%} interval unbounded)"
        return f"{self.verdict} (n={self.n}, {self.level:.0%} interval {self.low:+.3g} to {self.high:+.3g})"


def paired(
    baseline: Sequence[float], treated: Sequence[float], *, higher_is_better: bool = False, level: float = LEVEL
) -> Paired:
    """Compare two arms seed by seed with the paired t interval.

    mean(d) ± t(n - 1) · sd(d) / sqrt(n), d = treated - baseline. The verdict is `"better"` or `"worse"` only if the
    interval excludes 0. One pair, or a pair that is not finite, gives no evidence and an unbounded interval: no pair is
    ever dropped. A difference within rounding of its two values counts as 0: equal runs never pass for evidence.

    Args:
        baseline: the baseline's values, one for each seed.
        treated: the treated arm's values on the same seeds, in the same order.
        higher_is_better: whether a larger value is the better one (accuracy).
        level: confidence level.

    Returns:
        The difference, its interval and the verdict.

    Raises:
        UsageError: if the arms have different or no seeds, or the level is not between 0 and 1.

    Example:
        >>> print(paired([2.4, 2.5, 2.3], [1.7, 1.7, 1.6]))
        better (n=3, 95% interval -0.877 to -0.59)
        >>> print(paired([2.4], [1.7]))
        no evidence (n=1, 95% interval unbounded)
    """
    first, second = np.asarray(baseline, dtype=np.float64), np.asarray(treated, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise UsageError(
            f"a paired comparison needs the same seeds in both arms, at least one: got {first.size} and {second.size}."
        )
    if not 0 < level < 1:
        raise UsageError(f"a confidence level is between 0 and 1, got {level}.")
    n = len(first)
    with np.errstate(all="ignore"):
        differences = second - first
        rounding = 4 * np.finfo(np.float64).eps * np.maximum(np.abs(first), np.abs(second))
        differences = np.where(np.isfinite(rounding) & (np.abs(differences) <= rounding), 0.0, differences)
        # The mean of equal numbers is off by a rounding; shifting by the first one makes it exact.
        mean = float(differences[0] + np.mean(differences - differences[0]))
        error = float(np.std(differences, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    if not math.isfinite(mean) or not math.isfinite(error):
        return Paired(n, mean, -math.inf, math.inf, "no evidence", level)
    half = float(_t_quantile((1 + level) / 2, n - 1)) * error
    low, high = mean - half, mean + half
    verdict: Verdict = "no evidence"
    if low > 0 or high < 0:
        verdict = "better" if (low > 0) == higher_is_better else "worse"
    return Paired(n, mean, low, high, verdict, level)


def _t_quantile(probability: float, freedom: int) -> float:
    from scipy.stats import t  # half a second to import, needed only once results are in

    return t.ppf(probability, freedom)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
