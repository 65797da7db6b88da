"""Sweep the learning rate of optimizers, with and without remedies: a loss curve each, its sensitivity S and S+."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.compare.arm import Arm
from trimtab.compare.jobs import Progress
from trimtab.compare.lr_sensitivity import Sensitivity, sensitivity
from trimtab.compare.pairs import LEVEL, Paired, paired
from trimtab.compare.store import strict, write_results
from trimtab.compare.training import final_loss, outcome_json, prepared, run_all, seed_list, training_job
from trimtab.errors import UsageError
from trimtab.workloads import Outcome, Settings

RESULTS = "sweep.json"


@dataclass(frozen=True)
class Curve:
    """Final loss against learning rate for one arm.

    Attributes:
        arm: label and settings, but for learning rate and seed.
        lrs: learning rates, ascending.
        outcomes: for each learning rate, one outcome for each seed.
    """

    arm: Arm
    lrs: tuple[float, ...]
    outcomes: tuple[tuple[Outcome, ...], ...]

    @property
    def losses(self) -> list[list[float]]:
        """For each learning rate, the loss for each seed; a run that diverged counts as its loss at initialisation."""
        return [[final_loss(outcome) for outcome in row] for row in self.outcomes]

    @property
    def mean_losses(self) -> list[float]:
        """For each learning rate, the mean loss over seeds."""
        return [statistics.fmean(row) for row in self.losses]

    @property
    def sensitivities(self) -> list[Sensitivity]:
        """For each seed, the sensitivity of its own curve."""
        return [
            sensitivity(self.lrs, [row[seed] for row in self.losses], self.outcomes[0][seed].initial_loss)
            for seed in range(len(self.outcomes[0]))
        ]

    @property
    def s(self) -> float:
        """S, the mean over seeds."""
        return statistics.fmean(found.s for found in self.sensitivities)

    @property
    def s_plus(self) -> float:
        """S+, the mean over seeds."""
        return statistics.fmean(found.s_plus for found in self.sensitivities)

    @property
    def best(self) -> tuple[float, float]:
        """The learning rate with the lowest mean loss, and that loss."""
        loss, lr = min(zip(self.mean_losses, self.lrs, strict=True))
        return lr, loss

    def to_json(self) -> dict[str, Any]:
        """Return the curve as JSON data."""
        lr, loss = self.best
        return {
            "label": self.arm.label,
            "settings": self.arm.settings.model_dump(mode="json", exclude={"seed", "lr"}),
            "lrs": list(self.lrs),
            "losses": self.losses,
            "mean": self.mean_losses,
            "initial_loss": statistics.fmean(outcome.initial_loss for outcome in self.outcomes[0]),
            "S": self.s,
            "S_plus": self.s_plus,
            "best_lr": lr,
            "best_loss": loss,
            "by_seed": [found.to_json() for found in self.sensitivities],
            "diverged": [sum(outcome.diverged for outcome in row) for row in self.outcomes],
            "outcomes": [[outcome_json(outcome) for outcome in row] for row in self.outcomes],
        }


@dataclass(frozen=True)
class Sweep:
    """Curves of one workload over one grid; the first is the baseline.

    Attributes:
        workload: its name.
        lrs: the grid.
        seeds: the seeds.
        curves: one for each arm and each set of remedies.
        pairs: for each treated curve's label, S and S+ against the first curve's, paired by seed.
    """

    workload: str
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    curves: tuple[Curve, ...]
    pairs: dict[str, dict[str, Paired]]

    @property
    def runs(self) -> list[Path]:
        """The folders of all runs, curve by curve."""
        return [Path(run.folder) for curve in self.curves for row in curve.outcomes for run in row if run.folder]

    def to_json(self) -> dict[str, Any]:
        """Return the sweep as strict JSON data."""
        pairs = [
            {"arm": label, "baseline": self.curves[0].arm.label, "quantity": quantity, **pair.to_json()}
            for label, found in self.pairs.items()
            for quantity, pair in found.items()
        ]
        return strict(
            {
                "workload": self.workload,
                "metric": "loss",
                "level": LEVEL,
                "lrs": self.lrs,
                "seeds": self.seeds,
                "baseline": self.curves[0].arm.label,
                "curves": [curve.to_json() for curve in self.curves],
                "pairs": pairs,
            }
        )


def sweep(
    workload: str,
    lrs: Sequence[float],
    *,
    folder: str | Path,
    remedies: Sequence[Sequence[str]] = (),
    arms: Sequence[Arm | str] = (),
    seeds: int | Sequence[int] = 1,
    steps: int | None = None,
    workers: int = 2,
    text: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Sweep:
    """Train a workload at every learning rate, for each arm and with each set of remedies.

    Runs that are already in `folder` are not repeated. The result is also written to `FOLDER/sweep.json`.

    Args:
        workload: a workload's name.
        lrs: learning rates; evenly spaced in log for S to mean what the paper defines (`log_grid`).
        folder: where runs and results go.
        remedies: sets of method names; each set gives a curve, on top of the first arm.
        arms: arms, or their texts (`"lion,weight_decay=0.1"`), for a curve each; the first is the baseline. Default the
            workload's own settings.
        seeds: how many runs at each point, or which seeds.
        steps: training steps, instead of the workload's own.
        workers: processes.
        text: a file or folder of text for language models.
        progress: called as steps and runs finish.

    Returns:
        The curves and their sensitivities.

    Raises:
        UsageError: if the learning rates, arms, remedies, seeds or workload are not usable.
        RunFailedError: if runs failed.
        RecordError: if the folder cannot be written.
    """
    grid = tuple(sorted(lrs))
    if not grid or len(set(grid)) != len(grid):
        raise UsageError(
            f"a sweep needs different learning rates, got {', '.join(f'{lr:g}' for lr in grid) or 'none'}."
        )
    job_of = prepared(workload, text)
    defaults = job_of.defaults if steps is None else job_of.defaults.replace(steps=steps)
    sides = [arm if isinstance(arm, Arm) else _without_lr(arm, defaults) for arm in arms]
    sides = sides or [Arm("without remedy", defaults)]
    first = sides[0].settings
    sides += [Arm("+".join(names), first.replace(remedies=(*first.remedies, *names))) for names in remedies]
    if len({arm.label for arm in sides}) != len(sides):
        raise UsageError("a sweep needs different arms and sets of remedies: one is given twice.")
    for arm in sides:
        arm.check(job_of)
    chosen = seed_list(seeds)
    jobs = [
        training_job(job_of, arm.settings.replace(lr=lr, seed=seed), text)
        for seed in chosen
        for lr in grid
        for arm in sides
    ]
    outcomes = iter(run_all(jobs, folder, workers=workers, progress=progress))
    found = {(seed, lr, arm.label): next(outcomes) for seed in chosen for lr in grid for arm in sides}
    curves = tuple(
        Curve(arm, grid, tuple(tuple(found[seed, lr, arm.label] for seed in chosen) for lr in grid)) for arm in sides
    )
    result = Sweep(workload, grid, chosen, curves, {curve.arm.label: _pairs(curves[0], curve) for curve in curves[1:]})
    write_results(Path(folder) / RESULTS, "sweep", result.to_json())
    return result


def _without_lr(text: str, defaults: Settings) -> Arm:
    if any(part.partition("=")[0].strip() == "lr" for part in text.split(",")):
        raise UsageError(f"the arm {text!r} sets a learning rate: the sweep does, so leave it out.")
    return Arm.parse(text, defaults)


def _pairs(first: Curve, treated: Curve) -> dict[str, Paired]:
    return {
        "S": paired([found.s for found in first.sensitivities], [found.s for found in treated.sensitivities]),
        "S_plus": paired(
            [found.s_plus for found in first.sensitivities], [found.s_plus for found in treated.sensitivities]
        ),
    }
