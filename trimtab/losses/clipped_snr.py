"""Clipped-SNR weighting: a diffusion model's loss weighted by its signal-to-noise ratio, cut at both ends.

    loss = mean_B w(t) mean |x0 - x0_hat(x_t, t)|^2,   w(t) = min(max(SNR(t), 0.05), 1.5)
    SNR  = alpha_bar / (1 - alpha_bar)

Predictions at noisy times hardly depend on their input; a weight that falls with the signal leaves them little of the
gradient, the upper bound keeps times that are almost free of noise from taking all of it, and the lower one keeps the
noisiest from being forgotten. Le et al. 2023 (EQGAT-diff, arXiv:2309.17296); authors' code tuanle618/eqgat-diff.

Min-SNR (Hang et al. 2023, arXiv:2303.09556) is the weight min(SNR, 5) on the same loss: the same rule with `minimum=0`
and `maximum=5`. A model that predicts the noise or the velocity has the same loss in other units, as

    |x0 - x0_hat|^2 = |eps - eps_hat|^2 / SNR = |v - v_hat|^2 / (SNR + 1),

so that its weight is w / SNR or w / (SNR + 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError, choose
from trimtab.losses._reduction import reduce

__all__ = ["clipped_snr_loss", "clipped_snr_weight"]

_PREDICTIONS = ("x0", "epsilon", "v")


def clipped_snr_weight(snr: Tensor, *, minimum: float = 0.05, maximum: float = 1.5, predicts: str = "x0") -> Tensor:
    """Return w = min(max(SNR, minimum), maximum), divided by SNR or SNR + 1 for models that predict noise or velocity.

    Args:
        snr: signal-to-noise ratio alpha_bar / (1 - alpha_bar) of each sample's time, at least 0, [...]; infinite where
            there is no noise. With `predicts="epsilon"` it must be above 0: pure noise has no weight of finite size.
        minimum: lower bound of the weight, at least 0.
        maximum: upper bound, above `minimum`.
        predicts: what the squared error that it multiplies is of: `"x0"`, `"epsilon"` or `"v"`.

    Returns:
        The weights, in the shape of `snr` and in float32 or better, without gradient.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> clipped_snr_weight(torch.tensor([0.0, 0.5, 9.0]))
        tensor([0.0500, 0.5000, 1.5000])
        >>> clipped_snr_weight(torch.tensor([0.5, 10.0]), minimum=0.0, maximum=5.0, predicts="epsilon")  # Min-SNR
        tensor([1.0000, 0.5000])

    References:
        Le et al. 2023, arXiv:2309.17296, section 4; experiments/diffusion/continuous.py of the authors' code.
    """
    choose("prediction", predicts, _PREDICTIONS)
    if not 0 <= minimum < maximum:
        raise UsageError(
            f"the weight is cut to [minimum, maximum] with 0 <= minimum < maximum, got [{minimum}, {maximum}]: the "
            "paper's bounds are 0.05 and 1.5."
        )
    if not snr.is_floating_point():
        raise UsageError(f"snr must be floating point, alpha_bar / (1 - alpha_bar), got {snr.dtype}: not the times.")
    ratio = snr.detach().to(torch.promote_types(snr.dtype, torch.float32))
    weight = ratio.clamp(minimum, maximum)
    if predicts == "x0":
        return weight
    return weight / (ratio if predicts == "epsilon" else ratio + 1)


def clipped_snr_loss(
    prediction: Tensor,
    target: Tensor,
    snr: Tensor,
    *,
    minimum: float = 0.05,
    maximum: float = 1.5,
    predicts: str = "x0",
    valid: Tensor | None = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return the mean over samples of w(SNR) times the mean squared error of each.

    Other losses of a sample, such as the cross-entropy of atom types in the paper, are weighted by
    `clipped_snr_weight` in the same way.

    Args:
        prediction: output of the model, [B, ...].
        target: what it should be: x0, the noise or the velocity, [B, ...].
        snr: signal-to-noise ratio of each sample's time, [B].
        minimum: lower bound of the weight, at least 0.
        maximum: upper bound, above `minimum`.
        predicts: `"x0"`, `"epsilon"` or `"v"`.
        valid: which samples count, boolean, [B]; None for all.
        reduction: `"mean"`, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of samples that count.

    Returns:
        A scalar, or [B] with reduction `"none"`, in float32 or better. Without any sample that counts it is 0.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> x0, x0_hat = torch.zeros(2, 3), torch.ones(2, 3)
        >>> float(clipped_snr_loss(x0_hat, x0, torch.tensor([0.5, 9.0])))  # (0.5 + 1.5) / 2
        1.0

    References:
        Le et al. 2023, arXiv:2309.17296, section 4.
    """
    if prediction.shape != target.shape or prediction.dim() < 1 or not prediction.is_floating_point():
        raise UsageError(
            f"prediction and target must be floating point and of one shape [B, ...], got {tuple(prediction.shape)} "
            f"{prediction.dtype} and {tuple(target.shape)}."
        )
    if snr.shape != prediction.shape[:1]:
        raise UsageError(
            f"snr must have one value a sample, shape {tuple(prediction.shape[:1])}, got {tuple(snr.shape)}."
        )
    if valid is not None and (valid.dtype != torch.bool or valid.shape != snr.shape):
        raise UsageError(
            f"valid must be boolean of shape {tuple(snr.shape)}, got {valid.dtype} of {tuple(valid.shape)}."
        )
    weight_B = clipped_snr_weight(snr, minimum=minimum, maximum=maximum, predicts=predicts)
    wide = torch.promote_types(prediction.dtype, torch.float32)
    error_BN = (prediction.to(wide) - target.to(wide)).reshape(len(prediction), prediction[:1].numel() or 1)
    if valid is not None:
        # Zeroed before the square: 0 times the gradient of an infinite error would be NaN.
        error_BN = torch.where(valid.unsqueeze(-1), error_BN, torch.zeros_like(error_BN))
        weight_B = torch.where(valid, weight_B, torch.zeros_like(weight_B))
    return reduce(weight_B * error_BN.square().mean(dim=1), valid, reduction, denominator)


