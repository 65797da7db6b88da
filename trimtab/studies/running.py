"""Run one arm of a study on one seed, as a job of a worker process."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from trimtab.errors import RunFailedError


def run(arguments: Mapping[str, Any], folder: Path, report: Callable[[int, float], None]) -> dict[str, float]:
    """Return the metrics of a study and, as `cpu_seconds`, what they cost.

    Args:
        arguments: the `study`'s import path, its `seed` and its `options`.
        folder: unused: studies write nothing.
        report: unused: a study is one step.

    Raises:
        RunFailedError: if a metric is not a finite number, which no comparison could use.
    """
    module, _, name = arguments["study"].partition(":")
    function = getattr(importlib.import_module(module), name)
    began = time.process_time()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments["seed"])
        metrics = {key: float(value) for key, value in function(arguments["seed"], **arguments["options"]).items()}
    for key, value in metrics.items():
        if not math.isfinite(value):
            raise RunFailedError(f"{name}: {key} is {value}: a study counts what diverged at its worst finite value.")
    return {**metrics, "cpu_seconds": time.process_time() - began}
