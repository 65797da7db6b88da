"""Time and peak memory of the loss of a language model's head, forward and backward, over vocabulary sizes.

    python benchmarks/cross_entropy.py [--tokens 4096] [--width 512] [--repetitions 3]

Each way runs in a process of its own, in turns, on one thread. Peak memory is the highest resident set during the loss
and its gradients, less the resident set before: it holds the gradients of hidden states and weight, which every way
must make, and which are also given by themselves. `dense` is torch's cross_entropy of all logits; `chunked` calls it on
slices of tokens with activation checkpointing; `cut` and `cut, recompute` are trimtab's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from _common import one_thread, write
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trimtab.losses import linear_cross_entropy

VOCABULARIES = (32_768, 65_536, 131_072)
CHUNK = 512


def dense(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits at once."""
    return F.cross_entropy(hidden @ weight.T, targets)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The usual way to save memory: slices of tokens whose logits the backward pass computes again."""
    total = sum(
        checkpoint(lambda h, w, t: F.cross_entropy(h @ w.T, t, reduction="sum"), h, weight, t, use_reentrant=False)
        for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    )
    return total / len(targets)


def cut(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Blocks, each computed once."""
    return linear_cross_entropy(hidden, weight, targets)


def cut_recompute(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Blocks, computed again for the gradients."""
    return linear_cross_entropy(hidden, weight, targets, recompute=True)


WAYS = {"dense": dense, "chunked": chunked, "cut": cut, "cut, recompute": cut_recompute}


def measure(way: str, vocabulary: int, tokens: int, width: int) -> dict[str, float]:
    """Return CPU seconds, peak bytes and the loss of one forward and backward pass."""
    one_thread()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    WAYS[way](hidden[:64], weight[:256], targets[:64] % 256).backward()  # warm up
    hidden.grad = weight.grad = None
    before = _resident()
    began = time.process_time()
    loss = WAYS[way](hidden, weight, targets)
    loss.backward()
    seconds = time.process_time() - began
    return {"seconds": seconds, "peak_bytes": _peak() - before, "loss": float(loss.detach())}


def _resident() -> int:
    """Return the resident bytes of this process, and begin to count its peak anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _in_child(way: str, vocabulary: int, tokens: int, width: int) -> dict[str, float]:
    arguments = ["--measure", way, "--vocabulary", str(vocabulary), "--tokens", str(tokens), "--width", str(width)]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=list(VOCABULARIES))
    parser.add_argument("--measure", choices=WAYS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure, given.vocabulary[0], given.tokens, given.width)))
        return
    rows = []
    for vocabulary in given.vocabulary:
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for repetition in range(given.repetitions):
            for way in WAYS if repetition % 2 == 0 else reversed(WAYS):
                runs[way].append(_in_child(way, vocabulary, given.tokens, given.width))
        gradients = 4 * given.width * (vocabulary + given.tokens)
        for way, found in runs.items():
            seconds = [mine["seconds"] / base["seconds"] for mine, base in zip(found, runs["dense"], strict=True)]
            peak = statistics.median(run["peak_bytes"] for run in found)
            dense_peak = statistics.median(run["peak_bytes"] for run in runs["dense"])
            row = {
                "vocabulary": vocabulary,
                "way": way,
                "seconds": statistics.median(run["seconds"] for run in found),
                "time_against_dense": statistics.median(seconds),
                "peak_mib": peak / 2**20,
                "gradients_mib": gradients / 2**20,
                "dense_memory_against_it": dense_peak / peak,
                "without_gradients": (dense_peak - gradients) / max(peak - gradients, 2**20),
                "loss": found[0]["loss"],
            }
            rows.append(row)
            print(
                f"{vocabulary:>7} {way:<15} {row['seconds']:7.2f} s ({row['time_against_dense']:.2f} of dense)  "
                f"{row['peak_mib']:8.0f} MiB (dense is {row['dense_memory_against_it']:.1f}x, without gradients "
                f"{row['without_gradients']:.1f}x)",
                flush=True,
            )
        settings = {"tokens": given.tokens, "width": given.width, "repetitions": given.repetitions}
        print("written:", write("cross_entropy", {**settings, "rows": rows}), flush=True)


if __name__ == "__main__":
    main()
