"""1cycle: one rise and one fall of the learning rate, momentum mirrored, and a short end far below the start.

    rise:  s steps from 1 / div to 1;   fall: s steps back to 1 / div;   end: the rest, down to 1 / (div final_div)
    momentum: from high to low while the rate rises, back while it falls, high to the end

Smith 2018 (arXiv:1803.09820), sections 4.2 and 4.3: straight lines, the three phases of "1cycle".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch.optim import Optimizer

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError, choose
from trimtab.schedule._shape import Shape, fraction, whole
from trimtab.schedule.schedule_lr import ScheduleLR

__all__ = ["DecayAdvice", "OneCycleLR", "one_cycle", "one_cycle_momentum", "weight_decay_advice"]

_GRIDS = {"shallow": (1e-2, 1e-3, 1e-4), "unknown": (1e-3, 1e-4, 1e-5, 0.0), "deep": (1e-4, 1e-5, 1e-6, 0.0)}


def one_cycle(total: int, *, end: float = 0.1, div: float = 10.0, final_div: float = 100.0) -> Shape:
    """Return the learning rate's factor in 1cycle; the base rate is the largest, from an LR range test.

    Args:
        total: steps in all, at least 3.
        end: fraction of the steps after the cycle, in [0, 1].
        div: the cycle's ends are this many times below its top, at least 1.
        final_div: the very end is this many times below the cycle's ends, at least 1.

    Returns:
        The schedule.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> schedule = one_cycle(100)
        >>> [round(schedule(step), 4) for step in (0, 45, 90, 100)]
        [0.1, 1.0, 0.1, 0.001]

    References:
        Smith 2018, arXiv:1803.09820.
    """
    half, after = _phases(total, end)
    for name, value in (("div", div), ("final_div", final_div)):
        if not isinstance(value, (int, float)) or not 1 <= value < float("inf"):
            raise UsageError(f"{name} must be at least 1 and finite, got {value!r}.")
    low = 1 / div

    def factor(step: int) -> float:
        if step <= half:
            return low + (1 - low) * step / half
        if step <= after:
            return 1 - (1 - low) * (step - half) / (after - half)
        x = min(1.0, (step - after) / max(1, total - after))
        return low + (low / final_div - low) * x

    facts = (("total", total), ("end", end), ("div", div), ("final_div", final_div))
    return Shape("1cycle", factor, total, facts)


def one_cycle_momentum(total: int, *, end: float = 0.1, high: float = 0.95, low: float = 0.85) -> Shape:
    """Return the momentum itself in 1cycle: `low` where the learning rate is highest.

    Args:
        total: steps in all, at least 3.
        end: fraction of the steps after the cycle, in [0, 1].
        high: momentum at the cycle's ends, in [0, 1].
        low: momentum at its top, at most `high`.

    Returns:
        The schedule of the momentum.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> [round(one_cycle_momentum(100)(step), 3) for step in (0, 45, 90, 100)]
        [0.95, 0.85, 0.95, 0.95]
    """
    half, after = _phases(total, end)
    if fraction("low", low) > fraction("high", high):
        raise UsageError(f"low must be at most high, got {low} and {high}.")

    def factor(step: int) -> float:
        if step <= half:
            return high + (low - high) * step / half
        return low + (high - low) * min(1.0, (step - half) / (after - half))

    return Shape("1cycle-momentum", factor, total, (("total", total), ("end", end), ("high", high), ("low", low)))


class OneCycleLR(ScheduleLR):
    """1cycle on an optimizer: the learning rate of every group, and its momentum (or first beta), mirrored.

    The learning rates that the groups have now are the largest of the cycle.

    Args:
        optimizer: with `momentum` or `betas` in its groups.
        total: steps in all, at least 3.
        end: fraction of the steps after the cycle.
        div: the cycle's ends are this many times below its top.
        final_div: the very end is this many times below the cycle's ends.
        momentum: high and low momentum, or None to leave it.
        last_epoch: the last step taken, or -1 for a fresh start.

    Raises:
        UsageError: if an argument breaks its rule, or the optimizer has no momentum to cycle.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total: int,
        *,
        end: float = 0.1,
        div: float = 10.0,
        final_div: float = 100.0,
        momentum: tuple[float, float] | None = (0.95, 0.85),
        last_epoch: int = -1,
    ) -> None:
        self.momentum: Callable[[int], float] | None = None
        if momentum is not None:
            if not all("momentum" in group or "betas" in group for group in optimizer.param_groups):
                raise UsageError("the optimizer has no momentum to cycle: pass momentum=None.")
            self.momentum = one_cycle_momentum(total, end=end, high=momentum[0], low=momentum[1])
        super().__init__(optimizer, one_cycle(total, end=end, div=div, final_div=final_div), last_epoch)

    def step(self, epoch: int | None = None) -> None:
        """Go to the next step: set the learning rates and momenta."""
        super().step(epoch)
        if self.momentum is None:
            return
        value = self.momentum(self.last_epoch)
        for group in self.optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (value, *group["betas"][1:])
            else:
                group["momentum"] = value

    def state_dict(self) -> dict[str, object]:
        """Return the scheduler's state in plain numbers."""
        return {name: value for name, value in super().state_dict().items() if name != "momentum"}


