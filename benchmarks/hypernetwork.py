"""Hypernetwork tuning against random search and Bayesian optimisation, at equal CPU time.

A small network on 150 digits has five hyper-parameters: the decay of each of three layers, a dropout rate and the
strength of input noise. Each arm gets the same CPU seconds, the same optimizer (Adam at 0.001) and the same 250
samples to choose by; all stop early by them. A search's trial has 400 steps; so that longer training is not taken for
better hyper-parameters, controls train fixed values in one run for all the time. Reported are the lowest validation
loss of an arm, and the loss and accuracy on the other digits there, paired by seed, with 95 % intervals. The rate of
the hyper-parameters was chosen of three on seeds 100 and 101 (`--develop`).

Run: python benchmarks/hypernetwork.py [--seconds 4] [--seeds 5]
Writes benchmarks/results/hypernetwork.json. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _common import one_thread, write
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from torch import Tensor, nn

from trimtab.compare import Job, run_jobs
from trimtab.tune import Hyper, HypernetworkTuner

HYPERS = (
    *(Hyper(f"decay{layer}", 1e-3, 1e-6, 1.0, "log", decays=(f"{layer}.weight",)) for layer in (0, 3, 6)),
    Hyper("dropout", 0.4, 0.0, 0.8, "logit", drops=("*",)),
    Hyper("noise", 0.17, 0.01, 3.0, "log"),
)
STEPS, BATCH, EVERY = 400, 50, 50

Batch = tuple[Tensor, Tensor]


def data(seed: int) -> tuple[Batch, Batch, Batch]:
    bunch = load_digits()
    order = np.random.default_rng(seed).permutation(len(bunch.data))
    x = torch.tensor(bunch.data[order], dtype=torch.float32) / 8 - 1
    y = torch.tensor(bunch.target[order])
    return (x[:150], y[:150]), (x[150:400], y[150:400]), (x[400:], y[400:])


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    hidden = [part for a in (64, 64) for part in (nn.Linear(a, 64), nn.ReLU(), nn.Dropout(0.0))]
    return nn.Sequential(*hidden, nn.Linear(64, 10))


@torch.no_grad()
def measure(model: nn.Module, batch: Batch) -> dict[str, float]:
    model.eval()
    logits = model(batch[0])
    model.train()
    accuracy = float((logits.argmax(1) == batch[1]).float().mean())
    return {"loss": float(F.cross_entropy(logits, batch[1])), "accuracy": accuracy}


class Best:
    """Keeps the model of the lowest validation loss."""

    def __init__(self, valid: Batch) -> None:
        self.valid, self.loss, self.model, self.values = valid, math.inf, None, {}

    def see(self, model: nn.Module, values: Mapping[str, float]) -> float:
        """Measure a model, and keep a copy if it is the best."""
        loss = measure(model, self.valid)["loss"]
        if loss < self.loss:
            self.loss, self.model, self.values = loss, copy.deepcopy(model), dict(values)
        return loss


def train(values: Mapping[str, float], seed: int, training: Batch, best: Best, seconds: float = 0.0) -> float:
    """Train at fixed hyper-parameters, for STEPS or for some seconds, and return the lowest validation loss."""
    model, generator = network(seed), torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = values["dropout"]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    lowest = math.inf
    start = time.process_time()
    for step in itertools.count():
        if time.process_time() - start >= seconds if seconds else step == STEPS:
            break
        x, y = draw(training, generator)
        x = x + values["noise"] * torch.randn(x.shape, generator=generator)
        loss = F.cross_entropy(model(x), y)
        loss = loss + sum(values[f"decay{i}"] * model[i].weight.square().sum() / 2 for i in (0, 3, 6))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == EVERY - 1:
            lowest = min(lowest, best.see(model, values))
    return lowest


def draw(batch: Batch, generator: torch.Generator) -> Batch:
    chosen = torch.randint(len(batch[0]), (BATCH,), generator=generator)
    return batch[0][chosen], batch[1][chosen]


def to_values(unit: np.ndarray) -> dict[str, float]:
    """Map [0, 1]^5 to hyper-parameters, evenly in the logarithm or the rate."""
    return {
        h.name: h.low * (h.high / h.low) ** u if h.transform == "log" else h.low + (h.high - h.low) * u
        for h, u in zip(HYPERS, unit.tolist(), strict=True)
    }


def random_search(seed: int, training: Batch, best: Best, seconds: float) -> dict[str, Any]:
    draws, start, trials = np.random.default_rng(1000 + seed), time.process_time(), 0
    while time.process_time() - start < seconds:
        train(to_values(draws.uniform(size=len(HYPERS))), seed, training, best)
        trials += 1
    return {"trials": trials}


def bayesian(seed: int, training: Batch, best: Best, seconds: float) -> dict[str, Any]:
    """Expected improvement under a Gaussian process of log validation losses, after five random trials."""
    draws, start = np.random.default_rng(2000 + seed), time.process_time()
    points: list[np.ndarray] = []
    losses: list[float] = []
    while time.process_time() - start < seconds:
        unit = draws.uniform(size=len(HYPERS))
        if len(points) >= 5:
            kernel = ConstantKernel(1.0) * Matern(np.full(len(HYPERS), 0.5), (0.05, 20.0), nu=2.5) + WhiteKernel(1e-2)
            model = GaussianProcessRegressor(kernel, normalize_y=True, random_state=seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.fit(np.array(points), np.log(losses))
            among = draws.uniform(size=(1000, len(HYPERS)))
            mean, deviation = model.predict(among, return_std=True)
            gain = (math.log(min(losses)) - mean) / np.maximum(deviation, 1e-9)
            unit = among[np.argmax(deviation * (gain * stats.norm.cdf(gain) + stats.norm.pdf(gain)))]
        points.append(unit)
        losses.append(train(to_values(unit), seed, training, best))
    return {"trials": len(points)}


def hypernetwork(seed: int, training: Batch, best: Best, seconds: float, **options: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def train_loss(net: Callable[..., Tensor], batch: Batch, values: Mapping[str, Tensor]) -> Tensor:
        noise = values["noise"] * torch.randn(batch[0].shape, generator=generator)
        return F.cross_entropy(net(batch[0] + noise), batch[1])

    def valid_loss(net: Callable[..., Tensor], batch: Batch) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1])

    tuner = HypernetworkTuner(
        network(seed),
        HYPERS,
        train_loss=train_loss,
        valid_loss=valid_loss,
        warmup=100,
        seed=seed,
        **{"hyper_lr": 0.01, "samples": 2, **options},
    )
    start, path = time.process_time(), []
    while time.process_time() - start < seconds:
        tuner.step(draw(training, generator), draw(best.valid, generator))
        if tuner.steps % EVERY == 0:
            best.see(tuner.model, tuner.values)
        if tuner.steps % 500 == 0:
            path.append({name: round(value, 6) for name, value in tuner.values.items()})
    return {"steps": tuner.steps, "path": path}


ARMS = {"random search": random_search, "bayesian optimisation": bayesian, "hypernetwork": hypernetwork}


def run(seed: int, seconds: float, arms: Mapping[str, Callable[..., dict[str, Any]]] | None = None) -> dict[str, Any]:
    training, valid, test = data(seed)
    found: dict[str, Any] = {}
    for name, arm in (arms or ARMS).items():
        best, start = Best(valid), time.process_time()
        extra = arm(seed, training, best, seconds)
        cpu = time.process_time() - start
        found[name] = {
            "valid": best.loss,
            "test": measure(best.model, test),
            "values": best.values,
            "cpu": cpu,
            **extra,
        }
        if name == "hypernetwork":
            anew = Best(valid)
            train(best.values, seed, training, anew)
            found["its values, trained anew"] = {
                "valid": anew.loss,
                "test": measure(anew.model, test),
            }
    start_values = {h.name: h.start for h in HYPERS}
    untuned = Best(valid)
    train(start_values, seed, training, untuned)
    found["not tuned"] = {"valid": untuned.loss, "test": measure(untuned.model, test)}
    print(seed, {name: (round(r["valid"], 4), round(r["test"]["loss"], 4)) for name, r in found.items()}, flush=True)
    return found


def fixed(arguments: Mapping[str, Any], _folder: Path, _report: Callable[[int, float], None]) -> dict[str, Any]:
    """Train in one run for all the time, at given hyper-parameters: a search's trials are shorter than that."""
    training, valid, test = data(arguments["seed"])
    best = Best(valid)
    train(arguments["values"], arguments["seed"], training, best, arguments["seconds"])
    return {"valid": best.loss, "test": measure(best.model, test)}


