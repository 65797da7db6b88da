"""The core that contrastive losses share: InfoNCE of a matrix of scores, with any number of positives a row.

    value_i = -1 / |P(i)| sum_{p in P(i)} log( exp(s_ip) / sum_{c in C(i)} exp(s_ic) ),   P(i) within C(i)

Its gradient is softmax over C(i) less 1 / |P(i)| on the positives. One positive gives InfoNCE (van den Oord et al.
2018, arXiv:1807.03748), several the supervised contrastive loss "out" (Khosla et al. 2020, arXiv:2004.11362).

Shape suffixes: B anchors, C candidates, D embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import UsageError


def info_nce(scores: Tensor, positives: Tensor, candidates: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the values of anchors and which of them count.

    Args:
        scores: [B, C], in float32 or better.
        positives: [B, C], bool; an anchor without any has value 0 and does not count.
        candidates: [B, C], bool, positives among them; None for all.

    Returns:
        Both [B].
    """
    if candidates is not None:
        scores = scores.masked_fill(~candidates, -torch.inf)
    count_B = positives.sum(-1)
    valid_B = count_B > 0
    # A row without candidates is zeroed before its softmax, whose gradient would be NaN.
    scores = torch.where(valid_B.unsqueeze(-1), scores, torch.zeros_like(scores))
    log_p = F.log_softmax(scores, dim=-1)
    chosen = torch.where(positives, log_p, torch.zeros_like(log_p)).sum(-1)
    return -chosen / count_B.clamp(min=1), valid_B


def unit_rows(x: Tensor) -> Tensor:
    """Return rows of length 1, those of zeros as they are: their gradient is not blown up by a tiny divisor."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, torch.ones_like(norm))


def similarities(anchors: Tensor, candidates: Tensor, *, cosine: bool) -> Tensor:
    """Return dot products or cosines of all pairs of rows, [B, C], in float32 or better whatever autocast says."""
    wide = torch.promote_types(torch.promote_types(anchors.dtype, candidates.dtype), torch.float32)
    a_BD, c_CD = anchors.to(wide), candidates.to(wide)
    if cosine:
        a_BD, c_CD = unit_rows(a_BD), unit_rows(c_CD)
    with torch.autocast(a_BD.device.type, enabled=False):
        return a_BD @ c_CD.transpose(-1, -2)


def check_rows(**given: Tensor) -> None:
    """Raise a UsageError unless all are floating-point embeddings [rows, D] of one width."""
    width = None
    for name, value in given.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() != 2:
            kind = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"{name} must be floating-point embeddings of shape [rows, width], got {kind}.")
        width = value.shape[1] if width is None else width
        if value.shape[1] != width:
            raise UsageError(f"embeddings must have one width, got {width} and, for {name}, {value.shape[1]}.")
