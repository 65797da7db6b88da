"""The multi-level V-cycle on a small language model: compute to the loss of training from scratch.

Run: python benchmarks/multi_level.py
Writes benchmarks/results/multi_level.json. Fixed before any run: a causal transformer on bytes (4 blocks, width 64,
4 heads) is trained for S = 240 steps of batch 8 with warm-up and cosine decay: the baseline. The V-cycle trains it for
24 steps, coalesces it (2 blocks, width 32, 2 heads), trains that for 120 steps at twice the rate, maps it back with
alpha = 0.5 and trains on for some share of S with a cosine of its own length. Compute is 6 N + 12 B L D per token
(N the parameters in matrices, B the blocks, L the context, D the width), all phases counted.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import torch
from _common import one_thread, write
from torch import nn

from trimtab.compare import paired
from trimtab.schedule import GrowthSchedule, ScheduleLR, VCycle, cosine, pre_ln_layout
from trimtab.schedule._shape import Shape
from trimtab.workloads import workload
from trimtab.workloads.lm import LanguageModel
from trimtab.workloads.workload import seeded

STEPS, FIRST, SMALL, BATCH, CONTEXT = 240, 24, 120, 8, 64
SHARES = (0.5, 0.75)
LR = 0.01
SEEDS = range(3)


def flops(model: nn.Module) -> float:
    """Return the compute of a training step."""
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "position" not in name)
    width, blocks = model.embedding.embedding_dim, len(model.blocks)
    return (6.0 * matrices + 12.0 * blocks * CONTEXT * width) * BATCH * CONTEXT


def adamw(model: nn.Module, lr: float = LR) -> torch.optim.Optimizer:
    """Return the optimizer of every phase."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, rate: Shape, seed: int, first: int, steps: int) -> float:
    """Train for some steps, the batches going on from the step `first`; return the compute."""
    lm = workload("lm-small")
    scheduler = ScheduleLR(optimizer, rate)
    for step in range(first, first + steps):
        inputs, targets = lm.batch(seed, step, BATCH)
        optimizer.zero_grad()
        lm.loss(model(inputs), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return steps * flops(model)


def one_seed(seed: int) -> dict[str, Any]:
    """Return losses and compute of the baseline, and of V-cycles and shorter baselines of each length."""
    lm = workload("lm-small")

    def large() -> nn.Module:
        with seeded(seed):
            return LanguageModel(64, CONTEXT)

    def small() -> nn.Module:
        with seeded(seed):
            return LanguageModel(32, CONTEXT, layers=2, heads=2)

    result: dict[str, Any] = {}
    model = large()
    cost = fit(model, adamw(model), cosine(STEPS, warmup=STEPS // 10), seed, 0, STEPS)
    result["baseline"] = {"loss": lm.evaluate(model)["loss"], "flops": cost}

    cycle = VCycle(pre_ln_layout(), small, large)
    growth = GrowthSchedule({1: cycle.down, 2: cycle.up}, adamw)
    model = large()
    model, optimizer = growth.step(model, adamw(model))
    spent = fit(model, optimizer, Shape("warm-up", lambda t: min(1, (t + 1) / FIRST), None, ()), seed, 0, FIRST)
    model, optimizer = growth.step(model, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 2 * LR
    spent += fit(model, optimizer, cosine(SMALL, warmup=SMALL // 20, floor=0.5), seed, FIRST, SMALL)
    result["small"] = {"loss": lm.evaluate(model)["loss"], "flops": spent}
    model, _ = growth.step(model, optimizer)
    mapped = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result["mapped back"] = {"loss": lm.evaluate(model)["loss"], "flops": spent}
    for share in SHARES:
        steps = round(share * STEPS)
        again = large()
        again.load_state_dict(mapped)
        cost = spent + fit(again, adamw(again), cosine(steps, warmup=steps // 20), seed, FIRST + SMALL, steps)
        result[f"v-cycle, {share:g} S"] = {"loss": lm.evaluate(again)["loss"], "flops": cost}
        steps = round(cost / flops(again))
        if steps < STEPS:
            scratch = large()
            cost = fit(scratch, adamw(scratch), cosine(steps, warmup=steps // 10), seed, 0, steps)
            result[f"scratch, compute of {share:g} S"] = {"loss": lm.evaluate(scratch)["loss"], "flops": cost}
    print(seed, json.dumps(result), flush=True)
    return result


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means over seeds, and each arm paired with the baseline and with training from scratch."""
    base = statistics.fmean(row["baseline"]["flops"] for row in seeds)
    result: dict[str, Any] = {}
    for arm in seeds[0]:
        losses = [row[arm]["loss"] for row in seeds]
        compute = statistics.fmean(row[arm]["flops"] for row in seeds) / base
        result[arm] = {"loss": statistics.fmean(losses), "compute of the baseline's": compute}
        if arm != "baseline":
            result[arm]["against the baseline"] = str(paired([row["baseline"]["loss"] for row in seeds], losses))
        scratch = arm.replace("v-cycle,", "scratch, compute of")
        if arm.startswith("v-cycle") and scratch in seeds[0]:
            same = [row[scratch]["loss"] for row in seeds]
            result[arm]["against scratch at equal compute"] = str(paired(same, losses))
        print(arm, result[arm], flush=True)
    return result


def main() -> None:
    """Run all seeds and write the result."""
    one_thread()
    seeds = [one_seed(seed) for seed in SEEDS]
    write("multi_level", {"summary": summary(seeds), "seeds": seeds})


if __name__ == "__main__":
    main()
