"""Cost of one optimizer step, as a ratio to torch's fused AdamW in the same run, one thread, interleaved.

Run: python benchmarks/optim.py [--sizes 10 50] [--only NAME ...] [--repetitions 7] [--resume]
Writes benchmarks/results/optim.json after each arm. The first step includes compiling, with an empty cache. `per_byte`
divides the ratio by the bytes that a step must move (state read and written, weight read and written, gradient read),
relative to AdamW's 28 bytes a parameter. Bounds: compiled AdamW 1.05; compiled Lion, RAdam, CAME, SPAM and perpGrad +
AdamW 1.15 per byte; 8-bit AdamW 3; the default path no slower per byte than torch's foreach AdamW. Peers take part
where they are installed. `nonfinite="allow"` is what torch's optimizers do; the default check reads the gradients once
more, and has rows of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from _common import RESULTS, interleaved, one_thread, ratio, write
from torch import nn

from trimtab import optim

WIDTHS = {10: (384, 6), 50: (576, 12)}
"""Width and depth of a transformer with about so many million parameters, vocabulary 1,000."""

LARGE = (
    "torch",
    "bitsandbytes",
    "AdamW,",
    "Lion",
    "RAdam",
    "CAME",
    "SPAM,",
    "perpGrad",
    "GaLore",
    "Muon",
    "8-bit state",
)
"""Arms that the largest size is measured for, by a part of their names: compiling and matrices take their time."""

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def shapes(size: int) -> list[tuple[int, ...]]:
    """Return the parameter shapes of a transformer."""
    d, depth = WIDTHS[size]
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(1000, d), *(shape for _ in range(depth) for shape in block), (d,), (d,)]


def ours() -> dict[str, Make]:
    """Return our arms: the default path and the compiled one of each optimizer."""
    arms: dict[str, Make] = {}

    def both(name: str, cls: str, **options: Any) -> None:
        free = {"nonfinite": "allow", **options}
        arms[f"trimtab {name}"] = lambda params: getattr(optim, cls)(params, **free)
        arms[f"trimtab {name}, compiled"] = lambda params: getattr(optim, cls)(params, compile=True, **free)

    both("AdamW", "AdamW")
    both("AdamW with check", "AdamW", nonfinite="raise")
    both("AdamW, bf16 state", "AdamW", state="bf16")
    both("AdamW, 8-bit state", "AdamW", state="8bit")
    both("AdamW, 8-bit state of 2048", "AdamW", state="8bit-2048")
    both("Lion", "Lion")
    both("SGD", "SGD", momentum=0.9)
    both("RAdam", "RAdam")
    both("CAME", "CAME", lr=1e-4)
    both("SPAM", "SPAM")
    both("StableSPAM", "StableSPAM")
    both("perpGrad AdamW", "PerpGradAdamW")
    both("AdamWScale", "AdamWScale")
    both("ScheduleFreeAdamW", "ScheduleFreeAdamW")
    both("Ranger21", "Ranger21", total_steps=1000)
    both("GaLore rank 128", "GaLoreAdamW", rank=128)
    both("Fira rank 128", "Fira", rank=128)
    both("FRUGAL", "FRUGAL")
    both("Muon", "Muon")
    both("ROOT", "ROOT")
    arms["trimtab Shampoo"] = lambda params: optim.Shampoo(params, nonfinite="allow")
    return arms


def peers() -> dict[str, Make]:
    """Return the arms of torch and of what else is installed."""
    arms: dict[str, Make] = {
        "torch AdamW foreach": lambda params: torch.optim.AdamW(params, foreach=True),
        "torch RAdam foreach": lambda params: torch.optim.RAdam(params, foreach=True),
    }
    try:
        import pytorch_optimizer as po

        def theirs(name: str) -> Make:
            extra = {"num_iterations": 1000} if name == "Ranger21" else {}
            return lambda params: getattr(po, name)(params, lr=1e-4, **extra)

        for name in ("Lion", "CAME", "SPAM", "StableSPAM", "Ranger21"):
            arms[f"pytorch-optimizer {name}"] = theirs(name)
    except ImportError:
        pass
    try:
        import bitsandbytes

        arms["bitsandbytes AdamW8bit"] = lambda params: bitsandbytes.optim.AdamW8bit(params)
    except (ImportError, RuntimeError):
        pass
    try:
        from torchao.optim import AdamW8bit

        arms["torchao AdamW8bit"] = lambda params: AdamW8bit(params)
    except ImportError:
        pass
    return arms


def prepared(make: Make, size: int) -> tuple[Callable[[], object], float, torch.optim.Optimizer, int]:
    """Build an optimizer on fresh parameters; return its step, the seconds of the first one, itself and its size."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in shapes(size)]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 1e-3
    optimizer = make(params)
    if hasattr(optimizer, "train"):
        optimizer.train()
    began = time.perf_counter()
    optimizer.step()
    return optimizer.step, time.perf_counter() - began, optimizer, sum(p.numel() for p in params)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all state tensors, wrapped ones included."""
    total = 0
    for state in optimizer.state.values():
        for value in state.values():
            parts = [value]
            if hasattr(value, "__tensor_flatten__"):
                parts = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
            total += sum(part.numel() * part.element_size() for part in parts if isinstance(part, torch.Tensor))
    return total


def measure(name: str, make: Make, size: int, repetitions: int) -> dict[str, Any]:
    """Measure one arm beside fused AdamW."""
    step, first, optimizer, count = prepared(make, size)
    fused = prepared(lambda params: torch.optim.AdamW(params, fused=True), size)[0]
    seconds = interleaved({name: step, "fused": fused}, repetitions=repetitions)
    kept = state_bytes(optimizer) / count
    moved = 2 * kept + 4 + 8
    result = ratio(seconds, name, "fused")
    return {
        "ratio": result,
        "per_byte": result["median"] * 28 / moved,
        "state_bytes_per_parameter": kept,
        "first_step_seconds": first,
        "ms": 1e3 * sorted(seconds[name])[repetitions // 2],
    }


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 50], choices=sorted(WIDTHS))
    parser.add_argument("--only", nargs="+", default=[], help="arms whose name contains one of these")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--resume", action="store_true", help="keep the rows that the result has")
    arguments = parser.parse_args()
    one_thread()
    path = RESULTS / "optim.json"
    table: dict[str, dict[str, Any]] = {}
    if arguments.resume and path.exists():
        table = json.loads(path.read_text(encoding="utf-8"))["result"]["table"]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for size, name, make in chosen(arguments.sizes, arguments.only):
            rows = table.setdefault(f"{size}M", {})
            if name in rows:
                continue
            try:
                rows[name] = measure(name, make, size, arguments.repetitions)
            except Exception as error:  # a peer that fails is a row that says so
                rows[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            show(size, name, rows[name])
            torch.compiler.reset()
            if not arguments.only:
                write("optim", {"repetitions": arguments.repetitions, "table": table})


def chosen(sizes: Iterable[int], only: list[str]) -> Iterator[tuple[int, str, Make]]:
    """Return the arms to measure, by size."""
    for size in sizes:
        wanted = only or (LARGE if size == max(WIDTHS) else [])
        for name, make in (peers() | ours()).items():
            if not wanted or any(part in name for part in wanted):
                yield size, name, make


def show(size: int, name: str, row: dict[str, Any]) -> None:
    """Print a row."""
    shown = row.get("failed") or (
        f"{row['ratio']['median']:6.2f} x, per byte {row['per_byte']:5.2f}, "
        f"{row['state_bytes_per_parameter']:6.2f} B, first {row['first_step_seconds']:5.1f} s"
    )
    print(f"{size:3}M {name:40} {shown}", flush=True)


if __name__ == "__main__":
    main()
