"""Gradient filtering against exact backpropagation: fine-tuned accuracy, cosines, saved bytes, FLOPs and CPU seconds.

A small convolutional net is trained on the digits 0 to 4, upsampled to 16 x 16, then fine-tuned on 5 to 9 with a new
head: its last two convolutions, as the paper fine-tunes the last layers, or all four. Each arm takes the best of three
rates on validation samples (two seeds); five paired seeds with 95 % intervals.

Run: python benchmarks/gradient_filtering.py [--epochs 10] [--seeds 5]
Writes benchmarks/results/gradient_filtering.json. Needs scikit-learn for the digits.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from _common import interleaved, one_thread, ratio, write
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trimtab.optim import gradient_filter

RATES = (0.001, 0.003, 0.01)
CONVOLUTIONS = {"last two": ("4", "6"), "all four": ("0", "2", "4", "6")}
# The layers that are trained besides the head, and how their backward is filtered.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "last two, exact": ("last two", {}),
    "last two, patches of 2": ("last two", {"patch_size": 2}),
    "last two, patches of 4": ("last two", {"patch_size": 4}),
    "last two, patches of 8": ("last two", {"patch_size": 8}),
    "last two, patches of 2, authors' stride": ("last two", {"patch_size": 2, "follow": "code"}),
    "last two, patches of 4, authors' stride": ("last two", {"patch_size": 4, "follow": "code"}),
    "all four, exact": ("all four", {}),
    "all four, patches of 2": ("all four", {"patch_size": 2}),
    "all four, patches of 4": ("all four", {"patch_size": 4}),
    "all four, patches of 4, authors' stride": ("all four", {"patch_size": 4, "follow": "code"}),
    "head only": ("", {}),
}


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    widths = ((1, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1))
    body = [part for c, o, s in widths for part in (nn.Conv2d(c, o, 3, s, padding=1), nn.ReLU())]
    return nn.Sequential(*body, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 5))


def data() -> tuple[Tensor, Tensor]:
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(bunch.images, dtype=torch.float32)[order].unsqueeze(1) / 16
    return F.interpolate(x, size=(16, 16), mode="bilinear"), torch.tensor(bunch.target)[order]


def train(model: nn.Module, x: Tensor, y: Tensor, lr: float, epochs: int, seed: int) -> nn.Module:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(dim=1) == y).float().mean())


def prepared(base: nn.Sequential, arm: str, seed: int) -> nn.Sequential:
    """Return a copy of the pretrained net with a new head, as the arm trains it."""
    layers, options = ARMS[arm]
    model = copy.deepcopy(base).requires_grad_(False)
    torch.manual_seed(1000 + seed)
    model[-1] = nn.Linear(512, 5)
    if layers:
        for name in CONVOLUTIONS[layers]:
            model[int(name)].requires_grad_(True)
    if options:
        gradient_filter(model, only=CONVOLUTIONS[layers], **options)
    return model


def cosines(base: nn.Sequential, arm: str, x: Tensor, y: Tensor) -> dict[str, list[float]]:
    """Return cosine and ratio of norms to the exact gradient of each convolution, the first one first."""
    gradients = []
    for name in (f"{ARMS[arm][0]}, exact", arm):
        model = prepared(base, name, 0)
        F.cross_entropy(model(x[:64]), y[:64]).backward()
        convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        gradients.append([m.weight.grad.flatten() for m in convolutions if m.weight.grad is not None])
    pairs = list(zip(*gradients, strict=True))
    return {
        "cosine": [float(F.cosine_similarity(a, b, dim=0)) for a, b in pairs],
        "norm": [float(b.norm() / a.norm()) for a, b in pairs],
    }


def cost(channels: int = 64, size: int = 32, batch: int = 8) -> dict[str, Any]:
    """Return saved bytes, FLOPs of the backward and CPU seconds of a step of three 3 x 3 convolutions."""
    torch.manual_seed(0)
    exact = nn.Sequential(*(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)))
    models: dict[str, nn.Module] = {"exact": exact}
    for r in (2, 4, 8):
        models[f"patches of {r}"] = copy.deepcopy(exact)
        gradient_filter(models[f"patches of {r}"], patch_size=r)
    x = torch.randn(batch, channels, size, size, requires_grad=True)
    table: dict[str, Any] = {}
    for name, model in models.items():
        saved: dict[int, int] = {}
        weights = {parameter.data_ptr() for parameter in model.parameters()}

        def pack(t: Tensor, saved: dict[int, int] = saved, weights: set[int] = weights) -> Tensor:
            if t.data_ptr() not in weights:
                saved[t.data_ptr()] = t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(x)
        flops = FlopCounterMode(display=False)
        with flops:
            y.sum().backward()
        table[name] = {"saved bytes": sum(saved.values()), "backward FLOPs": flops.get_total_flops()}
    seconds = interleaved({name: lambda m=m: m(x).sum().backward() for name, m in models.items()}, repetitions=9)
    with torch.no_grad():
        forward = interleaved({"forward": lambda: exact(x)}, repetitions=9)["forward"]
    for name, row in table.items():
        row["step, CPU seconds over exact"] = ratio(seconds, name, "exact")
        row["step, CPU milliseconds"] = 1e3 * statistics.median(seconds[name])
        row["forward alone, CPU milliseconds"] = 1e3 * statistics.median(forward)
    return table


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    one_thread()
    x, y = data()
    old, new = y < 5, y >= 5
    x_new, y_new = x[new], y[new] - 5
    cut, tuning = int(0.5 * len(x_new)), int(0.65 * len(x_new))
    spans = {"train": slice(0, cut), "validation": slice(cut, tuning), "test": slice(tuning, None)}
    seeds = range(arguments.seeds)
    bases = [train(net(seed), x[old], y[old], 0.003, 6, seed) for seed in seeds]
    fit, check, test = spans["train"], spans["validation"], spans["test"]
    table: dict[str, Any] = {"pretrained": [accuracy(base, x[old], y[old]) for base in bases]}

    def run(arm: str, base: nn.Sequential, lr: float, seed: int, on: slice) -> float:
        model = train(prepared(base, arm, seed), x_new[fit], y_new[fit], lr, arguments.epochs, seed)
        return accuracy(model, x_new[on], y_new[on])

    for arm, (layers, options) in ARMS.items():
        tuned = {lr: statistics.mean(run(arm, bases[0], lr, seed, check) for seed in (100, 101)) for lr in RATES}
        best = max(tuned, key=lambda lr: tuned[lr])
        row: dict[str, Any] = {"lr": best}
        row["test"] = [run(arm, base, best, seed, test) for seed, base in zip(seeds, bases, strict=True)]
        baseline = table.get(f"{layers or 'last two'}, exact", row)["test"]
        pairs = [a - b for a, b in zip(row["test"], baseline, strict=True)]
        mean, spread = statistics.mean(pairs), statistics.stdev(pairs)
        half = float(stats.t.ppf(0.975, len(pairs) - 1)) * spread / math.sqrt(len(pairs))
        row["difference"] = [mean, mean - half, mean + half]
        if options:
            row |= cosines(bases[0], arm, x_new, y_new)
        table[arm] = row
        print(f"{arm:42s} lr {best:<5} {statistics.mean(row['test']):.4f} ", row["difference"], flush=True)
    costs = cost()
    for name, figures in costs.items():
        print(name, figures)
    result = {"epochs": arguments.epochs, "seeds": arguments.seeds, "fine-tuning": table, "cost": costs}
    print(write("gradient_filtering", result))


if __name__ == "__main__":
    main()
