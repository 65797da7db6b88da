"""What the schedules of other things than the learning rate do: lengths, batches, images and frozen layers.

Run: python benchmarks/curricula.py [--parts length,batch,images,freezing]
Writes benchmarks/results/curricula.json, part by part. Fixed before any run: every setting below. Nothing is tuned for
a method, and every arm of a part has the same weights and batches for a seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from _common import RESULTS, one_thread, write
from torch import Tensor, nn

from trimtab.compare import paired
from trimtab.schedule import (
    BatchSizeSampler,
    LayerFreezing,
    ScheduleLR,
    cosine,
    efficient_train,
    increase_batch,
    length_warmup,
    low_frequency,
    progressive_stages,
    resize_images,
    set_dropout,
)
from trimtab.schedule._shape import Shape
from trimtab.schedule._sizes import Sizes
from trimtab.workloads import train, workload

SEEDS, FEWER = range(5), range(3)


Rows = dict[str, list[dict[str, float]]]


def against(rows: Rows, baseline: str, metrics: Iterable[tuple[str, bool]]) -> dict[str, Any]:
    """Return the means of each arm and its paired comparison with the baseline, metric by metric."""
    result: dict[str, Any] = {}
    for arm, values in rows.items():
        result[arm] = {"mean": {name: statistics.fmean(row[name] for row in values) for name in values[0]}}
        if arm != baseline:
            for metric, higher in metrics:
                pair = [[row[metric] for row in rows[name]] for name in (baseline, arm)]
                result[arm][metric] = str(paired(*pair, higher_is_better=higher))
        print(arm, json.dumps(result[arm]), flush=True)
    return result


def length() -> dict[str, Any]:
    """Length warm-up on lm-small at learning rates too high for it: final loss, and the paper's loss ratios."""
    result: dict[str, Any] = {}
    lm = workload("lm-small")
    for lr in (0.1, 0.01):
        rows: Rows = {"full length": [], "length-warmup": []}
        for seed, (name, values) in itertools.product(FEWER, rows.items()):
            settings = lm.defaults.replace(lr=lr, steps=240, batch_size=8, seed=seed)
            settings = settings.replace(remedies=("length-warmup",) if name == "length-warmup" else ())
            losses: list[float] = []
            start = time.process_time()
            outcome = train(lm, settings, progress=lambda step, steps, loss, losses=losses: losses.append(loss))
            spent = time.process_time() - start
            # Loss ratio: a step's loss over the least of those before it; above 1.2 is the paper's sign of instability.
            least = itertools.accumulate(losses, min)
            ratios = [loss / before for loss, before in zip(losses[1:], least, strict=False)]
            schedule = length_warmup(64, ramp=72 if name == "length-warmup" else 0)
            values.append(
                {
                    "loss": outcome.loss,
                    "steps with loss ratio above 1.2": sum(ratio > 1.2 for ratio in ratios),
                    "largest loss ratio": max(ratios),
                    "tokens": 8 * sum(schedule(step) for step in range(240)),
                    "cpu seconds": spent,
                }
            )
        result[f"lr={lr}"] = against(rows, "full length", [("loss", False), ("steps with loss ratio above 1.2", False)])
    return result


