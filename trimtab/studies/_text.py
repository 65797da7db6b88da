"""What studies on text share: a small causal transformer over bytes, trained for a number of multiplications.

Batches, warm-up, decay, clipping and optimizer are those of the workload lm-small, on shorter sequences.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from trimtab.scalars import to_scalar
from trimtab.workloads.lm import LanguageModel, LMSmall
from trimtab.workloads.workload import evaluating, seeded

CONTEXT = 32
_BATCH, _TEST = 16, 256
_WARMUP, _CLIP, _DECAY, _BETAS = 0.1, 1.0, 0.1, (0.9, 0.95)
_WORST = math.log(256)
"""Loss of a guess, counted for a run that diverged."""


@functools.cache
def _workload() -> LMSmall:
    workload = LMSmall()
    workload.prepare()
    return workload


def build(seed: int, width: int, layers: int, heads: int) -> LanguageModel:
    """Return a language model with the initial weights of a seed."""
    with seeded(seed):
        return LanguageModel(width, CONTEXT, layers, heads)


def multiplications(model: LanguageModel, linears: int) -> int:
    """Return the multiplications for a token, given those of the linear layers: head and attention come on top."""
    width = model.norm.normalized_shape[0]
    return linears + model.head.weight.numel() + len(model.blocks) * 2 * CONTEXT * width


def held_out_loss(model: nn.Module) -> float:
    """Return the loss in nats a byte on test windows, at most that of a guess."""
    workload = _workload()
    inputs = workload.data.test_inputs
    chosen = torch.arange(_TEST) * len(inputs) // _TEST
    with evaluating(model):
        logits = model(inputs[chosen, :CONTEXT].long())
    loss = to_scalar(workload.loss(logits, workload.data.test_targets[chosen, :CONTEXT].long()))
    return min(loss, _WORST) if math.isfinite(loss) else _WORST


class Trainer:
    """Trains a model by AdamW with warm-up and a cosine to 0, step by step.

    Args:
        model: trained in place.
        seed: of the batches.
        steps: length of the schedule.
        lr: largest learning rate.
        offset: step of the first batch.
    """

    def __init__(self, model: nn.Module, seed: int, steps: int, lr: float, offset: int = 0) -> None:
        self.model, self.seed, self.steps, self.lr, self.offset = model, seed, steps, lr, offset
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=_BETAS, weight_decay=_DECAY)
        self.losses: list[float] = []

    def step(self) -> None:
        """Take one step; after a loss that is not finite, none."""
        done = len(self.losses)
        if self.losses and not math.isfinite(self.losses[-1]):
            self.losses.append(self.losses[-1])
            return
        warmup = max(1, int(_WARMUP * self.steps))
        rate = min(1.0, (done + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * done / self.steps))
        self.optimizer.param_groups[0]["lr"] = self.lr * rate
        inputs, targets = _workload().batch(self.seed, self.offset + done, _BATCH)
        loss: Tensor = _workload().loss(self.model(inputs[:, :CONTEXT]), targets[:, :CONTEXT])
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
        self.optimizer.step()
        self.losses.append(to_scalar(loss))

    def mean(self, first: int, last: int) -> float:
        """Return the mean of some steps' losses, each at most that of a guess."""
        part = [min(loss, _WORST) if math.isfinite(loss) else _WORST for loss in self.losses[first:last]]
        return sum(part) / len(part)
