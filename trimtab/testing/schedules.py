"""ScheduleTestCase: a schedule is a pure function of the step, and drives torch's schedulers exactly."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

from trimtab.schedule._shape import Shape
from trimtab.schedule.schedule_lr import ScheduleLR


class ScheduleTestCase:
    """Contract of a schedule. Subclass it, give `schedule`, and pytest collects every test below.

    Example:
        >>> from trimtab.schedule import linear
        >>> class TestLinear(ScheduleTestCase):
        ...     @staticmethod
        ...     def schedule() -> Shape:
        ...         return linear(10)
        >>> TestLinear().test_is_defined_and_bounded_everywhere()
    """

    @staticmethod
    def schedule() -> Shape:
        """Return the schedule, made anew."""
        raise NotImplementedError("give `schedule`: it returns the schedule to test")

    def _steps(self) -> range:
        return range(3 * (self.schedule().total or 100))

    def test_is_defined_and_bounded_everywhere(self) -> None:
        schedule = self.schedule()
        values = [schedule(step) for step in self._steps()]
        assert all(isinstance(value, float) and math.isfinite(value) and value >= 0 for value in values)
        assert max(values) > 0
        if schedule.total is not None:
            assert set(values[schedule.total :]) == {values[schedule.total]}, "it changes after its end"

    def test_is_a_pure_function(self) -> None:
        one, two = self.schedule(), self.schedule()
        backwards = {step: two(step) for step in reversed(self._steps())}
        assert [one(step) for step in self._steps()] == [backwards[step] for step in self._steps()]
        assert one == two

    def test_refuses_steps_that_are_none(self) -> None:
        for step in (-1, 0.5, True, None):
            with pytest.raises(ValueError, match="step must be a whole number"):
                self.schedule()(step)  # type: ignore[arg-type]

    def test_every_group_follows_its_own_base_rate(self) -> None:
        weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
        optimizer = torch.optim.SGD([{"params": weights[:1], "lr": 0.5}, {"params": weights[1:], "lr": 2.0}])
        scheduler = ScheduleLR(optimizer, self.schedule())
        schedule = self.schedule()
        for step in range(20):
            rates = [group["lr"] for group in optimizer.param_groups]
            assert rates == [0.5 * schedule(step), 2.0 * schedule(step)]
            optimizer.step()
            scheduler.step()

    def test_resumes_bit_exactly_through_disk(self) -> None:
        def fresh() -> tuple[torch.optim.Optimizer, ScheduleLR]:
            optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.3)
            return optimizer, ScheduleLR(optimizer, self.schedule())

        def run(optimizer: torch.optim.Optimizer, scheduler: ScheduleLR, steps: int) -> list[float]:
            rates = []
            for _ in range(steps):
                optimizer.step()
                scheduler.step()
                rates.append(optimizer.param_groups[0]["lr"])
            return rates

        whole = run(*fresh(), len(self._steps()))
        half = len(whole) // 2
        optimizer, scheduler = fresh()
        run(optimizer, scheduler, half)
        stream = io.BytesIO()
        torch.save([optimizer.state_dict(), scheduler.state_dict()], stream)
        stream.seek(0)
        saved = torch.load(stream, weights_only=True)
        resumed = fresh()
        for part, state in zip(resumed, saved, strict=True):
            part.load_state_dict(state)  # type: ignore[attr-defined]
        assert run(*resumed, len(whole) - half) == whole[half:]
