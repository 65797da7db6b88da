"""The loss of a language model's head, with its logits in memory or not."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trimtab.errors import choose
from trimtab.losses import linear_cross_entropy
from trimtab.scalars import to_scalar
from trimtab.studies._memory import PeakMemory


def memory(
    seed: int, *, way: str = "dense", classes: int = 32768, tokens: int = 1024, width: int = 64
) -> dict[str, float]:
    """Take the loss of a head and its gradients once, and count the memory.

    Args:
        seed: of hidden states, weight and targets.
        way: `"dense"` for torch's cross_entropy of all logits, `"cut"`, or `"recompute"`.
        classes: V.
        tokens: N.
        width: D.

    Returns:
        `peak_mib` of the tensors that loss and gradients made, less the gradients themselves; the `loss`; and
        `gradient_norm` of the weight.
    """
    choose("way", way, ("dense", "cut", "recompute"))
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight = (torch.randn(classes, width, generator=generator) / width**0.5).requires_grad_()
    targets = torch.randint(classes, (tokens,), generator=generator)
    with PeakMemory() as counted:
        if way == "dense":
            loss = F.cross_entropy(hidden @ weight.T, targets)
        else:
            loss = linear_cross_entropy(hidden, weight, targets, recompute=way == "recompute")
        found = torch.autograd.grad(loss, [hidden, weight])
    gradients = sum(each.numel() * each.element_size() for each in found)
    return {
        "peak_mib": (counted.peak - gradients) / 2**20,
        "loss": to_scalar(loss.detach()),
        "gradient_norm": to_scalar(found[1].norm()),
    }
