"""output-logit-drift: the output logits wander off to where the softmax loses precision.

Cross-entropy does not change when a constant is added to all logits, and on separable data it always falls a little
when they are scaled up. Nothing holds log Z near 0, so it can grow far beyond what the loss needs.
"""

from __future__ import annotations

import math

from trimtab.diagnose.papers import PALM, PRIETO, WORTSMAN
from trimtab.diagnose.pathology import Match, Pathology, Signals
from trimtab.diagnose.robust import episodes, finite_points, growth, median

SIGNAL = "logits_abs_log_z"
LEVEL = 100.0
"""Ours: at 100 bfloat16 numbers are 0.5 apart. Healthy classifiers and language models stay below 25, modadd-nodecay
reaches 601 at its defaults."""
LEAVE = 50.0
"""Ours: below this the drift is over."""
FACTOR = 5.0
"""Ours: growth over the beginning, so that a pre-trained model with a large log Z is left alone."""
HOLD = 3
"""Samples in a row."""
CRITICAL = 10.0
"""Ours: times LEVEL; bfloat16 numbers are then 4 and more apart, and float32 loses the seventh digit of the loss."""


def rule(signals: Signals) -> Match | None:
    """Fire where mean |log Z| passes LEVEL and FACTOR times its beginning."""
    steps, values = finite_points(signals.series(SIGNAL))
    if len(values) < 2 * HOLD:
        return None
    classes = signals.meta.get("n_classes")
    baseline = max(
        min(float(values[0]), median(values[:HOLD])),
        math.log(classes) if isinstance(classes, int) and classes > 1 else 1.0,
    )
    level = max(LEVEL, FACTOR * baseline)
    found = episodes(values, enter=level, leave=max(LEAVE, 2 * baseline), hold=HOLD)
    if not found or found[-1].ended:
        return None
    first, last = int(steps[found[0].first]), int(steps[found[-1].last])
    value = median(values[found[-1].first : found[-1].last + 1][-HOLD:])
    spacing = 2.0 ** (math.floor(math.log2(value)) - 7)
    evidence: dict[str, float | int | str] = {
        "signal": SIGNAL,
        "value": value,
        "threshold": level,
        "baseline": baseline,
        "ratio": value / baseline,
        "bfloat16_spacing": spacing,
    }
    trend = growth(steps[steps <= last][-60:], values[steps <= last][-60:])
    growing = trend is not None and trend.low > 0
    if growing and trend is not None:
        evidence["doubling_steps"] = math.log(2) / trend.rate
    cause = (
        f"The mean |log Z| of the output softmax drifted from {baseline:.3g} to {value:.4g} "
        f"({value / baseline:.0f}x), past {level:.3g} from step {first} on{', and still grows' if growing else ''}: "
        f"the loss does not hold the scale of the logits, and numbers of this size are {spacing:.2g} apart in "
        "bfloat16, so the softmax loses the differences that it should learn from."
    )
    return Match("critical" if value >= CRITICAL * level else "warning", first, last, (), evidence, cause)


PATHOLOGY = Pathology(
    name="output-logit-drift",
    needs=(SIGNAL,),
    rule=rule,
    citations=(PALM, WORTSMAN, PRIETO),
    refutes=(
        "log Z levels off, or a run with z-loss on the same seed ends no better: then the drift does no harm in "
        "this precision"
    ),
    explains=("softmax-collapse",),
)
