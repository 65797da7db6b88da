"""Multi-stage networks: fit a function to machine precision, each network the residual of those before it.

One network stalls near an error of 1e-5: what is left is small, and of a high frequency that networks learn last. A new
network for the residual removes both obstacles,

    u_k = u_(k-1) + e_k n_k(x),   e_k = max |f - u_(k-1)| / 2
    n_k's first layer: sin( kappa_k W x + b ),   kappa_k = 3 times the number of the residual's zeros

so that each fits a target of size 2 that begins in its own range of frequencies. The first stage has tanh and
kappa = 1, and all further layers have tanh. Wang and Lai 2024 (arXiv:2307.08934), after the authors' code
YaoGroup/MultistageNN, Regression. Stages are trained by Adam, then by L-BFGS on all samples, in float64.

Shape suffixes: N samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.scalars import to_scalar

__all__ = ["MultiStageNetwork", "StageNetwork", "StageReport", "fit_multi_stage", "residual_scale"]

_LOSS_SCALE = 1e12
"""torch's L-BFGS drops what it learned of the curvature where that is below 1e-10, as it is for losses this small."""


class StageNetwork(nn.Module):
    """One stage: e n(x), with a sine or tanh first layer of scale kappa and tanh layers behind it.

    n(x) = W_L tanh( ... tanh( W_2 phi( kappa W_1 z + b_1 ) + b_2 ) ... ) + b_L, z = x scaled to [-1, 1].

    Args:
        width: of the hidden layers.
        depth: hidden layers.
        low: least x, scaled to -1.
        high: largest x, scaled to 1.
        kappa: scale of the first layer.
        size: e, what the output is multiplied by.
        sine: whether phi is the sine; else it is tanh.
        generator: to draw weights from.
        dtype: of the parameters.

    Shapes: [N, 1] to [N, 1].

    Raises:
        UsageError: if width or depth is below 1, or the range is empty.

    Example:
        >>> StageNetwork(8, 2, low=-1.0, high=1.0)(torch.zeros(3, 1, dtype=torch.float64)).shape
        torch.Size([3, 1])
    """

    low: Tensor
    high: Tensor
    size: Tensor

    def __init__(
        self,
        width: int,
        depth: int,
        *,
        low: float,
        high: float,
        kappa: float = 1.0,
        size: float = 1.0,
        sine: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        if width < 1 or depth < 1:
            raise UsageError(f"width and depth must be at least 1, got {width} and {depth}.")
        if not low < high:
            raise UsageError(f"x must lie between two different values, got {low} and {high}.")
        self.kappa, self.sine = kappa, sine
        widths = [1, *[width] * depth, 1]
        layers = [nn.Linear(a, b, dtype=dtype) for a, b in pairwise(widths)]
        for layer in layers:
            std = math.sqrt(2 / (layer.in_features + layer.out_features))
            nn.init.trunc_normal_(layer.weight, 0.0, std, -2 * std, 2 * std, generator=generator)
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)
        # Buffers: a saved network comes back with the range and size that it was fitted for.
        for name, value in (("low", low), ("high", high), ("size", size)):
            self.register_buffer(name, torch.tensor(value, dtype=dtype))

    def normalized(self, x: Tensor) -> Tensor:
        """Return n(x), whose target has the size 2."""
        h = 2 * (x - self.low) / (self.high - self.low) - 1
        # kappa on the input, not on the bias: W (kappa z) + b.
        h = self.layers[0](self.kappa * h)
        h = h.sin() if self.sine else h.tanh()
        for layer in self.layers[1:-1]:
            h = layer(h).tanh()
        return self.layers[-1](h)

    def forward(self, x: Tensor) -> Tensor:
        """Return e n(x)."""
        return self.size * self.normalized(x)


