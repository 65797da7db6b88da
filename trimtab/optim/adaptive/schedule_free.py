"""Schedule-Free AdamW and SGD: an average of the iterates takes the place of a learning-rate schedule.

Three points: z takes the steps, x is the weighted mean of the z's and is what the model is used with, and y between
them is where gradients are taken. With d the direction (the gradient, or Adam's without momentum) and step k:

    y = (1 - beta) z + beta x
    z <- z - lr_k (d(y) + weight_decay y),    x <- (1 - c_k) x + c_k z
    c_k = w_k / (w_1 + ... + w_k),    w_k = k^r s_k^weight_lr_power,    lr_k = lr s_k,    s_k = min(1, k / warmup_steps)

The parameters hold y in training and x after `eval()`. Kept is z - y, from which both others follow. Defazio et al.
2024 (arXiv:2405.15682); authors' code facebookresearch/schedule_free (schedulefree 1.4.1).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError
from trimtab.optim._ops import add_, addcmul_
from trimtab.optim.chain import Chain
from trimtab.optim.transform import Transform, check_betas, check_range, check_whole

__all__ = ["ScheduleFreeAdamW", "ScheduleFreeSGD", "schedule_free", "schedule_free_adam"]


class schedule_free(Transform):
    """The last stage of a schedule-free chain: it steps z along the update, averages, and writes y.

    Any transforms may come before it; the chain needs `ScheduleFree`'s `train` and `eval`, which `ScheduleFreeSGD` and
    `ScheduleFreeAdamW` have.

    Args:
        momentum: beta, the share of the average in y, in (0, 1).
        warmup_steps: length of the linear warm-up of the learning rate.
        r: power of the step in the average's weights, at least 0.
        weight_lr_power: power of the warm-up's learning rate in them, at least 0.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = ScheduleFreeSGD([weight], lr=1.0)
        >>> for _ in range(2):
        ...     weight.grad = torch.ones(1)
        ...     optimizer.step()
        >>> optimizer.eval()
        >>> round(weight.item(), 4)  # the mean of z = -1 and -2
        -1.5
    """

    writes = True

    def __init__(
        self, *, momentum: float = 0.9, warmup_steps: int = 0, r: float = 0.0, weight_lr_power: float = 2.0
    ) -> None:
        super().__init__(momentum=momentum, **_averaging(warmup_steps, r, weight_lr_power))
        self._sums: dict[tuple[float, float, float], array[float]] = {}

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse a beta outside (0, 1), and a negative warm-up or power."""
        check_range("momentum", self.beta(group), 0, 1, open_low=True)
        check_whole("warmup_steps", group["warmup_steps"], 0)
        for name in ("r", "weight_lr_power"):
            check_range(name, group[name], 0)

    def beta(self, group: Mapping[str, Any]) -> float:
        """Return the share of the average in y."""
        return group["momentum"]

    def init(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return z - y, zero."""
        return {"offset": torch.zeros_like(p)}

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the factors of z - y and of the direction, in y's step and in z - y's.

        Raises:
            UsageError: if the parameters hold the average.
        """
        if not group["training"]:
            raise UsageError("the parameters hold the average: call the optimizer's train() before step().")
        warmup, decay, beta = group["warmup_steps"], float(group["weight_decay"]), float(self.beta(group))
        lr = float(group["lr"]) * (min(1.0, step / warmup) if warmup else 1.0)
        c = self._share(step, group)
        # z' = z - lr d and y' = (1 - c) y + c z - lr (1 - beta (1 - c)) d, written for y and z - y.
        return {
            "average": c,
            "along": -lr * (1 - beta * (1 - c)),
            "keep": 1 - c,
            "apart": -lr * beta * (1 - c),
            "decay": decay,
            "decays": bool(decay),
        }

    def _share(self, step: int, group: Mapping[str, Any]) -> float:
        """Return c, the newest z's share of the average."""
        warmup, r, power = group["warmup_steps"], group["r"], group["weight_lr_power"]
        sums = self._sums.setdefault((warmup, r, power), array("d", [0.0]))
        for k in range(len(sums), step + 1):
            sums.append(sums[-1] + _weight(k, warmup, r, power))
        return _weight(step, warmup, r, power) / sums[step]

    def direction(self, u: Any, state: Any, h: Any) -> Any:
        """Return the direction of z's step, without decay."""
        return u

    def update(self, u: Any, p: Any, state: Any, h: Any) -> None:
        """Write y, and z - y."""
        offset = state["offset"]
        d = self.direction(u, state, h)
        if h["decays"]:
            d = d + p * h["decay"]
        add_(p, offset, h["average"])
        add_(p, d, h["along"])
        add_(offset.mul_(h["keep"]), d, h["apart"])


class schedule_free_adam(schedule_free):
    """`schedule_free` whose direction is Adam's without momentum: g / (sqrt(v_hat) + eps).

    Args:
        betas: the share of the average in y, in (0, 1), and the decay of the second moment, in [0, 1).
        eps: added to the denominator, at least 0.
        warmup_steps: length of the linear warm-up of the learning rate.
        r: power of the step in the average's weights, at least 0.
        weight_lr_power: power of the warm-up's learning rate in them, at least 0.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([0.5, -2.0])
        >>> ScheduleFreeAdamW([weight], lr=0.1).step()
        >>> [round(value, 4) for value in weight.tolist()]
        [-0.1, 0.1]
    """

    moments = {"exp_avg_sq": False}

    def __init__(
        self,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
    ) -> None:
        super().__init__()
        self.options = {"betas": betas, "eps": eps, **_averaging(warmup_steps, r, weight_lr_power)}

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse betas out of range and a negative eps, warm-up or power."""
        check_betas(group["betas"])
        check_range("eps", group["eps"], 0)
        super().check(group)

    def beta(self, group: Mapping[str, Any]) -> float:
        """Return the share of the average in y."""
        return group["betas"][0]

    def init(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return z - y and the second moment, zero."""
        return super().init(p, group) | {"exp_avg_sq": torch.zeros_like(p)}

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the averaging's factors and the second moment's."""
        beta2 = float(group["betas"][1])
        return super().coefficients(step, group) | {
            "beta2": beta2,
            "rate2": 1 - beta2,
            "correction2": 1 / math.sqrt(1 - beta2**step),
            "eps": float(group["eps"]),
        }

    def direction(self, u: Any, state: Any, h: Any) -> Any:
        """Return g / (sqrt(v_hat) + eps)."""
        v = state["exp_avg_sq"]
        addcmul_(v.mul_(h["beta2"]), u, u, h["rate2"])
        return u / v.sqrt().mul_(h["correction2"]).add_(h["eps"])


def _averaging(warmup_steps: int, r: float, weight_lr_power: float) -> dict[str, Any]:
    return {"warmup_steps": warmup_steps, "r": r, "weight_lr_power": weight_lr_power, "training": True}


def _weight(step: int, warmup: float, r: float, power: float) -> float:
    return float(step**r * (min(1.0, step / warmup) ** power if warmup else 1.0))


class _ScheduleFree(Chain):
    """A chain that ends with `schedule_free`, and switches its parameters between y and x."""

    @torch.no_grad()
    def eval(self) -> None:
        """Put the average x into the parameters, to evaluate or to keep the model."""
        self._switch(False)

    @torch.no_grad()
    def train(self) -> None:
        """Put y into the parameters, to go on training; equal to what it was up to rounding."""
        self._switch(True)

    def _switch(self, training: bool) -> None:
        last = self.transforms[-1]
        for group in self.param_groups:
            if group["training"] == training:
                continue
            group["training"] = training
            beta = float(last.beta(group))  # type: ignore[attr-defined]
            # x = y + (1 - 1 / beta) (z - y).
            factor = (1 / beta - 1) if training else (1 - 1 / beta)
            for p in group["params"]:
                if "offset" in self.state.get(p, {}):
                    p.add_(self.state[p]["offset"].to(p.dtype), alpha=factor)


class ScheduleFreeSGD(_ScheduleFree):
    """Schedule-Free SGD: z <- z - lr (g(y) + weight_decay y), x the mean of the z's, y = (1 - momentum) z + momentum x.

    Call `eval()` before the model is evaluated or saved for use, and `train()` before the next step. Warm up by
    `warmup_steps`: of a scheduler's warm-up the average's weights know nothing.

    Args:
        params: parameters or groups.
        lr: learning rate; 10 to 50 times a scheduled SGD's with momentum, the authors say.
        momentum: the share of the average in y, in (0, 1).
        weight_decay: at y.
        warmup_steps: length of the linear warm-up of the learning rate.
        r: power of the step in the average's weights, at least 0.
        weight_lr_power: power of the warm-up's learning rate in them, at least 0.
        options: of every `Chain`: `maximize`, `state`, `foreach`, `compile`, `nonfinite`.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = ScheduleFreeSGD(model.parameters(), lr=1.0, warmup_steps=10)

    References:
        Defazio et al. 2024, arXiv:2405.15682.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **options: Any,
    ) -> None:
        stage = schedule_free(momentum=momentum, warmup_steps=warmup_steps, r=r, weight_lr_power=weight_lr_power)
        super().__init__(params, [stage], lr=lr, weight_decay=weight_decay, **options)


