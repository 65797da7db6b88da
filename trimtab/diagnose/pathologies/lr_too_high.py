"""lr-too-high: steps so large that the loss rises above its beginning, or never leaves it.

No one sign suffices: large updates are healthy in a warm-up and clipping all the time is healthy in small
transformers. The rule asks for the damage (the loss overshoots its initial value for many steps, or is stuck near it
at the end) together with updates that replace a good part of the weights every step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from trimtab.diagnose.course import Course, ends_broken, loss_course
from trimtab.diagnose.papers import CS231N, SMITH, WORTSMAN
from trimtab.diagnose.pathology import Match, Pathology, Signals
from trimtab.diagnose.robust import finite_points, median

OVERSHOOT = 1.5
"""Ours: times the initial loss; 1.05 at most in healthy runs, 5 and more where the rate is absurd."""
STUCK = 0.2
"""Ours: a loss that ends less than this part below its beginning, and never came below twice that."""
UPDATE = 0.05
"""Ours: 0.013 is the largest median of a tuned run; CS231n's rule of thumb is 1e-3."""
CLIPPED = 0.9
"""Ours: share of steps that are clipped (0.95 in a healthy vision transformer: no sign by itself) ..."""
CLIP = 0.05
"""... by this factor, typically (0.25 there)."""
HOLD = 10
"""Steps above the level (fewer do where the run ends in losses that are not finite)."""
NOISE = 5.0
"""Times the spread of single losses that an overshoot must exceed."""
NOISIEST = 0.5
"""Ours: most noise that is allowed for, as part of the initial loss."""
LOST = 0.5
"""Share of the progress lost again; see loss-divergence."""
SHORTEST = 100
"""Losses before a run can be called stuck: healthy ones stand still through a warm-up."""
NEAR = 20
"""Steps to either side of the damage in which an update counts as its cause."""


class _Damage(NamedTuple):
    """What the loss suffered: since when, until when, how far, beyond what, and in words."""

    first: int
    last: int
    value: float
    threshold: float
    what: str


def rule(signals: Signals) -> Match | None:
    """Fire where the loss overshoots or is stuck while updates are large against the weights."""
    course = loss_course(signals)
    if course is None or course.initial <= 0:
        return None
    damage = _overshoot(course, ends_broken(signals)) or _stuck(course) or _undone(course)
    if damage is None:
        return None
    update = _update(signals, damage.first)
    share, factor = _clipping(signals, damage)
    clipped = share >= CLIPPED and factor <= CLIP
    if update is None and not clipped:
        return None
    evidence: dict[str, float | int | str] = {
        "signal": "loss",
        "value": damage.value,
        "threshold": damage.threshold,
        "baseline": course.initial,
        "ratio": damage.value / course.initial,
    }
    signs = []
    if update is not None:
        evidence |= {"update_ratio": update, "update_ratio_threshold": UPDATE}
        signs.append(f"every step changes the weights by {update:.1%} of their size")
    if clipped:
        evidence |= {"clipped_share": share, "clip_factor": factor}
        signs.append(f"gradients are clipped in {share:.0%} of the steps, by a factor of {factor:.2g}")
    _, rates = finite_points(signals.series("lr"))
    rate = ""
    if len(rates):
        evidence["lr"] = float(rates.max())
        rate = f" of {rates.max():.3g}"
    cause = f"The learning rate{rate} is too high: {damage.what}, while {' and '.join(signs)}."
    critical = course.final >= (1 - STUCK) * course.initial
    return Match("critical" if critical else "warning", damage.first, damage.last, (), evidence, cause)


def _overshoot(course: Course, broken: bool) -> _Damage | None:
    """Return how the smoothed loss rose above its beginning."""
    # A loss that explodes is its own noise, so the allowance for noise is bounded.
    level = OVERSHOOT * course.initial + NOISE * min(course.noise, NOISIEST * course.initial)
    above = np.flatnonzero(course.smooth >= level)
    if len(above) < (course.window if broken else max(HOLD, course.window)):
        return None
    high = float(np.max(course.smooth))
    times = f"{level / course.initial:.3g} times its beginning for {len(above)} steps"
    what = f"the loss rose from {course.initial:.4g} to {high:.4g} and was {times}"
    return _Damage(int(course.steps[above[0]]), int(course.steps[above[-1]]), high, level, what)


def _stuck(course: Course) -> _Damage | None:
    """Return how the loss ends near its beginning."""
    if (
        len(course.losses) < SHORTEST
        or course.final < (1 - STUCK) * course.initial
        or course.best < (1 - 2 * STUCK) * course.initial
    ):
        return None
    what = f"the loss ends at {course.final:.4g}, where it began ({course.initial:.4g})"
    return _Damage(int(course.steps[0]), int(course.steps[-1]), course.final, (1 - STUCK) * course.initial, what)


def _undone(course: Course) -> _Damage | None:
    """Return how the loss had lost its progress again by the end."""
    if course.lost < LOST:
        return None
    level = course.best + LOST * course.progress
    index = int(np.flatnonzero(course.smooth < level)[-1]) + 1
    first = max(0, index - course.window // 2)
    what = f"the loss came down to {course.best:.4g}, lost it again and ended at {course.final:.4g}"
    start = int(course.steps[min(first, len(course.steps) - 1)])
    return _Damage(start, int(course.steps[-1]), course.final, level, what)


def _update(signals: Signals, first: int) -> float | None:
    """Return the update-to-weight ratio, typical or largest about the onset of the damage, if it is beyond UPDATE."""
    series = signals.series("update_ratio_by_module")
    if not len(series):
        return None
    per_step = np.array([median(row) for row in series.values])
    near = per_step[np.abs(series.steps - first) <= NEAR]
    value = max(median(per_step, default=0.0), float(near[np.isfinite(near)].max(initial=0.0)))
    return value if value >= UPDATE else None


def _clipping(signals: Signals, damage: _Damage) -> tuple[float, float]:
    steps, factors = finite_points(signals.series("grad_clip"))
    here = factors[(steps >= damage.first) & (steps <= damage.last)]
    return (float((here < 1).mean()), median(here)) if len(here) else (0.0, 1.0)


PATHOLOGY = Pathology(
    name="lr-too-high",
    needs=("loss",),
    rule=rule,
    citations=(SMITH, WORTSMAN, CS231N),
    explains=(
        "loss-divergence",
        "non-finite",
        "dead-units",
        "output-logit-drift",
        "loss-spike",
        "gradient-spike",
    ),
    refutes="a tenth of the learning rate ends no better: then the model, the data or the loss is at fault",
)
