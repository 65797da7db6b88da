"""Entropy and largest logit of attention, head by head."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from trimtab.watch.probe import Attention, Probe, Reading


class AttentionStatistics(Probe):
    """Attention entropy and largest attention logit of each head.

    With p = softmax over the unmasked keys of the scaled logits z: `entropy = E[-sum_j p_j log p_j]` in nats,
    averaged over batch and queries; `entropy_ratio` is the sum of the entropies over the sum of their largest
    possible values log(unmasked keys), in [0, 1]; `max_logit` is the largest z. Large computations are estimated from
    evenly spaced batch entries and queries (see `trimtab.watch.attention.BUDGET`), so the largest logit is then a
    lower bound.

    References:
        Zhai et al. 2023, Stabilizing Transformer Training by Preventing Attention Entropy Collapse, arXiv:2303.06296.
        Wortsman et al. 2023, Small-scale proxies for large-scale Transformer training instabilities, arXiv:2309.14322.
    """

    name = "attention"
    signals = {
        "attention_entropy": "entropy of a head's attention in nats, mean over batch and queries",
        "attention_entropy_ratio": "attention entropy over its largest possible value under the mask, in [0, 1]",
        "attention_max_logit": "largest scaled, unmasked attention logit of a head",
    }

    def __init__(self) -> None:
        self._heads: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def on_attention(self, module: str, attention: Attention) -> None:
        """Reduce one attention computation to three numbers a head."""
        logits_BHLS = attention.logits
        # A query whose keys are all masked has no distribution: its terms are masked, so it adds nothing. NaN logits
        # are not -inf: they stay and show.
        masked_BHLS = logits_BHLS == -torch.inf
        log_p = torch.log_softmax(logits_BHLS, dim=-1)
        terms = (log_p.exp() * log_p).masked_fill_(masked_BHLS, 0.0)
        total_H = -terms.sum(dim=(0, 2, 3))
        open_BHL = masked_BHLS.logical_not().sum(dim=-1)
        rows_H = (open_BHL > 0).sum(dim=(0, 2)).clamp(min=1)
        possible_H = open_BHL.clamp(min=1).float().log().sum(dim=(0, 2))
        largest_H = logits_BHLS.amax(dim=(0, 2, 3))
        self._heads[module] = (total_H / rows_H, total_H / possible_H, largest_H)

    def read(self) -> Iterable[Reading]:
        """Give the statistics of this step."""
        if not self._heads:
            return
        labels = tuple(f"{module}/head{head}" for module, seen in self._heads.items() for head in range(len(seen[0])))
        entropy, ratio, largest = (torch.cat(column) for column in zip(*self._heads.values(), strict=True))
        self._heads = {}
        yield Reading("attention_entropy", labels, entropy)
        yield Reading("attention_entropy_ratio", labels, ratio)
        yield Reading("attention_max_logit", labels, largest)
