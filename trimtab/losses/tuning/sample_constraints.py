"""Feasible learning: a bound on the loss of each sample, in place of a mean over all.

    find theta with l_i(theta) <= epsilon for each i:
    loss     = sum_i lambda_i (l_i - epsilon),                       down in theta
    lambda_i <- max(0, lambda_i + eta (l_i - epsilon)),              up in lambda

Samples above the bound gain weight, those below lose it and end with none. Where the bound cannot be met, resilient
feasible learning relaxes each by a slack u_i at a price alpha / 2 ||u||^2, whose best value is lambda_i / alpha:

    lambda_i <- max(0, lambda_i + eta (l_i - epsilon - lambda_i / alpha))

Ramirez et al. 2025 (arXiv:2501.14912); authors' code juan43ramirez/feasible-learning.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.losses._reduction import reduce
from trimtab.losses.preference._pairs import check_number

__all__ = ["FeasibleLearning"]


class FeasibleLearning(nn.Module):
    """Multipliers of a bound on each sample's loss; they are in `state_dict`.

    In each step: losses of the batch's samples, `ascend` with them, then the gradient of what the call returns.

    Args:
        samples: size of the training set, at least 1.
        epsilon: bound on each loss, at least 0.
        dual_lr: eta, step size of the multipliers, at least 0; at 0 they stay.
        price: alpha of resilient feasible learning, above 0; None for bounds without slack.
        initial: value that the multipliers begin with, at least 0; at 1 with `dual_lr` 0 the gradient is that of the
            plain mean.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> feasible = FeasibleLearning(3, epsilon=0.5, dual_lr=1.0)
        >>> losses, index = torch.tensor([0.7, 0.1]), torch.tensor([2, 0])
        >>> feasible.ascend(losses, index)
        >>> [round(value, 4) for value in feasible.multipliers.tolist()]
        [0.0, 0.0, 0.2]
        >>> round(float(feasible(losses, index)), 4)  # mean of 0.2 * (0.7 - 0.5) and 0
        0.02

    References:
        Ramirez et al. 2025, arXiv:2501.14912 (https://github.com/juan43ramirez/feasible-learning).
    """

    multipliers: Tensor

    def __init__(
        self, samples: int, *, epsilon: float, dual_lr: float = 1e-2, price: float | None = None, initial: float = 0.0
    ) -> None:
        super().__init__()
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
            raise UsageError(f"samples must be a whole number of at least 1, got {samples!r}: the training set's size.")
        self.epsilon = check_number("epsilon", epsilon, 0)
        self.dual_lr = check_number("dual_lr", dual_lr, 0)
        self.price = None if price is None else check_number("price", price, 0, open_low=True)
        start = check_number("initial", initial, 0)
        self.register_buffer("multipliers", torch.full((samples,), start, dtype=torch.float32))

    def forward(
        self, losses: Tensor, index: Tensor, *, reduction: str = "mean", denominator: float | Tensor | None = None
    ) -> Tensor:
        """Return lambda_i (l_i - epsilon) of a batch, with no gradient through the multipliers.

        Args:
            losses: l_i, [B].
            index: which samples of the training set these are, int64, [B].
            reduction: `"mean"`, `"sum"` or `"none"`.
            denominator: what the mean divides by in place of the number of samples.

        Returns:
            A scalar, or [B] with reduction `"none"`, in float32 or better.

        Raises:
            UsageError: if an argument breaks its rule.
        """
        self._check(losses, index)
        wide = losses.to(torch.promote_types(losses.dtype, torch.float32))
        weight = self.multipliers[index].to(wide.dtype)
        return reduce(weight * (wide - self.epsilon), None, reduction, denominator)

    @torch.no_grad()
    def ascend(self, losses: Tensor, index: Tensor) -> None:
        """Take one step of the multipliers of a batch's samples; those that are not in it stay.

        Args:
            losses: l_i, [B]; a sample that is in the batch twice counts twice. A loss that is not finite leaves its
                multiplier as it is.
            index: which samples these are, int64, [B].

        Raises:
            UsageError: if an argument breaks its rule.
        """
        self._check(losses, index)
        step = losses.to(self.multipliers.dtype) - self.epsilon
        if self.price is not None:
            step = step - self.multipliers[index] / self.price
        step = torch.where(step.isfinite(), self.dual_lr * step, torch.zeros_like(step))
        self.multipliers.index_add_(0, index, step).clamp_(min=0)

    def slack(self, index: Tensor) -> Tensor:
        """Return u_i = lambda_i / alpha, by how much each bound is relaxed; 0 without a price.

        Args:
            index: which samples, int64, [B].

        Returns:
            [B].
        """
        return torch.zeros_like(self.multipliers[index]) if self.price is None else self.multipliers[index] / self.price

    def _check(self, losses: Tensor, index: Tensor) -> None:
        if (
            losses.dim() != 1
            or not losses.is_floating_point()
            or index.shape != losses.shape
            or index.dtype != torch.int64
        ):
            raise UsageError(
                f"losses must be [B] and index int64 [B], got {tuple(losses.shape)} and {index.dtype} of "
                f"{tuple(index.shape)}: use a loss with reduction='none'."
            )


CARD = Card(
    name="feasible-learning",
    room="losses",
    summary="a bound on each sample's loss, by multipliers that weigh the samples above it",
    paper=Paper(
        "Feasible Learning", 2025, arxiv="2501.14912", code="https://github.com/juan43ramirez/feasible-learning"
    ),
    equation="loss = lambda_i (l_i - epsilon); lambda_i <- max(0, lambda_i + eta (l_i - epsilon - lambda_i / alpha))",
    claim="Better tails of the loss than empirical risk minimisation, with little effect on the mean.",
    acts_on="loss",
    entry="trimtab.losses.tuning.sample_constraints:FeasibleLearning",
    defaults=(
        Default("dual_lr", 1e-2, "ours: the paper searches it"),
        Default("price", None, "paper: feasible learning without slack"),
        Default("initial", 0.0, "authors' code, src/cmps/feasibility.py"),
    ),
    verified={
        "equation": (
            "tests/losses/tuning/test_sample_constraints.py::test_equals_numpy",
            "tests/losses/tuning/test_sample_constraints.py::test_constant_multipliers_are_the_plain_mean",
            "tests/losses/tuning/test_sample_constraints.py::test_resilient_multipliers_end_at_price_times_violation",
        ),
        "claim": ("tests/losses/tuning/test_sample_constraints.py::test_worst_loss_is_lower_than_under_the_mean",),
    },
    deviations=(
        "The slack is at its best value at any time, in place of a variable of its own (recalled to be the paper's).",
        "The authors clamp or square losses in some tasks; pass such losses.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.tails:constraints",
            "dual_lr=0",
            "dual_lr=1",
            metric="cvar",
            mechanism="mean",
            outcome=(
                "no evidence here: worst twentieth of held-out losses 1.77 to 1.67, difference -0.10 (95 % "
                "interval -0.26 to +0.06), n=5, at a mean of 0.201 and 0.193 (-0.017 to +0.002); of the training "
                "losses, which are bounded, 1.34 to 0.91, -0.43 (-0.52 to -0.34)"
            ),
        ),
    ),
)
