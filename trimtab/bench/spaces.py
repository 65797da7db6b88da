"""What is tuned: for each optimizer a box of hyper-parameters, filled with quasi-random points (Bousquet et al. 2017).

Every box has the same shape, so that nobody is tuned over a wider or a finer one:

    learning rate            log-uniform over three decades, the optimizer's own
    total decay              log-uniform in [0.03, 30]: learning rate x weight decay x steps, what the decay alone would
                             shrink the logarithm of a weight by, at the peak rate: equal for all optimizers, whatever
                             the scale of their learning rates
    1 - beta1                log-uniform in [0.02, 0.5]
    1 - beta2                log-uniform in [0.002, 0.2]
    1 - momentum             log-uniform in [0.01, 0.5]
    warm-up                  uniform in [0, 0.2] of the steps

An optimizer has those of them that it takes. What an arm fixes is not tuned.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from trimtab.bench.suite import Task
from trimtab.errors import UsageError
from trimtab.workloads import Settings, parse_arm
from trimtab.workloads.optimizers import make_optimizer, optimizer_class, taken_moments
from trimtab.workloads.schedules import takes_warmup

LR = (1e-4, 1e-1)
"""Adam's decades."""

LR_OF: Mapping[str, tuple[float, float]] = {
    "sgd": (1e-2, 1e1),
    "trimtab-sgd": (1e-2, 1e1),
    "lion": (1e-5, 1e-2),
    "schedule-free": (1e-3, 1.0),
}
"""Optimizers whose learning rates are not of Adam's size, with their own three decades."""

PRESETS: Mapping[str, str] = {"schedule-free": "schedule=constant", "ranger21": "schedule=constant,warmup=0"}
"""What comes with an optimizer that brings its own schedule or does without, unless the arm says otherwise."""

_MOMENTS = {"beta1": (0.02, 0.5), "beta2": (0.002, 0.2), "momentum": (0.01, 0.5)}
_DECAY = (0.03, 30.0)
_WARMUP = (0.0, 0.2)
_FIXED = ("steps", "batch_size", "seed", "width", "depth")
_SEED = 20240101
_EDGE = 0.05


@dataclass(frozen=True)
class Dimension:
    """One hyper-parameter and its range.

    Attributes:
        name: `"lr"`, `"decay"`, `"beta1"`, `"beta2"`, `"momentum"` or `"warmup"`.
        low: of the range; of 1 - value for moments.
        high: likewise.
        log: whether the range is even in logarithms.
    """

    name: str
    low: float
    high: float
    log: bool = True

    def at(self, share: float) -> float:
        """Return the value at a share of the range, from 0 to 1.

        Example:
            >>> Dimension("lr", 1e-4, 1e-2).at(0.5)
            0.001
        """
        if not self.log:
            return float(f"{self.low + share * (self.high - self.low):.4g}")
        return float(f"{math.exp(math.log(self.low) + share * math.log(self.high / self.low)):.4g}")


