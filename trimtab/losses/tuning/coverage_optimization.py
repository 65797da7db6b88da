"""Direct coverage optimisation: the loss of at least one right answer among N samples.

    loss = -log( 1 - (1 - p)^N ),   p = pi(y)

Cross-entropy goes on raising p when N samples would contain the answer anyway, and so makes the model overconfident.
The gradient here is that of cross-entropy times F = N p (1 - p)^(N - 1) / (1 - (1 - p)^N), which falls from 1 to 0
where p exceeds about 1 / N. Chen et al. 2025 (arXiv:2502.07154). Computed from log p in logarithms throughout, so that
it stays right for p far below rounding and for any N.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.losses._reduction import reduce
from trimtab.losses._stable import log1mexp
from trimtab.losses.preference._pairs import log_probabilities

__all__ = ["dco_loss"]

_SMALL = -12.0  # below it, in logarithms, series of three terms are exact to rounding in float64


def dco_loss(
    policy: Tensor,
    *,
    samples: int = 16,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return -log(1 - (1 - p)^N).

    Args:
        policy: log p = log pi(y), [B], sums over the answer's tokens (`sequence_log_probs`); at most 0.
        samples: N, drawn at test time, at least 1; at 1 it is cross-entropy.
        reduction: `"mean"`, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of answers.

    Returns:
        A scalar, or [B] with reduction `"none"`, in float32 or better.

    Raises:
        UsageError: if `samples` is not a whole number of at least 1, or the log-probabilities are not floating point.

    Example:
        >>> round(float(dco_loss(torch.tensor([0.5]).log(), samples=2)), 4)  # -log(3 / 4)
        0.2877

    References:
        Chen et al. 2025, arXiv:2502.07154, equation 9.
    """
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
        raise UsageError(f"samples must be a whole number of at least 1, got {samples!r}: N of pass@N.")
    (log_p,) = log_probabilities(policy=policy)
    # v = -N log(1 - p), so that the loss is -log(1 - exp(-v)).
    log_v = math.log(samples) + _log_of(log_p, first=0.5, second=5 / 24, exact=lambda x: torch.log(-log1mexp(x)))
    coverage = _log_of(log_v, first=-0.5, second=1 / 24, exact=lambda x: log1mexp(-torch.exp(x)))
    return reduce(-coverage, None, reduction, denominator)


def _log_of(x: Tensor, *, first: float, second: float, exact: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a function of exp(x) that tends to x: by its series x + first e^x + second e^(2x) where that is small."""
    small = x < _SMALL
    # Each branch gets an argument of its own side: the gradient of the one not taken would be NaN.
    power = torch.exp(torch.where(small, x, torch.full_like(x, _SMALL)))
    series = x + first * power + second * power.square()
    return torch.where(small, series, exact(torch.where(small, torch.full_like(x, _SMALL), x)))


CARD = Card(
    name="dco",
    room="losses",
    summary="the loss of at least one right answer among N samples, which limits confidence to what N needs",
    paper=Paper(
        "Rethinking Fine-Tuning when Scaling Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning",
        2025,
        arxiv="2502.07154",
    ),
    equation="loss = -log(1 - (1 - p)^N)",
    claim="Raises pass@N on MATH and MiniF2F, which longer training by cross-entropy lowers.",
    acts_on="loss",
    entry="trimtab.losses.tuning.coverage_optimization:dco_loss",
    defaults=(
        Default("samples", 16, "ours: the paper matches it to the test-time N"),
        Default("reduction", "mean", "paper: an expectation over samples"),
    ),
    verified={
        "equation": (
            "tests/losses/tuning/test_coverage_optimization.py::test_equals_high_precision",
            "tests/losses/tuning/test_coverage_optimization.py::test_gradient_is_cross_entropy_times_the_factor",
            "tests/losses/tuning/test_coverage_optimization.py::test_one_sample_is_cross_entropy",
        ),
        "claim": ("tests/losses/tuning/test_coverage_optimization.py::test_coverage_of_ambiguous_answers",),
    },
    deviations=(
        "The paper replaces examples whose factor F is below a threshold by others in the batch; that is the loader's.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.tails:coverage",
            "samples=1",
            "samples=8",
            metric="pass_at_n",
            higher_is_better=True,
            mechanism="decline",
            outcome=(
                "better: pass@8 0.719 to 0.762, difference +0.042 (95 % interval +0.036 to +0.048), n=5; it "
                "falls by 0.035 from its best on the way with cross-entropy and by 0.010 with DCO, -0.026 "
                "(-0.031 to -0.021)"
            ),
        ),
    ),
)