@dataclass(frozen=True)
class DecayAdvice:
    """Which weight decays to try next.

    Attributes:
        best: the one of the lowest loss so far; None before the first runs.
        next: decays to try, largest first; none once the best one's neighbours are close.
        why: in words.
    """

    best: float | None
    next: tuple[float, ...]
    why: str


def weight_decay_advice(
    losses: Mapping[float, float] | None = None, *, model: str = "unknown", finest: float = 10**0.5
) -> DecayAdvice:
    """Say which weight decays to try with 1cycle, by the validation losses of short runs.

    Weight decay stays constant in a run; a few epochs tell good values from bad ones. First a grid by the model's size,
    then past an edge while the best value is there, then halfway between the best value's and its neighbours'
    exponents.

    Args:
        losses: from a weight decay to a validation loss early in training, all from runs of one length, learning rate
            and momentum; a run that diverged has one that is not finite.
        model: `"shallow"`, `"deep"` or `"unknown"`: of the first grid, deep models and large data need less decay.
        finest: ratio of neighbours, above 1, at which the search ends.

    Returns:
        The best decay so far, and those to try next.

    Raises:
        UsageError: if an argument breaks its rule, or no loss is finite.

    Example:
        >>> weight_decay_advice().next
        (0.001, 0.0001, 1e-05, 0.0)
        >>> advice = weight_decay_advice({1e-3: 0.9, 1e-4: 0.7, 1e-5: 0.8, 0: 0.85})
        >>> advice.best, [f"{decay:.2g}" for decay in advice.next]
        (0.0001, ['0.00032', '3.2e-05'])

    References:
        Smith 2018, arXiv:1803.09820, section 4.4.
    """
    choose("model", model, _GRIDS)
    if not isinstance(finest, (int, float)) or not 1 < finest < math.inf:
        raise UsageError(f"finest must be above 1 and finite, got {finest!r}.")
    if not losses:
        return DecayAdvice(None, _GRIDS[model], f"a first grid for a model of {model} depth")
    if wrong := [decay for decay in losses if not 0 <= decay < math.inf]:
        raise UsageError(f"weight decays must be at least 0 and finite, got {wrong[0]!r}.")
    finite = {decay: loss for decay, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise UsageError("no loss is finite: lower the learning rate before the weight decay is looked at.")
    best = min(finite, key=lambda decay: (finite[decay], decay))
    above = min((decay for decay in losses if decay > best), default=None)
    below = max((decay for decay in losses if decay < best), default=None)
    if best == 0:
        if above is None:
            return DecayAdvice(best, _GRIDS[model][:-1], "no decay was tried")
        return DecayAdvice(best, (above / 10,) if above > 1e-7 else (), "no decay is best: less than the least")
    if above is None or below is None:
        edge = 10 * best if above is None else best / 10
        return DecayAdvice(best, (edge,), "the best decay is at an edge")
    # Towards a neighbour 0, which has no exponent, one goes down by ten.
    wide = [other for other in (above, below) if other == 0 or max(other / best, best / other) > finest * (1 + 1e-9)]
    halfway = tuple(best / 10 if other == 0 else math.sqrt(best * other) for other in wide)
    return DecayAdvice(
        best, halfway, "halfway to its neighbours in the exponent" if wide else "its neighbours are close"
    )


def _phases(total: int, end: float) -> tuple[int, int]:
    whole("total", total, 3)
    after = max(2, round(total * (1 - fraction("end", end))))
    return after // 2, after


CARD = Card(
    name="1cycle",
    room="schedule",
    summary="one rise and fall of the learning rate with momentum mirrored, then a short end",
    paper=Paper(
        "A disciplined approach to neural network hyper-parameters: Part 1",
        2018,
        arxiv="1803.09820",
    ),
    equation="rise 1/div -> 1, fall 1 -> 1/div, end 1/div -> 1/(div final_div); momentum high -> low -> high",
    claim="With the largest rate of a range test, reaches the accuracy of step schedules in far fewer epochs.",
    acts_on="settings",
    entry="trimtab.schedule.one_cycle_policy:one_cycle",
    defaults=(
        Default("end", 0.1, "ours: the paper says 'a little smaller than the total number'"),
        Default("div", 10.0, "paper: 'usually 1/3 or 1/4 of', and a factor of 10 or 20 in its text"),
        Default("final_div", 100.0, "paper: 'several orders of magnitude less'"),
        Default("weight decay", (1e-3, 1e-4, 1e-5, 0.0), "paper, section 4.4 (recalled): the grid of a first search"),
    ),
    verified={
        "equation": (
            "tests/schedule/test_one_cycle_policy.py::test_corners_and_straight_lines",
            "tests/schedule/test_one_cycle_policy.py::test_weight_decay_is_found_by_halving_exponents",
        ),
        "reference": ("tests/schedule/test_one_cycle_policy.py::test_equals_torchs_three_phases",),
    },
    deviations=(
        "Weight decay is constant in a run and is not changed by the schedule: weight_decay_advice says which values "
        "to try. Its grids and the halving of exponents are the paper's, going past an edge by ten is ours.",
        "The paper's numbers for the ends differ from figure to figure; they were recalled, not read again.",
    ),
)
