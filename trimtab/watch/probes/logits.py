"""Output logits of a classifier or language model: drift, size and softmax collapse."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from trimtab.watch.probe import Probe, Reading

_BUDGET = 2**19
"""Most logits looked at; beyond it, evenly spaced samples are taken."""


class Logits(Probe):
    """Statistics of the logits that a cross-entropy is computed from.

    With Z = sum_c exp(z_c): `logits_abs_log_z = E|log Z|` (0 for normalised outputs), `logits_max = max |z|`,
    `zero_loss_fraction` = share of samples whose cross-entropy is exactly 0 in the logits' own precision: softmax
    collapse, where the sample's gradient vanishes, and `train_accuracy` on the batch. Seen where `F.cross_entropy`
    (or `nn.CrossEntropyLoss`) is called on logits that require gradients, or given by hand to `Watch.step`.

    References:
        Prieto et al. 2025, Grokking at the Edge of Numerical Stability, arXiv:2501.04697 (softmax collapse).
        Chowdhery et al. 2022, PaLM, arXiv:2204.02311 (log Z drift).
    """

    name = "logits"
    signals = {
        "logits_abs_log_z": "mean |log Z| of the output softmax",
        "logits_max": "largest absolute output logit",
        "zero_loss_fraction": "share of samples whose cross-entropy is exactly zero in floating point",
        "train_accuracy": "share of the batch's samples whose largest logit is the target's",
    }

    def __init__(self) -> None:
        self._readings: list[Reading] = []

    def on_classification(self, logits: Tensor, targets: Tensor) -> None:
        """Reduce one batch of logits to four numbers."""
        step = max(1, logits.numel() // _BUDGET)
        logits_NC, targets_N = logits[::step], targets[::step]
        low, high = logits_NC.aminmax()
        losses = functional.cross_entropy(logits_NC, targets_N, reduction="none")
        self._readings = [
            Reading("logits_abs_log_z", (), logits_NC.float().logsumexp(dim=-1).abs().mean()),
            Reading("logits_max", (), torch.maximum(high, -low)),
            Reading("zero_loss_fraction", (), (losses == 0).float().mean()),
            Reading("train_accuracy", (), (logits_NC.argmax(dim=-1) == targets_N).float().mean()),
        ]

    def read(self) -> Iterable[Reading]:
        """Give the statistics of this step."""
        readings, self._readings = self._readings, []
        return readings
