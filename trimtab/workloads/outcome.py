"""What came out of a training run, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.record import Run

_WORST: dict[str, Callable[[np.ndarray], Any]] = {
    "activation_max": np.max,
    "attention_entropy": np.min,
    "attention_entropy_ratio": np.min,
    "attention_max_logit": np.max,
    "dead_fraction": np.max,
    "grad_norm": np.max,
    "logits_abs_log_z": np.max,
    "logits_max": np.max,
    "zero_loss_fraction": np.max,
}
"""The signals that explain an outcome, and which of their values over a run is the worst."""


@dataclass(frozen=True)
class Outcome:
    """What came out of a training run.

    Attributes:
        workload: its name.
        settings: as `Settings.model_dump()` gives them.
        loss: test loss at the end of the schedule; the one at initialisation if the run diverged.
        metrics: every test metric at the end; empty if the run diverged.
        initial_loss: test loss at initialisation.
        diverged: whether a loss was not finite, or a gradient that the optimizer refuses.
        steps: optimizer steps done.
        cpu_seconds_per_step: of the training step and its watch, without evaluations and checkpoints.
        mechanism: for signals that explain the outcome, the worst finite value over run, modules and heads; and
            `state_bytes_per_parameter`, what the optimizer keeps between steps.
        folder: where the record and checkpoints are, or None.

    Example:
        >>> outcome = Outcome("digits-mlp", {"lr": 0.1}, 0.2, {"loss": 0.2}, 2.3, False, 400, 0.001)
        >>> Outcome.from_json(outcome.to_json()) == outcome
        True
    """

    workload: str
    settings: dict[str, Any]
    loss: float
    metrics: dict[str, float]
    initial_loss: float
    diverged: bool
    steps: int
    cpu_seconds_per_step: float
    mechanism: dict[str, float] = field(default_factory=dict)
    folder: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as JSON data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        """Return the outcome that `to_json` described."""
        return cls(**data)


def mechanism(folder: Path) -> dict[str, float]:
    """Return the worst finite value of each explaining signal in a run's record; a signal without one is left out."""
    found = {}
    with Run(folder) as run:
        for name, worst in _WORST.items():
            values = run.series(name).values
            finite = values[np.isfinite(values)]
            if finite.size:
                found[name] = float(worst(finite))
    return found
