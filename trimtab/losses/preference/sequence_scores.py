"""Log-probabilities of responses: what the losses of preferences are functions of.

    log pi(y | x) = sum over the response's tokens of log softmax(logits)[target]

Shape suffixes: B responses, L positions, V classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.losses._reduction import check_logits, check_targets, working_dtype

__all__ = ["ResponseScores", "sequence_log_probs"]


class ResponseScores(NamedTuple):
    """Log-probability of each response and its number of tokens, both [B]."""

    log_probs: Tensor
    lengths: Tensor


def sequence_log_probs(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> ResponseScores:
    """Return the log-probability of each response, the sum over its tokens, and how many tokens it has.

    Computed in float32 or better. Shift before: position i of the logits predicts position i of the targets.

    Args:
        logits: [B, L, V].
        targets: [B, L], int64; the prompt and padding are `ignore_index`.
        ignore_index: target that does not count.

    Returns:
        `log_probs` [B], and `lengths` [B] as int64.

    Raises:
        UsageError: if the shapes or dtypes do not fit.

    Example:
        >>> logits = torch.zeros(1, 3, 4)
        >>> scores = sequence_log_probs(logits, torch.tensor([[-100, 2, 0]]))
        >>> round(float(scores.log_probs[0]), 4), int(scores.lengths[0])  # 2 log(1/4)
        (-2.7726, 2)
    """
    check_logits(logits)
    check_targets(logits, targets)
    valid = targets != ignore_index
    wide = logits.to(working_dtype(logits, None))
    # Zeroed before, not after: a position that does not count must not spoil the gradient of those that do.
    wide = torch.where(valid.unsqueeze(-1), wide, torch.zeros_like(wide))
    chosen = wide.gather(-1, targets.masked_fill(~valid, 0).unsqueeze(-1)).squeeze(-1)
    each = torch.where(valid, chosen - wide.logsumexp(-1), torch.zeros_like(chosen))
    return ResponseScores(each.sum(-1), valid.sum(-1))
