"""TAG: adaptive steps that are short where a past task's directions disagree with the present task's.

Each task t has its own second moment V_t and mean gradient M_t, kept for good. While task t is trained, each parameter
steps against a weighted sum of all tasks' second moments so far:

    M_t <- 0.9 M_t + 0.1 g,    V_t <- beta2 V_t + (1 - beta2) g^2         (V_t <- V_t + g^2 in TAG-Adagrad)
    a_s = exp(-b cos(M_t, M_s)) for the tasks s <= t                      (1 while there is only the first task)
    p <- p - lr g / (sqrt(sum_s a_s V_s) + eps)                           (M_t, both debiased, for g in TAG-Adam)

A past task that disagrees, cos < 0, weighs more and shortens the step in the directions that it used; one that agrees
weighs less. Malviya, Ravindran and Chandar 2022 (arXiv:2105.05155); authors' code pranshu28/TAG, tag_update.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError, choose
from trimtab.optim._ops import addcmul_, ema_
from trimtab.optim.chain import Chain
from trimtab.optim.transform import Transform, check_betas, check_range

__all__ = ["TAG", "task_based"]

_BASES = ("rmsprop", "adagrad", "adam")


class task_based(Transform):
    """TAG's step, g / (sqrt(sum_s a_s V_s) + eps), with two moments for each task.

    Args:
        tasks: how many tasks there will be, at least 1; memory is twice the parameters for each.
        base: "rmsprop", "adagrad" or "adam".
        betas: decay of the mean gradient and of the second moment, each in [0, 1).
        eps: added to the denominator, at least 0.
        b: how strongly relatedness counts, at least 0.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([0.5, -2.0])
        >>> Chain([weight], [task_based(tasks=2, base="adagrad")], lr=0.1).step()
        >>> [round(value, 4) for value in weight.tolist()]
        [-0.1, 0.1]
    """

    elementwise = False
    moments = {"task_exp_avg": True, "task_exp_avg_sq": False}

    def __init__(
        self,
        *,
        tasks: int,
        base: str = "rmsprop",
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        b: float = 5.0,
    ) -> None:
        super().__init__(tasks=tasks, base=base, betas=betas, eps=eps, b=b, task=0)

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse a number of tasks below 1, a task out of range, and other options out of range."""
        if not isinstance(group["tasks"], int) or group["tasks"] < 1:
            raise UsageError(f"tasks must be a whole number, at least 1, got {group['tasks']!r}.")
        check_task(group["task"], group["tasks"])
        choose("base of TAG", group["base"], _BASES)
        check_betas(group["betas"])
        check_range("eps", group["eps"], 0)
        check_range("b", group["b"], 0)

    def init(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the moments of all tasks, and their numbers of steps, zero."""
        shape = (group["tasks"], *p.shape)
        moments = {"task_exp_avg": p.new_zeros(shape), "task_exp_avg_sq": p.new_zeros(shape)}
        return moments | ({"task_steps": p.new_zeros(group["tasks"])} if group["base"] == "adam" else {})

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the rates, the task, and b."""
        beta1, beta2 = (float(beta) for beta in group["betas"])
        adagrad = group["base"] == "adagrad"
        return {
            "task": group["task"],
            "base": group["base"],
            "rate1": 1 - beta1,
            "keep2": 1.0 if adagrad else beta2,
            "rate2": 1.0 if adagrad else 1 - beta2,
            "log1": math.log(beta1) if beta1 else -math.inf,
            "log2": math.log(beta2) if beta2 else -math.inf,
            "b": float(group["b"]),
            "eps": float(group["eps"]),
        }

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return the step."""
        task = h["task"]
        m, v = state["task_exp_avg"][task], state["task_exp_avg_sq"][task]
        ema_(m, u, h["rate1"])
        addcmul_(v.mul_(h["keep2"]), u, u, h["rate2"])
        total = v
        if task:
            total = v * _relation(m, m, h)
            for past in range(task):
                total = total + state["task_exp_avg_sq"][past] * _relation(m, state["task_exp_avg"][past], h)
        root, numerator = total.sqrt(), u
        if h["base"] == "adam":
            steps = state["task_steps"][task]
            steps.add_(1.0)
            # 1 - beta^n, without cancellation where beta is near 1.
            numerator = m / -torch.expm1(steps * h["log1"])
            root = root / (-torch.expm1(steps * h["log2"])).sqrt()
        return numerator / (root + h["eps"])


def _relation(m: Any, past: Any, h: Any) -> Any:
    """Return a = exp(-b cos(M_t, M_s)), over the whole parameter; a mean gradient of 0 is related to nothing."""
    lengths = (m * m).sum().sqrt() * (past * past).sum().sqrt()
    return torch.exp((m * past).sum() / torch.clamp_min(lengths, torch.finfo(m.dtype).tiny) * -h["b"])


def check_task(task: Any, tasks: int) -> None:
    """Raise a `UsageError` unless a task's number is in range.

    Raises:
        UsageError: if it is not.
    """
    if not isinstance(task, int) or isinstance(task, bool) or not 0 <= task < tasks:
        raise UsageError(f"task must be a whole number from 0 to {tasks - 1}, got {task!r}: build TAG with more tasks.")


class TAG(Chain):
    """TAG-RMSProp, TAG-Adagrad or TAG-Adam: u = g / (sqrt(sum_s exp(-b cos(M_t, M_s)) V_s) + eps), p <- p - lr u.

    Call `set_task(k)` when training goes on to task k, counted from 0.

    Args:
        params: parameters or groups.
        lr: learning rate.
        tasks: how many tasks there will be, at least 1; memory is twice the parameters for each.
        base: "rmsprop", "adagrad" or "adam".
        betas: decay of the mean gradient and of the second moment, each in [0, 1); default (0.9, 0.99), or (0.9,
            0.999) with base "adam".
        eps: added to the denominator, at least 0.
        b: how strongly relatedness counts, at least 0; the authors try 1 to 7.
        weight_decay: decoupled; the authors have none.
        options: of every `Chain`: `maximize`, `state`, `foreach`, `compile`, `nonfinite`.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = TAG(model.parameters(), lr=1e-3, tasks=3)
        >>> optimizer.set_task(1)

    References:
        Malviya, Ravindran and Chandar 2022, arXiv:2105.05155.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        tasks: int,
        base: str = "rmsprop",
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        b: float = 5.0,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        if betas is None:
            betas = (0.9, 0.999) if base == "adam" else (0.9, 0.99)
        step = task_based(tasks=tasks, base=base, betas=betas, eps=eps, b=b)
        super().__init__(params, [step], lr=lr, weight_decay=weight_decay, **options)

    def set_task(self, task: int) -> None:
        """Go on to a task: later steps are its own; those before it, by number, count as past.

        Raises:
            UsageError: if its number is not in range.
        """
        for group in (*self.param_groups, self.defaults):
            check_task(task, group["tasks"])
            group["task"] = task


CARD = Card(
    name="tag",
    room="optim",
    summary="adaptive steps that keep away from what past, unrelated tasks use",
    paper=Paper(
        "TAG: Task-based Accumulated Gradients for Lifelong learning",
        2022,
        arxiv="2105.05155",
        code="https://github.com/pranshu28/TAG",
    ),
    equation="u = g / (sqrt(sum_{s <= t} exp(-b cos(M_t, M_s)) V_s) + eps),  p <- p - lr u",
    claim="Less forgetting, and transfer between tasks, in streams of many tasks without a replay buffer.",
    acts_on="optimizer",
    entry="trimtab.optim.adaptive.tag:TAG",
    treats={"forgetting": 2},
    defaults=(
        Default("lr", 1e-3, "ours; the authors search"),
        Default("base", "rmsprop", "paper"),
        Default("betas", None, "authors' code: (0.9, 0.99), or (0.9, 0.999) for Adam"),
        Default("eps", 1e-8, "authors' code"),
        Default("b", 5.0, "authors' code"),
        Default("weight_decay", 0.0, "authors' code"),
    ),
    verified={
        "equation": (
            "tests/optim/adaptive/test_tag.py::test_equals_a_plain_loop",
            "tests/optim/adaptive/test_tag.py::test_one_task_is_rmsprop",
            "tests/optim/adaptive/test_tag.py::test_an_opposed_task_shortens_the_step",
        ),
        "claim": ("tests/claims/test_optimizers_clipping.py::test_tag_forgets_less_than_rmsprop",),
    },
    deviations=(
        "eps is added outside of the root, as in the authors' code.",
        "TAG-Adam counts the steps of the task, where the authors' code counts batches of the epoch, which starts "
        "again with each epoch; in streams of one epoch both are the same.",
        "The relation to a past task whose mean gradient is 0 is 0, where the authors' code divides by 0.",
        "Weight decay is an addition.",
    ),
)
