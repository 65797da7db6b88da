"""Ranger21: AdamW with eight published additions, each of which can be switched off.

For the gradient g of a parameter w, at step t, in this order:

    adaptive clipping     g_i <- g_i min(1, tau max(|w_i|, 1e-3) / |g_i|), unit by unit
    centralisation        g <- g - mean of g over all but its first dimension
    positive-negative     m_t = beta1^2 m_{t-2} + (1 - beta1^2) g
    momentum              m_hat = ((1 + beta0) m_t - beta0 m_{t-1}) / (sqrt((1 + beta0)^2 + beta0^2) (1 - beta1^t))
    second moment         v = beta2 v + (1 - beta2) g^2,   v_max = max(v_max, v),   v_hat = v_max / (1 - beta2^t)
    warm-up, warm-down    lr_t = lr min(1, t / warmup), and linearly down to `warmdown_lr` after 72 % of the steps
    stable weight decay   w <- w (1 - lr_t weight_decay / sqrt(mean of v / (1 - beta2^t) over all parameters))
    norm loss             w_i <- w_i (1 - 2 lr_t factor (1 - 1 / |w_i|)), which draws each unit's norm to 1
    step                  w <- w - lr_t m_hat / (sqrt(v_hat) + eps), or over softplus(sqrt(v_hat) + eps) in the code
    lookahead             every 5 steps w <- slow + alpha (w - slow), slow <- w

Wright and Demeure 2021 (arXiv:2106.13731; its algorithm is recalled); authors' code lessw2020/Ranger21,
ranger21/ranger21.py at 1be857f.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import ParamsT

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError, choose
from trimtab.optim._ops import addcmul_, ema_
from trimtab.optim._sharding import Shard
from trimtab.optim.chain import Chain
from trimtab.optim.clipping.adaptive_clipping import adaptive_clip, unitwise_norm
from trimtab.optim.transform import Transform, check_betas, check_flag, check_range, check_whole

__all__ = ["Ranger21", "centralize", "ranger21_step"]

_FOLLOW = ("paper", "code")
_WARMDOWN_START = 0.72


class centralize(Transform):
    """Gradient centralisation: subtracts each unit's mean; vectors pass through.

    Args:
        normalize: whether to divide the result by its standard deviation, over the whole tensor, too.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1, 2))
        >>> weight.grad = torch.tensor([[1.0, 5.0]])
        >>> Chain([weight], [centralize()], lr=1.0).step()
        >>> weight.tolist()
        [[2.0, -2.0]]
    """

    elementwise = False

    def __init__(self, *, normalize: bool = False) -> None:
        super().__init__(normalize=normalize)

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse a normalize that is neither True nor False."""
        check_flag("normalize", group["normalize"])

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return whether to normalise."""
        return {"normalize": bool(group["normalize"])}

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return the centralised gradient."""
        size = math.prod(u.shape)
        if u.ndim > 1 and size:
            u = u - u.mean(dim=tuple(range(1, u.ndim)), keepdim=True)
        if h["normalize"] and size > 2:
            u = u / (u.std() + 1e-8)
        return u


