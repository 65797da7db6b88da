"""The facts about machine and versions that a run's record keeps."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Return versions, platform, threads and accelerator, as plain data.

    Example:
        >>> environment()["torch"] == torch.__version__
        True
    """
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "trimtab": sys.modules["trimtab"].__version__,
    }
