"""The schedules of a run: the protocol's own cosine and constant, and every schedule of the catalogue."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from trimtab.catalogue import methods
from trimtab.errors import UsageError, choose
from trimtab.schedule._shape import Shape
from trimtab.workloads.options import Scalar, checked, kinds

OWN = ("cosine", "constant")
"""Those that a run knows without the catalogue."""


def schedule_names() -> list[str]:
    """Return what a run can name as its schedule."""
    return [*OWN, *(name for name in _makers() if name not in OWN)]


def schedule_options(name: str) -> list[str]:
    """Return the options that a schedule has."""
    return list(_options(name))


def takes_warmup(name: str) -> bool:
    """Return whether the run's `warmup` plays a part in a schedule: not where the rise is part of its shape."""
    return name in OWN or "warmup" in inspect.signature(_makers()[name]).parameters


def checked_schedule(name: Any, options: Any) -> tuple[tuple[str, Scalar], ...]:
    """Return a schedule's options by name, in the types of its signature.

    Raises:
        UsageError: if there is no such schedule or option, or a value has another type.
    """
    if name not in OWN:
        choose("schedule", name, schedule_names())
    return checked(f"schedule {name}", options, _options(name)) if options else ()


@functools.lru_cache(maxsize=64)
def shape(name: str, options: tuple[tuple[str, Scalar], ...], steps: int, warmup: float, beta2: float) -> Shape:
    """Return the schedule of a run of `steps` steps.

    Args:
        name: one of the catalogue's.
        options: its options; a length in steps may be a fraction below 1 of the run's.
        steps: of the run.
        warmup: fraction of the steps.
        beta2: of the run's optimizer.

    Raises:
        UsageError: if the options do not make a schedule of that length.
    """
    maker = _makers()[name]
    given: dict[str, Any] = {"total": steps, "warmup": round(warmup * steps), "beta2": beta2}
    values = {key: value for key, value in given.items() if key in inspect.signature(maker).parameters}
    lengths = _lengths(maker)
    for key, value in options:
        if key in lengths and isinstance(value, float):
            if not 0 < value < 1:
                rule = f"{key} of schedule {name} is a number of steps, or a fraction below 1"
                raise UsageError(f"{rule}, got {value:g}.")
            value = round(value * steps)
        values[key] = value
    return maker(**values)


@functools.cache
def _makers() -> dict[str, Callable[..., Shape]]:
    found = {}
    for card in methods(room="schedule"):
        entry = card.public()
        returned = get_type_hints(entry).get("return") if inspect.isfunction(entry) else None
        if isinstance(returned, type) and issubclass(returned, Shape):
            found[card.name] = entry
    return found


def _lengths(maker: Callable[..., Shape]) -> set[str]:
    """Return the parameters that count steps."""
    return {name for name, part in inspect.signature(maker).parameters.items() if "int" in kinds(part)}


def _options(name: str) -> dict[str, inspect.Parameter]:
    if name not in _makers():
        return {}
    parameters = inspect.signature(_makers()[name]).parameters
    lengths = _lengths(_makers()[name])
    return {
        key: part.replace(annotation=f"{part.annotation} | float") if key in lengths else part
        for key, part in parameters.items()
        if key != "total"
    }
