"""AdamW, Lion and SGD with moments in 8 bits: a code of 256 values, scaled by the largest entry of each block.

A block's moments are kept as the nearest of the code's values times the block's absolute maximum; a step decodes them,
updates them in full precision and encodes them again:

    m = A_b Q(c),    m <- beta1 m + (1 - beta1) g, and the rest of the rule
    A_b = max |m| in block b,    c = argmin_j |Q(j) - m / A_b|

Dettmers et al. 2022 (arXiv:2110.02861). These classes are the optimizers of the same names with `state="8bit"`, blocks
of 256 entries; `state="8bit-2048"` has the paper's. Tensors below 4,096 entries stay in full precision.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.optim.adaptive.adamw import AdamW
from trimtab.optim.adaptive.lion import Lion
from trimtab.optim.adaptive.sgd import SGD

__all__ = ["AdamW8bit", "Lion8bit", "SGD8bit"]


class AdamW8bit(AdamW):
    """AdamW with both moments in 8 bits, about 2 bytes of state a parameter instead of 8.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled.
        state: "8bit", blocks of 256 entries, or "8bit-2048".
        options: of every `Chain`: `maximize`, `foreach`, `compile`, `nonfinite`.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(64, 64))
        >>> optimizer = AdamW8bit([weight], lr=1e-3)
        >>> weight.grad = torch.ones(64, 64)
        >>> optimizer.step()
        >>> optimizer.state[weight]["exp_avg"].dtype
        torch.uint8

    References:
        Dettmers et al. 2022, arXiv:2110.02861.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        state: str = "8bit",
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas=betas, eps=eps, weight_decay=weight_decay, state=state, **options)


class Lion8bit(Lion):
    """Lion with its momentum in 8 bits, about 1 byte of state a parameter instead of 4.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: weight of the momentum in the step, and decay of the momentum, each in [0, 1).
        weight_decay: decoupled.
        state: "8bit", blocks of 256 entries, or "8bit-2048".
        options: of every `Chain`: `maximize`, `foreach`, `compile`, `nonfinite`.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = Lion8bit(model.parameters(), lr=1e-4)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        state: str = "8bit",
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas=betas, weight_decay=weight_decay, state=state, **options)


class SGD8bit(SGD):
    """SGD with its momentum in 8 bits, about 1 byte of state a parameter instead of 4.

    Args:
        params: parameters or groups.
        lr: learning rate.
        momentum: what is kept of the sum of gradients, in [0, 1).
        dampening: what is taken off the gradient, in [0, 1].
        nesterov: whether to step along g + momentum b.
        weight_decay: added to the gradient as weight_decay p.
        state: "8bit", blocks of 256 entries, or "8bit-2048".
        options: of every `Chain`: `maximize`, `foreach`, `compile`, `nonfinite`.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = SGD8bit(model.parameters(), lr=0.1)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.9,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        state: str = "8bit",
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum=momentum,
            dampening=dampening,
            nesterov=nesterov,
            weight_decay=weight_decay,
            state=state,
            **options,
        )


CARD = Card(
    name="adamw-8bit",
    room="optim",
    summary="AdamW, Lion and SGD with moments in 8 bits",
    paper=Paper(
        "8-bit Optimizers via Block-wise Quantization",
        2022,
        arxiv="2110.02861",
        code="https://github.com/bitsandbytes-foundation/bitsandbytes",
    ),
    equation="m = A_b Q(c) by blocks b;  the rule of the optimizer;  A_b = max |m| in b,  c nearest to m / A_b",
    claim="Keeps the loss of 32-bit optimizers with about a quarter of their state.",
    acts_on="optimizer",
    entry="trimtab.optim.adaptive.eight_bit:AdamW8bit",
    defaults=(
        Default("lr", 1e-3, "torch.optim.AdamW"),
        Default("betas", (0.9, 0.999), "Adam's paper"),
        Default("eps", 1e-8, "Adam's paper"),
        Default("weight_decay", 0.01, "torch.optim.AdamW"),
        Default("state", "8bit", "bitsandbytes (blocks of 256); the paper has 2,048"),
    ),
    verified={
        "equation": ("tests/optim/adaptive/test_eight_bit.py::test_a_first_step_is_adams_whatever_the_code_rounds",),
        "reference": ("tests/optim/adaptive/test_eight_bit.py::test_stays_close_to_bitsandbytes",),
        "claim": (
            "tests/optim/adaptive/test_eight_bit.py::test_state_is_about_a_quarter",
            "tests/claims/test_optimizers_adaptive.py::test_eight_bit_adamw_fits_as_adamw_does",
        ),
    },
    deviations=("The paper's stable embedding layer is apart; its blocks of 2,048 entries are state='8bit-2048'.",),
    experiments=(
        Experiment(
            "lm-small",
            "adamw,lr=0.003,steps=300,batch_size=8",
            "adamw-8bit,lr=0.003,steps=300,batch_size=8",
            mechanism="state_bytes_per_parameter",
            outcome=(
                "no evidence: final loss 2.482 to 2.477, difference -0.005 (95 % interval -0.014 to +0.003), n=5; "
                "state 8.00 to 2.62 bytes a parameter; learning rates tuned on both sides; 90 % of the entries "
                "are in 8 bits, embeddings and vectors are not"
            ),
        ),
    ),
)
