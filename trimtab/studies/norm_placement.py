"""What the placement of norms does to a deep language model: variance over depth, massive activations, gradients.

A narrow transformer of many blocks reads bytes of Python sources. Its sublayers come from one seed whatever the
placement, with the matrices of N(0, 0.02) at width 1,024 brought to its width: branches are as large as in the models
of the Peri-LN paper (arXiv:2502.02732).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.layers.norms.norm_placement import ResidualStack
from trimtab.scalars import to_floats, to_scalar
from trimtab.studies._fitting import fit, last, minibatch
from trimtab.workloads.transformer import CausalSelfAttention
from trimtab.workloads.workload import Data, workload

_CONTEXT = 32
_HEADS = 4
_BYTES = 256
_STD = 0.02
_STD_WIDTH = 1024
_WORST = 1e6


class _Model(nn.Module):
    """A language model over bytes whose residual stream can be seen."""

    def __init__(self, placement: str, blocks: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_BYTES, width)
        self.position = nn.Embedding(_CONTEXT, width)
        sublayers = [part for _ in range(blocks) for part in (CausalSelfAttention(width, _HEADS), _mlp(width))]
        self.stack = ResidualStack(width, sublayers, placement)
        self.head = nn.Linear(width, _BYTES, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, 0.0, _STD)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, _STD * math.sqrt(_STD_WIDTH / width))
        if placement == "res-post":  # as the authors of Swin V2 start it
            for block in self.stack.blocks:
                nn.init.zeros_(block.get_parameter("output_norm.weight"))

    def streams(self, tokens_BL: Tensor) -> list[Tensor]:
        """Return the residual stream behind each block of two sublayers."""
        x_BLD = self.stack.embedding_norm(self.embedding(tokens_BL) + self.position.weight[: tokens_BL.shape[1]])
        found = []
        for index, block in enumerate(self.stack.blocks):
            x_BLD = block(x_BLD)
            found += [x_BLD] if index % 2 else []
        return found

    def forward(self, tokens_BL: Tensor) -> Tensor:
        return self.head(self.stack.final_norm(self.streams(tokens_BL)[-1]))


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False))


def depth_profile(
    seed: int,
    *,
    placement: str = "pre",
    blocks: int = 12,
    width: int = 32,
    steps: int = 150,
    batch: int = 8,
    lr: float = 0.003,
) -> dict[str, float]:
    """Train a deep model and measure how its residual stream and gradients change with depth.

    Args:
        seed: of initialisation and batches.
        placement: where the norms are: one of `ResidualBlock`'s.
        blocks: how many, of attention and MLP each.
        width: D.
        steps: of Adam, at a rate that falls along half a cosine.
        batch: windows a step.
        lr: learning rate of the first step.

    Returns:
        For the variance v_l of the stream behind block l: `exponent`, the slope of log v_l over log l (1: linear
        growth), and `last_variance`, of the last block; `massive`, the largest activation of the stream over the
        median one; `gradient_ratio`, the largest gradient norm of a block over the smallest; `loss`; all after
        training, and with `initial_` before it.
    """
    data = workload("lm-small").prepare()
    model = _build(seed, placement, blocks, width)
    found = {f"initial_{name}": value for name, value in _measure(model, data, seed).items()}
    losses = _train(model, data, seed, steps=steps, batch=batch, lr=lr)
    return {**found, **_measure(model, data, seed), "loss": last(losses)}


def diverged_rates(
    seed: int,
    *,
    placement: str = "pre",
    blocks: int = 12,
    width: int = 32,
    steps: int = 20,
    batch: int = 8,
) -> dict[str, float]:
    """Train at growing learning rates and count those at which the loss is not below the one at initialisation.

    Args:
        seed: of initialisation and batches.
        placement: where the norms are: one of `ResidualBlock`'s.
        blocks: how many, of attention and MLP each.
        width: D.
        steps: of Adam, for each rate.
        batch: windows a step.

    Returns:
        `diverged`, of 5 rates from 0.003 to 0.3, and `mean_loss` over them, where one that diverged counts as its loss
        at initialisation.
    """
    data = workload("lm-small").prepare()
    diverged, reached = 0, []
    for lr in (0.003, 0.01, 0.03, 0.1, 0.3):
        losses = _train(_build(seed, placement, blocks, width), data, seed, steps=steps, batch=batch, lr=lr)
        reached.append(last(losses))
        diverged += reached[-1] == losses[0]
    return {"diverged": float(diverged), "mean_loss": sum(reached) / len(reached)}


def _build(seed: int, placement: str, blocks: int, width: int) -> _Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _Model(placement, blocks, width)


def _train(model: _Model, data: Data, seed: int, *, steps: int, batch: int, lr: float) -> list[float]:
    def loss_at(step: int) -> Tensor:
        chosen = minibatch(seed, step, batch, len(data.train_inputs))
        return _loss(model, data.train_inputs[chosen], data.train_targets[chosen])

    return fit(model.parameters(), loss_at, steps=steps, lr=lr)


def _loss(model: _Model, inputs: Tensor, targets: Tensor) -> Tensor:
    logits = model(inputs[:, :_CONTEXT].long())
    return F.cross_entropy(logits.flatten(0, 1), targets[:, :_CONTEXT].long().flatten())


def _measure(model: _Model, data: Data, seed: int) -> dict[str, float]:
    chosen = minibatch(seed, -1, 16, len(data.test_inputs))
    inputs, targets = data.test_inputs[chosen], data.test_targets[chosen]
    with torch.no_grad():
        streams = model.streams(inputs[:, :_CONTEXT].long())
    variances = np.array(to_floats([torch.stack([x.var(-1, correction=0).mean() for x in streams])])[0])
    size = torch.stack(streams).abs()
    model.zero_grad()
    _loss(model, inputs, targets).backward()
    blocks = list(model.stack.blocks)
    norms = [_gradient_norm(pair) for pair in zip(blocks[::2], blocks[1::2], strict=True)]
    model.zero_grad()
    depth = np.log(np.arange(1, len(variances) + 1))
    exponent = np.polyfit(depth, np.log(np.maximum(variances, 1e-30)), 1)[0] if len(variances) > 1 else 0.0
    found = {
        "exponent": float(exponent),
        "last_variance": float(variances[-1]),
        "massive": to_scalar(size.max() / size.median()),
        "gradient_ratio": max(norms) / max(min(norms), 1e-30),
    }
    return {name: min(value, _WORST) if math.isfinite(value) else _WORST for name, value in found.items()}


def _gradient_norm(modules: tuple[nn.Module, ...]) -> float:
    gradients = [p.grad for module in modules for p in module.parameters() if p.grad is not None]
    return math.hypot(*(to_scalar(gradient.norm()) for gradient in gradients))
