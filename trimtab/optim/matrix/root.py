"""ROOT: Muon with coefficients found for each matrix shape, and momentum cut off at its own quantile.

    m <- mu m + (1 - mu) g,    n = (1 - mu) g + mu m (Nesterov) or m
    O = sign(n) max(|n| - t, 0), t the quantile of |n|,    B = n - O    (outliers, which are dropped, and the rest)
    u = 0.2 sqrt(max(R, C)) NewtonSchulz_(R, C)(B),    p <- p - lr (u + weight_decay p)

One triple (a, b, c) for all steps of Newton-Schulz leaves errors that depend on the shape, because the singular values
of a matrix with norm 1 do: here the triple is the one with the least error for the spectra expected of that shape.

He et al. 2025 (arXiv:2511.20626); authors' code huawei-noah/noah-research, ROOT/examples/example_train.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.optim.adaptive.adamw import adam
from trimtab.optim.chain import Chain
from trimtab.optim.matrix._by_role import by_role
from trimtab.optim.matrix._newton_schulz import SCHEDULES, Schedule, Triple
from trimtab.optim.matrix.muon import orthogonalize
from trimtab.optim.transform import check_range

__all__ = ["ROOT", "newton_coefficients", "robust_orthogonalize"]

_JORDAN = SCHEDULES["jordan"][0]
_STARTS: tuple[Triple, ...] = (_JORDAN, (3.0, -3.6, 1.6), (2.5, -2.5, 1.0))
_HIGHEST, _LOWEST = 1.25, 0.5
"""What singular values anywhere in [0, 1], and in [1/32, 1], may become: spectra in training are not all expected."""


def _random_spectrum(rows: int, columns: int, count: int) -> Any:
    """Return singular values of a Gaussian matrix of norm 1 at evenly spaced quantiles (Marchenko and Pastur)."""
    ratio = rows / columns
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # With x = middle - half cos(t) the density sqrt((high - x)(x - low)) / x dx is sin(t)^2 / x dt, without poles.
    t = (np.arange(4000) + 0.5) * np.pi / 4000
    x = (low + high) / 2 - (high - low) / 2 * np.cos(t)
    mass = np.cumsum(np.sin(t) ** 2 / x)
    return np.sqrt(np.interp((np.arange(count) + 0.5) / count, mass / mass[-1], x) / rows)


def _after(sigma: Any, triple: Sequence[float], steps: int) -> Any:
    a, b, c = triple
    for _ in range(steps):
        square = sigma * sigma
        sigma = sigma * (a + square * (b + c * square))
    return sigma


@functools.cache
def newton_coefficients(rows: int, columns: int, steps: int = 5) -> Triple:
    """Return the triple (a, b, c) that orthogonalises matrices of a shape best in a number of Newton-Schulz steps.

    It minimises the worse of the errors ||X X^T - I|| of two spectra, each against that of Muon's triple: a Gaussian
    matrix, and one whose k-th largest singular value is also divided by sqrt(k), as momentum's fall. No singular value
    in [0, 1] may grow above 1.25, so that any other matrix stays bounded. Found by Nelder and Mead's search from fixed
    starts: the same on every machine up to rounding, about 0.2 s for a new shape, and remembered.

    Args:
        rows: of the matrix, at least 1.
        columns: of the matrix, at least 1; the order of the two does not matter.
        steps: of Newton-Schulz, at least 1.

    Returns:
        (a, b, c).

    Raises:
        UsageError: if an argument is below 1.

    Example:
        >>> a, b, c = newton_coefficients(64, 256)
        >>> a < 3.4445  # smaller than Muon's slope: the smallest singular values are not that small
        True
    """
    for name, value in (("rows", rows), ("columns", columns), ("steps", steps)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value!r}.")
    from scipy import optimize  # here: it takes longer to import than all of this package

    rows, columns = min(rows, columns), max(rows, columns)
    count = min(rows, 128)
    random = _random_spectrum(rows, columns, count)
    falling = random / np.sqrt(np.arange(count, 0, -1) * rows / count)
    falling *= np.linalg.norm(random) / np.linalg.norm(falling)
    spectra = [random, falling]
    everywhere = np.linspace(0, 1, 257)[1:]

    def error(sigma: Any, triple: Sequence[float]) -> float:
        return float(np.sqrt(np.mean((1 - _after(sigma, triple, steps) ** 2) ** 2)))

    muon = [error(sigma, _JORDAN) for sigma in spectra]

    def objective(triple: Sequence[float]) -> float:
        with np.errstate(all="ignore"):
            reached = _after(everywhere, triple, steps)
            out = max(reached.max() - _HIGHEST, 0) + max(_LOWEST - reached[7:].min(), 0)
            worst = max(error(sigma, triple) / scale for sigma, scale in zip(spectra, muon, strict=True))
        return worst + 10 * out if math.isfinite(worst + out) else 1e6

    options = {"maxiter": 400, "xatol": 1e-5, "fatol": 1e-7}
    found = [optimize.minimize(objective, start, method="Nelder-Mead", options=options) for start in _STARTS]
    a, b, c = min(found, key=lambda result: result.fun).x
    return float(a), float(b), float(c)


class robust_orthogonalize(orthogonalize):
    """ROOT's step for a matrix: momentum without outliers, orthogonalised with coefficients of its shape.

    Args:
        momentum: decay of the average of gradients, in [0, 1).
        nesterov: whether the gradient is mixed in once more.
        quantile: of the entries' sizes beyond which they are cut off, in [0, 1]; 1 cuts nothing.
        ns_steps: steps of Newton-Schulz, at least 1.
        scale: "match_rms_adamw", "original", "spectral" or "none", as for `orthogonalize`.
        ns_eps: least norm that momentum is divided by, above 0.
        precision: "auto", "full" or "bf16", as for `orthogonalize`.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 3))
        >>> weight.grad = torch.tensor([[1.0, 0.0, 0.1], [0.0, 1.0, 900.0]])  # an outlier
        >>> Chain([weight], [robust_orthogonalize(quantile=0.75, scale="none")], lr=1.0).step()
        >>> (weight @ weight.T).diagonal().round(decimals=1).tolist()
        [1.0, 1.0]
    """

    def __init__(
        self,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        quantile: float = 0.9,
        ns_steps: int = 5,
        scale: str = "match_rms_adamw",
        ns_eps: float = 1e-7,
        precision: str = "auto",
    ) -> None:
        super().__init__(momentum=momentum, nesterov=nesterov, scale=scale, ns_eps=ns_eps, precision=precision)
        del self.options["coefficients"]
        self.options |= {"quantile": quantile, "ns_steps": ns_steps}

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse what `orthogonalize` refuses, a quantile outside [0, 1], and fewer than one step."""
        super().check({**group, "coefficients": "jordan"})
        check_range("quantile", group["quantile"], 0, 1, open_high=False)
        steps = group["ns_steps"]
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise UsageError(f"ns_steps must be a whole number from 1, got {steps!r}.")

    def kind(self, p: Tensor, group: Mapping[str, Any]) -> Hashable:
        """Return the coefficients for the parameter's shape, and where among its sorted entries the quantile lies."""
        rows, entries = p.shape[0], p.numel()
        triple = newton_coefficients(rows, entries // rows, group["ns_steps"])
        return (triple,) * group["ns_steps"], float(group["quantile"]) * (entries - 1)

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of `orthogonalize`, and whether anything is cut off."""
        h = super().coefficients(step, {**group, "coefficients": "jordan"})
        del h["schedule"]
        return h | {"cuts": group["quantile"] < 1}

    def prepared(self, matrix: Any, h: Any) -> Any:
        """Return n - O: the momentum with its entries cut off at the quantile of their sizes."""
        if not h["cuts"]:
            return matrix
        below, part = divmod(h["kind"][1], 1.0)
        sizes = matrix.abs().flatten()
        # Faster than sorting: of the largest entries, the two smallest are the quantile's neighbours.
        upper = torch.topk(sizes, sizes.shape[0] - int(below), sorted=False)[0]
        t = upper.amin()
        if part > 0:
            pair = torch.topk(upper, 2, largest=False)[0]
            t = pair[0] * (1 - part) + pair[1] * part
        return torch.clamp(matrix, min=-t, max=t)

    def schedule(self, h: Any) -> Schedule:
        """Return the coefficients for the shape."""
        return h["kind"][0]


class ROOT(Chain):
    """ROOT for hidden matrices, u = scale NewtonSchulz_shape(momentum cut off at its quantile); AdamW for all else.

    Hidden matrices are the parameters of two or more dimensions, except those of groups with the role "embedding",
    "head" or "vector": give groups by role (`param_groups_for(model)`).

    Args:
        params: parameters or groups, best from `trimtab.optim.param_groups_for`.
        lr: learning rate; one that suits AdamW suits.
        momentum: decay of the average of gradients, in [0, 1).
        nesterov: whether the gradient is mixed in once more; the paper's algorithm does not.
        quantile: of the entries' sizes beyond which they are cut off, in [0, 1]; 1 cuts nothing.
        ns_steps: steps of Newton-Schulz.
        scale: "match_rms_adamw", "original", "spectral" or "none".
        ns_eps: least norm that momentum is divided by, above 0.
        precision: "auto", "full" or "bf16".
        other_lr: learning rate of everything else, as a multiple of `lr`.
        betas: of AdamW for everything else.
        eps: of AdamW for everything else.
        weight_decay: decoupled.
        options: of every `Chain`: `maximize`, `state`, `foreach`, `compile`, `nonfinite`.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> from trimtab.optim import param_groups_for
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 10))
        >>> optimizer = ROOT(param_groups_for(model), lr=1e-3)

    References:
        He et al. 2025, arXiv:2511.20626; huawei-noah/noah-research, ROOT.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        quantile: float = 0.9,
        ns_steps: int = 5,
        scale: str = "match_rms_adamw",
        ns_eps: float = 1e-7,
        precision: str = "auto",
        other_lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        **options: Any,
    ) -> None:
        matrix = robust_orthogonalize(
            momentum=momentum,
            nesterov=nesterov,
            quantile=quantile,
            ns_steps=ns_steps,
            scale=scale,
            ns_eps=ns_eps,
            precision=precision,
        )
        stages = [by_role(matrix, adam(betas=betas, eps=eps), other_lr=other_lr)]
        super().__init__(params, stages, lr=lr, weight_decay=weight_decay, **options)


