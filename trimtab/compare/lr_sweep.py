"""Sweep the learning rate of optimizers, with and without remedies and at several sizes: loss curves, S and S+."""

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
from trimtab.compare.sizes import Size, sizes
from trimtab.compare.store import strict, write_results
from trimtab.compare.training import final_loss, outcome_json, prepared, run_all, seed_list, training_job
from trimtab.errors import UsageError
from trimtab.workloads import Outcome, Settings

RESULTS = "sweep.json"
_OWN = Size()


@dataclass(frozen=True)
class Curve:
    """Final loss against learning rate for one arm at one size.

    Attributes:
        arm: label and settings, but for learning rate and seed.
        lrs: learning rates, ascending.
        outcomes: for each learning rate, one outcome for each seed.
        side: the arm's label without its size.
        size: its width and depth where the sweep sets them.
    """

    arm: Arm
    lrs: tuple[float, ...]
    outcomes: tuple[tuple[Outcome, ...], ...]
    side: str = ""
    size: Size = _OWN

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
            "side": self.side or self.arm.label,
            **self.size.to_json(),
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
    """Curves of one workload over one grid; the first of each size is the baseline of that size.

    Attributes:
        workload: its name.
        lrs: the grid.
        seeds: the seeds.
        curves: one for each size, and in it for each arm and each set of remedies.
        pairs: for each treated curve's label, S and S+ against the baseline's of its size, paired by seed.
        widths: the widths, ascending; empty for the workload's own.
        depths: likewise.
    """

    workload: str
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    curves: tuple[Curve, ...]
    pairs: dict[str, dict[str, Paired]]
    widths: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()

    def at(self, size: Size) -> list[Curve]:
        """Return the curves of one size."""
        return [curve for curve in self.curves if curve.size == size]

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes, in the order of the curves."""
        return tuple(dict.fromkeys(curve.size for curve in self.curves))

    @property
    def runs(self) -> list[Path]:
        """The folders of all runs, curve by curve."""
        return [Path(run.folder) for curve in self.curves for row in curve.outcomes for run in row if run.folder]

    def to_json(self) -> dict[str, Any]:
        """Return the sweep as strict JSON data."""
        pairs = [
            {
                "arm": curve.arm.label,
                "baseline": self.at(curve.size)[0].arm.label,
                "quantity": quantity,
                **pair.to_json(),
            }
            for curve in self.curves
            for quantity, pair in self.pairs.get(curve.arm.label, {}).items()
        ]
        return strict(
            {
                "workload": self.workload,
                "metric": "loss",
                "level": LEVEL,
                "lrs": self.lrs,
                "seeds": self.seeds,
                "widths": self.widths,
                "depths": self.depths,
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
    widths: Sequence[int] = (),
    depths: Sequence[int] = (),
    seeds: int | Sequence[int] = 1,
    steps: int | None = None,
    workers: int = 2,
    text: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Sweep:
    """Train a workload at every learning rate and size, for each arm and with each set of remedies.

    Runs that are already in `folder` are not repeated. The result is also written to `FOLDER/sweep.json`.

    Args:
        workload: a workload's name.
        lrs: learning rates; evenly spaced in log for S to mean what the paper defines (`log_grid`).
        folder: where runs and results go.
        remedies: sets of method names; each set gives a curve, on top of the first arm.
        arms: arms, or their texts (`"lion,weight_decay=0.1"`), for a curve each; the first is the baseline. Default the
            workload's own settings.
        widths: widths of the model, for a curve of every arm at each, and at each depth; none keeps the workload's
            own.
        depths: depths of the model, likewise.
        seeds: how many runs at each point, or which seeds.
        steps: training steps, instead of the workload's own.
        workers: processes.
        text: a file or folder of text for language models.
        progress: called as steps and runs finish.

    Returns:
        The curves and their sensitivities.

    Raises:
        UsageError: if the learning rates, arms, remedies, sizes, seeds or workload are not usable.
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
    grown = sizes(widths, depths, sides)
    arms_at = {(size, side.label): size.of(side, job_of) for size in grown for side in sides}
    for arm in arms_at.values():
        arm.check(job_of)
    chosen = seed_list(seeds)
    # Seeds outside: whatever is finished when time runs out is whole curves.
    points = [(seed, size, lr, side.label) for seed in chosen for size in grown for lr in grid for side in sides]
    jobs = [
        training_job(job_of, arms_at[size, label].settings.replace(lr=lr, seed=seed), text)
        for seed, size, lr, label in points
    ]
    found = dict(zip(points, run_all(jobs, folder, workers=workers, progress=progress), strict=True))
    curves = tuple(
        Curve(arm, grid, tuple(tuple(found[seed, size, lr, label] for seed in chosen) for lr in grid), label, size)
        for (size, label), arm in arms_at.items()
    )
    firsts = {curve.size: curve for curve in reversed(curves)}
    pairs = {curve.arm.label: _pairs(firsts[curve.size], curve) for curve in curves if curve is not firsts[curve.size]}
    result = Sweep(workload, grid, chosen, curves, pairs, tuple(sorted(widths)), tuple(sorted(depths)))
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
