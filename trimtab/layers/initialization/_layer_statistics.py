"""Forward and backward statistics of every layer with a weight, from one pass in each direction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.scalars import to_scalar

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class Sums:
    """Sums over the values of a tensor, or of several calls of a layer, in float64 on the tensor's device."""

    count: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """Add the values of one more tensor."""
        # A shift would be needed for a mean far above the spread; float64 has digits enough for layers' outputs.
        values = x.detach().to(torch.float64)
        self.count += values.numel()
        self.total = self.total + values.sum()
        self.squares = self.squares + values.square().sum()

    def mean_square(self) -> float:
        """Return E[x^2], 0 of nothing."""
        return to_scalar(self.squares) / self.count if self.count else 0.0

    def variance(self) -> float:
        """Return E[x^2] - E[x]^2, 0 of nothing."""
        if not self.count:
            return 0.0
        mean, square = to_scalar(self.total) / self.count, self.mean_square()
        return max(0.0, square - mean * mean) if math.isfinite(square) else math.nan


@dataclass
class Statistics:
    """What one layer was seen to do.

    Attributes:
        name: of the module.
        module: the layer.
        given: its input, where that is floating point.
        made: its output.
        gradient: of the loss with respect to its output.
        reached: for each of its units, whether any value's gradient is not zero; None if no gradient came.
    """

    name: str
    module: nn.Module
    given: Sums = field(default_factory=Sums)
    made: Sums = field(default_factory=Sums)
    gradient: Sums = field(default_factory=Sums)
    reached: Tensor | None = None


def weight_of(module: nn.Module) -> Tensor | None:
    """Return the matrix or kernel of a layer, [fan_out, fan_in...] but for embeddings and transposed convolutions."""
    if isinstance(module, nn.MultiheadAttention):
        return module.in_proj_weight if module.in_proj_weight is not None else module.q_proj_weight
    weight = getattr(module, "weight_ih_l0" if isinstance(module, nn.RNNBase) else "weight", None)
    return weight if isinstance(weight, Tensor) and weight.dim() >= 2 else None


def fan_in_of(module: nn.Module) -> int | None:
    """Return the number of inputs that one unit of a layer sums over; None for an embedding, which sums none."""
    weight = weight_of(module)
    if weight is None or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return None
    if isinstance(module, _TRANSPOSED):
        return weight.shape[0] // module.groups * math.prod(module.kernel_size)
    return weight[0].numel()


@contextmanager
def observed(model: nn.Module) -> Iterator[list[Statistics]]:
    """Observe every forward and backward pass inside the block.

    The list that is given has the layers in the order in which they are first called.
    """
    seen: list[Statistics] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if weight_of(module) is not None:
                hook = module.register_forward_hook(_watcher(Statistics(name, module), seen))
                stack.callback(hook.remove)
        yield seen


def _watcher(statistics: Statistics, seen: list[Statistics]) -> Callable[[nn.Module, Any, Any], None]:
    def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        y = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(y, Tensor):
            return
        if not any(statistics is other for other in seen):
            seen.append(statistics)
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.is_floating_point():
            statistics.given.add(x)
        statistics.made.add(y)
        if y.requires_grad:
            # A hook on the tensor, not on the module: it holds also where an activation then works in place.
            y.register_hook(lambda gradient: _take_gradient(statistics, gradient))

    return watch


def _take_gradient(statistics: Statistics, gradient: Tensor) -> None:
    statistics.gradient.add(gradient)
    module = statistics.module
    units = -1 - len(module.kernel_size) if isinstance(module, _CONVOLUTIONS) else -1
    reached = (gradient.detach().movedim(units, 0).reshape(gradient.shape[units], -1) != 0).any(dim=1)
    statistics.reached = reached if statistics.reached is None else statistics.reached | reached
