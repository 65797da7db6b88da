"""What the benchmarks share: one thread, interleaved CPU-time measurement, results with the machine they came from."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab.record.environment import environment

RESULTS = Path(__file__).parent / "results"


def one_thread() -> None:
    """Compute on one torch thread, so that CPU seconds mean the same on every machine."""
    torch.set_num_threads(1)


def write(name: str, result: Mapping[str, Any], *, folder: Path = RESULTS) -> Path:
    """Write a benchmark's result as `results/NAME.json` with the command and the environment it came from."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    document = {"benchmark": name, "command": command, "environment": environment(), "result": dict(result)}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return path


def interleaved(
    arms: Mapping[str, Callable[[], object]], *, repetitions: int = 11, warmup: int = 2
) -> dict[str, list[float]]:
    """Measure the CPU seconds of each arm, repetition by repetition side by side.

    The arms take turns, and the turn is reversed every other time, so that a slow spell of the machine falls on all of
    them alike.
    """
    names = list(arms)
    for name in names * warmup:
        arms[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(repetitions):
        for name in names if repetition % 2 == 0 else reversed(names):
            start = time.process_time()
            arms[name]()
            seconds[name].append(time.process_time() - start)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], arm: str, baseline: str) -> dict[str, float]:
    """Return the median over repetitions of arm / baseline, with the quartiles of the paired ratios."""
    paired = [a / b for a, b in zip(seconds[arm], seconds[baseline], strict=True)]
    low, middle, high = statistics.quantiles(paired, n=4, method="inclusive")
    return {"median": middle, "quartile_low": low, "quartile_high": high}