class ranger21_step(Transform):
    """Ranger21's step from a clipped and centralised gradient: momentum, schedule, decay, norm loss, lookahead.

    The options are those of `Ranger21`, which also counts the entries that stable weight decay averages over.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> weight.grad = torch.ones(2)
        >>> Ranger21([weight], lr=0.1, total_steps=100).step()
    """

    elementwise = False
    writes = True
    sums = True
    moments = {
        "exp_avg": True,
        "exp_avg_odd": True,
        "exp_avg_even": True,
        "exp_avg_sq": False,
        "max_exp_avg_sq": False,
    }

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.size = 1

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse options out of range."""
        check_betas(group["betas"])
        choose("source to follow", group["follow"], _FOLLOW)
        check_range("lookahead_alpha", group["lookahead_alpha"], 0, 1, open_high=False)
        for name in ("beta0", "eps", "norm_loss", "softplus", "warmdown_lr"):
            check_range(name, group[name], 0)
        for name in ("stable_decay", "positive_negative"):
            check_flag(name, group[name])
        check_whole("lookahead_steps", group["lookahead_steps"], 0)
        for name in ("total_steps", "warmup_steps"):
            if group[name] is not None:
                check_whole(name, group[name], 0)

    def kind(self, p: Tensor, group: Mapping[str, Any]) -> Hashable:
        """Return whether weight decay and norm loss act on the parameter."""
        return group["follow"] == "paper" or p is group["params"][-1]

    def init(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return zero moments and the slow weights."""
        names = ["exp_avg_odd", "exp_avg_even"] if group["positive_negative"] else ["exp_avg"]
        names += ["exp_avg_sq"] + (["max_exp_avg_sq"] if group["follow"] == "paper" else [])
        slow = {"slow": p.clone()} if group["lookahead_steps"] else {}
        return {name: torch.zeros_like(p) for name in names} | slow

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the rates, the learning rate of the step, and what is switched on."""
        beta1, beta2 = (float(beta) for beta in group["betas"])
        paper = group["follow"] == "paper"
        # The authors' code takes beta0 = 1, and beta2 in the norm.
        beta0, in_norm = (float(group["beta0"]), float(group["beta0"])) if paper else (1.0, beta2)
        scale = 1 / (1 - beta1**step)
        if group["positive_negative"]:
            scale /= math.sqrt((1 + in_norm) ** 2 + in_norm**2)
        odd = step % 2 == 1
        rate = 1 - beta1**2
        lr = _learning_rate(step, group)
        decay, factor = float(group["weight_decay"]), float(group["norm_loss"])
        every = group["lookahead_steps"]
        return {
            "paper": paper,
            "positive_negative": bool(group["positive_negative"]),
            "rate1": 1 - beta1,
            "rate_odd": rate if odd else 0.0,
            "rate_even": 0.0 if odd else rate,
            "odd": scale * (1 + beta0 if odd else -beta0),
            "even": scale * (-beta0 if odd else 1 + beta0),
            "scale": scale,
            "beta2": beta2,
            "rate2": 1 - beta2,
            "correction2": 1 / (1 - beta2**step),
            "root2": 1 / math.sqrt(1 - beta2**step),
            "eps": float(group["eps"]),
            "softplus": float(group["softplus"]),
            "per_softplus": 1 / float(group["softplus"]) if group["softplus"] else 0.0,
            "smooths": bool(group["softplus"]),
            "step": -lr,
            "decays": bool(decay),
            "decay": lr * decay,
            "stable": bool(group["stable_decay"]),
            "per_entry": 1 / self.size,
            "draws": bool(factor),
            "draw": 2 * lr * factor,
            "merges": bool(every) and step % every == 0,
            "back": 1 - float(group["lookahead_alpha"]),
        }

    def total(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return the sum of this step's v / (1 - beta2^t), which `update` has yet to compute."""
        return (state["exp_avg_sq"] * h["beta2"] + u * u * h["rate2"]).sum() * h["correction2"]

    def update(self, u: Any, p: Any, state: Any, h: Any) -> None:
        """Write the new parameters."""
        v = state["exp_avg_sq"]
        addcmul_(v.mul_(h["beta2"]), u, u, h["rate2"])
        if h["paper"]:
            v = state["max_exp_avg_sq"].copy_(torch.maximum(state["max_exp_avg_sq"], v))
        if h["positive_negative"]:
            ema_(state["exp_avg_odd"], u, h["rate_odd"])
            ema_(state["exp_avg_even"], u, h["rate_even"])
            m = state["exp_avg_odd"] * h["odd"] + state["exp_avg_even"] * h["even"]
        else:
            ema_(state["exp_avg"], u, h["rate1"])
            m = state["exp_avg"] * h["scale"]
        denominator = v.sqrt() * h["root2"] + h["eps"]
        if h["smooths"]:
            denominator = F.softplus(denominator * h["softplus"]) * h["per_softplus"]
        w = self._shrunk(p, h) if h["kind"] else p
        w = w + m / denominator * h["step"]
        if h["merges"]:
            w = w + (state["slow"] - w) * h["back"]
            state["slow"].copy_(w)
        p.copy_(w)

    @staticmethod
    def _shrunk(p: Any, h: Any) -> Any:
        """Return the weights after weight decay and the norm loss."""
        if h["decays"] and h["stable"]:
            mean = h["total"] * h["per_entry"]
            # Without any gradient so far there is no scale to decay by; weights never change their sign.
            strength = torch.where(mean > 0, h["decay"] / mean.sqrt(), torch.zeros_like(mean))
            p = p * (1.0 - strength.clamp_max(1.0))
        elif h["decays"]:
            p = p * (1.0 - h["decay"])
        if h["draws"]:
            p = p * (((_unit_norms(p) + h["eps"]).reciprocal() - 1.0) * h["draw"] + 1.0)
        return p


