"""Short runs of every workload, and the losses they are known to have.

Regenerate on purpose, after a change that is meant to change the numbers:  python tests/workloads/golden.py [NAME ...]
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from trimtab.record import Run
from trimtab.workloads import train, workload, workloads

FOLDER = Path(__file__).parent / "golden"
STEPS = {"lm-medium": 10, "lm-small": 20}
"""Steps of the short run; 30 for those not named."""


def fingerprint(data_sha256: str) -> dict[str, str]:
    """Return what the numbers depend on to the last digits: data, torch, processor and the instructions torch uses."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "data": data_sha256,
        "torch": torch.__version__,
        "machine": f"{platform.machine()} {processor} {torch.backends.cpu.get_cpu_capability()}".strip(),
    }


def short_run(name: str, folder: Path, *, watch: bool) -> dict[str, Any]:
    """Train a workload for a few steps at its defaults and return what a golden file holds."""
    job = workload(name)
    job.evaluations = 1  # at the end: those along the run change nothing and take most of the time
    settings = job.defaults.replace(steps=STEPS.get(name, 30))
    outcome = train(job, settings, out=folder, watch=watch)
    with Run(folder) as run:
        losses = run.series("loss").flat.tolist()
    return {
        "workload": name,
        "settings": settings.model_dump(mode="json"),
        "fingerprint": fingerprint(job.data.sha256),
        "initial_loss": outcome.initial_loss,
        "losses": losses,
        "metrics": outcome.metrics,
    }


def main() -> None:
    """Write the golden files of the workloads named on the command line, or of all."""
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or [job.name for job in workloads()]:
        with tempfile.TemporaryDirectory() as folder:
            document = short_run(name, Path(folder), watch=False)
        path = FOLDER / f"{name}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(path, document["losses"][0], "->", document["losses"][-1])


if __name__ == "__main__":
    main()
