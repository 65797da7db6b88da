"""Adam whose moments are forgotten at intervals, so that what a spike left in them does not last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.optim._ops import add_, addcmul_
from trimtab.optim.adaptive.adamw import adam
from trimtab.optim.transform import check_whole

__all__ = ["reset_adam"]


class reset_adam(adam):
    """Adam whose moments, and their bias corrections, start again every `interval` steps.

    Args:
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator, at least 0.
        interval: steps between resets; 0 never resets.

    Example:
        >>> import torch
        >>> from trimtab.optim import Chain
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = Chain([weight], [reset_adam(interval=2)], lr=1.0)
        >>> for gradient in (1.0, -1.0):  # the second step starts again, and sees its own gradient only
        ...     weight.grad = torch.full((1,), gradient)
        ...     optimizer.step()
        >>> round(weight.tolist()[0], 4)
        0.0
    """

    def __init__(self, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, interval: int = 500) -> None:
        super().__init__(betas=betas, eps=eps)
        self.options["interval"] = interval

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse what Adam refuses, and a negative interval."""
        super().check(group)
        check_whole("interval", group["interval"], 0)

    def resets(self, step: int, group: Mapping[str, Any]) -> bool:
        """Whether the moments start again before this step."""
        return group["interval"] > 0 and step % group["interval"] == 0

    def age(self, step: int, group: Mapping[str, Any]) -> int:
        """Return the number of steps, this one included, that the bias corrections count."""
        interval = group["interval"]
        return step if not interval or step < interval else step % interval + 1

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return Adam's coefficients, and what is kept of the moments: nothing at a reset."""
        resets = self.resets(step, group)
        beta1, beta2 = (0.0, 0.0) if resets else group["betas"]
        own = {"keep1": float(beta1), "keep2": float(beta2), "resets": resets}
        return super().coefficients(self.age(step, group), group) | own

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return m_hat / (sqrt(v_hat) + eps)."""
        m, v = state["exp_avg"], state["exp_avg_sq"]
        if h["resets"]:  # a square that overflowed would outlast a product with 0
            v.zero_()
        add_(m.mul_(h["keep1"]), u, h["rate1"])
        addcmul_(v.mul_(h["keep2"]), u, u, h["rate2"])
        return m * h["correction1"] / (v.sqrt() * h["correction2"] + h["eps"])
