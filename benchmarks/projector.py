"""Cost of a new subspace: eigenvectors of the Gram matrix against a singular value decomposition, in CPU seconds.

Run: python benchmarks/projector.py [--repetitions 9]
Writes benchmarks/results/projector.json. At 2048 x 512 and rank 128 the bound is a third of the decomposition's time.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from _common import interleaved, one_thread, ratio, write

from trimtab.optim.projected._projection import top_subspace

SHAPES = ((2048, 512), (512, 2048), (1024, 1024), (512, 128))
RANK = 128
BOUND = 1 / 3


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    one_thread()
    rows: list[dict[str, Any]] = []
    for m, n in SHAPES:
        g = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
        side, rank = "right" if m >= n else "left", min(RANK, min(m, n) // 4)
        arms = {
            "top_subspace": partial(top_subspace, g, rank, side),
            "svd": partial(torch.linalg.svd, g, full_matrices=False),
        }
        seconds = interleaved(arms, repetitions=arguments.repetitions, warmup=1)
        _, _, vh = torch.linalg.svd(g.double(), full_matrices=False)
        u, _, _ = torch.linalg.svd(g.double(), full_matrices=False)
        exact = vh[:rank].mT if side == "right" else u[:, :rank]
        # The sine of the largest angle between the two subspaces.
        found = top_subspace(g, rank, side).double()
        apart = torch.linalg.matrix_norm(found - exact @ (exact.mT @ found), ord=2)
        row = {
            "shape": [m, n],
            "rank": rank,
            "milliseconds": {name: 1e3 * sorted(values)[len(values) // 2] for name, values in seconds.items()},
            "ratio": ratio(seconds, "top_subspace", "svd"),
            "sine_of_largest_angle": float(apart),
        }
        rows.append(row)
        print(f"{m} x {n}, rank {rank}: {row['ratio']['median']:.3f} of the decomposition's time")
    print(write("projector", {"bound": BOUND, "rows": rows}))


if __name__ == "__main__":
    main()
