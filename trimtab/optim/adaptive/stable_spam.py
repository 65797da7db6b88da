"""Stable-SPAM: SPAM whose clipping threshold and gradient norm follow their own history, tensor by tensor.

With G = max |g| and n = ||g|| of a tensor at step t:

    AdaClip  T <- gamma3 T + (1 - gamma3) G,    g_i <- g_i / G T_hat where |g_i| > T_hat,    T_hat = T / (1 - gamma3^t)
    AdaGN    a <- gamma1 a + (1 - gamma1) n,    b <- gamma2 b + (1 - gamma2) n^2
             g <- g / n a_hat / (sqrt(b_hat) + eps),    a_hat and b_hat corrected as T_hat is
    MoRet    Adam on g, its moments reset every `interval` steps

Huang et al. 2025 (arXiv:2502.17055); authors' code TianjinYellow/StableSPAM.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError, choose
from trimtab.optim._ops import ema_
from trimtab.optim.adaptive.spam import reset_adam
from trimtab.optim.chain import Chain
from trimtab.optim.transform import Transform, check_range

__all__ = ["StableSPAM", "adaptive_spike_clip"]


class adaptive_spike_clip(Transform):
    """AdaClip and AdaGN: entries bounded by a running maximum, and the whole by running norms, a tensor at a time.

    Args:
        gammas: decay of the mean norm, of the mean squared norm, and of the mean maximum, each in [0, 1).
        norm_eps: added to the root of the mean squared norm, at least 0.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, -4.0])
        >>> Chain([weight], [adaptive_spike_clip()], lr=1.0).step()
        >>> [round(value, 4) for value in weight.tolist()]  # at first the norms cancel: a unit vector
        [-0.6, 0.8]
    """

    elementwise = False

    def __init__(self, *, gammas: tuple[float, float, float] = (0.7, 0.9, 0.999), norm_eps: float = 1e-8) -> None:
        super().__init__(gammas=gammas, norm_eps=norm_eps)

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse gammas outside [0, 1) and a negative eps."""
        if not isinstance(group["gammas"], (tuple, list)) or len(group["gammas"]) != 3:
            raise UsageError(f"gammas must be 3 numbers in [0, 1), got {group['gammas']!r}.")
        for gamma in group["gammas"]:
            check_range("gammas", gamma, 0, 1)
        check_range("norm_eps", group["norm_eps"], 0)

    def kind(self, p: Tensor, group: Mapping[str, Any]) -> Hashable:
        """Return whether there is anything to clip."""
        return "empty" if p.numel() == 0 else None

    def init(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the means of the norm, of its square and of the maximum, zero."""
        return {name: p.new_zeros(()) for name in ("norm", "norm_sq", "maximum")}

    def age(self, step: int, group: Mapping[str, Any]) -> int:
        """Return what the bias corrections count."""
        return step

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return rates, bias corrections and eps."""
        age = self.age(step, group)
        h: dict[str, Any] = {"eps": float(group["norm_eps"])}
        for index, gamma in enumerate(group["gammas"], start=1):
            h |= {f"rate{index}": 1 - float(gamma), f"correction{index}": 1 / (1 - float(gamma) ** age)}
        return h

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return the gradient, bounded and of a steadier norm."""
        if h["kind"] == "empty":
            return u
        norm, norm_sq, maximum = state["norm"], state["norm_sq"], state["maximum"]
        size = u.abs()
        greatest = size.max()
        ema_(maximum, greatest, h["rate3"])
        bound = maximum * h["correction3"]
        g = u * torch.where(size > bound, bound / greatest, 1.0)
        # Bounded so that its square is finite: the means of norms would else stay infinite.
        n = (g * g).sum().sqrt().clamp_max(0.5 * torch.finfo(g.dtype).max ** 0.5)
        ema_(norm, n, h["rate1"])
        ema_(norm_sq, n * n, h["rate2"])
        wanted = norm * h["correction1"] / ((norm_sq * h["correction2"]).sqrt() + h["eps"])
        # A gradient of zeros stays one.
        return g * torch.where(n > 0, wanted / n, 0.0)


class _clip(adaptive_spike_clip):
    """AdaClip and AdaGN; in the authors' code a reset makes the corrections count from 1 again, one step later."""

    def age(self, step: int, group: Mapping[str, Any]) -> int:
        interval = group["interval"]
        return (step - 1) % interval + 2 if group["follow"] == "code" and 0 < interval < step else step


class _reset_adam(reset_adam):
    """Adam with resets; the authors' code forgets the moments a step later than it counts anew."""

    def __init__(self, *, follow: str, **options: Any) -> None:
        super().__init__(**options)
        self.options["follow"] = follow

    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        choose("source to follow", group["follow"], ("paper", "code"))

    def resets(self, step: int, group: Mapping[str, Any]) -> bool:
        interval = group["interval"]
        if group["follow"] == "code":
            return interval > 0 and step > interval and step % interval == 1 % interval
        return super().resets(step, group)


class StableSPAM(Chain):
    """Stable-SPAM: Adam with resets on gradients whose maxima and norms are held to their running means.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of Adam's moments, each in [0, 1).
        eps: added to both denominators, at least 0.
        gammas: decay of the mean norm, of the mean squared norm, and of the mean maximum, each in [0, 1).
        interval: steps between resets; 0 never resets.
        weight_decay: decoupled.
        follow: "paper", or "code" for what the authors' code does at and after a reset.
        options: of every `Chain`: `maximize`, `state`, `foreach`, `compile`, `nonfinite`.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = StableSPAM(model.parameters(), lr=1e-3)

    References:
        Huang et al. 2025, arXiv:2502.17055; authors' code TianjinYellow/StableSPAM.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        gammas: tuple[float, float, float] = (0.7, 0.9, 0.999),
        interval: int = 1000,
        weight_decay: float = 0.0,
        follow: str = "paper",
        **options: Any,
    ) -> None:
        clip = _clip(gammas=gammas, norm_eps=eps)
        adam = _reset_adam(betas=betas, eps=eps, interval=interval, follow=follow)
        super().__init__(params, [clip, adam], lr=lr, weight_decay=weight_decay, **options)


CARD = Card(
    name="stable-spam",
    room="optim",
    summary="Adam on gradients whose maxima and norms are held to their history",
    paper=Paper(
        "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam",
        2025,
        arxiv="2502.17055",
        code="https://github.com/TianjinYellow/StableSPAM",
    ),
    equation="g_i <- g_i / max|g| T_hat where |g_i| > T_hat;  g <- g / |g| a_hat / sqrt(b_hat);  Adam with resets",
    claim="Steadies gradient norms in 4-bit training, which then beats 16-bit Adam by up to 2 perplexity.",
    acts_on="optimizer",
    entry="trimtab.optim.adaptive.stable_spam:StableSPAM",
    treats={"gradient-spike": 2, "loss-spike": 3},
    defaults=(
        Default("lr", 1e-3, "authors' code"),
        Default("betas", (0.9, 0.999), "authors' code"),
        Default("eps", 1e-8, "authors' code"),
        Default("gammas", (0.7, 0.9, 0.999), "authors' code"),
        Default("interval", 1000, "authors' code"),
        Default("weight_decay", 0.0, "authors' code"),
        Default("follow", "paper", "ours"),
    ),
    verified={
        "equation": (
            "tests/optim/adaptive/test_stable_spam.py::test_equals_the_papers_loop",
            "tests/optim/adaptive/test_stable_spam.py::test_a_first_step_is_adams_on_a_unit_gradient",
        ),
        "reference": (
            "tests/optim/adaptive/test_stable_spam.py::test_equals_pytorch_optimizer",
            "tests/optim/adaptive/test_stable_spam.py::test_equals_the_authors_rule",
        ),
        "claim": ("tests/claims/test_optimizers_adaptive.py::test_stable_spam_bounds_what_a_spike_moves",),
    },
    deviations=(
        "At a reset the authors' code still steps along the old moments, corrected as if they were new, and starts "
        "anew with the next step, which it counts as the second; it also counts the corrections of the norms from 1 "
        "again, though the norms are kept, so that nothing is clipped for a while; follow='code' does all that.",
        "The authors' options for amsgrad, and for a decay of beta1 and gamma1 over the run, are left out.",
    ),
    experiments=(
        Experiment(
            "lm-small",
            "adamw,lr=0.003,clip=0,spikes=0.05,spike_scale=1000,steps=300,batch_size=8",
            "stable-spam,lr=0.003,clip=0,spikes=0.05,spike_scale=1000,steps=300,batch_size=8",
            outcome=(
                "better: final loss 2.705 to 2.460, difference -0.245 (95 % interval -0.385 to -0.105), n=5; "
                "learning rates tuned on both sides"
            ),
        ),
        Experiment(
            "lm-small",
            "adamw,lr=0.003,clip=1,spikes=0.05,spike_scale=1000,steps=300,batch_size=8",
            "stable-spam,lr=0.003,clip=1,spikes=0.05,spike_scale=1000,steps=300,batch_size=8",
            outcome=(
                "better: final loss 2.503 to 2.458, difference -0.045 (95 % interval -0.069 to -0.021), n=5; "
                "learning rates tuned on both sides"
            ),
        ),
        Experiment(
            "lm-small",
            "adamw,lr=0.003,steps=300,batch_size=8",
            "stable-spam,lr=0.003,steps=300,batch_size=8",
            outcome=(
                "better: final loss 2.482 to 2.462, difference -0.020 (95 % interval -0.028 to -0.013), n=5; "
                "learning rates tuned on both sides"
            ),
        ),
    ),
)
