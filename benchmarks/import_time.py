"""How long `import trimtab` takes beyond `import torch`: fresh processes, median of 11, bound 0.3 s.

`bare` is the import statement alone; `public names` also resolves every name of `trimtab.__all__`, which loads the
rooms behind them; `all rooms` loads every room, with the libraries that each needs.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

from _common import one_thread, write

BOUND = 0.3
REPETITIONS = 11
USES = {
    "bare": "import trimtab",
    "public names": "import trimtab\nfor name in trimtab.__all__: getattr(trimtab, name)",
    "all rooms": "import trimtab\nfor name in trimtab._ROOMS: getattr(trimtab, name)",
}
PROBE = """
import time
import torch
wall, cpu = time.perf_counter(), time.process_time()
{use}
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def seconds(use: str) -> tuple[float, float]:
    """Return wall and CPU seconds of a use in a fresh process that has imported torch."""
    command = [sys.executable, "-c", PROBE.format(use=use)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]).stdout
    wall, cpu = output.split()
    return float(wall), float(cpu)


def main() -> int:
    """Measure, write the result and say whether the bound holds."""
    one_thread()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in USES}
    for repetition in range(REPETITIONS + 1):
        for name, use in USES.items():
            sample = seconds(use)
            if repetition:  # the first fills the file cache and the byte-code cache
                samples[name].append(sample)
    result = {
        name: {
            "wall_seconds": statistics.median(wall for wall, _ in found),
            "cpu_seconds": statistics.median(cpu for _, cpu in found),
            "worst_wall_seconds": max(wall for wall, _ in found),
        }
        for name, found in samples.items()
    }
    holds = result["bare"]["wall_seconds"] <= BOUND and result["public names"]["wall_seconds"] <= BOUND
    path = write("import_time", {"bound_seconds": BOUND, "holds": holds, "repetitions": REPETITIONS, "uses": result})
    for name, figures in result.items():
        print(f"{name:13} {figures['wall_seconds']:.3f} s wall, {figures['cpu_seconds']:.3f} s CPU")
    print(f"bound {BOUND} s {'holds' if holds else 'is broken'}; written to {path}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
