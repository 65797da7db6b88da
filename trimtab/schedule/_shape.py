"""What schedules share: a pure function of the step, its checks, and warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import UsageError, choose


@dataclass(frozen=True)
class Shape:
    """A schedule: the factor on the learning rate as a pure function of the step, counted from 0.

    It is defined for every step from 0 on, past the end too, where it keeps its last value; equal arguments give equal
    schedules.

    Attributes:
        name: of the method.
        factor: the function.
        total: steps until the end; None for a schedule without one.
        facts: the arguments it was made with.
    """

    name: str
    factor: Callable[[int], float] = field(compare=False, repr=False)
    total: int | None
    facts: tuple[tuple[str, Any], ...]

    def __call__(self, step: int) -> float:
        """Return the factor at a step.

        Raises:
            UsageError: if the step is negative or not a whole number.
        """
        return self.factor(count("step", step, 0))


def whole(name: str, value: Any, low: int = 0) -> int:
    """Return a number of steps.

    Raises:
        UsageError: if it is not a whole number of at least `low`.
    """
    return count(name, value, low, unit=" of steps")


def count(name: str, value: Any, low: int = 1, *, unit: str = "") -> int:
    """Return a whole number.

    Raises:
        UsageError: if it is none, or below `low`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UsageError(f"{name} must be a whole number{unit}, at least {low}, got {value!r}.")
    return value


def fraction(name: str, value: Any) -> float:
    """Return a factor in [0, 1].

    Raises:
        UsageError: if it is not a number there.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise UsageError(f"{name} must be in [0, 1], got {value!r}.")
    return float(value)


def spans(total: int, **parts: int) -> None:
    """Check that the parts of a schedule fit into its steps.

    Raises:
        UsageError: if they do not.
    """
    for name, value in parts.items():
        whole(name, value)
    if sum(parts.values()) > total:
        shown = " + ".join(f"{name} {value}" for name, value in parts.items())
        raise UsageError(f"{shown} is more than the {total} steps in all: shorten a part.")


def rising(step: int, warmup: int) -> float:
    """Return the factor of linear warm-up, (step + 1) / (warmup + 1), and 1 after it: no step is lost at factor 0."""
    return min(1.0, (step + 1) / (warmup + 1))


def falling(form: str, progress: float, floor: float) -> float:
    """Return the factor of a decay from 1 to `floor` at a progress in [0, 1].

    linear: 1 - x;  1-sqrt: 1 - sqrt(x);  cosine: (1 + cos(pi x)) / 2, each between 1 and floor;  exponential: floor^x.
    """
    if form == "exponential":
        return float(floor**progress)
    left = {
        "linear": 1 - progress,
        "1-sqrt": 1 - math.sqrt(progress),
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[form]
    return floor + (1 - floor) * left


def decay_form(form: Any, floor: Any) -> tuple[str, float]:
    """Return the form and floor of a decay.

    Raises:
        UsageError: if there is no such form, the floor is not in [0, 1], or an exponential decay would end at 0.
    """
    choose("form", form, DECAYS)
    if form == "exponential" and floor == 0:
        raise UsageError("an exponential decay never reaches 0: give a floor above 0, such as 0.1.")
    return form, fraction("floor", floor)


def decayed(form: str, total: int, warmup: int, floor: float) -> Shape:
    """Return linear warm-up and a decay of that form from its end to the last step.

    Raises:
        UsageError: if the parts do not fit, or the floor is not in [0, 1].
    """
    whole("total", total, 1)
    spans(total - 1, warmup=warmup)
    _, floor = decay_form(form, floor)

    def factor(step: int) -> float:
        if step < warmup:
            return rising(step, warmup)
        return falling(form, min(1.0, (step - warmup) / (total - warmup)), floor)

    return Shape(form, factor, total, (("total", total), ("warmup", warmup), ("floor", floor)))


DECAYS = ("linear", "1-sqrt", "cosine", "exponential")
