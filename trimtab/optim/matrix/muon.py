"""Muon: momentum, orthogonalised, for the matrices of hidden layers; AdamW for everything else.

    m <- mu m + (1 - mu) g,    n = (1 - mu) g + mu m (Nesterov) or m
    u = scale(R, C) NewtonSchulz(n),    p <- p - lr (u + weight_decay p)

Every direction of the update then has the same length, so that rare directions are learned as fast as frequent ones.
The momentum is an average here, as in the author's code and in torch; with a sum in its place, the direction is the
same.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon); author's code KellerJordan/Muon, muon.py; the scale of
"match_rms_adamw" is Liu et al. 2025 (arXiv:2502.16982).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError, choose
from trimtab.optim._ops import ema_
from trimtab.optim.adaptive.adamw import adam
from trimtab.optim.chain import Chain
from trimtab.optim.matrix._by_role import as_matrix, by_role
from trimtab.optim.matrix._newton_schulz import Schedule, Triple, newton_schulz, schedule_of
from trimtab.optim.transform import Transform, check_range

__all__ = ["Muon", "orthogonalize"]

_SCALES = ("original", "match_rms_adamw", "spectral", "none")
_PRECISIONS = ("auto", "full", "bf16")


def _scale(name: str, rows: int, columns: int) -> float:
    if name == "original":
        return math.sqrt(max(1.0, rows / columns))
    if name == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(rows / columns) if name == "spectral" else 1.0


class orthogonalize(Transform):
    """Muon's step for a matrix: momentum with its singular values moved to 1, times a scale by shape.

    Tensors of more than two dimensions are matrices of one row for each index of the first; every tensor must have two
    at least (`Muon` sees to that).

    Args:
        momentum: decay of the average of gradients, in [0, 1).
        nesterov: whether the gradient is mixed in once more.
        coefficients: of Newton-Schulz: a name ("jordan", "polar-express", "polar-express-8", "you", "dion", "cans",
            "classical-cubic", "classical-quintic", "two-step") or triples (a, b, c), one a step.
        scale: "original" is sqrt(max(1, R/C)), "match_rms_adamw" is 0.2 sqrt(max(R, C)), "spectral" is sqrt(R/C),
            "none" is 1, for R rows (outputs) and C columns (inputs).
        ns_eps: least norm that momentum is divided by, above 0.
        precision: of Newton-Schulz: "full" (float32, or float64 for float64 parameters), "bf16", or "auto": bf16 on
            accelerators and full on the CPU.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> weight.grad = torch.tensor([[3.0, 0.0], [0.0, 0.1]])
        >>> Chain([weight], [orthogonalize(coefficients="polar-express-8")], lr=1.0).step()
        >>> weight.diagonal().round(decimals=3).tolist()  # both singular values are 1, whatever they were
        [-1.0, -1.0]
    """

    elementwise = False
    moments = {"momentum_buffer": True}

    def __init__(
        self,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        coefficients: str | Sequence[Triple] = "jordan",
        scale: str = "original",
        ns_eps: float = 1e-7,
        precision: str = "auto",
    ) -> None:
        if not isinstance(coefficients, str):
            coefficients = schedule_of(coefficients)
        super().__init__(
            momentum=momentum,
            nesterov=nesterov,
            coefficients=coefficients,
            scale=scale,
            ns_eps=ns_eps,
            precision=precision,
        )

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse a momentum outside [0, 1), unknown names, and an ns_eps that is not above 0."""
        check_range("momentum", group["momentum"], 0, 1)
        check_range("ns_eps", group["ns_eps"], 0, open_low=True)
        if not isinstance(group["nesterov"], bool):
            raise UsageError(f"nesterov must be True or False, got {group['nesterov']!r}.")
        choose("scale", group["scale"], _SCALES)
        choose("precision", group["precision"], _PRECISIONS)
        schedule_of(group["coefficients"])

    def init(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the momentum, zero."""
        return {"momentum_buffer": torch.zeros_like(p)}

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return momentum, and what chooses the code: schedule, scale and precision."""
        momentum = float(group["momentum"])
        return {
            "momentum": momentum,
            "rate": 1 - momentum,
            "nesterov": group["nesterov"],
            # In tuples: numbers that a compiled step may bake in.
            "schedule": schedule_of(group["coefficients"]),
            "ns_eps": (float(group["ns_eps"]),),
            "scale": group["scale"],
            "precision": group["precision"],
        }

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return the scaled, orthogonalised momentum."""
        m = state["momentum_buffer"]
        ema_(m, u, h["rate"])
        n = torch.lerp(u, m, h["momentum"]) if h["nesterov"] else m
        X = self.prepared(as_matrix(n), h)
        factor = _scale(h["scale"], *X.shape)
        if h["precision"] == "bf16" or (h["precision"] == "auto" and X.device.type != "cpu"):
            X = X.to(torch.bfloat16)
        return (newton_schulz(X, self.schedule(h), eps=h["ns_eps"][0]).to(n.dtype) * factor).reshape(n.shape)

    def prepared(self, matrix: Any, h: Any) -> Any:
        """Return what is orthogonalised in place of the momentum."""
        return matrix

    def schedule(self, h: Any) -> Schedule:
        """Return the coefficients of Newton-Schulz."""
        return h["schedule"]


class Muon(Chain):
    """Muon for hidden matrices: u = scale NewtonSchulz(momentum); AdamW for all else; p <- p - lr (u + weight_decay p).

    Hidden matrices are the parameters of two or more dimensions, except those of groups with the role "embedding",
    "head" or "vector". Give groups by role (`param_groups_for(model)`): without them embeddings and the head are
    orthogonalised too, which its author advises against.

    Args:
        params: parameters or groups, best from `trimtab.optim.param_groups_for`.
        lr: learning rate of the matrices. With `scale="match_rms_adamw"` one that suits AdamW suits, for `other_lr=1`.
        momentum: decay of the average of gradients, in [0, 1).
        nesterov: whether the gradient is mixed in once more.
        coefficients: of Newton-Schulz, a name or triples, as for `orthogonalize`.
        scale: "original", "match_rms_adamw", "spectral" or "none".
        ns_eps: least norm that momentum is divided by, above 0.
        precision: "auto", "full" or "bf16".
        other_lr: learning rate of everything else, as a multiple of `lr`; with the default, 0.0003.
        betas: of AdamW for everything else.
        eps: of AdamW for everything else.
        weight_decay: decoupled, at the learning rate of each parameter.
        options: of every `Chain`: `maximize`, `state`, `foreach`, `compile`, `nonfinite`.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> from trimtab.optim import param_groups_for
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 10))
        >>> optimizer = Muon(param_groups_for(model), lr=0.02)

    References:
        Jordan et al. 2024, kellerjordan.github.io/posts/muon. Liu et al. 2025, arXiv:2502.16982.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        coefficients: str | Sequence[Triple] = "jordan",
        scale: str = "original",
        ns_eps: float = 1e-7,
        precision: str = "auto",
        other_lr: float = 0.015,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        matrix = orthogonalize(
            momentum=momentum,
            nesterov=nesterov,
            coefficients=coefficients,
            scale=scale,
            ns_eps=ns_eps,
            precision=precision,
        )
        stages = [by_role(matrix, adam(betas=betas, eps=eps), other_lr=other_lr)]
        super().__init__(params, stages, lr=lr, weight_decay=weight_decay, **options)