class ScheduleFreeAdamW(_ScheduleFree):
    """Schedule-Free AdamW: z <- z - lr (g / (sqrt(v_hat) + eps) + weight_decay y), x the mean of the z's.

    Gradients are taken at y = (1 - beta1) z + beta1 x. Call `eval()` before the model is evaluated or saved for use,
    and `train()` before the next step. Warm up by `warmup_steps`: of a scheduler's warm-up the average's weights know
    nothing.

    Args:
        params: parameters or groups.
        lr: learning rate; 1 to 10 times a scheduled AdamW's, the authors say.
        betas: the share of the average in y, in (0, 1), and the decay of the second moment, in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: at y.
        warmup_steps: length of the linear warm-up of the learning rate.
        r: power of the step in the average's weights, at least 0.
        weight_lr_power: power of the warm-up's learning rate in them, at least 0.
        options: of every `Chain`: `maximize`, `state`, `foreach`, `compile`, `nonfinite`.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = ScheduleFreeAdamW(model.parameters(), lr=2.5e-3, warmup_steps=10)

    References:
        Defazio et al. 2024, arXiv:2405.15682, algorithm 1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2.5e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **options: Any,
    ) -> None:
        stage = schedule_free_adam(
            betas=betas, eps=eps, warmup_steps=warmup_steps, r=r, weight_lr_power=weight_lr_power
        )
        super().__init__(params, [stage], lr=lr, weight_decay=weight_decay, **options)


CARD = Card(
    name="schedule-free",
    room="optim",
    summary="AdamW and SGD with an average of the iterates in place of a learning-rate schedule",
    paper=Paper(
        "The Road Less Scheduled", 2024, arxiv="2405.15682", code="https://github.com/facebookresearch/schedule_free"
    ),
    equation="y = (1 - beta) z + beta x,  z <- z - lr (d(y) + weight_decay y),  x <- (1 - c) x + c z,  c = w_k / sum w",
    claim="Matches or beats tuned schedules without knowing when training stops.",
    acts_on="optimizer",
    entry="trimtab.optim.adaptive.schedule_free:ScheduleFreeAdamW",
    treats={"plateau": 3},
    defaults=(
        Default("lr", 2.5e-3, "authors' code"),
        Default("betas", (0.9, 0.999), "authors' code"),
        Default("eps", 1e-8, "authors' code"),
        Default("weight_decay", 0.0, "authors' code"),
        Default("warmup_steps", 0, "authors' code"),
        Default("r", 0.0, "authors' code"),
        Default("weight_lr_power", 2.0, "authors' code"),
    ),
    verified={
        "equation": (
            "tests/optim/adaptive/test_schedule_free.py::test_equals_the_papers_loop",
            "tests/optim/adaptive/test_schedule_free.py::test_average_is_the_mean_of_the_iterates",
        ),
        "reference": (
            "tests/optim/adaptive/test_schedule_free.py::test_equals_schedulefree_adamw",
            "tests/optim/adaptive/test_schedule_free.py::test_equals_schedulefree_sgd",
        ),
        "claim": ("tests/claims/test_optimizers_clipping.py::test_schedule_free_is_as_good_as_a_schedule",),
    },
    deviations=(
        "The average's weights are those of a constant learning rate after the warm-up: equal to the authors' for "
        "every learning rate that does not rise outside the warm-up, as they weigh by its running maximum.",
        "The paper's lr_k has Adam's factor sqrt(1 - beta2^k) (recalled); here, as in the authors' code, the second "
        "moment is corrected by it.",
        "Training mode is the default, where the authors' optimizer must be told; z - y is kept where they keep z.",
        "Steps are counted for each parameter, where theirs are for each group.",
    ),
)
