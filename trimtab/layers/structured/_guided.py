"""Self-guided training: a dense branch beside the factors whose share falls to 0."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import UsageError
from trimtab.layers._checkpointing import recomputing
from trimtab.layers.structured._linear import StructuredLinear, working
from trimtab.scalars import to_scalar


class GuidedLinear(StructuredLinear):
    """A structured linear layer that a dense matrix W guides through the first steps of training.

        y = alpha W x + (1 - alpha) M x + b,   alpha = (1 + cos(pi min(t / T, 1))) / 2

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether to learn b.
        guided_steps: T; 0 for no dense branch.
        count_forwards: whether each training forward counts as a step; otherwise `set_guided_step` moves t.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UsageError: if `guided_steps` is below 0.
    """

    guide: nn.Parameter | None
    guide_step: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        guided_steps: int,
        count_forwards: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        if guided_steps < 0:
            raise UsageError(f"guided_steps must be at least 0, got {guided_steps}: half of the run is the default.")
        self.guided_steps, self.count_forwards = guided_steps, count_forwards
        self.register_parameter("guide", None)
        self.register_buffer("guide_step", None)

    def begin_guidance(self) -> None:
        """Start the dense branch at the product of the factors, with all of the output its own."""
        if self.guided_steps:
            matrix = self.matrix().detach()
            self.guide = nn.Parameter(matrix.contiguous())
            self.guide_step = torch.zeros((), dtype=torch.int64, device=matrix.device)

    def alpha(self, step: Tensor | None = None) -> Tensor:
        """Return the dense branch's share as a tensor; 0 without one."""
        step = self.guide_step if step is None else step
        if step is None:
            return torch.zeros(())
        share = (step.to(torch.float32) / self.guided_steps).clamp(max=1.0)
        return 0.5 * (1 + torch.cos(math.pi * share))

    @property
    def weight(self) -> Tensor:
        """The layer as one dense matrix, the dense branch's share included."""
        if self.guide is None:
            return self.matrix()
        alpha = self.alpha()
        return alpha.to(self.guide.dtype) * self.guide + (1 - alpha).to(self.guide.dtype) * self.matrix()

    def forward(self, x: Tensor) -> Tensor:
        """Return alpha W x + (1 - alpha) M x + b; in training, the step counts once."""
        y = self.multiply(x)
        if self.guide is not None and self.guide_step is not None:
            if self.training and self.count_forwards:
                # A new tensor, not a change in place: a compiled backward recomputes alpha from the one it was given.
                if not recomputing():
                    self.guide_step = self.guide_step + 1
                alpha = self.alpha(self.guide_step - 1)
            else:
                alpha = self.alpha()
            y = alpha.to(y.dtype) * F.linear(x, self.guide) + (1 - alpha).to(y.dtype) * y
        return y if self.bias is None else y + self.bias.to(y.dtype)


def guided_layers(model: nn.Module) -> dict[str, GuidedLinear]:
    """Return the layers that have a dense branch, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GuidedLinear) and module.guide is not None
    }


def set_guided_step(model: nn.Module, step: int) -> float:
    """Go to a step of self-guided training in every layer of a model that has a dense branch.

    Needed where a step of training is not one forward, as with gradient accumulation: build the layers with
    `count_forwards=False` and call this before each step.

    Args:
        model: the model.
        step: t, counted from 0.

    Returns:
        The first layer's alpha at that step.

    Raises:
        UsageError: if the step is below 0 or no layer has a dense branch.

    Example:
        >>> from trimtab.layers import LowRankLinear
        >>> layer = LowRankLinear(4, 4, 2, guided_steps=10)
        >>> [round(set_guided_step(layer, step), 3) for step in (0, 5, 10, 11)]
        [1.0, 0.5, 0.0, 0.0]
    """
    if step < 0:
        raise UsageError(f"the step must be at least 0, got {step}.")
    layers = guided_layers(model)
    if not layers:
        raise UsageError(
            f"no layer of {type(model).__name__} has a dense branch: build them with guided_steps above 0."
        )
    for layer in layers.values():
        if layer.guide_step is not None:
            layer.guide_step.fill_(step)
    return to_scalar(next(iter(layers.values())).alpha())


def finish_guidance(model: nn.Module) -> dict[str, str]:
    """Drop the dense branches once their share is 0: the function stays, their parameters go.

    Call it outside of DDP and FSDP wrapping, and leave the dropped parameters out of the next optimizer.

    Args:
        model: the model, changed in place.

    Returns:
        What was changed, by name of module.

    Raises:
        UsageError: if no layer has a dense branch, or one still has a share of the output.

    Example:
        >>> from trimtab.layers import LowRankLinear
        >>> layer = LowRankLinear(4, 4, 2, bias=False, guided_steps=1)
        >>> sum(p.numel() for p in layer.parameters())
        32
        >>> _ = set_guided_step(layer, 1)
        >>> finish_guidance(layer)
        {'': 'dense branch dropped'}
        >>> sum(p.numel() for p in layer.parameters())
        16
    """
    layers = guided_layers(model)
    if not layers:
        raise UsageError(f"no layer of {type(model).__name__} has a dense branch: there is nothing to finish.")
    for name, layer in layers.items():
        if (alpha := to_scalar(layer.alpha())) > 0:
            raise UsageError(
                f"{name or type(layer).__name__} still has alpha = {alpha:.3g}: train it to step {layer.guided_steps}, "
                "or set that step."
            )
    for layer in layers.values():
        layer.guide, layer.guide_step, layer.guided_steps = None, None, 0
    return dict.fromkeys(layers, "dense branch dropped")


def polar(matrices: Tensor) -> Tensor:
    """Return the orthonormal factor U V^T of each matrix."""
    u, _, vh = torch.linalg.svd(working(matrices), full_matrices=False)
    return (u @ vh).to(matrices.dtype)
