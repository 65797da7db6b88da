"""ADR: adversarial training on soft labels from an average of the model's own weights, in place of one-hot labels.

    Q   = softmax(teacher(x) / tau)                          teacher: exponential moving average of the weights
    l_i = clip(lambda - (max_k Q_k - Q_y), 0, 1)             less of the teacher where it is wrong
    P   = l_i Q + (1 - l_i) onehot(y)
    loss = -sum_k P_k log softmax(model(x'))_k               x' maximises it around x

One-hot labels ask for a certainty that perturbed inputs do not have, and adversarial training overfits to them. P keeps
the true class on top: with d = max Q - Q_y and l_i <= 1 - d, P_y - P_k >= 1 - l_i (1 + d) >= d^2 >= 0. During training
tau falls and lambda rises along half a cosine (`annealed`). Wu et al. 2023 (arXiv:2305.12118), equations 3 to 5.

Shape suffixes: B any leading dimensions, V classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.losses._reduction import check_logits, check_targets, reduce, working_dtype
from trimtab.losses.preference._pairs import check_number

__all__ = ["annealed", "rectified_cross_entropy", "rectified_targets"]


def annealed(start: float, end: float, progress: float) -> float:
    """Return a value that goes from `start` to `end` along half a cosine, as tau and lambda do.

    Args:
        start: value at the beginning; the paper's, on CIFAR-10: tau 2.5, lambda 0.7.
        end: value at the end; the paper's: tau 2.0, lambda 0.95.
        progress: share of the training steps that is done, in [0, 1].

    Returns:
        The value.

    Raises:
        UsageError: if `progress` is outside [0, 1].

    Example:
        >>> [round(annealed(2.5, 2.0, progress), 3) for progress in (0, 0.25, 0.5, 1)]
        [2.5, 2.427, 2.25, 2.0]
    """
    check_number("progress", progress, 0, 1)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def rectified_targets(
    teacher_logits: Tensor, targets: Tensor, *, temperature: float = 2.0, mix: float = 0.95, ignore_index: int = -100
) -> Tensor:
    """Return P = l_i softmax(teacher / tau) + (1 - l_i) onehot(y), whose largest entry is that of the true class.

    Args:
        teacher_logits: [B..., V], of the averaged model on the inputs without perturbation.
        targets: [B...], class indices.
        temperature: tau, above 0.
        mix: lambda, in [0, 1]; at 0 the targets are one-hot.
        ignore_index: target that does not count; its row is 0.

    Returns:
        Probabilities without gradient, [B..., V], in float32 or better.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> teacher = torch.tensor([[0.8, 0.2], [0.2, 0.8]]).log()  # right, and wrong by 0.6
        >>> rectified_targets(teacher, torch.tensor([0, 0]), temperature=1.0, mix=0.9)
        tensor([[0.8200, 0.1800],
                [0.7600, 0.2400]])

    References:
        Wu et al. 2023, arXiv:2305.12118, equations 3 to 5.
    """
    check_number("temperature", temperature, 0, open_low=True)
    check_number("mix", mix, 0, 1)
    check_logits(teacher_logits)
    check_targets(teacher_logits, targets)
    valid_B1 = (targets != ignore_index).unsqueeze(-1)
    wide = teacher_logits.detach().to(working_dtype(teacher_logits, None))
    teacher_BV = torch.softmax(torch.where(valid_B1, wide, torch.zeros_like(wide)) / temperature, dim=-1)
    label_B1 = torch.where(valid_B1, targets.unsqueeze(-1), torch.zeros_like(targets).unsqueeze(-1)).long()
    excess_B1 = teacher_BV.amax(-1, keepdim=True) - teacher_BV.gather(-1, label_B1)
    mix_B1 = (mix - excess_B1).clamp(min=0, max=1)
    targets_BV = (mix_B1 * teacher_BV).scatter_add(-1, label_B1, 1 - mix_B1)
    return torch.where(valid_B1, targets_BV, torch.zeros_like(targets_BV))


def rectified_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    teacher_logits: Tensor,
    temperature: float = 2.0,
    mix: float = 0.95,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy -sum_k P_k log softmax(logits)_k with the targets P of `rectified_targets`.

    The same loss is maximised over the perturbation and minimised over the weights.

    Args:
        logits: [B..., V], of the model on perturbed inputs.
        targets: [B...], class indices.
        teacher_logits: [B..., V], of the averaged model on the inputs without perturbation; gets no gradient. Average
            the weights after each step, by 0.995 in the paper (`torch.optim.swa_utils.get_ema_multi_avg_fn`).
        temperature: tau, above 0, from `annealed`.
        mix: lambda, in [0, 1], from `annealed`; at 0 it is cross-entropy.
        ignore_index: target that does not count.
        reduction: `"mean"` over the targets that count, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of targets that count.

    Returns:
        A scalar, or [B...] with reduction `"none"`, in float32 or better.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> logits, teacher = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])
        >>> round(float(rectified_cross_entropy(logits, torch.tensor([0]), teacher_logits=teacher)), 4)  # log 2
        0.6931

    References:
        Wu et al. 2023, arXiv:2305.12118.
    """
    check_logits(logits)
    check_targets(logits, targets)
    if teacher_logits.shape != logits.shape:
        raise UsageError(
            f"teacher_logits must have the shape of the logits, {tuple(logits.shape)}, got "
            f"{tuple(teacher_logits.shape)}."
        )
    valid = targets != ignore_index
    wide = logits.to(working_dtype(logits, None))
    # Zeroed before, not after: 0 times the gradient of an infinite logit would be NaN.
    log_probs_BV = torch.log_softmax(torch.where(valid.unsqueeze(-1), wide, torch.zeros_like(wide)), dim=-1)
    target_BV = rectified_targets(
        teacher_logits, targets, temperature=temperature, mix=mix, ignore_index=ignore_index
    ).to(log_probs_BV.dtype)
    # A class without probability costs nothing, even one that is masked out with a logit of -inf.
    terms_BV = torch.where(target_BV > 0, target_BV * log_probs_BV, torch.zeros_like(log_probs_BV))
    return reduce(-terms_BV.sum(-1), valid, reduction, denominator)


