"""Made-up measurements, whose speeds and values are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from trimtab.bench import SUITE, Contender, Measured, Result
from trimtab.bench.protocol import Point
from trimtab.bench.runs import Ended


def measured(
    arm: str,
    rate: float,
    *,
    seeds: int = 10,
    noise: float = 0.0,
    cost: float = 1.0,
    budget: str = "full",
    seed: int = 0,
) -> Measured:
    """Curves that fall as 2 exp(-2 rate t / S), or rise as min(1, 0.9 rate t / S), plus a constant for each seed."""
    draw = np.random.default_rng(seed)
    results = {}
    for task in SUITE:
        total = task.settings().steps
        every = total // task.evaluations
        grid = tuple(range(0, total + 1, every))
        runs = []
        for number in range(seeds):
            shift = float(draw.normal(0, noise)) if noise else 0.0
            if task.higher_is_better:
                course = [min(1.0, max(0.0, 0.9 * rate * step / total + (shift if step else 0))) for step in grid]
            else:
                course = [2 * float(np.exp(-2 * rate * step / total)) + (shift if step else 0) for step in grid]
            runs.append(Ended(number, course[-1], course[-1], course[0], False, grid, tuple(course), 1e-3, {}))
        point = Point({"lr": 0.01}, 1.0, 1.0, False)
        results[task.name] = Result(task.name, (point,), 0, False, {"lr": 0.01}, tuple(runs), cost)
    return Measured(Contender.parse(arm), budget, results, {})


@pytest.fixture
def made() -> Callable[..., Measured]:
    """Make measurements of an arm that learns at a rate."""
    return measured
