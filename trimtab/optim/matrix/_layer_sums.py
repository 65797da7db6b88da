"""What a linear layer's inputs and output gradients add up to between two steps, from a hook that changes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LayerSums:
    """Sums over samples of one layer's inputs and of its outputs' gradients, since they were last cleared.

    Attributes:
        inputs: the sum of inputs [C], or None.
        gradients: the sum of gradients [R], or None.
        count: of samples.
        active: whether sums are taken.
        handle: takes the hook off the layer.
    """

    def __init__(self, module: nn.Module) -> None:
        self.clear()
        self.active = True
        self.handle = module.register_forward_hook(self._forward)

    def clear(self) -> None:
        """Forget what was seen."""
        self.inputs: Tensor | None = None
        self.gradients: Tensor | None = None
        self.count = 0

    def _forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.active or not torch.is_grad_enabled() or not output.requires_grad:
            return
        flat = args[0].detach().reshape(-1, args[0].shape[-1])
        seen, count = flat.float().sum(0) if flat.dtype.itemsize < 4 else flat.sum(0), len(flat)

        def backward(gradient: Tensor) -> None:
            # Only here: a forward pass without a backward pass has no part in the gradient.
            total = gradient.detach().reshape(-1, gradient.shape[-1]).to(seen.dtype).sum(0)
            self.inputs = seen if self.inputs is None else self.inputs + seen
            self.gradients = total if self.gradients is None else self.gradients + total
            self.count += count

        # Of the tensor, not the module: the hooks of modules wrap what they see, and break operations in place.
        output.register_hook(backward)
