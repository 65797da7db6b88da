"""Initialisations: the classics in deep ReLU networks, and those of graph networks by structure of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import choose
from trimtab.layers import audit_initialization, gcn_adjacency, virgo_
from trimtab.scalars import to_scalar
from trimtab.studies._fitting import fit, last, minibatch
from trimtab.workloads import workload

_CLASSICS = {"glorot": nn.init.xavier_normal_, "orthogonal": nn.init.orthogonal_}
_GAINS = {"he": 2.0, "lecun": 1.0, "torch": 1 / 3}


def deep_relu(
    seed: int, *, init: str = "glorot", depth: int = 30, width: int = 64, steps: int = 300, lr: float = 0.01
) -> dict[str, float]:
    """Train a deep ReLU network on digits by SGD with momentum from one of the classic initialisations, biases 0.

    Args:
        seed: of the weights and of the batches.
        init: `"glorot"`, `"he"`, `"lecun"`, `"orthogonal"`, or `"torch"`: variance 1 / (3 n).
        depth: layers with weights.
        width: of the hidden layers.
        steps: batches of 64.
        lr: learning rate of the first step.

    Returns:
        The last training `loss`; the test part's `accuracy`; and of the audit before the first step `forward_ratio` and
        `backward_ratio` over the hidden layers, and how many layers it calls `vanishing`.
    """
    choose("initialisation", init, [*_CLASSICS, *_GAINS])
    data = workload("digits-mlp").data
    model = _network(data.train_inputs.shape[1], width, 10, depth)
    generator = torch.Generator().manual_seed(seed)
    for layer in (part for part in model if isinstance(part, nn.Linear)):
        if init in _CLASSICS:
            _CLASSICS[init](layer.weight, generator=generator)
        else:
            nn.init.normal_(layer.weight, 0.0, (_GAINS[init] / layer.in_features) ** 0.5, generator=generator)
        nn.init.zeros_(layer.bias)
    audit = audit_initialization(model, data.train_inputs[:256], targets=data.train_targets[:256])

    def loss_at(step: int) -> Tensor:
        chosen = minibatch(seed, step, 64, len(data.train_inputs))
        return F.cross_entropy(model(data.train_inputs[chosen]), data.train_targets[chosen])

    losses = fit(model.parameters(), loss_at, steps=steps, lr=lr, momentum=0.9)
    with torch.no_grad():
        right = model(data.test_inputs).argmax(-1) == data.test_targets
    return {
        "loss": last(losses),
        "accuracy": to_scalar(right.double().mean()),
        "forward_ratio": audit.trends[0].forward,
        "backward_ratio": audit.trends[0].backward or 0.0,
        "vanishing": float(sum(layer.verdict.endswith("vanishes") for layer in audit.layers)),
    }


def _network(inputs: int, width: int, outputs: int, depth: int) -> nn.Sequential:
    hidden = [part for _ in range(depth - 2) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), *hidden, nn.Linear(width, outputs))


def graph_network(
    seed: int,
    *,
    init: str = "glorot",
    depth: int = 8,
    width: int = 64,
    nodes: int = 400,
    neighbours: int = 5,
    labels: int = 10,
    steps: int = 100,
    lr: float = 0.003,
) -> dict[str, float]:
    """Classify the nodes of a graph by a deep graph convolution network: digits, joined to their nearest neighbours.

    Args:
        seed: of the nodes, of which are labelled, and of the weights.
        init: `"glorot"`, `"he"` or `"virgo"`; uniform all three.
        depth: layers.
        width: of the hidden layers.
        nodes: digits drawn.
        neighbours: to which a digit is joined, both ways.
        labels: labelled nodes of every class.
        steps: of Adam on all labelled nodes.
        lr: learning rate of the first step.

    Returns:
        The `accuracy` on nodes without a label, the last training `loss`, and how far variances are from equal at
        initialisation, in mean |log ratio| of successive hidden layers: `drift`, the mean of `forward_drift` (of
        embeddings before the ReLU) and `backward_drift` (of the loss's gradients there).
    """
    choose("initialisation", init, ("glorot", "he", "virgo"))
    generator = torch.Generator().manual_seed(seed)
    data = workload("digits-mlp").data
    chosen = torch.randperm(len(data.train_inputs), generator=generator)[:nodes]
    x, y = (data.train_inputs[chosen] + 1) / 2, data.train_targets[chosen]
    near = torch.cdist(x, x).fill_diagonal_(float("inf")).topk(neighbours, largest=False).indices
    edges = torch.stack([torch.arange(nodes).repeat_interleave(neighbours), near.flatten()])
    adjacency = gcn_adjacency(torch.cat([edges, edges.flip(0)], dim=1).unique(dim=1), nodes).to_dense()
    labelled = torch.cat([(y == digit).nonzero().flatten()[:labels] for digit in range(10)])
    unlabelled = torch.ones(nodes, dtype=torch.bool).index_fill(0, labelled, False)
    widths = [x.shape[1], *[width] * (depth - 1), 10]
    weights = [torch.empty(out, into) for into, out in pairwise(widths)]
    if init == "virgo":
        virgo_(weights, adjacency, x, generator=generator)
    else:
        for w in weights:
            gain = 2 / w.shape[1] if init == "he" else 2 / sum(w.shape)
            w.uniform_(-((3 * gain) ** 0.5), (3 * gain) ** 0.5, generator=generator)
    parameters = [w.requires_grad_() for w in weights]

    def embeddings() -> list[Tensor]:
        h, found = x, []
        for w in parameters:
            found.append(adjacency @ (h @ w.T))
            h = found[-1].relu()
        return found

    found = embeddings()
    loss = F.cross_entropy(found[-1][labelled], y[labelled])
    gradients = torch.autograd.grad(loss, found)
    forward, backward = _drift(found[:-1]), _drift(gradients[:-1])
    losses = fit(parameters, lambda step: F.cross_entropy(embeddings()[-1][labelled], y[labelled]), steps=steps, lr=lr)
    with torch.no_grad():
        right = (embeddings()[-1].argmax(-1) == y)[unlabelled]
    return {
        "accuracy": to_scalar(right.double().mean()),
        "loss": last(losses),
        "drift": (forward + backward) / 2,
        "forward_drift": forward,
        "backward_drift": backward,
    }


def _drift(layers: Sequence[Tensor]) -> float:
    logs = torch.stack([layer.detach().double().square().mean().log() for layer in layers])
    return to_scalar(logs.diff().abs().mean())
