"""loss-spike: the loss jumps for several steps and then recovers, undoing work each time.

One odd batch is not a spike: the rule looks at the median of five losses, so at least three of five batches must be
high, asks for a jump far outside the noise *and* for a real share of what the run had learned.
"""

from __future__ import annotations

import numpy as np

from trimtab.diagnose.course import loss_course
from trimtab.diagnose.papers import MOLYBOG, OLMO2, SPAM
from trimtab.diagnose.pathology import Match, Pathology, Signals
from trimtab.diagnose.robust import rolling_median, trailing

LEARNED = 0.25
"""Ours: part of the initial loss that must have been learned before there is anything to undo."""
WINDOW = 50
"""Losses that a spike is compared with."""
MEDIAN_OF = 5
"""Losses whose median must be high: three of five batches."""
SIGMAS = 6.0
"""OLMo's monitor calls a loss six standard deviations above its trailing mean a spike."""
SHARE = 0.2
"""Ours: part of what the run had learned that the jump undoes; the smallest kick that mattered undid 0.5."""
RECOVER = 0.5
"""A spike is over once the median sinks below this part of the jump."""


def rule(signals: Signals) -> Match | None:
    """Fire where the median of five losses stands out of the trailing window, and later comes back."""
    course = loss_course(signals)
    if course is None or len(course.losses) < WINDOW + 4 * MEDIAN_OF:
        return None
    five = rolling_median(course.losses, MEDIAN_OF)
    center, width = trailing(course.losses, WINDOW, gap=MEDIAN_OF)
    learned = course.initial - center
    jump = np.maximum(SIGMAS * width, SHARE * learned)
    # Before anything is learned there is nothing to undo: that is the business of lr-too-high.
    jump = np.where(learned > LEARNED * abs(course.initial), jump, np.nan)
    excess = five - center
    peaks: list[tuple[int, int, int]] = []
    start = 0
    while start < len(five):
        above = np.flatnonzero(excess[start:] >= jump[start:])
        if not len(above):
            break
        first = start + int(above[0])
        back = np.flatnonzero(five[first:] < center[first] + RECOVER * jump[first])
        if not len(back):
            break
        last = first + int(back[0]) - 1
        peaks.append((first, last, first + int(np.argmax(five[first : last + 1]))))
        # The trailing window has to forget the spike before the next one can be judged.
        start = last + 1 + MEDIAN_OF
    if not peaks:
        return None
    first, _, top = max(peaks, key=lambda peak: five[peak[2]] - center[peak[0]])
    value, baseline = float(five[top]), float(center[first])
    sigmas = (value - baseline) / width[first] if width[first] > 0 else np.inf
    onset = max(0, peaks[0][0] - MEDIAN_OF // 2)
    evidence: dict[str, float | int | str] = {
        "signal": "loss",
        "value": value,
        "threshold": float(baseline + jump[first]),
        "baseline": baseline,
        "ratio": value / baseline if baseline > 0 else np.inf,
        "sigmas": float(sigmas),
        "spikes": len(peaks),
        "peak_step": int(course.steps[top]),
    }
    cause = (
        f"The loss jumped from {baseline:.4g} to {value:.4g} at step {int(course.steps[top])} and came back; "
        f"{len(peaks)} such spike{'s' * (len(peaks) > 1)} in all. At least three of five batches were high, so a "
        f"step, not a batch, did it: it undid {(value - baseline) / learned[first]:.0%} of what the run had learned."
    )
    return Match("warning", int(course.steps[onset]), int(course.steps[peaks[-1][1]]), (), evidence, cause)


PATHOLOGY = Pathology(
    name="loss-spike",
    needs=("loss",),
    rule=rule,
    citations=(OLMO2, MOLYBOG, SPAM),
    refutes=(
        "the batches of those steps have the same high loss under the weights from before the spike: then it is the "
        "data"
    ),
)
