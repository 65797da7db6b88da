"""Mirror a record to TensorBoard."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import require
from trimtab.integrations.loggers.mirror import Mirror


class TensorBoardMirror(Mirror):
    """Write a record's signals as TensorBoard scalars.

    Args:
        folder: where the event file goes.
        signals: names of the signals to mirror; all of them by default.
        **options: passed to `torch.utils.tensorboard.SummaryWriter`; a resumed run gives `purge_step`.

    Raises:
        MissingExtraError: if TensorBoard is not installed.

    Example:
        >>> import tempfile
        >>> from trimtab.record import Recorder
        >>> folder = Path(tempfile.mkdtemp())
        >>> with Recorder(folder, listeners=[TensorBoardMirror(folder / "tensorboard")]) as recorder:
        ...     recorder.log(0, "loss", 5.5)
        >>> len(list((folder / "tensorboard").glob("events.*")))
        1
    """

    def __init__(self, folder: str | Path, *, signals: Collection[str] | None = None, **options: Any) -> None:
        super().__init__(signals=signals)
        require("tensorboard", extra="tensorboard")
        module = require("torch.utils.tensorboard", extra="tensorboard")
        self._writer = module.SummaryWriter(log_dir=str(folder), **options)

    def put(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write one step's numbers."""
        for tag, value in numbers.items():
            self._writer.add_scalar(tag, value, global_step=step)

    def finish(self) -> None:
        """Write what is buffered and close the file."""
        self._writer.close()
