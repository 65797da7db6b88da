"""A torch learning-rate scheduler around any schedule."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from trimtab.errors import UsageError
from trimtab.schedule._shape import Shape

__all__ = ["ScheduleLR"]


class ScheduleLR(LRScheduler):
    """Sets every group's learning rate to its own base rate times the schedule's factor at the current step.

    The rate is a closed form of the step, so that a restored scheduler goes on bit-exactly, and `state_dict` holds
    plain numbers only.

    Args:
        optimizer: any torch optimizer.
        schedule: such as `cosine(1000, warmup=100)`.
        last_epoch: the last step taken, or -1 for a fresh start.

    Raises:
        UsageError: if the schedule is not one of `trimtab.schedule`.

    Example:
        >>> from trimtab.schedule import linear
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.8)
        >>> scheduler = ScheduleLR(optimizer, linear(4))
        >>> rates = []
        >>> for _ in range(4):
        ...     rates.append(optimizer.param_groups[0]["lr"])
        ...     optimizer.step()
        ...     scheduler.step()
        >>> rates
        [0.8, 0.6000000000000001, 0.4, 0.2]
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Shape, last_epoch: int = -1) -> None:
        if not isinstance(schedule, Shape):
            raise UsageError(f"ScheduleLR needs a schedule such as cosine(1000), got {type(schedule).__name__}.")
        self.schedule = schedule
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of every group at the current step."""
        return [base * self.schedule(self.last_epoch) for base in self.base_lrs]

    def state_dict(self) -> dict[str, object]:
        """Return the scheduler's state; the schedule itself is code, and is given again when it is built."""
        return {name: value for name, value in super().state_dict().items() if name != "schedule"}
