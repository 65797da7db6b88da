"""Scores of an untrained network from one batch: what it may be worth without training it.

    grad_norm   sum over layers of |dL/dW|
    snip        sum |w dL/dw|                                        Lee et al. 2019 (arXiv:1810.02340)
    grasp       -sum w (H g), g = dL/dw, H its derivative            Wang et al. 2020 (arXiv:2002.07376)
    synflow     sum |w dR/dw|, R = sum f(1; |w|)                     Tanaka et al. 2020 (arXiv:2006.05467)
    fisher      sum over channels 1/2 mean_n (sum_pixels a dL/da)^2  Theis et al. 2018 (arXiv:1801.05787)
    jacov       -sum_i log(v_i + k) + 1 / (v_i + k), v the eigenvalues of the correlations of df/dx
    naswot      log |det K|, K_nm the ReLUs that x_n and x_m agree on     Mellor et al. 2021 (arXiv:2006.04647)
    ntk         -log10 of the condition of G G^T, G_n = d f_target(x_n) / dw   Chen et al. 2021 (arXiv:2102.11535)

Signs are such that a larger score should be a better network, as in Abdelfattah et al. 2021 (arXiv:2101.08134), whose
code SamsungLabs/zero-cost-nas the collection follows. Weights are those of linear and convolutional layers. Each score
works on a copy of the network.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.scalars import to_local_full, to_scalar

Loss = Callable[[Tensor, Tensor], Tensor]
Score = Callable[[nn.Module, Tensor, Tensor, Loss], float]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_JACOV_K = 1e-5


def _weights(model: nn.Module) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, _LAYERS)]


def _gradients(value: Tensor, weights: list[Tensor], *, graph: bool = False) -> list[Tensor]:
    return list(torch.autograd.grad(value, weights, create_graph=graph, materialize_grads=True))


def _sum(terms: list[Tensor]) -> float:
    return to_scalar(torch.stack([term.sum() for term in terms]).sum())


def grad_norm(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss) -> float:
    """Sum over layers of the norm of the weights' gradient."""
    model = copy.deepcopy(model)
    return _sum([g.norm() for g in _gradients(loss(model(inputs), targets), _weights(model))])


def snip(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss) -> float:
    """How far the loss reacts to removing each weight: sum |w dL/dw|."""
    model = copy.deepcopy(model)
    weights = _weights(model)
    return _sum(
        [(w * g).abs() for w, g in zip(weights, _gradients(loss(model(inputs), targets), weights), strict=True)]
    )


def grasp(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss) -> float:
    """How removing each weight changes the gradient's norm: -sum w (H g)."""
    model = copy.deepcopy(model)
    weights = _weights(model)
    gradients = _gradients(loss(model(inputs), targets), weights, graph=True)
    flow = torch.stack([(g.detach() * g).sum() for g in gradients]).sum()
    if not flow.requires_grad:
        return 0.0
    return _sum([-w * hg for w, hg in zip(weights, _gradients(flow, weights), strict=True)])


def synflow(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss) -> float:
    """The product of the weights' sizes along all paths, in float64 and without batch normalisation; no data."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, _NORMS):
                setattr(module, name, nn.Identity())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    weights = _weights(model)
    ones = torch.ones_like(inputs[:1], dtype=torch.float64)
    return _sum([(w * g).abs() for w, g in zip(weights, _gradients(model(ones).sum(), weights), strict=True)])


def fisher(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss) -> float:
    """How far the loss reacts to removing each channel, to second order."""
    model = copy.deepcopy(model)
    outputs: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, _LAYERS):
            module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    value = loss(model(inputs), targets)
    products = [a * g for a, g in zip(outputs, _gradients(value, outputs), strict=True)]
    return _sum([p.flatten(2).sum(2).square().mean(0) / 2 if p.dim() > 2 else p.square().mean(0) / 2 for p in products])


def jacov(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss) -> float:
    """How uncorrelated the inputs' gradients are."""
    model = copy.deepcopy(model)
    x = inputs.detach().clone().requires_grad_()
    (jacobian,) = torch.autograd.grad(model(x).sum(), x)
    rows = to_local_full(jacobian).flatten(1).double().cpu().numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations = np.corrcoef(rows)
    if not np.isfinite(correlations).all():
        return math.nan
    v = np.linalg.eigvalsh(correlations).clip(min=0) + _JACOV_K
    return float(-(np.log(v) + 1 / v).sum())


def naswot(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss) -> float:
    """How differently the inputs switch the ReLUs; NaN for a network without ReLUs."""
    model = copy.deepcopy(model)
    codes: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda _module, args, _output: codes.append((args[0] > 0).flatten(1)))
    with torch.no_grad():
        model(inputs)
    if not codes:
        return math.nan
    code = torch.cat([to_local_full(part) for part in codes], dim=1).double().cpu().numpy()
    sign, logdet = np.linalg.slogdet(code @ code.T + (1 - code) @ (1 - code).T)
    return float(logdet) if sign != 0 else math.nan


def ntk(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss) -> float:
    """How evenly training would act on the inputs: -log10 of the condition of the target logits' tangent kernel."""
    model = copy.deepcopy(model)
    weights = _weights(model)
    logits = model(inputs).gather(1, targets[:, None])[:, 0]
    rows = [
        torch.cat([part.flatten() for part in torch.autograd.grad(logit, weights, retain_graph=True)])
        for logit in logits
    ]
    values = np.linalg.svd(to_local_full(torch.stack(rows)).double().cpu().numpy(), compute_uv=False)
    return float(-2 * np.log10(values[0] / values[-1])) if values[-1] > 0 else math.nan


SCORES: dict[str, Score] = {
    "grad_norm": grad_norm,
    "snip": snip,
    "grasp": grasp,
    "fisher": fisher,
    "synflow": synflow,
    "jacov": jacov,
    "naswot": naswot,
    "ntk": ntk,
}
