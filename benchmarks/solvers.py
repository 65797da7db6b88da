"""What the solvers do on small convex problems: iterations to the optimum, and certificates that it is one.

Run: python benchmarks/solvers.py
Writes benchmarks/results/solvers.json: gradient-regularised Newton on logistic and softmax regression against plain
Newton and gradient descent, and convex ReLU training against restarts of gradient descent.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _common import one_thread, write
from torch import Tensor

from trimtab.optim.solvers.convex_relu import (
    activation_patterns,
    convex_relu_admm,
    convex_relu_sampled,
    relu_objective,
)
from trimtab.optim.solvers.normalized_newton import Composite, minimize


def data(classes: int, *, n: int = 200, width: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, dtype=torch.float64, generator=generator)
    teacher = torch.randn(width, classes, dtype=torch.float64, generator=generator)
    noise = torch.randn(n, classes, dtype=torch.float64, generator=generator)
    return x, (x @ teacher + 3 * noise).argmax(dim=1)


def logistic() -> tuple[dict[str, Composite], int, float]:
    x, y = data(2)
    sign = 2.0 * y - 1
    whole = Composite(lambda z: -F.logsigmoid(sign * z).mean(), lambda w: x @ w)
    losses = Composite(torch.mean, lambda w: -F.logsigmoid(sign * (x @ w)))
    lipschitz = float(torch.linalg.matrix_norm(x, 2)) ** 2 / (4 * len(x))
    return {"exact": whole, "gauss-newton": whole, "fisher": losses}, x.shape[1], lipschitz


def softmax() -> tuple[dict[str, Composite], int, float]:
    x, y = data(4)
    pad = torch.zeros(len(x), 1, dtype=x.dtype)

    def logits(w: Tensor) -> Tensor:
        return torch.cat([x @ w.reshape(x.shape[1], 3), pad], dim=1)

    whole = Composite(lambda z: F.cross_entropy(z, y), logits)
    losses = Composite(torch.mean, lambda w: F.cross_entropy(logits(w), y, reduction="none"))
    lipschitz = float(torch.linalg.matrix_norm(x, 2)) ** 2 / (2 * len(x))
    return {"exact": whole, "gauss-newton": whole, "fisher": losses}, 3 * x.shape[1], lipschitz


def plain_newton(fn: Callable[[Tensor], Tensor], x: Tensor, target: float) -> str:
    """Return in how many full steps Newton's method gets to the target, or how it fails."""
    start = float(fn(x))
    for step in range(50):
        if float(fn(x)) <= target:
            return f"{step} steps"
        h = torch.func.jacrev(torch.func.grad(fn))(x)
        if not bool(h.isfinite().all()) or not float(fn(x)) < 1e6:
            return "diverges"
        x = x - torch.linalg.pinv(h) @ torch.func.grad(fn)(x)
    return "diverges" if not float(fn(x)) < start else "not there after 50 steps"


def newton() -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, make in (("logistic", logistic), ("softmax", softmax)):
        problems, size, lipschitz = make()
        best = minimize(problems["exact"], torch.zeros(size, dtype=torch.float64), tolerance=1e-11).f
        for scale in (1.0, 20.0, 100.0):
            start = torch.full((size,), scale, dtype=torch.float64)
            row: dict[str, Any] = {"plain newton": plain_newton(problems["exact"], start, best + 1e-6)}
            x, steps = start.clone(), 0
            while float(problems["exact"](x)) > best + 1e-6 and steps < 20_000:
                x = x - torch.func.grad(problems["exact"])(x) / lipschitz
                steps += 1
            row["gradient descent, 1/L"] = steps
            for hessian, fn in problems.items():
                run = minimize(fn, start, hessian=hessian, tolerance=1e-7, max_iterations=5000)
                values = [entry.f for entry in run.trace]
                row[hessian] = {
                    "steps": next(k for k, f in enumerate(values) if f <= best + 1e-6),
                    "linear systems": sum(entry.solves for entry in run.trace),
                    "status": run.status,
                    "monotone": all(b <= a + 1e-15 * abs(a) for a, b in itertools.pairwise(values)),
                }
            result[f"{name} from {scale:g}"] = row
            print(name, scale, row)
    return result


def convex() -> dict[str, Any]:
    result: dict[str, Any] = {}
    for beta in (0.1, 0.03, 0.01):
        gaps, ratios, sampled, seconds, neurons = [], [], [], [], []
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            x = torch.linspace(-1, 1, 16, dtype=torch.float64)
            x = torch.stack([x + 0.03 * torch.randn(16, dtype=x.dtype, generator=generator), torch.ones_like(x)], dim=1)
            y = (4 * x[:, 0]).sin() + 0.1 * torch.randn(16, dtype=x.dtype, generator=generator)
            patterns = activation_patterns(x, 50_000, generator=generator)
            begin = time.process_time()
            network = convex_relu_admm(x, y, patterns, beta=beta, tolerance=1e-9, max_iterations=50_000)
            seconds.append(time.process_time() - begin)
            neurons.append(len(network.alphas))
            value = float(relu_objective(x, y, network.weights, network.alphas, beta=beta))
            gaps.append(value - dual_bound(x, y, network.predict(x), beta))
            losses = restarts(x, y, beta, width=2 * len(network.alphas), generator=generator)
            ratios.append([float(losses.min()) / value, float(losses.median()) / value])
            program = convex_relu_sampled(x, y, 1000, beta=beta, generator=generator, max_iterations=5000)
            sampled.append(program.objective / value)
        result[f"beta {beta}"] = {
            "gap to the dual bound": max(gaps),
            "best of 100 restarts / optimum": statistics.median(r[0] for r in ratios),
            "best of 100 restarts / optimum, lowest": min(r[0] for r in ratios),
            "median restart / optimum": statistics.median(r[1] for r in ratios),
            "sampled program of 1000 / optimum": statistics.median(sampled),
            "cpu seconds of ADMM": statistics.median(seconds),
            "neurons": statistics.median(neurons),
        }
        print(beta, result[f"beta {beta}"])
    return result


def dual_bound(x: Tensor, y: Tensor, prediction: Tensor, beta: float) -> float:
    """Return a lower bound on the loss of any network with two inputs: the dual at the scaled residual."""
    angles = torch.linspace(0, 2 * torch.pi, 200_001, dtype=x.dtype)
    units = torch.stack([angles.cos(), angles.sin()])
    residual = y - prediction
    dual = residual * min(1.0, beta / float((residual @ torch.relu(x @ units)).abs().max()))
    return float(0.5 * y.square().sum() - 0.5 * (y - dual).square().sum())


def restarts(x: Tensor, y: Tensor, beta: float, *, width: int, generator: torch.Generator) -> Tensor:
    """Return the losses of 100 networks after 4,000 steps of gradient descent with momentum."""
    weights = torch.randn(100, width, 2, dtype=x.dtype, generator=generator).requires_grad_()
    alphas = torch.randn(100, width, dtype=x.dtype, generator=generator).requires_grad_()
    optimizer = torch.optim.SGD([weights, alphas], lr=0.005, momentum=0.95)
    for _ in range(4000):
        losses = torch.func.vmap(lambda w, a: relu_objective(x, y, w, a, beta=beta))(weights, alphas)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    return losses.detach()[losses.detach().isfinite()]


def main() -> None:
    """Measure and write the table."""
    one_thread()
    print(write("solvers", {"newton": newton(), "convex ReLU": convex()}))


if __name__ == "__main__":
    main()
