"""Agreement of trimtab's optimizers with other implementations: identical gradient streams, with spikes and decay.

Run: python benchmarks/conformance.py [--only NAME ...]
Writes benchmarks/results/conformance.json. Each pair trains the same parameters on the same 150 gradients, two of them
spikes a thousand times as large. The drift is |theirs - ours| / |ours - start| at the end, the largest over parameters.
Peers that are not installed are rows that say so. Why a peer differs is written beside it in `peers.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import warnings
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from _common import one_thread, write
from peers import PAIRS, Pair
from torch import Tensor, nn

from trimtab.scalars import to_scalar

STEPS = 150
SPIKES = (60, 111)


def stream(p: Tensor, step: int, place: int) -> Tensor:
    """Return a gradient: noise around a slowly turning direction, so that moments matter."""
    generator = torch.Generator().manual_seed(1000 * step + place)
    noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    turning = torch.cos(torch.arange(p.numel(), dtype=torch.float64).view(p.shape) + step / 20)
    scale = 1000.0 if step in SPIKES else 1.0
    return (scale * (noise + turning)).to(p.dtype)


def trained(make: Any, pair: Pair) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters before and after the stream."""
    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(pair.dtype))
        for shape in pair.shapes
    ]
    start = [p.detach().clone() for p in params]
    optimizer = make(params)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for step in range(STEPS):
        for place, p in enumerate(params):
            p.grad = stream(p.detach(), step, place)
        optimizer.step()
    return start, [p.detach() for p in params]


def drift(pair: Pair) -> float:
    """Return the largest relative distance between the two ends."""
    start, ours = trained(pair.ours, pair)
    _, theirs = trained(pair.theirs, pair)
    return max(drifts(start, ours, theirs))


def drifts(start: Iterable[Tensor], ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> Iterable[float]:
    """Return the relative distance of each parameter."""
    for x, a, b in zip(start, ours, theirs, strict=True):
        yield to_scalar((b.double() - a.double()).norm() / (a.double() - x.double()).norm())


def row(pair: Pair) -> dict[str, Any]:
    """Measure one pair."""
    facts: dict[str, Any] = {"ours": pair.name, "peer": pair.peer, "settings": pair.settings, "bound": pair.bound}
    facts["dtype"] = str(pair.dtype).removeprefix("torch.")
    try:
        facts["version"] = version(pair.package)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            facts["drift"] = drift(pair)
    except PackageNotFoundError:
        return facts | {"verdict": "not installed"}
    except Exception as error:  # a peer that fails is a finding, not the end
        return facts | {"verdict": f"fails: {type(error).__name__}: {str(error).splitlines()[0][:160]}"}
    agrees = facts["drift"] <= pair.bound
    facts["verdict"] = "agrees" if agrees else "differs"
    facts["why"] = "" if agrees else pair.why or "not explained"
    return facts


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="pairs whose name or peer contains one of these")
    arguments = parser.parse_args()
    one_thread()
    rows = []
    for pair in PAIRS:
        if arguments.only and not any(part in f"{pair.name} {pair.peer}" for part in arguments.only):
            continue
        facts = row(pair)
        rows.append(facts)
        found = f"{facts['drift']:.1e}" if "drift" in facts else ""
        print(f"{pair.name:24} {pair.peer:44} {pair.settings:40} {found:8} {facts['verdict']}", flush=True)
    if not arguments.only:
        write("conformance", {"steps": STEPS, "spikes": SPIKES, "rows": rows})


if __name__ == "__main__":
    main()