def _unit_norms(p: Any) -> Any:
    """Return `unitwise_norm(p)`, by a product of matrices: torch 2.13 cannot compile short sums with a write to p."""
    if p.ndim < 2:
        return unitwise_norm(p)
    squares = (p * p).flatten(1)
    return (squares @ torch.ones_like(squares[:1]).transpose(0, 1)).sqrt().reshape(-1, *[1] * (p.ndim - 1))


def _learning_rate(step: int, group: Mapping[str, Any]) -> float:
    """Return the learning rate: linear warm-up, constant, linear warm-down."""
    lr, total, warmup = float(group["lr"]), group["total_steps"], group["warmup_steps"]
    if warmup is None:
        warmup = math.ceil(2 / (1 - group["betas"][1]))
        if total and warmup > 0.45 * total:
            warmup = int(0.22 * total)
    if total:
        start = int(_WARMDOWN_START * total)
        if step >= start:
            lowest = min(lr, float(group["warmdown_lr"]))
            return lr - (lr - lowest) * min(1.0, (step + 1 - start) / (total - start + 1))
    return lr * min(1.0, step / warmup) if warmup else lr


class Ranger21(Chain):
    """Ranger21: AdamW with clipping, centralisation, positive-negative momentum, norm loss, its own schedule, and more.

    Args:
        params: parameters or groups.
        lr: learning rate between warm-up and warm-down.
        total_steps: steps of the whole training, for the warm-down; without them there is none.
        warmup_steps: length of the linear warm-up; default 2 / (1 - beta2), or 22 % of the steps where that is more
            than 45 %; 0 switches it off.
        warmdown_lr: learning rate at the end of the warm-down.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator, and to norms in the norm loss.
        weight_decay: decoupled, at least 0.
        stable_decay: whether decay is divided by the root of the mean second moment.
        agc: bound of a unit's gradient relative to its weights (tau), or 0 without clipping.
        gradient_centralization: whether to centralise gradients.
        normalize: whether to divide centralised gradients by their standard deviation; default as in what is followed:
            the code does, since after the paper.
        positive_negative: whether to use positive-negative momentum instead of Adam's.
        beta0: amplitude of positive-negative momentum, at least 0.
        norm_loss: factor of the norm loss, or 0 without.
        softplus: sharpness of the softplus on the denominator, or 0 without; default as in what is followed: 50 in the
            code, since after the paper. It needs normalised gradients: clipped ones are far below its floor.
        lookahead_steps: steps between lookahead's merges, or 0 without.
        lookahead_alpha: share of the fast weights in a merge, in [0, 1].
        follow: "paper", or "code", where weight decay and norm loss reach only the last parameter of a group, the
            second moment's maximum is not kept, the momentum has beta0 = 1 with beta2 in its norm, and gradients and
            denominators are treated as above.
        options: of every `Chain`: `maximize`, `state`, `foreach`, `compile`, `nonfinite`.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = Ranger21(model.parameters(), lr=1e-3, total_steps=1000)

    References:
        Wright and Demeure 2021, arXiv:2106.13731.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        total_steps: int | None = None,
        warmup_steps: int | None = None,
        warmdown_lr: float = 3e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-4,
        stable_decay: bool = True,
        agc: float = 1e-2,
        gradient_centralization: bool = True,
        normalize: bool | None = None,
        positive_negative: bool = True,
        beta0: float = 0.9,
        norm_loss: float = 1e-4,
        softplus: float | None = None,
        lookahead_steps: int = 5,
        lookahead_alpha: float = 0.5,
        follow: str = "paper",
        **options: Any,
    ) -> None:
        check_range("agc", agc, 0)
        check_flag("gradient_centralization", gradient_centralization)
        normalize = follow == "code" and gradient_centralization if normalize is None else normalize
        softplus = (50.0 if follow == "code" else 0.0) if softplus is None else softplus
        check_flag("normalize", normalize)
        if normalize and not gradient_centralization:
            raise UsageError("normalize=True divides centralised gradients: pass gradient_centralization=True too.")
        step = ranger21_step(
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            warmdown_lr=warmdown_lr,
            betas=betas,
            eps=eps,
            stable_decay=stable_decay,
            positive_negative=positive_negative,
            beta0=beta0,
            norm_loss=norm_loss,
            softplus=softplus,
            lookahead_steps=lookahead_steps,
            lookahead_alpha=lookahead_alpha,
            follow=follow,
        )
        stages: list[Transform] = [adaptive_clip(clip_factor=agc)] if agc else []
        stages += [centralize(normalize=normalize)] if gradient_centralization else []
        super().__init__(params, [*stages, step], lr=lr, weight_decay=weight_decay, **options)

    def _shards(self) -> list[Shard]:
        shards = super()._shards()
        # What stable weight decay averages over: the entries with a gradient.
        self.transforms[-1].size = max(1, sum(shard.parameter.numel() for shard in shards))  # type: ignore[attr-defined]
        return shards


CARD = Card(
    name="ranger21",
    room="optim",
    summary="AdamW with eight additions: clipping, centralisation, positive-negative momentum, norm loss, schedule...",
    paper=Paper(
        "Ranger21: a synergistic deep learning optimizer",
        2021,
        arxiv="2106.13731",
        code="https://github.com/lessw2020/Ranger21",
    ),
    equation="w <- w - lr_t m_hat / (sqrt(v_hat) + eps), after stable weight decay and norm loss; lookahead",
    claim="Better accuracy and smoother curves than AdamW; trains a ResNet-50 without normalisation.",
    acts_on="optimizer",
    entry="trimtab.optim.adaptive.ranger21:Ranger21",
    defaults=(
        Default("lr", 1e-3, "pytorch_optimizer; the authors' class has none"),
        Default("total_steps", None, "ours; the authors' code needs epochs and batches"),
        Default("warmup_steps", None, "authors' code"),
        Default("warmdown_lr", 3e-5, "authors' code"),
        Default("betas", (0.9, 0.999), "authors' code"),
        Default("eps", 1e-8, "authors' code"),
        Default("weight_decay", 1e-4, "authors' code"),
        Default("stable_decay", True, "authors' code"),
        Default("agc", 1e-2, "authors' code"),
        Default("gradient_centralization", True, "authors' code"),
        Default("normalize", None, "False in the paper, True in the authors' code"),
        Default("positive_negative", True, "authors' code"),
        Default("beta0", 0.9, "paper (recalled); pytorch_optimizer"),
        Default("norm_loss", 1e-4, "authors' code"),
        Default("softplus", None, "none in the paper, 50 in the authors' code"),
        Default("lookahead_steps", 5, "authors' code"),
        Default("lookahead_alpha", 0.5, "authors' code"),
        Default("follow", "paper", "ours"),
    ),
    verified={
        "equation": (
            "tests/optim/adaptive/test_ranger21.py::test_equals_a_plain_loop",
            "tests/optim/adaptive/test_ranger21.py::test_without_its_additions_it_is_adamw",
        ),
        "reference": ("tests/optim/adaptive/test_ranger21.py::test_equals_pytorch_optimizer",),
        "claim": ("tests/claims/test_optimizers_clipping.py::test_ranger21_is_as_good_as_adamw_on_a_cosine",),
    },
    deviations=(
        "The authors' code decays, and applies the norm loss to, only the last parameter of a group, as its loop "
        "variable is left over from another loop; follow='code' does so too, with the group's own options.",
        "The authors' code never updates the maximum of the second moment, has beta0 = 1, and beta2 in the momentum's "
        "norm; follow='code' does so too.",
        "The schedule is the code's in both cases. Its base is the present learning rate of the group, and the "
        "warm-down never raises it.",
        "Softplus and gradient normalisation came to the code after the paper, together; they are off unless "
        "follow='code'. Softplus without normalisation hardly trains: its floor of 0.014 is far above the root of the "
        "second moment of clipped gradients.",
        "Decay and norm loss are two factors, as in the code; the paper's algorithm joins them (recalled). The decay's "
        "factor is never below 0, and there is no decay before the first gradient.",
        "Units have their outputs first; the code takes norms of weights with 3 dimensions over the second one only.",
        "MADGRAD as core, AdaBelief, and Chebyshev steps, options of the code, are left out.",
    ),
)
