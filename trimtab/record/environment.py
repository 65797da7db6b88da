"""The facts about machine and versions that a run's record, a comparison's results and the benchmarks keep."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Return what a run's numbers depend on besides its settings, as plain data.

    Example:
        >>> environment()["torch"] == torch.__version__
        True
    """
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
        "trimtab": sys.modules["trimtab"].__version__,
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


@functools.cache
def processor() -> str:
    """Return the CPU's model where the system tells it: kernels, and so roundings, differ between CPUs."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()