@dataclass(frozen=True)
class Contender:
    """An optimizer with its remedies, before it is tuned.

    Attributes:
        arm: as a command line gives it, without a learning rate: `"lion,with=qk-norm"`.
        lr: the range of its learning rate.
    """

    arm: str
    lr: tuple[float, float] = LR

    @classmethod
    def parse(cls, arm: str, *, remedies: Sequence[str] = (), lr: tuple[float, float] | None = None) -> Contender:
        """Read an arm, with remedies to add to it.

        Raises:
            UsageError: if the arm begins with no optimizer, sets what the protocol sets, or the range is none.
        """
        text = ",".join([*(part.strip() for part in arm.split(",")), *(f"with={name.strip()}" for name in remedies)])
        optimizer = text.partition(",")[0]
        if optimizer:  # an empty arm is refused when it is read as settings
            optimizer_class(optimizer)
        names = _names(text)
        if "lr" in names:
            raise UsageError(
                f"the arm {text!r} sets a learning rate: the benchmark tunes it, give its range with --lr."
            )
        for name in _FIXED:
            if name in names:
                raise UsageError(f"the arm {text!r} sets {name}: the suite fixes it, so leave it out.")
        low, high = lr or LR_OF.get(optimizer, LR)
        if not 0 < low < high < math.inf:
            raise UsageError(f"a range of learning rates rises from above 0, got {low:g}:{high:g}.")
        return cls(text, (low, high))

    @property
    def optimizer(self) -> str:
        """The optimizer's name."""
        return self.arm.partition(",")[0]

    def settings(self, task: Task, *, quick: bool = False) -> Settings:
        """Return the settings of the arm on a task, before tuning.

        Raises:
            UsageError: if the arm cannot be read.
        """
        base = task.settings(quick=quick)
        own = _names(self.arm)
        preset = [part for part in PRESETS.get(self.optimizer, "").split(",") if part and part.split("=")[0] not in own]
        found = parse_arm(",".join([self.arm, *preset]), base)
        return found if _decays(task, found) else found.replace(weight_decay=0.0)

    def dimensions(self, task: Task) -> tuple[Dimension, ...]:
        """Return what is tuned on a task."""
        fixed = {*_names(self.arm), *_names(PRESETS.get(self.optimizer, ""))}
        settings = self.settings(task)
        found = [Dimension("lr", *self.lr)]
        if "weight_decay" not in fixed and _decays(task, settings):
            found.append(Dimension("decay", *_DECAY))
        found += [Dimension(name, *_MOMENTS[name]) for name in taken_moments(self.optimizer) if name not in fixed]
        if "warmup" not in fixed and takes_warmup(settings.schedule):
            found.append(Dimension("warmup", *_WARMUP, log=False))
        return tuple(found)

    def points(self, task: Task, count: int) -> list[dict[str, float]]:
        """Return the quasi-random points: a scrambled Halton sequence, the same every time."""
        from scipy.stats import qmc  # a second to import, needed only where something is tuned

        dimensions = self.dimensions(task)
        halton = qmc.Halton(len(dimensions), scramble=True, seed=np.random.default_rng(_SEED))
        return [
            {part.name: part.at(float(share)) for part, share in zip(dimensions, row, strict=True)}
            for row in halton.random(count)
        ]

    def at(self, task: Task, point: Mapping[str, float], *, quick: bool = False) -> Settings:
        """Return the settings at a point."""
        settings = self.settings(task, quick=quick)
        changes: dict[str, Any] = {}
        for name, value in point.items():
            if name in _MOMENTS:
                changes[name] = float(f"{1 - value:.6g}")
            elif name == "decay":
                changes["weight_decay"] = float(f"{value / (point['lr'] * settings.steps):.4g}")
            else:
                changes[name] = value
        return settings.replace(**changes)

    def lr_at_edge(self, point: Mapping[str, float]) -> bool:
        """Return whether the learning rate lies in the outer twentieth of its range: a wider one may then be better."""
        low, high = self.lr
        share = math.log(point["lr"] / low) / math.log(high / low)
        return not _EDGE <= share <= 1 - _EDGE


def _decays(task: Task, settings: Settings) -> bool:
    """Return whether weight decay is part of it: the task has it, and the optimizer takes it."""
    return task.decays and _takes_decay(settings.optimizer, settings.options)


@functools.lru_cache(maxsize=64)
def _takes_decay(optimizer: str, options: tuple[tuple[str, Any], ...]) -> bool:
    """Return whether an optimizer has weight decay: it is refused with one, and made without."""
    settings = Settings(optimizer=optimizer, options=options, lr=1e-3, steps=10)
    model = nn.Linear(8, 8)
    try:
        make_optimizer(model, settings.replace(weight_decay=1e-4))
    except UsageError:
        try:
            make_optimizer(model, settings)
        except UsageError:  # what is wrong is something else, and is told when the arm is checked
            return True
        return False
    return True


def _names(text: str) -> set[str]:
    """Return the settings that an arm's text names."""
    return {part.partition("=")[0].strip() for part in text.split(",") if "=" in part}
