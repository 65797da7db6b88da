"""What the convex bound of a schedule is good for: cooldown lengths, longer runs, rates for other schedules.

With gamma* the base learning rate of the least bound (`optimal_base_lr`), Schaipp et al. 2025 (arXiv:2501.18965)

    transfer a tuned rate to another schedule:    gamma <- gamma gamma*(target) / gamma*(source)
    extend a run and keep its rate:               the cooldown c, or the factor rho of a second stage, for which
                                                  gamma* of the longer run = gamma* of the shorter one

None of these depends on D, nor on G as long as it is constant: they need nothing but the schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from trimtab.errors import UsageError
from trimtab.schedule._shape import Shape, whole
from trimtab.schedule.convex_bound import Schedule, TunedRate, above, optimal_base_lr, suboptimality_bound
from trimtab.schedule.wsd_decay import WSD, wsd

__all__ = ["Cooldown", "best_cooldown", "extended_cooldown", "second_stage_factor", "transferred_base_lr"]

_SHARES = tuple(hundredth / 100 for hundredth in range(5, 101))
"""Candidates for cooldown lengths, as shares of the run, and for rho."""


class Cooldown(NamedTuple):
    """A length of the cooldown in steps, the base learning rate that goes with it, and their bound."""

    decay: int
    gamma: float
    bound: float


def transferred_base_lr(gamma: float, source: Schedule, target: Schedule) -> float:
    """Return the base learning rate for another schedule: gamma times gamma*(target) / gamma*(source).

    The ratio does not depend on D, nor on G as long as it is constant. The schedules may differ in form and length.

    Args:
        gamma: the best rate found with `source`, above 0.
        source: the schedule it was found with.
        target: the schedule to run.

    Returns:
        The rate for `target`.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> from trimtab.schedule import linear, wsd
        >>> round(transferred_base_lr(1e-3, wsd(4000, decay=800, form="linear"), linear(4000)), 5)
        0.00195
    """
    return above("gamma", gamma) * optimal_base_lr(target).gamma / optimal_base_lr(source).gamma


def best_cooldown(
    T: int, *, gamma: float | None = None, form: str = "linear", G: float | Sequence[float] = 1.0, D: float = 1.0
) -> Cooldown:
    """Return the length of the cooldown of WSD with the least bound, among hundredths of the run from 5 % up.

    Args:
        T: steps in all, at least 2.
        gamma: base learning rate that is kept; by default each length gets its own gamma*, and then a cooldown over the
            whole run is best, or nearly so.
        form: of the cooldown, as for `wsd`; "exponential" has no end at 0.
        G: norms of the gradients: one for all steps, or one each.
        D: distance to the minimiser at the start, above 0.

    Returns:
        The cooldown, the rate and the bound.

    Raises:
        UsageError: if an argument breaks its rule.
    """
    found = []
    for decay in _lengths(T):
        shape = wsd(T, decay=decay, form=form)
        rate = optimal_base_lr(shape, G=G, D=D) if gamma is None else None
        kept = gamma if gamma is not None else 0.0
        at = rate or TunedRate(kept, suboptimality_bound(shape, kept, G=G, D=D))
        found.append(Cooldown(decay, at.gamma, at.bound))
    return min(found, key=lambda cooldown: cooldown.bound)


def extended_cooldown(schedule: WSD, T: int) -> Cooldown:
    """Return the cooldown that lets a longer run keep the base learning rate that was best for a shorter one.

    A longer run wants a smaller rate, a longer cooldown a larger one: of all hundredths of the longer run, the length
    is chosen whose gamma* is nearest to the schedule's own. The stable phase so far is then not wasted.

    Args:
        schedule: the WSD schedule of the shorter run.
        T: steps of the longer run, more than the schedule's.

    Returns:
        The cooldown, and its gamma* and bound for D = G = 1: how near gamma* is to the schedule's shows the match.

    Raises:
        UsageError: if the schedule is no WSD or the run is not longer.

    Example:
        >>> short = wsd(400, decay=80, form="linear")
        >>> extended_cooldown(short, 800).decay / 800
        0.62
    """
    facts = _extension(schedule, T)
    own = optimal_base_lr(schedule).gamma

    def at(decay: int) -> Shape:
        return wsd(T, warmup=facts["warmup"], decay=decay, form=facts["form"], floor=facts["floor"])

    fitting = [decay for decay in _lengths(T) if decay + facts["warmup"] <= T]
    decay, tuned = _nearest(own, fitting, at)
    return Cooldown(round(decay), tuned.gamma, tuned.bound)


def second_stage_factor(schedule: WSD, T: int) -> float:
    """Return rho, by which the rate is lowered where the shorter run would have cooled down, to go on until T.

    The longer run is the schedule's stable phase at 1, a second stage at rho, and a cooldown from rho with the form and
    share of steps of the shorter one. Of all hundredths, the rho is chosen with which the best base learning rate is
    the schedule's own.

    Args:
        schedule: the WSD schedule of the shorter run.
        T: steps of the longer run, more than the schedule's.

    Returns:
        The factor, in (0, 1].

    Raises:
        UsageError: if the schedule is no WSD or the run is not longer.

    Example:
        >>> second_stage_factor(wsd(400, decay=80, form="linear"), 800)
        0.54
    """
    facts = _extension(schedule, T)
    first = facts["total"] - facts["decay"]
    cooled = round(facts["decay"] / facts["total"] * T)
    longer = wsd(T, warmup=facts["warmup"], decay=cooled, form=facts["form"], floor=facts["floor"])
    eta = np.array([longer(step) for step in range(T)])

    def at(rho: float) -> np.ndarray:
        return np.concatenate([eta[:first], rho * eta[first:]])

    rho, _ = _nearest(optimal_base_lr(schedule).gamma, _SHARES, at)
    return rho


def _nearest(gamma: float, trials: Sequence[float], at: Callable[[Any], Schedule]) -> tuple[float, TunedRate]:
    """Return the trial whose gamma* is nearest to a given one, as the authors' code chooses it."""
    tuned = [(trial, optimal_base_lr(at(trial))) for trial in trials]
    return min(tuned, key=lambda pair: abs(pair[1].gamma - gamma))


def _lengths(T: int) -> list[int]:
    return sorted({max(1, round(share * whole("T", T, 2))) for share in _SHARES})


def _extension(schedule: Any, T: int) -> dict[str, Any]:
    if not isinstance(schedule, WSD):
        raise UsageError(f"a schedule made by wsd can be extended, got {type(schedule).__name__}.")
    if whole("T", T) <= (schedule.total or 0):
        raise UsageError(f"T must be more than the schedule's {schedule.total} steps, got {T}.")
    return dict(schedule.facts)