class MultiStageNetwork(nn.Module):
    """The sum of its stages.

    Args:
        stages: in the order in which they were fitted.

    Shapes: [N, 1] to [N, 1].

    Example:
        >>> stage = StageNetwork(4, 1, low=0.0, high=1.0)
        >>> x = torch.rand(5, 1, dtype=torch.float64)
        >>> torch.equal(MultiStageNetwork([stage, stage])(x), 2 * stage(x))
        True
    """

    def __init__(self, stages: Sequence[StageNetwork]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the stages' outputs."""
        total = self.stages[0](x)
        for stage in self.stages[1:]:
            total = total + stage(x)
        return total


@dataclass(frozen=True)
class StageReport:
    """What one stage was given and left.

    Attributes:
        kappa: scale of its first layer.
        size: e, half of the largest residual before it.
        zeros: sign changes of that residual.
        error: root mean square of the residual after it, over that of the function.
    """

    kappa: float
    size: float
    zeros: int
    error: float


def residual_scale(x: Tensor, residual: Tensor) -> tuple[float, int]:
    """Return max |residual| / 2 and the number of its zeros: sign changes along x.

    Args:
        x: [N, 1] or [N].
        residual: likewise.

    Returns:
        The size e that makes the residual one of size 2, and the count.

    Example:
        >>> x = torch.linspace(0, 1, 1000)
        >>> size, zeros = residual_scale(x, 4 * torch.cos(20 * torch.pi * x))
        >>> round(size, 3), zeros
        (2.0, 20)
    """
    values = residual.detach().flatten()[x.detach().flatten().argsort()]
    # Signs, not products, which underflow; and a sample at a zero is no end of it.
    signs = values.sign()
    signs = signs[signs != 0]
    return to_scalar(values.abs().max()) / 2, int(to_scalar((signs[:-1] != signs[1:]).sum()))


def fit_multi_stage(
    x: Tensor,
    y: Tensor,
    *,
    stages: int = 3,
    width: int = 20,
    depth: int = 3,
    adam_steps: int | Sequence[int] = 3000,
    lbfgs_steps: int | Sequence[int] = 3333,
    lr: float = 1e-3,
    kappa_per_zero: float = 3.0,
    generator: torch.Generator | None = None,
) -> tuple[MultiStageNetwork, list[StageReport]]:
    """Fit y = f(x) in stages, each network the residual of the sum before it.

    u_k = u_(k-1) + e_k n_k, with e_k and kappa_k from the residual's size and number of zeros.

    Fitting ends early where the residual is of the size of rounding.

    Args:
        x: [N, 1], float64 for an error below that of float32.
        y: [N, 1].
        stages: networks at most.
        width: of the hidden layers.
        depth: hidden layers.
        adam_steps: of every stage, or one number for each.
        lbfgs_steps: iterations of L-BFGS after them, likewise.
        lr: of Adam.
        kappa_per_zero: kappa over the residual's number of zeros, from the second stage on.
        generator: to draw weights from.

    Returns:
        The network, and a report of each stage.

    Raises:
        UsageError: if x and y are not two columns of finite numbers, or an option breaks its rule.

    Example:
        >>> x = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None]
        >>> network, reports = fit_multi_stage(
        ...     x, x.sin(), stages=2, adam_steps=20, lbfgs_steps=30, generator=torch.Generator().manual_seed(0)
        ... )
        >>> len(network.stages), reports[1].error < reports[0].error
        (2, True)

    References:
        Wang and Lai 2024, arXiv:2307.08934; authors' code YaoGroup/MultistageNN, Regression/Reg1D_mNN_64bit_exp1.py.
    """
    if x.dim() != 2 or x.shape[1] != 1 or x.shape != y.shape or len(x) < 3 or not x.is_floating_point():
        raise UsageError(f"x and y must be floats [samples, 1], 3 or more, got {tuple(x.shape)} and {tuple(y.shape)}.")
    if not bool(x.isfinite().all() & y.isfinite().all()):
        raise UsageError("x and y must be finite: drop the samples that are not.")
    if stages < 1 or kappa_per_zero <= 0 or lr <= 0:
        raise UsageError(f"stages, kappa_per_zero and lr must be above 0, got {stages}, {kappa_per_zero}, {lr}.")
    budgets = list(zip(_each(adam_steps, stages), _each(lbfgs_steps, stages), strict=True))
    low, high = to_scalar(x.min()), to_scalar(x.max())
    scale = to_scalar(y.square().mean().sqrt()) or 1.0
    fitted: list[StageNetwork] = []
    reports: list[StageReport] = []
    residual = y
    for number, (adam, lbfgs) in enumerate(budgets):
        size, zeros = residual_scale(x, residual)
        if size <= torch.finfo(y.dtype).eps * scale:
            break
        kappa = max(1.0, kappa_per_zero * zeros) if number else 1.0
        stage = StageNetwork(
            width,
            depth,
            low=low,
            high=high,
            kappa=kappa,
            size=size,
            sine=number > 0,
            generator=generator,
            dtype=x.dtype,
        ).to(x.device)
        _train(stage, x, residual / size, adam, lbfgs, lr)
        with torch.no_grad():
            residual = residual - stage(x)
        fitted.append(stage)
        reports.append(StageReport(kappa, size, zeros, to_scalar(residual.square().mean().sqrt()) / scale))
    if not fitted:
        raise UsageError("y is 0 everywhere: there is nothing to fit.")
    return MultiStageNetwork(fitted), reports


def _each(steps: int | Sequence[int], stages: int) -> list[int]:
    given = [steps] * stages if isinstance(steps, int) else list(steps)
    if len(given) != stages or min(given) < 0:
        raise UsageError(f"steps must be 0 or more, one number or one for each of {stages} stages, got {steps}.")
    return given


def _train(stage: StageNetwork, x: Tensor, target: Tensor, adam_steps: int, lbfgs_steps: int, lr: float) -> None:
    adam = torch.optim.Adam(stage.parameters(), lr=lr)
    for _ in range(adam_steps):
        adam.zero_grad()
        (stage.normalized(x) - target).square().mean().backward()
        adam.step()
    lbfgs = torch.optim.LBFGS(
        stage.parameters(),
        max_iter=lbfgs_steps,
        history_size=50,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Any:
        lbfgs.zero_grad()
        loss = _LOSS_SCALE * (stage.normalized(x) - target).square().mean()
        loss.backward()
        return loss

    if lbfgs_steps:
        lbfgs.step(closure)
    stage.zero_grad()


CARD = Card(
    name="multi-stage",
    room="layers",
    summary="fit a smooth function to machine precision: each network the residual of those before it",
    paper=Paper(
        "Multi-stage Neural Networks: Function Approximator of Machine Precision",
        2024,
        arxiv="2307.08934",
        code="https://github.com/YaoGroup/MultistageNN",
    ),
    equation="u_k = u_(k-1) + e_k n_k(x), e_k = max |f - u_(k-1)| / 2, kappa_k = 3 times the residual's zeros",
    claim=(
        "The error of regression and of physics-informed networks nears 1e-16 in float64 within a few stages, where "
        "single networks stay near 1e-5; residuals' sizes fall with their frequencies by a power law."
    ),
    acts_on="run",
    entry="trimtab.layers.growth.multi_stage:fit_multi_stage",
    defaults=(
        Default(
            "stages", 3, "ours; authors' code has four, the last two with a width of 30 and three times the samples"
        ),
        Default("width", 20, "authors' code, layers of the first two stages"),
        Default("depth", 3, "authors' code"),
        Default("adam_steps", 3000, "authors' code, first stage; 5,000 later"),
        Default("lbfgs_steps", 3333, "authors' code, first stage: a third of 10,000; 20,000 to 40,000 later"),
        Default("lr", 1e-3, "authors' code: TensorFlow's default"),
        Default("kappa_per_zero", 3.0, "authors' code"),
    ),
    verified={
        "equation": (
            "tests/layers/growth/test_multi_stage.py::test_stage_equals_the_authors_network",
            "tests/layers/growth/test_multi_stage.py::test_stages_fit_residuals",
        ),
        "claim": ("tests/studies/test_multi_stage.py::test_curve",),
    },
    deviations=(
        "Functions of one variable, on samples: the number of zeros stands for the dominant frequency, as in the "
        "authors' code; the paper takes it from the Fourier transform.",
        "The authors' fourth stage has tanh in its first layer, as its script leaves out the sine that its comment "
        "names; here every later stage has the sine.",
        "L-BFGS is torch's with a strong Wolfe search and a history of 50; the authors' is TensorFlow Probability's.",
        "Physics-informed stages (residuals of equations) are not offered.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.multi_stage:curve",
            "stages=1",
            "stages=3",
            metric="log10_error",
            mechanism="last_kappa",
            outcome=(
                "better: -4.04 to -5.86, difference -1.81 (95 % interval -2.29 to -1.33), n=5; last kappa 1 to 150.0"
            ),
        ),
    ),
)
