"""What schedules of a size share: a whole number as a pure function of the step, and batches cut by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trimtab.schedule._shape import count

Batches = Callable[[int], tuple[Tensor, Tensor]]
"""The batches of a run: from a step, counted from 0, to inputs and targets."""


@dataclass(frozen=True)
class Sizes:
    """A size, such as that of a batch, as a pure function of the step, counted from 0.

    It is defined for every step from 0 on; from step `ramp` on it is `full`. Equal arguments give equal schedules.

    Attributes:
        name: of the method.
        size: the function.
        full: the last and largest size.
        ramp: the first step at full size.
        facts: the arguments it was made with.
    """

    name: str
    size: Callable[[int], int] = field(compare=False, repr=False)
    full: int
    ramp: int
    facts: tuple[tuple[str, Any], ...]

    def __call__(self, step: int) -> int:
        """Return the size at a step.

        Raises:
            UsageError: if the step is negative or not a whole number.
        """
        return self.size(count("step", step, 0))