def batch() -> dict[str, Any]:
    """Smith et al.'s growing batch on digits-mlp with SGD: 15 epochs, a decay by 5 at epochs 6, 9 and 12."""
    digits = workload("digits-mlp")
    data = digits.data
    count = len(data.train_inputs)

    def sizes_of(per_stage: list[int]) -> list[int]:
        return [
            size for epochs, size in zip((6, 3, 3, 3), per_stage, strict=True) for _ in range(epochs * (count // size))
        ]

    def run(seed: int, grow: bool) -> dict[str, float]:
        stages = [32, 160, 800, 800] if grow else [32] * 4
        steps = [len(sizes_of(stages[:i] + [10**9] * (4 - i))) for i in range(5)]
        decay = Shape("steps", lambda step: 0.2 ** sum(step >= first for first in steps[1:4]), steps[4], ())
        sizes, rate = increase_batch(decay, 32, largest=800) if grow else (Sizes("32", lambda _: 32, 32, 0, ()), decay)
        model = digits.model(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        scheduler = ScheduleLR(optimizer, rate)
        sampler = BatchSizeSampler(count, sizes, seed=seed)
        done, start = 0, time.process_time()
        while done < steps[4]:
            for chosen in itertools.islice(sampler, steps[4] - done):
                optimizer.zero_grad()
                digits.loss(model(data.train_inputs[chosen]), data.train_targets[chosen]).backward()
                optimizer.step()
                scheduler.step()
                done += 1
        spent = time.process_time() - start
        return {**digits.evaluate(model), "updates": done, "cpu seconds": spent}

    rows = {name: [run(seed, name == "growing batch") for seed in FEWER] for name in ("decaying rate", "growing batch")}
    return against(rows, "decaying rate", [("accuracy", True), ("loss", False)])


def cnn() -> nn.Module:
    """Build a network that takes images of any size from 4 pixels on."""
    layers: list[nn.Module] = []
    for width, out in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    layers += [nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 10))


def images() -> dict[str, Any]:
    """Progressive learning and EfficientTrain on 8 x 8 digits with a convolutional network of any input size."""
    digits, steps = workload("digits-cnn"), 300
    data = digits.data
    stages = progressive_stages(steps, sizes=(4, 8), regularization={"dropout": (0.1, 0.3)})
    bands = efficient_train(8, steps).band
    arms: dict[str, Callable[[int], int]] = {
        "full size": lambda step: 8,
        "sizes and dropout": lambda step: stages(step).size,
        "sizes alone": lambda step: stages(step).size,
        "efficient-train": bands,
        "full size, 64 % of the steps": lambda step: 8,
    }

    def run(name: str, seed: int) -> dict[str, float]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = cnn()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01)
        total = round(0.64 * steps) if "%" in name else steps
        scheduler = ScheduleLR(optimizer, cosine(total, warmup=total // 10))
        cost, start = 0, time.process_time()
        torch.manual_seed(seed)
        for step in range(total):
            inputs, targets = digits.batch(seed, step, 64)
            x, size = inputs.view(-1, 1, 8, 8), arms[name](step)
            x = low_frequency(x, size) if name == "efficient-train" else resize_images(x, size)
            if name == "sizes and dropout":
                set_dropout(model, stages(step).strengths["dropout"])
            cost += size**2
            optimizer.zero_grad()
            F.cross_entropy(model(x), targets).backward()
            optimizer.step()
            scheduler.step()
        spent = time.process_time() - start
        model.eval()
        with torch.no_grad():
            logits = model(data.test_inputs.view(-1, 1, 8, 8))
        accuracy = float((logits.argmax(1) == data.test_targets).float().mean())
        loss = float(F.cross_entropy(logits, data.test_targets))
        return {"accuracy": accuracy, "loss": loss, "pixels": cost / (64 * steps), "cpu seconds": spent}

    rows = {name: [run(name, seed) for seed in SEEDS] for name in arms}
    return against(rows, "full size", [("accuracy", True), ("loss", False)])


def saved_bytes(model: nn.Module, inputs: Tensor, targets: Tensor) -> int:
    """Return the bytes of activations that a forward pass keeps for the backward pass."""
    seen: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.cross_entropy(model(inputs), targets)
    return sum(seen.values())


def freezing() -> dict[str, Any]:
    """Fine-tune digits-vit, trained on mirrored digits, on upright ones with a share of its layers frozen a step."""
    digits = workload("digits-vit")
    flipped = torch.arange(64).view(8, 8).flip(1).flatten()
    rates = {"nothing frozen": 0.0, "half frozen": 0.5, "90 % frozen": 0.9}

    def fit(model: nn.Module, seed: int, steps: int, lr: float, mirror: bool, rate: float) -> dict[str, float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
        scheduler = ScheduleLR(optimizer, cosine(steps, warmup=steps // 10))
        kept: list[int] = []
        start = time.process_time()
        with LayerFreezing(model, optimizer, rate=rate, keep=("head.*",), seed=seed) as freeze:
            for step in range(steps):
                inputs, targets = digits.batch(seed, step, 64)
                inputs = inputs[:, flipped] if mirror else inputs
                if step % 20 == 10:
                    kept.append(saved_bytes(model, inputs, targets))
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
                scheduler.step()
                freeze.step()
        spent = time.process_time() - start
        metrics = {name: digits.evaluate(model)[name] for name in ("accuracy", "loss")}
        return {**metrics, "saved activations, kB": statistics.fmean(kept) / 1e3, "cpu seconds": spent}

    rows: Rows = {"before": [], **{name: [] for name in rates}}
    for seed in FEWER:
        torch.manual_seed(seed)
        base = digits.model(seed)
        fit(base, seed, 150, 0.01, True, 0.0)
        rows["before"].append({name: digits.evaluate(base)[name] for name in ("accuracy", "loss")})
        for name, rate in rates.items():
            model = digits.model(seed)
            model.load_state_dict(base.state_dict())
            torch.manual_seed(seed)
            rows[name].append(fit(model, seed, 100, 0.003, False, rate))
    before = rows.pop("before")
    result = against(rows, "nothing frozen", [("accuracy", True), ("loss", False)])
    result["before fine-tuning"] = {"mean": {key: statistics.fmean(row[key] for row in before) for key in before[0]}}
    return result


PARTS = {"images": images, "freezing": freezing, "batch": batch, "length": length}


def main() -> None:
    """Run the parts and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS))
    chosen = parser.parse_args().parts.split(",")
    one_thread()
    path = RESULTS / "curricula.json"
    result = json.loads(path.read_text(encoding="utf-8"))["result"] if path.exists() else {}
    for name in chosen:
        start = time.process_time()
        print(f"== {name}", flush=True)
        result[name] = {**PARTS[name](), "cpu seconds in all": math.ceil(time.process_time() - start)}
        write("curricula", result)


if __name__ == "__main__":
    main()