CARD = Card(
    name="muon",
    room="optim",
    summary="momentum with all its singular values moved to 1, for hidden matrices",
    paper=Paper(
        "Muon: An optimizer for hidden layers in neural networks",
        2024,
        code="https://github.com/KellerJordan/Muon",
    ),
    equation="u = scale(R, C) NewtonSchulz((1 - mu) g + mu m),  p <- p - lr (u + weight_decay p)",
    claim="Trains language models to the same loss with about half the compute of AdamW.",
    acts_on="optimizer",
    entry="trimtab.optim.matrix.muon:Muon",
    defaults=(
        Default("lr", 0.02, "author's code"),
        Default("momentum", 0.95, "author's code"),
        Default("nesterov", True, "author's code"),
        Default("coefficients", "jordan", "author's code"),
        Default("scale", "original", "author's code"),
        Default("ns_eps", 1e-7, "author's code"),
        Default("precision", "auto", "ours: the author's bf16 is slow and coarse on CPUs"),
        Default("other_lr", 0.015, "author's code: 0.0003 beside 0.02"),
        Default("betas", (0.9, 0.95), "author's code"),
        Default("eps", 1e-10, "author's code"),
        Default("weight_decay", 0.0, "author's code"),
    ),
    verified={
        "equation": (
            "tests/optim/matrix/test_muon.py::test_equals_the_equations",
            "tests/optim/matrix/test_muon.py::test_converging_coefficients_give_the_polar_factor",
        ),
        "reference": (
            "tests/optim/matrix/test_muon.py::test_equals_torch_in_bf16",
            "tests/optim/matrix/test_muon.py::test_others_equal_torch_adamw",
        ),
    },
    deviations=(
        "Newton-Schulz runs in float32 on CPUs (precision='auto'); the author's code and torch always use bf16.",
        "The norm is clamped to ns_eps from below, as in torch; the author's code adds 1e-7 to it.",
        "Every tensor of more than two dimensions is one matrix [R, rest]; the author's code does so for four, and "
        "treats three as a batch of matrices.",
        "Decoupled weight decay and the scale 'match_rms_adamw' are from 'Muon is Scalable for LLM Training' "
        "(arXiv:2502.16982); the scale 'spectral' is Bernstein's (arXiv:2409.20325).",
    ),
    experiments=(
        Experiment(
            "lm-small",
            "adamw,lr=0.003,outliers=0.001,spike_scale=100,steps=300,batch_size=8",
            "muon,lr=0.03,scale=match_rms_adamw,other_lr=1,outliers=0.001,spike_scale=100,steps=300,batch_size=8",
            outcome=(
                "better: final loss 2.495 to 2.377, difference -0.118 (95 % interval -0.128 to -0.108), n=5; "
                "learning rates tuned on both sides"
            ),
        ),
    ),
)