CARD = Card(
    name="root",
    room="optim",
    summary="Muon with coefficients for each shape, and momentum without its outliers",
    paper=Paper(
        "ROOT: Robust Orthogonalized Optimizer for Neural Network Training",
        2025,
        arxiv="2511.20626",
        code="https://github.com/huawei-noah/noah-research/tree/master/ROOT",
    ),
    equation="B = n - sign(n) max(|n| - t, 0),  u = 0.2 sqrt(max(R, C)) NewtonSchulz_(R, C)(B)",
    claim="Orthogonalises every shape better than fixed coefficients, and trains better than Muon under outliers.",
    acts_on="optimizer",
    entry="trimtab.optim.matrix.root:ROOT",
    defaults=(
        Default("lr", 1e-3, "authors' code"),
        Default("momentum", 0.95, "authors' code"),
        Default("nesterov", True, "authors' code"),
        Default("quantile", 0.9, "authors' code"),
        Default("ns_steps", 5, "authors' code"),
        Default("scale", "match_rms_adamw", "authors' code"),
        Default("ns_eps", 1e-7, "authors' code"),
        Default("precision", "auto", "ours, as for Muon"),
        Default("other_lr", 1.0, "authors' code"),
        Default("betas", (0.9, 0.95), "authors' code"),
        Default("eps", 1e-8, "authors' code"),
        Default("weight_decay", 0.1, "authors' code"),
    ),
    verified={
        "equation": (
            "tests/optim/matrix/test_root.py::test_equals_the_equations",
            "tests/optim/matrix/test_root.py::test_cut_equals_numpy_quantile",
        ),
        "claim": (
            "tests/claims/test_optimizers_matrix.py::test_root_orthogonalises_every_shape_better",
            "tests/claims/test_optimizers_matrix.py::test_root_keeps_the_clean_direction_under_outliers",
        ),
    },
    deviations=(
        "The authors give coefficients for four shapes and fall back to Muon's for all others; here every shape has "
        "its own, from a search of ours over expected spectra, which differs from theirs for those four too: their "
        "triple for 2048 x 2048 sends some singular values of (0, 1] to 3.3, ours none above 1.25.",
        "The authors' file uses a dataset before it assigns it and does not run as it stands; only its update is "
        "followed. Their Nesterov step, which the paper's algorithm does not have, is the default as in the code.",
        "1e-9 is not added to the quantile, and momentum is an average, not a sum: neither changes the direction.",
        "AdamW for everything else corrects both biases; the authors' formula is the same, with eps added to the "
        "uncorrected root.",
    ),
    experiments=(
        Experiment(
            "lm-small",
            "adamw,lr=0.003,outliers=0.001,spike_scale=100,steps=300,batch_size=8",
            "root,lr=0.03,outliers=0.001,spike_scale=100,steps=300,batch_size=8",
            outcome=(
                "better: final loss 2.495 to 2.280, difference -0.215 (95 % interval -0.225 to -0.205), n=5; "
                "learning rates tuned on both sides"
            ),
        ),
        Experiment(
            "lm-small",
            "muon,lr=0.03,scale=match_rms_adamw,other_lr=1,outliers=0.001,spike_scale=100,steps=300,batch_size=8",
            "root,lr=0.03,outliers=0.001,spike_scale=100,steps=300,batch_size=8",
            outcome=(
                "better: final loss 2.377 to 2.280, difference -0.097 (95 % interval -0.106 to -0.088), n=5; "
                "learning rates tuned on both sides"
            ),
        ),
    ),
)
