"""Adapters: a small vision transformer, trained on digits, frozen and adapted to digits on their side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimtab.remedy import apply
from trimtab.scalars import to_scalar
from trimtab.studies._fitting import fit, last, minibatch
from trimtab.workloads import workload
from trimtab.workloads.digits import VisionTransformer

_POWER = 6


def transfer(
    seed: int,
    *,
    connected: bool = False,
    rank: int = 16,
    width: int = 32,
    depth: int = 4,
    pretraining: int = 100,
    steps: int = 100,
    lr: float = 0.01,
) -> dict[str, float]:
    """Train a transformer on upright digits, then its adapters alone on transposed ones.

    Args:
        seed: of the weights, the adapters and the batches.
        connected: whether the adapters are joined beside the model.
        rank: of the adapters.
        width: of the transformer.
        depth: its blocks.
        pretraining: steps of Adam on all of it.
        steps: steps of Adam on the adapters.
        lr: learning rate of the first of these.

    Returns:
        The last training `loss` on transposed digits, the test part's `accuracy` on them, how many parameters were
        `trained`, and the `sharpness` of the loss in them, its largest curvature, at the end.
    """
    data = workload("digits-vit").data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionTransformer(width, depth, dropout=0.0)
    _fit(model, data.train_inputs, data.train_targets, seed, pretraining, 0.003)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        apply(model, "aside-adapters", rank=rank, connected=connected)
    turned = [x.view(-1, 8, 8).transpose(1, 2).flatten(1) for x in (data.train_inputs, data.test_inputs)]
    losses = _fit(model, turned[0], data.train_targets, seed + 1, steps, lr)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        right = model(turned[1]).argmax(-1) == data.test_targets
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        sharpness = _sharpness(F.cross_entropy(model(turned[0][:256]), data.train_targets[:256]), trained)
    return {
        "loss": last(losses),
        "accuracy": to_scalar(right.double().mean()),
        "trained": float(sum(p.numel() for p in trained)),
        "sharpness": sharpness,
    }


def _fit(model: nn.Module, x: Tensor, y: Tensor, seed: int, steps: int, lr: float) -> list[float]:
    def loss_at(step: int) -> Tensor:
        chosen = minibatch(seed, step, 64, len(x))
        return F.cross_entropy(model(x[chosen]), y[chosen])

    return fit([p for p in model.parameters() if p.requires_grad], loss_at, steps=steps, lr=lr)


def _sharpness(loss: Tensor, parameters: Sequence[Tensor]) -> float:
    """Return the size of the Hessian's largest eigenvalue, by a few steps of the power method."""
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    v = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))
    size = gradient.new_zeros(())
    for _ in range(_POWER):
        v = v / v.norm().clamp(min=1e-12)
        v = torch.cat([h.flatten() for h in torch.autograd.grad(gradient @ v, parameters, retain_graph=True)])
        size = v.norm()
    return to_scalar(size)