CARD = Card(
    name="clipped-snr",
    room="losses",
    summary="a diffusion loss weighted by its signal-to-noise ratio, cut to [0.05, 1.5]",
    paper=Paper(
        "Navigating the Design Space of Equivariant Diffusion-Based Generative Models for De Novo 3D Molecule "
        "Generation",
        2023,
        arxiv="2309.17296",
        code="https://github.com/tuanle618/eqgat-diff",
    ),
    equation="loss = mean min(max(SNR(t), 0.05), 1.5) |x0 - x0_hat|^2, SNR = alpha_bar / (1 - alpha_bar)",
    claim=(
        "Time-dependent weighting of the x0-prediction loss substantially increases training convergence and the "
        "quality of generated molecules."
    ),
    acts_on="loss",
    entry="trimtab.losses.clipped_snr:clipped_snr_loss",
    defaults=(
        Default("minimum", 0.05, "authors' code, clamp_min in experiments/diffusion_discrete.py"),
        Default("maximum", 1.5, "authors' code, clamp_max"),
        Default("predicts", "x0", "paper: the model predicts the data"),
        Default("reduction", "mean", "paper: an expectation over samples and times"),
    ),
    verified={
        "equation": (
            "tests/losses/test_clipped_snr.py::test_equals_numpy",
            "tests/losses/test_clipped_snr.py::test_loss_does_not_depend_on_what_the_model_predicts",
            "tests/losses/test_clipped_snr.py::test_micro_batches_and_ranks_add_up",
        ),
    },
    deviations=(
        "The authors' code also has the difference SNR(t - 1) - SNR(t) as a weight, cut to the same bounds; this is "
        "the weight SNR(t) of the paper (the code's snr_t).",
        "Models that predict noise or velocity, which the paper does not weight, get the same loss in their own units.",
        "The authors drop samples whose loss is NaN and print a line; here a NaN stays one, and `valid` says what "
        "counts.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.diffusion:weighting",
            "weight=uniform",
            "weight=clipped",
            metric="frechet",
            mechanism="gradient_spread",
            outcome=(
                "no evidence: 3.15 to 3.29, difference 0.141 (95 % interval -0.135 to 0.417), n=5; gradient "
                "spread 0.33 to 0.615"
            ),
        ),
    ),
)
