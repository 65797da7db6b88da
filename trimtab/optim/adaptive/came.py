"""CAME: Adafactor's factored second moment, and a confidence that damps the entries where updates disagree.

For a matrix with gradient g, row means r and column means c over entries, and <r> the mean of r:

    r <- beta2 r + (1 - beta2) rowmean(g^2 + eps1),    c <- beta2 c + (1 - beta2) colmean(g^2 + eps1)
    x = g / sqrt(r c / <r>),    x <- x / max(1, RMS(x) / d),    m <- beta1 m + (1 - beta1) x
    R <- beta3 R + (1 - beta3) rowmean((x - m)^2 + eps2),    C likewise by columns
    u = m / sqrt(R C / <R>),    p <- p - lr (u + weight_decay p)

Parameters with fewer than two dimensions keep a whole second moment and step along m.

Luo et al. 2023 (arXiv:2307.02047); authors' code yangluo7/CAME, came_pytorch/CAME.py at b368dc0.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.optim._ops import ema_
from trimtab.optim.chain import Chain
from trimtab.optim.transform import Transform, check_betas, check_range

__all__ = ["CAME", "confidence_guided"]


class confidence_guided(Transform):
    """CAME's step: factored Adam, with each entry damped by how much its updates disagree with their mean.

    Args:
        betas: decay of the mean update, of the second moment, and of the disagreement, each in [0, 1).
        eps: added to squared gradients and to squared disagreements, each at least 0.
        clip_threshold: root mean square that a tensor's update may have before it is averaged, above 0.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> weight.grad = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
        >>> Chain([weight], [confidence_guided()], lr=1.0).step()
        >>> (weight / weight[0, 0]).tolist()  # of rank one, as the gradient: all entries move alike
        [[1.0, 1.0], [1.0, 1.0]]
    """

    elementwise = False
    moments = {"exp_avg": True}

    def __init__(
        self,
        *,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
    ) -> None:
        super().__init__(betas=betas, eps=eps, clip_threshold=clip_threshold)

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse betas outside [0, 1), a negative eps, and a clip_threshold that is not above 0."""
        check_betas(group["betas"], 3)
        if not isinstance(group["eps"], (tuple, list)) or len(group["eps"]) != 2:
            raise UsageError(f"eps must be 2 numbers, at least 0, got {group['eps']!r}.")
        for eps in group["eps"]:
            check_range("eps", eps, 0)
        check_range("clip_threshold", group["clip_threshold"], 0, open_low=True)

    def kind(self, p: Tensor, group: Mapping[str, Any]) -> Hashable:
        """Return whether the moments are factored, by the last two dimensions."""
        return p.ndim >= 2 and p.numel() > 0

    def init(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the mean update, and second moments by rows and columns, zero."""
        state = {"exp_avg": torch.zeros_like(p)}
        if not self.kind(p, group):
            return state | {"exp_avg_sq": torch.zeros_like(p)}
        row, col = p.shape[:-1], p.shape[:-2] + p.shape[-1:]
        for name in ("exp_avg_sq", "exp_avg_res"):
            state |= {f"{name}_row": p.new_zeros(row), f"{name}_col": p.new_zeros(col)}
        return state

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return rates, the two eps, and the threshold."""
        rates = {f"rate{index}": 1 - float(beta) for index, beta in enumerate(group["betas"], start=1)}
        eps1, eps2 = group["eps"]
        return rates | {"eps1": float(eps1), "eps2": float(eps2), "per_threshold": 1 / float(group["clip_threshold"])}

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return the mean update over the root of its disagreement."""
        m = state["exp_avg"]
        if not h["kind"]:
            v = state["exp_avg_sq"]
            ema_(v, u * u + h["eps1"], h["rate2"])
            ema_(m, _clipped_(u * v.rsqrt(), h), h["rate1"])
            return m
        # In place where the tensor is new: what costs here is memory.
        x = _clipped_(_per_root(u * u, state, "exp_avg_sq", h["eps1"], h["rate2"]).mul_(u), h)
        ema_(m, x, h["rate1"])
        difference = x.sub_(m)
        squares = difference.mul_(difference)
        return _per_root(squares, state, "exp_avg_res", h["eps2"], h["rate3"]).mul_(m)


def _per_root(squares: Any, state: Any, name: str, eps: Any, rate: Any) -> Any:
    """Average the row and column means of squares, and return 1 / sqrt(r c / <r>)."""
    r, c = state[f"{name}_row"], state[f"{name}_col"]
    ema_(r, squares.mean(dim=-1) + eps, rate)
    ema_(c, squares.mean(dim=-2) + eps, rate)
    return (r / r.mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1) * c.rsqrt().unsqueeze(-2)


def _clipped_(x: Any, h: Any) -> Any:
    """Divide x by max(1, RMS(x) / d), in place."""
    rms = torch.linalg.vector_norm(x) / math.sqrt(max(1, math.prod(x.shape)))
    return x.div_((rms * h["per_threshold"]).clamp_min(1.0))


class CAME(Chain):
    """CAME: u = m / sqrt(R C / <R>), the mean update over its disagreement; p <- p - lr (u + weight_decay p).

    A parameter of shape (..., n, m) keeps one moment in full and four vectors; other parameters keep two moments.

    Args:
        params: parameters or groups.
        lr: learning rate; the authors take 0.5 to 0.9 times AdamW's.
        betas: decay of the mean update, of the second moment, and of the disagreement, each in [0, 1).
        eps: added to squared gradients and to squared disagreements, each at least 0.
        clip_threshold: root mean square that a tensor's update may have before it is averaged, above 0.
        weight_decay: decoupled.
        options: of every `Chain`: `maximize`, `state`, `foreach`, `compile`, `nonfinite`.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = CAME(model.parameters(), lr=2e-4, weight_decay=0.01)

    References:
        Luo et al. 2023, arXiv:2307.02047; authors' code yangluo7/CAME (came-pytorch 0.1.3).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-4,
        *,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        step = confidence_guided(betas=betas, eps=eps, clip_threshold=clip_threshold)
        super().__init__(params, [step], lr=lr, weight_decay=weight_decay, **options)


CARD = Card(
    name="came",
    room="optim",
    summary="factored Adam whose steps are damped where updates disagree",
    paper=Paper(
        "CAME: Confidence-guided Adaptive Memory Efficient Optimization",
        2023,
        arxiv="2307.02047",
        code="https://github.com/yangluo7/CAME",
    ),
    equation="u = m / sqrt(R C / <R>), R and C row and column means of (x - m)^2;  p <- p - lr (u + weight_decay p)",
    claim="Trains BERT at batch 32,768 faster and to a higher accuracy than Adam, with Adafactor's memory.",
    acts_on="optimizer",
    entry="trimtab.optim.adaptive.came:CAME",
    defaults=(
        Default("lr", 2e-4, "authors' README; their class has none"),
        Default("betas", (0.9, 0.999, 0.9999), "authors' code"),
        Default("eps", (1e-30, 1e-16), "authors' code"),
        Default("clip_threshold", 1.0, "authors' code"),
        Default("weight_decay", 0.0, "authors' code"),
    ),
    verified={
        "equation": (
            "tests/optim/adaptive/test_came.py::test_equals_the_papers_loop",
            "tests/optim/adaptive/test_came.py::test_a_rank_one_gradient_moves_all_entries_alike",
        ),
        "reference": ("tests/optim/adaptive/test_came.py::test_equals_came_pytorch",),
        "claim": ("tests/claims/test_optimizers_adaptive.py::test_came_keeps_one_moment_and_vectors",),
    },
    deviations=(
        "The paper's r, c, R and C are sums over rows and columns; means, as in the authors' code, give the same "
        "quotients.",
        "The paper treats matrices; as in the authors' code, more dimensions are batches of matrices of the last two, "
        "clipped together, and fewer keep a whole second moment without confidence.",
    ),
    experiments=(
        Experiment(
            "lm-small",
            "adamw,lr=0.003,steps=300,batch_size=8",
            "came,lr=0.0003,steps=300,batch_size=8",
            mechanism="state_bytes_per_parameter",
            outcome=(
                "worse: final loss 2.482 to 2.529, difference +0.047 (95 % interval +0.012 to +0.082), n=5; state "
                "8.00 to 4.19 bytes a parameter; learning rates tuned on both sides"
            ),
        ),
    ),
)
