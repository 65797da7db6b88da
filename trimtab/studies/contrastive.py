"""Contrastive losses on digits: halves that find each other, and sequences of rows with few labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import UsageError, choose
from trimtab.losses import cached_contrastive_step, dropout_views, multiple_negatives_ranking_loss, supcl_seq_loss
from trimtab.scalars import to_scalar
from trimtab.studies._fitting import fit, minibatch
from trimtab.workloads import workload

_PAIRS = 64


def halves(
    seed: int, *, group: int = 64, cached: bool = False, steps: int = 400, lr: float = 0.003, scale: float = 20.0
) -> dict[str, float]:
    """Train two encoders so that the left half of a digit finds its right half among those of all test digits.

    Every step sees the same 64 pairs; only who is ranked against whom differs.

    Args:
        seed: of the weights and of the batches.
        group: pairs that are encoded at once, a divisor of 64; gradients of groups are added up.
        cached: whether all 64 pairs are ranked against each other all the same, by a gradient cache.
        steps: of 64 pairs.
        lr: learning rate of the first step.
        scale: of the cosines.

    Returns:
        `recall`, the share of test halves whose own other half comes first; the mean reciprocal `rank`; and
        `negatives`, those that each anchor was ranked against.

    Raises:
        UsageError: if the group does not divide 64.
    """
    if group < 1 or _PAIRS % group:
        raise UsageError(f"group must divide {_PAIRS}, got {group}.")
    data = workload("digits-mlp").data
    left, right = (x.unflatten(1, (8, 8)) for x in (data.train_inputs, data.train_inputs))
    left, right = left[:, :, :4].flatten(1), right[:, :, 4:].flatten(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoders = [nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 32)) for _ in range(2)]
    optimizer = torch.optim.Adam([p for encoder in encoders for p in encoder.parameters()], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))

    def loss(anchors: Tensor, positives: Tensor) -> Tensor:
        return multiple_negatives_ranking_loss(
            anchors, positives, similarity="cosine", scale=scale, denominator=float(_PAIRS)
        )

    for step in range(steps):
        chosen = minibatch(seed, step, _PAIRS, len(left))
        optimizer.zero_grad()
        if cached:
            cached_contrastive_step(encoders, (left[chosen], right[chosen]), loss, micro_batch=group)
        else:
            for part in chosen.split(group):
                loss(encoders[0](left[part]), encoders[1](right[part])).backward()
        optimizer.step()
        schedule.step()
    images = data.test_inputs.unflatten(1, (8, 8))
    with torch.no_grad():
        anchors, positives = (
            F.normalize(encode(half.flatten(1)), dim=-1)
            for encode, half in zip(encoders, (images[:, :, :4], images[:, :, 4:]), strict=True)
        )
        scores = anchors @ positives.T
        # Whatever is not below a half's own other half comes before it: ties, as of embeddings that collapsed, and NaN.
        place = (~(scores < scores.diagonal().unsqueeze(1))).sum(1).double()
    return {
        "recall": to_scalar((place == 1).double().mean()),
        "rank": to_scalar((1 / place).mean()),
        "negatives": float((_PAIRS if cached else group) - 1),
    }


def sequences(
    seed: int, *, objective: str = "cross-entropy", labelled: int = 100, steps: int = 150, lr: float = 0.003
) -> dict[str, float]:
    """Train a small transformer on digits, as sequences of eight rows, with few labels.

    Both objectives see the same batches, in the same four views that differ by their dropout.

    Args:
        seed: of the weights, the labelled part, the batches and dropout.
        objective: `"cross-entropy"` of encoder and linear classifier together, or `"supcl-seq"` of the encoder, with a
            linear classifier on the frozen encoder after it.
        labelled: training samples.
        steps: batches of 32.
        lr: learning rate of the first step.

    Returns:
        The test part's `accuracy`; and `separation`, the mean cosine of test embeddings within classes less that
        between classes.
    """
    choose("objective", objective, ("cross-entropy", "supcl-seq"))
    data = workload("digits-mlp").data
    part = torch.randperm(len(data.train_inputs), generator=torch.Generator().manual_seed(seed))[:labelled]
    inputs, labels = data.train_inputs[part].view(-1, 8, 8), data.train_targets[part]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder, head = _Rows(), nn.Linear(32, 10)

        def views(chosen: Tensor) -> Tensor:
            return dropout_views(encoder, lambda: encoder(inputs[chosen]))

        def loss_at(step: int) -> Tensor:
            chosen = minibatch(seed, step, 32, labelled)
            embeddings = views(chosen)
            if objective == "supcl-seq":
                return supcl_seq_loss(embeddings, labels[chosen])
            return F.cross_entropy(head(embeddings).flatten(0, 1), labels[chosen].repeat(len(embeddings)))

        trained = [*encoder.parameters(), *(head.parameters() if objective == "cross-entropy" else ())]
        fit(trained, loss_at, steps=steps, lr=lr)
        encoder.eval()
        with torch.no_grad():
            seen, test = encoder(inputs), encoder(data.test_inputs.view(-1, 8, 8))
        if objective == "supcl-seq":
            fit(head.parameters(), lambda _: F.cross_entropy(head(seen), labels), steps=200, lr=0.03)
    with torch.no_grad():
        right = head(test).argmax(-1) == data.test_targets
        z = F.normalize(test.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), dim=-1)
        cosines = z @ z.T
        same = data.test_targets.unsqueeze(1) == data.test_targets
    return {
        "accuracy": to_scalar(right.double().mean()),
        "separation": to_scalar(cosines[same].mean() - cosines[~same].mean()),
    }


class _Rows(nn.Module):
    """One transformer layer over eight rows, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.positions = nn.Parameter(0.1 * torch.randn(8, 32))
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=True)

    def forward(self, rows: Tensor) -> Tensor:
        """Return embeddings [B, 32] of sequences [B, 8, 8]."""
        return self.layer(self.embed(rows) + self.positions).mean(1)
