"""Update clipping: a step whose gradient is larger than its second moment expects is made shorter.

With Adam's moments m_hat and v_hat, StableAdamW measures how far the second moment lags behind and divides by it:

    RMS = sqrt(mean(g^2 / max(v_hat, eps^2))),    lr' = lr / max(1, RMS / d)
    p <- p - lr' (m_hat / (sqrt(v_hat) + eps) + weight_decay p)

`update_clip` is Adafactor's form, which bounds any update's own root mean square: u / max(1, RMS(u) / d).

Wortsman et al. 2023 (arXiv:2304.13013), algorithm 2; Shazeer and Stern 2018 (arXiv:1804.04235), section 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from trimtab.card import Card, Default, Paper
from trimtab.optim._ops import addcmul_, ema_
from trimtab.optim.adaptive.adamw import adam
from trimtab.optim.chain import Chain
from trimtab.optim.transform import Transform, check_range

__all__ = ["StableAdamW", "stable_adam", "update_clip"]


class update_clip(Transform):
    """Bounds the root mean square of each parameter's update: u / max(1, RMS(u) / clip_threshold).

    Args:
        clip_threshold: d, above 0.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([6.0, 8.0])
        >>> Chain([weight], [update_clip()], lr=1.0).step()
        >>> [round(value, 4) for value in weight.tolist()]  # over their root mean square, sqrt(50)
        [-0.8485, -1.1314]
    """

    elementwise = False

    def __init__(self, *, clip_threshold: float = 1.0) -> None:
        super().__init__(clip_threshold=clip_threshold)

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse a threshold that is not above 0."""
        check_range("clip_threshold", group["clip_threshold"], 0, open_low=True)

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return 1 / d."""
        return {"per_threshold": 1 / float(group["clip_threshold"])}

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return the update, no longer than the threshold."""
        return u / torch.clamp_min((u * u).mean().sqrt() * h["per_threshold"], 1.0)


class stable_adam(adam):
    """Adam whose step, with its weight decay, is divided by max(1, RMS(g / sqrt(v_hat)) / clip_threshold).

    Args:
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator; its square is the least second moment that the RMS divides by.
        clip_threshold: d, above 0.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([0.5, -2.0])
        >>> Chain([weight], [stable_adam()], lr=0.1).step()
        >>> [round(value, 4) for value in weight.tolist()]  # as Adam: the first gradient is its own second moment
        [-0.1, 0.1]
    """

    elementwise = False

    def __init__(
        self, *, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-6, clip_threshold: float = 1.0
    ) -> None:
        super().__init__(betas=betas, eps=eps)
        self.options |= {"clip_threshold": clip_threshold}

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse what Adam refuses, an eps of 0, and a threshold that is not above 0."""
        super().check(group)
        check_range("eps", group["eps"], 0, open_low=True)
        check_range("clip_threshold", group["clip_threshold"], 0, open_low=True)

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return Adam's coefficients, 1 / d, and the weight decay that is scaled too."""
        decay = float(group["weight_decay"])
        own = {"per_threshold": 1 / float(group["clip_threshold"]), "decay": decay, "decays": bool(decay)}
        return super().coefficients(step, group) | own

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return the step and, as the chain's end adds weight_decay p in full, what is too much of that."""
        m, v = state["exp_avg"], state["exp_avg_sq"]
        ema_(m, u, h["rate1"])
        addcmul_(v.mul_(h["beta2"]), u, u, h["rate2"])
        root = v.sqrt() * h["correction2"]
        ratio = u / torch.clamp_min(root, h["eps"])
        scale = torch.clamp_min((ratio * ratio).mean().sqrt() * h["per_threshold"], 1.0).reciprocal()
        step = (m * h["correction1"]) / (root + h["eps"]) * scale
        return step + p * ((scale - 1.0) * h["decay"]) if h["decays"] else step


class StableAdamW(Chain):
    """StableAdamW: AdamW with lr' = lr / max(1, RMS(g / sqrt(v_hat)) / clip_threshold), parameter by parameter.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator, above 0; its square is the least second moment that the RMS divides by.
        clip_threshold: d, above 0.
        weight_decay: decoupled, and made weaker with the step.
        options: of every `Chain`: `maximize`, `state`, `foreach`, `compile`, `nonfinite`.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = StableAdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

    References:
        Wortsman et al. 2023, arXiv:2304.13013.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        clip_threshold: float = 1.0,
        weight_decay: float = 0.01,
        **options: Any,
    ) -> None:
        step = stable_adam(betas=betas, eps=eps, clip_threshold=clip_threshold)
        super().__init__(params, [step], lr=lr, weight_decay=weight_decay, **options)


CARD = Card(
    name="update-clipping",
    room="optim",
    summary="AdamW whose step shrinks where the second moment lags behind the gradient",
    paper=Paper("Stable and low-precision training for large-scale vision-language models", 2023, arxiv="2304.13013"),
    equation="lr' = lr / max(1, RMS / d),  RMS = sqrt(mean(g^2 / max(v_hat, eps^2)))",
    claim="Prevents the loss spikes that follow an out-of-date second moment, and does better than gradient clipping.",
    acts_on="optimizer",
    entry="trimtab.optim.clipping.update_clipping:StableAdamW",
    treats={"loss-spike": 2, "gradient-spike": 1, "update-too-large": 2},
    defaults=(
        Default("lr", 1e-3, "torch.optim.AdamW"),
        Default("betas", (0.9, 0.99), "paper, algorithm 2 (recalled); pytorch_optimizer"),
        Default("eps", 1e-6, "paper, algorithm 2 (recalled)"),
        Default("clip_threshold", 1.0, "Adafactor's paper"),
        Default("weight_decay", 0.01, "torch.optim.AdamW; the paper's models take 0.2"),
    ),
    verified={
        "equation": ("tests/optim/clipping/test_update_clipping.py::test_equals_the_papers_loop",),
        "reference": ("tests/optim/clipping/test_update_clipping.py::test_equals_pytorch_optimizer",),
        "claim": ("tests/optim/clipping/test_update_clipping.py::test_after_a_calm_the_step_is_shorter_than_adams",),
    },
    deviations=("The paper has d = 1 only; clip_threshold is Adafactor's.",),
)