CARD = Card(
    name="adr",
    room="losses",
    summary="adversarial training on soft labels from an average of the model's weights, the true class kept on top",
    paper=Paper("Annealing Self-Distillation Rectification Improves Adversarial Training", 2023, arxiv="2305.12118"),
    equation="loss = -sum P log p; P = l Q + (1 - l) onehot, Q = softmax(teacher / tau), l = lambda - (max Q - Q_y)",
    claim="Higher robust accuracy and less robust overfitting than with one-hot labels, without a pre-trained teacher.",
    acts_on="loss",
    entry="trimtab.losses.robustness.annealed_rectification:rectified_cross_entropy",
    defaults=(
        Default("temperature", 2.0, "paper, CIFAR-10: the end of 2.5 to 2.0"),
        Default("mix", 0.95, "paper, CIFAR-10: the end of 0.7 to 0.95"),
        Default("reduction", "mean", "paper: an expectation over samples"),
        Default("ignore_index", -100, "torch.nn.functional.cross_entropy"),
    ),
    verified={
        "equation": (
            "tests/losses/robustness/test_annealed_rectification.py::test_targets_equal_a_plain_loop",
            "tests/losses/robustness/test_annealed_rectification.py::test_the_true_class_stays_on_top",
            "tests/losses/robustness/test_annealed_rectification.py::TestRectifiedCrossEntropy::test_micro_batches_add_up",
        ),
        "reference": ("tests/losses/robustness/test_annealed_rectification.py::test_equals_torch_on_probabilities",),
    },
    deviations=(
        "The formulas of Q, l and P are those of the authors' code; the ranges of tau and lambda and the attack on the "
        "rectified loss are those that others who run it report.",
        "The average of the weights and the attack are the caller's; the study has both.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.adversarial:overfitting",
            "targets=one-hot",
            "targets=adr",
            metric="robust_accuracy",
            higher_is_better=True,
            mechanism="gap",
            outcome=(
                "better: robust accuracy 0.697 to 0.750, difference +0.054 (95 % interval +0.034 to +0.074), n=5; the "
                "gap from best to last, near 0 in both arms here, does not shrink: +0.009 (-0.002 to +0.021)"
            ),
        ),
    ),
)
