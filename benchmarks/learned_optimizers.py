"""What learned optimizers gain on unseen problems: nowcasting against Adam and a line, L2O-PA against a black-box rule.

Run: python benchmarks/learned_optimizers.py [--part nowcasting|structured]
Writes benchmarks/results/learned_nowcasting.json and learned_structured.json. For nowcasting, Adam's learning rate and
each horizon are tuned on tasks of their own, with a constant rate and with one that decays linearly to 0; an arm that
jumps to the mean of the checkpoints shows what averaging alone gains.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _common import one_thread, write
from torch import Tensor, nn

from trimtab.optim.learned.extrapolation import LineFit, Nowcasting
from trimtab.optim.learned.l2o_pa import L2OPA, BlackBoxLSTM, L1Problem, lasso, logistic_l1, meta_train
from trimtab.optim.learned.nowcaster import Nowcaster, Trajectory, linear_chain, train_nowcaster

STEPS, EVERY, CONTEXT = 600, 6, 5
PERIOD = EVERY * CONTEXT


class Task:
    """Classification of Gaussian inputs labelled by a random teacher network."""

    def __init__(self, seed: int, *, width: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(1024, 8, generator=generator)
        teacher = torch.randn(8, 32, generator=generator), torch.randn(32, 4, generator=generator)
        logits = (self.x @ teacher[0]).tanh() @ teacher[1]
        self.y = (logits + torch.randn(logits.shape, generator=generator)).argmax(dim=1)
        self.batches = torch.randint(1024, (STEPS, 64), generator=generator)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = nn.Sequential(
                nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
            )

    def loss(self) -> float:
        """Return the loss on all training data."""
        with torch.no_grad():
            return F.cross_entropy(self.model(self.x), self.y).item()


class Mean:
    """Predicts the mean of the checkpoints."""

    def predict(self, checkpoints: Sequence[Tensor], k: int) -> list[Tensor]:
        """Return the means, whatever k."""
        return [theta.mean(dim=0) for theta in checkpoints]


def train(task: Task, *, lr: float, decay: bool, predictor: Any = None, horizon: int = 1, keep: bool = False) -> Any:
    """Train and return the full training loss every EVERY steps, or with `keep` the trajectory."""
    adam = torch.optim.Adam(task.model.parameters(), lr=lr)
    optimizer: Any = adam
    if predictor is not None:
        optimizer = Nowcasting(adam, predictor, period=PERIOD, context=CONTEXT, horizon=horizon, max_steps=STEPS)
    losses, states = [], []
    for step in range(STEPS):
        adam.param_groups[0]["lr"] = lr * (1 - step / STEPS) if decay else lr
        index = task.batches[step]
        optimizer.zero_grad()
        F.cross_entropy(task.model(task.x[index]), task.y[index]).backward()
        optimizer.step()
        if (step + 1) % EVERY == 0:
            losses.append(task.loss())
            states.append([p.detach().clone() for p in task.model.parameters()])
    if keep:
        return Trajectory([torch.stack(series) for series in zip(*states, strict=True)], linear_chain(task.model))
    return losses


def steps_to(losses: list[float], target: float) -> int:
    """Return the step at which the loss first reaches the target; a run that never does counts in full."""
    return next((EVERY * (k + 1) for k, loss in enumerate(losses) if loss <= target), STEPS)


def compare(losses: list[float], baseline: list[float]) -> dict[str, float]:
    """Return steps to the baseline's last loss (mean of 5), and last loss, both over the baseline's."""
    target = statistics.mean(baseline[-5:])
    return {
        "steps": steps_to(losses, target) / steps_to(baseline, target),
        "last loss": statistics.mean(losses[-5:]) / target,
    }


def nowcasting(*, decay: bool) -> dict[str, Any]:
    """Compare the predictors under one schedule."""
    tuning, tests = range(1000, 1005), range(2000, 2012)
    table = {
        lr: statistics.mean(statistics.mean(train(Task(s, width=24), lr=lr, decay=decay)[-5:]) for s in tuning)
        for lr in (3e-3, 1e-2, 3e-2, 6e-2, 1e-1)
    }
    lr = min(table, key=table.__getitem__)
    runs = [train(Task(seed, width=16 if seed % 2 else 24), lr=lr, decay=decay, keep=True) for seed in range(28)]
    arms: dict[str, Any] = {"line fit": lambda task: LineFit(), "mean of checkpoints": lambda task: Mean()}
    errors = {}
    for name, layers in (("nowcaster without messages", 0), ("nowcaster with messages", 1)):
        nowcaster = Nowcaster(hidden=32, layers=layers, horizon=20)
        losses = train_nowcaster(nowcaster, runs, generator=torch.Generator().manual_seed(0), steps=2000)
        errors[name] = statistics.mean(losses[-200:])
        arms[name] = lambda task, n=nowcaster: n.on(task.model)
    baselines = {
        (seed, width): train(Task(seed, width=width), lr=lr, decay=decay)
        for seeds, widths in ((tuning, (24,)), (tests, (24, 40)))
        for seed in seeds
        for width in widths
    }

    def measure(make: Any, seed: int, width: int, horizon: int) -> dict[str, float]:
        task = Task(seed, width=width)
        losses = train(task, lr=lr, decay=decay, predictor=make(task), horizon=horizon)
        return compare(losses, baselines[seed, width])

    result: dict[str, Any] = {}
    for name, make in arms.items():
        horizons = (1,) if name == "mean of checkpoints" else (1, 4, 10, 20)
        tuned = {
            k: statistics.mean(measure(make, seed, 24, k)["last loss" if decay else "steps"] for seed in tuning)
            for k in horizons
        }
        horizon = min(tuned, key=tuned.__getitem__)
        entry: dict[str, Any] = {"horizon": horizon, "tuning": {str(k): v for k, v in tuned.items()}}
        for width in (24, 40):
            pairs = [measure(make, seed, width, horizon) for seed in tests]
            entry[f"width {width}"] = {
                key: {
                    "median": statistics.median(pair[key] for pair in pairs),
                    "better": sum(pair[key] < 1 for pair in pairs),
                    "of": len(pairs),
                    "each": [pair[key] for pair in pairs],
                }
                for key in ("steps", "last loss")
            }
        if name in errors:
            entry["training error"] = errors[name]
        result[name] = entry
        print(
            decay,
            name,
            horizon,
            {w: {k: round(v["median"], 3) for k, v in entry[w].items()} for w in entry if w.startswith("width")},
            flush=True,
        )
    settings = {"steps": STEPS, "period": PERIOD, "context": CONTEXT, "training runs": len(runs)}
    return {"adam lr": lr, "adam lr tuning": {str(k): v for k, v in table.items()}, **settings, "arms": result}


def sparse(generator: torch.Generator, *, size: float = 1.0, spread: float = 1.0, rho: float = 0.1) -> L1Problem:
    a = torch.randn(32, 25, 50, generator=generator)
    a = a / a.norm(dim=1, keepdim=True) * torch.linspace(1, spread, 50)
    x = size * torch.randn(32, 50, generator=generator) * (torch.rand(32, 50, generator=generator) < 0.1)
    return lasso(a, (a @ x.unsqueeze(-1)).squeeze(-1), rho=rho)


def logistic(generator: torch.Generator, *, size: float = 1.0, rho: float = 0.02) -> L1Problem:
    a = size * torch.randn(32, 60, 20, generator=generator)
    x = torch.randn(32, 20, generator=generator) * (torch.rand(32, 20, generator=generator) < 0.3)
    return logistic_l1(a, ((a @ x.unsqueeze(-1)).squeeze(-1) >= 0).float(), rho=rho)


def proximal(problem: L1Problem, steps: int, *, momentum: bool) -> Tensor:
    """Return the values of ISTA or FISTA."""
    x = y = torch.zeros(problem.size)
    t, values = 1.0, [problem.value(x)]
    for _ in range(steps):
        new = problem.prox(y - problem.gradient(y) / problem.lipschitz, 1 / problem.lipschitz)
        t_new = (1 + (1 + 4 * t * t) ** 0.5) / 2
        y = new + ((t - 1) / t_new if momentum else 0.0) * (new - x)
        x, t = new, t_new
        values.append(problem.value(x))
    return torch.stack(values)


def structured() -> dict[str, Any]:
    result: dict[str, Any] = {}
    shifts: dict[str, Any] = {
        "lasso": (
            sparse,
            {"same": {}, "x10": {"size": 10.0}, "spread, rho 0.3, x5": {"size": 5.0, "spread": 0.2, "rho": 0.3}},
        ),
        "logistic": (logistic, {"same": {}, "features x4": {"size": 4.0}, "rho / 10": {"rho": 0.002}}),
    }
    for family, (sample, variants) in shifts.items():
        rules = {"L2O-PA": L2OPA(), "black box": BlackBoxLSTM()}
        for rule in rules.values():
            meta_train(rule, sample, generator=torch.Generator().manual_seed(0), steps=150)
        for variant, options in variants.items():
            problem = sample(torch.Generator().manual_seed(12345), **options)
            best = torch.cat([proximal(problem, 5000, momentum=True), proximal(problem, 100, momentum=False)]).amin(0)
            curves = {name: rule.solve(problem, 500)[1] for name, rule in rules.items()}
            curves["ISTA"] = proximal(problem, 500, momentum=False)
            curves["FISTA"] = proximal(problem, 500, momentum=True)
            table = {}
            for name, values in curves.items():
                gap = ((values - best) / best).median(dim=1).values
                table[name] = {str(k): gap[k].item() for k in (10, 50, 100, 500)}
            result[f"{family}: {variant}"] = table
            print(family, variant, {n: {k: f"{v:.1e}" for k, v in row.items()} for n, row in table.items()})
    return result


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("nowcasting", "structured"))
    part = parser.parse_args().part
    one_thread()
    if part != "structured":
        result = {"constant": nowcasting(decay=False), "linear decay": nowcasting(decay=True)}
        print(write("learned_nowcasting", result))
    if part != "nowcasting":
        print(write("learned_structured", structured()))


if __name__ == "__main__":
    main()