def job(arguments: Mapping[str, Any], _folder: Path, _report: Callable[[int, float], None]) -> dict[str, Any]:
    return run(arguments["seed"], arguments["seconds"])


def interval(differences: list[float]) -> dict[str, float]:
    mean, n = statistics.mean(differences), len(differences)
    half = stats.t.ppf(0.975, n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", default=str(Path(tempfile.gettempdir()) / "trimtab-hypernetwork"))
    parser.add_argument("--develop", action="store_true")
    options = parser.parse_args()
    one_thread()
    if options.develop:
        for choice in ({"hyper_lr": 0.003}, {"hyper_lr": 0.01}, {"hyper_lr": 0.03}):
            print(choice)
            for seed in (100, 101):
                run(seed, options.seconds, {"hypernetwork": lambda *a, c=choice: hypernetwork(*a, **c)})
        return
    jobs = [
        Job("hypernetwork:job", {"seed": seed, "seconds": options.seconds}, f"hypernetwork-{seed}")
        for seed in range(options.seeds)
    ]
    runs = run_jobs(jobs, options.folder, workers=options.workers)
    start = {h.name: h.start for h in HYPERS}
    for name in ("not tuned", "hypernetwork"):
        controls = [
            Job(
                "hypernetwork:fixed",
                {"seed": seed, "seconds": options.seconds, "values": r[name].get("values", start)},
                f"{name}-{seed}",
            )
            for seed, r in enumerate(runs)
        ]
        for r, control in zip(runs, run_jobs(controls, options.folder, workers=options.workers), strict=True):
            r[f"values of {name}, one long run"] = control
    summary = {
        name: {
            "valid_loss": statistics.mean(r[name]["valid"] for r in runs),
            "test_loss": statistics.mean(r[name]["test"]["loss"] for r in runs),
            "test_accuracy": statistics.mean(r[name]["test"]["accuracy"] for r in runs),
        }
        for name in runs[0]
    }
    paired = {
        name: {
            "valid_loss": interval([r["hypernetwork"]["valid"] - r[name]["valid"] for r in runs]),
            "test_loss": interval([r["hypernetwork"]["test"]["loss"] - r[name]["test"]["loss"] for r in runs]),
        }
        for name in runs[0]
        if name != "hypernetwork"
    }
    for name, row in summary.items():
        print(f"{name:28s}", {key: round(value, 4) for key, value in row.items()})
    for name, row in paired.items():
        print(f"hypernetwork - {name:28s}", {key: {k: round(v, 4) for k, v in d.items()} for key, d in row.items()})
    result = {"seconds": options.seconds, "summary": summary, "hypernetwork_minus": paired, "runs": runs}
    print(write("hypernetwork", result))


if __name__ == "__main__":
    main()
