"""Measure how large the outputs of a model's layers are, and how far they moved, while it takes a few steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.scalars import to_floats, to_scalar

_PASSED_ON = (nn.Identity, nn.Dropout, nn.Flatten, nn.Unflatten)
"""Leaves whose output says nothing that their input's module does not."""


def measure_coordinates(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Sequence[Any],
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train a model for some steps and measure the coordinates of its layers before the first and after each.

    Measuring is done on the first batch without dropout; batch norms use its statistics and keep their own.

    Args:
        model: trained in training mode.
        loss_fn: takes the model and a batch, returns the mean loss.
        batches: of the steps, taken in turn.
        optimizer: of the model.
        steps: to take.
        progress: called after each step with the steps done and the loss.

    Returns:
        `sizes` and `changes` by module, each with steps + 1 numbers, and `losses`, one for each step.
    """
    first: dict[str, list[Tensor]] = {}
    numbers: dict[str, list[tuple[float, float]]] = {}
    losses: list[float] = []
    for step in range(steps + 1):
        outputs = _outputs(model, loss_fn, batches[0])
        first = first or outputs
        for name, values in outputs.items():
            pairs = list(zip(values, first[name], strict=True))
            stacked = [torch.stack([x.abs().mean(), (x - x_0).abs().mean()]) for x, x_0 in pairs]
            rows = to_floats(stacked)
            size, change = (statistics.fmean(row[place] for row in rows) for place in range(2))
            numbers.setdefault(name, []).append((size, change))
        if step == steps:
            break
        model.train()
        optimizer.zero_grad()
        loss = loss_fn(model, batches[step % len(batches)])
        loss.backward()
        optimizer.step()
        losses.append(to_scalar(loss))
        if progress is not None:
            progress(step + 1, losses[-1])
    return {
        "sizes": {name: [size for size, _ in row] for name, row in numbers.items()},
        "changes": {name: [change for _, change in row] for name, row in numbers.items()},
        "losses": losses,
    }


@torch.no_grad()
def _outputs(model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any) -> dict[str, list[Tensor]]:
    """Return the outputs of every leaf in a forward pass, one for each call, in the order of the calls."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        # Attention as a whole has parts that are parameters only: they are never called.
        leaf = isinstance(module, nn.MultiheadAttention) or next(module.children(), None) is None
        if leaf and not isinstance(module, _PASSED_ON):
            handles.append(module.register_forward_hook(_keeper(found.setdefault(name, []))))
    try:
        with _measuring(model):
            loss_fn(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: values for name, values in found.items() if values}


def _keeper(place: list[Tensor]) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        value = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            # A copy: the next layer may work in place.
            place.append(value.detach().clone())

    return keep


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Inside the block there is no dropout, and batch norms use the batch; modes and buffers are put back."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    for module in modes:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for buffer, value in buffers:
            buffer.copy_(value)
