"""AdamWScale: AdamW whose step is a fraction of each weight tensor's own size, as Adafactor's is.

    u = max(1e-3, RMS(p)) sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps)
    p <- (1 - lr weight_decay) (p - lr u)

Nawrot 2023, nanoT5 (arXiv:2309.02373); authors' code PiotrNawrot/nanoT5, nanoT5/utils/copied_utils.py at 73b2e63, which
adds the scale to Hugging Face's AdamW. The scale is that of Shazeer and Stern 2018 (Adafactor, arXiv:1804.04235).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from trimtab.card import Card, Default, Paper
from trimtab.optim.adaptive.adamw import adam
from trimtab.optim.chain import Chain
from trimtab.optim.transform import Transform, check_range

__all__ = ["AdamWScale", "weight_rms_scale"]


class weight_rms_scale(Transform):
    """Steps relative to the weights: max(scale_floor, RMS(p)) u, a tensor at a time.

    Args:
        scale_floor: the scale of tensors that are smaller than that, zeros among them; at least 0.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
        >>> weight.grad = torch.ones(2)
        >>> Chain([weight], [weight_rms_scale()], lr=0.1).step()
        >>> [round(value, 4) for value in weight.tolist()]  # 0.1 sqrt((9 + 16) / 2) = 0.3536
        [2.6464, -4.3536]
    """

    elementwise = False

    def __init__(self, *, scale_floor: float = 1e-3) -> None:
        super().__init__(scale_floor=scale_floor)

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse a negative floor."""
        check_range("scale_floor", group["scale_floor"], 0)

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the floor."""
        return {"floor": float(group["scale_floor"])}

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return the update, scaled."""
        return u * (p * p).mean().sqrt().clamp_min(h["floor"])


class _adam(adam):
    """Adam as Hugging Face has it: eps meets sqrt(v) before the bias correction, and the decay comes after the step."""

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        h = super().coefficients(step, group)
        # The chain decays first: (1 - lr weight_decay) (p - lr u) is its step along (1 - lr weight_decay) u.
        kept = 1 - float(group["lr"]) * group["weight_decay"]
        return h | {"eps": h["eps"] * h["correction2"], "correction1": h["correction1"] * kept}


class AdamWScale(Chain):
    """AdamWScale: AdamW's step times max(scale_floor, RMS(p)), p <- (1 - lr weight_decay) (p - lr u).

    Args:
        params: parameters or groups.
        lr: learning rate, relative to the weights' size: nanoT5 trains at 0.02.
        betas: decay of the two moments, each in [0, 1).
        eps: added to sqrt(v) before its bias correction, at least 0.
        scale_floor: the scale of tensors that are smaller than that, at least 0.
        weight_decay: decoupled, not scaled.
        options: of every `Chain`: `maximize`, `state`, `foreach`, `compile`, `nonfinite`.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = AdamWScale(model.parameters(), lr=0.02)

    References:
        Nawrot 2023, arXiv:2309.02373; authors' code PiotrNawrot/nanoT5 at 73b2e63.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        scale_floor: float = 1e-3,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        stages = [_adam(betas=betas, eps=eps), weight_rms_scale(scale_floor=scale_floor)]
        super().__init__(params, stages, lr=lr, weight_decay=weight_decay, **options)


CARD = Card(
    name="adamw-scale",
    room="optim",
    summary="AdamW with steps relative to each weight tensor's size",
    paper=Paper(
        "nanoT5: A PyTorch Framework for Pre-training and Fine-tuning T5-style Models with Limited Resources",
        2023,
        arxiv="2309.02373",
        code="https://github.com/PiotrNawrot/nanoT5",
    ),
    equation="u = max(1e-3, RMS(p)) m_hat / (sqrt(v_hat) + eps),  p <- (1 - lr weight_decay) (p - lr u)",
    claim="Pre-trains T5 as stably as Adafactor and to a lower loss, where plain AdamW diverges or lags.",
    acts_on="optimizer",
    entry="trimtab.optim.adaptive.adamw_scale:AdamWScale",
    defaults=(
        Default("lr", 1e-3, "authors' class; their runs take 0.02"),
        Default("betas", (0.9, 0.999), "authors' code"),
        Default("eps", 1e-6, "authors' code"),
        Default("scale_floor", 1e-3, "authors' code"),
        Default("weight_decay", 0.0, "authors' code"),
    ),
    verified={
        "equation": ("tests/optim/adaptive/test_adamw_scale.py::test_a_step_is_relative_to_the_weights",),
        "reference": ("tests/optim/adaptive/test_adamw_scale.py::test_equals_the_authors_rule",),
    },
    deviations=("The authors' correct_bias=False, of BERT's TensorFlow code, is left out: bias is always corrected.",),
)
