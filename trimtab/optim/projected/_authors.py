"""Where the code of GaLore's and Fira's authors departs from Adam with decoupled decay, as parts for their chains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.optim._ops import add_
from trimtab.optim.adaptive.adamw import adam
from trimtab.optim.transform import Descend


class early_eps_adam(adam):
    """Adam; following the authors' code, eps is added to sqrt(v) before the bias correction."""

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return Adam's coefficients, eps divided by sqrt(1 - beta2^t) where the code is followed."""
        h = super().coefficients(step, group)
        if group["follow"] == "code":
            h["eps"] *= h["correction2"]
        return h


class late_decay(Descend):
    """The chain's end; following the authors' code, the weights are decayed after the step."""

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the learning rate, what is left of the weights, and the order."""
        return super().coefficients(step, group) | {"late": group["follow"] == "code"}

    def update(self, u: Any, p: Any, state: Any, h: Any) -> None:
        """Write the new parameters."""
        if not h["late"]:
            super().update(u, p, state, h)
            return
        add_(p, u, h["step"])
        if h["decays"]:
            p.mul_(h["keep"])
