"""Mirror a record to MLflow, in a local folder unless a server is given."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import require
from trimtab.integrations.loggers.mirror import Mirror

_BATCH = 1000
"""Metrics that one call may carry, by MLflow's interface."""


class MlflowMirror(Mirror):
    """Log a record's signals to MLflow.

    Nothing leaves the machine by default: runs are written to a folder, and MLflow's usage telemetry is switched off.

    Args:
        where: a folder, or the address of a tracking server (`"http://..."`).
        experiment: the experiment's name; made if it is missing.
        name: the run's name; MLflow makes one up by default.
        config: settings, logged as the run's parameters.
        signals: names of the signals to mirror; all of them by default.

    Raises:
        MissingExtraError: if MLflow is not installed.
    """

    def __init__(
        self,
        where: str | Path,
        *,
        experiment: str = "trimtab",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        signals: Collection[str] | None = None,
    ) -> None:
        super().__init__(signals=signals)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        mlflow = require("mlflow", extra="mlflow")
        address = str(where) if "://" in str(where) else Path(where).resolve().as_uri()
        if address.startswith("file:"):
            # MLflow 3 asks for this consent before it writes to a plain folder, the only store that needs no database.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._metric = mlflow.entities.Metric
        self._client = mlflow.MlflowClient(tracking_uri=address)
        found = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if found is None else found.experiment_id
        self._run = self._client.create_run(number, run_name=name).info.run_id
        for key, value in (config or {}).items():
            self._client.log_param(self._run, key, value)

    def put(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log one step's numbers."""
        now = int(1000 * time.time())
        metrics = [self._metric(tag, value, now, step) for tag, value in numbers.items()]
        for start in range(0, len(metrics), _BATCH):
            self._client.log_batch(self._run, metrics=metrics[start : start + _BATCH])

    def finish(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run)
