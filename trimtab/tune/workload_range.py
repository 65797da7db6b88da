"""The learning-rate range test on a workload, with the model, optimizer and loss that its run would have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trimtab.tune.lr_range import LRRange, lr_range_test
from trimtab.workloads import Settings, Workload
from trimtab.workloads import workload as find_workload
from trimtab.workloads.session import Session
from trimtab.workloads.workload import seeded

__all__ = ["workload_lr_range"]


def workload_lr_range(
    workload: Workload | str,
    settings: Settings | None = None,
    *,
    lowest: float = 1e-7,
    highest: float = 10.0,
    steps: int = 100,
    mode: str = "exponential",
    progress: Callable[[int, int, float], None] | None = None,
    text: str | Path | None = None,
) -> LRRange:
    """Run the range test on a workload, with its own batches, optimizer, remedies and clipping, without its schedule.

    Args:
        workload: a workload or its name.
        settings: of the run; the workload's defaults if left out. Learning rate, steps and schedule play no part.
        lowest: first rate, above 0.
        highest: last rate, above `lowest`.
        steps: optimizer steps, at least 10.
        mode: "exponential" or "linear".
        progress: called after each step with the steps done, the steps in all and the loss.
        text: a file or folder of text, for language models.

    Returns:
        What the test found; a pure function of the arguments.

    Raises:
        UsageError: if a setting or an argument cannot be used.

    Example:
        >>> found = workload_lr_range("digits-mlp", steps=40)
        >>> found.stopped_because, 1e-4 < found.suggestion < found.largest_stable
        ('diverged', True)
    """
    if isinstance(workload, str):
        workload = find_workload(workload)
    workload.prepare(text)
    asked = settings or workload.defaults
    with seeded(asked.seed):
        run = Session(workload, asked, {})

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            inputs, targets = batch
            return run.loss(model(inputs), targets)

        return lr_range_test(
            run.model,
            run.optimizer,
            loss,
            _Batches(workload, asked),
            lowest=lowest,
            highest=highest,
            steps=steps,
            mode=mode,
            clip=run.settings.clip,
            progress=progress,
        )


class _Batches:
    """The batches of a run, from its first step on and without end."""

    def __init__(self, workload: Workload, settings: Settings) -> None:
        self._take = workload.batch
        self._seed, self._size = settings.seed, settings.batch_size

    def __iter__(self) -> Iterator[Any]:
        step = 0
        while True:
            yield self._take(self._seed, step, self._size)
            step += 1
