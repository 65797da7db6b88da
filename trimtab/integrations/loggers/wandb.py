"""Mirror a record to Weights & Biases, offline unless asked otherwise."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import choose, require
from trimtab.integrations.loggers.mirror import Mirror


class WandbMirror(Mirror):
    """Log a record's signals to Weights & Biases.

    Nothing leaves the machine by default: the run is written to `folder` and may be uploaded later with `wandb sync`.
    Error reporting is off, and neither the console, the code nor the git state is captured.

    Args:
        folder: where the run's files go.
        project: the project's name.
        name: the run's name; Weights & Biases makes one up by default.
        config: settings to show beside the run.
        mode: `"offline"` or `"online"`.
        signals: names of the signals to mirror; all of them by default.
        **options: passed to `wandb.init`.

    Raises:
        MissingExtraError: if wandb is not installed.
        UsageError: if the mode is another.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        project: str = "trimtab",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        mode: str = "offline",
        signals: Collection[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(signals=signals)
        choose("mode", mode, ("offline", "online"))
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb = require("wandb", extra="wandb")
        Path(folder).mkdir(parents=True, exist_ok=True)
        options.setdefault("settings", wandb.Settings(console="off", silent=True, disable_git=True, save_code=False))
        self._run = wandb.init(
            dir=str(folder), project=project, name=name, config=dict(config or {}), mode=mode, **options
        )
        # Steps of its own: Weights & Biases drops what it gets for an earlier step, as an evaluation logged late.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def put(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log one step's numbers."""
        self._run.log({**numbers, "step": step})

    def finish(self) -> None:
        """Close the run."""
        self._run.finish()
