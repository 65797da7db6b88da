"""Best responses: weights as affine functions of the hyper-parameters, about their current values.

With z = (raw - raw_now) / sigma [H], in units in which the response learns about as fast as the weights:

    linear:  w(z) = w + W1 z                       Lorraine & Duvenaud 2018; H numbers a weight
    rows:    W(z) = W + (V z) o U,  b(z) = b + C z    MacKay et al. 2019, equation 10; V z scales the rows of U

Both are exact at z = 0 with the model's own weights, so the model is always the one at the current values.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trimtab.errors import choose

RESPONSES = ("rows", "linear")


class Response:
    """The parts of a model's affine best response beyond its own weights."""

    def __init__(self, model: nn.Module, hypers: int, kind: str, generator: torch.Generator) -> None:
        choose("response", kind, RESPONSES)
        self.model = model
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.parts: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if kind == "rows" and parameter.dim() > 1:
                # V starts at 0, so that training starts from the model as it is; U must not, or neither would move.
                scale = parameter.detach().square().mean().sqrt().clamp(min=1e-3)
                noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
                self.parts[f"{name}/U"] = (scale * noise).to(parameter.dtype)
                self.parts[f"{name}/V"] = parameter.new_zeros(parameter.shape[0], hypers)
            else:
                self.parts[f"{name}/W1"] = parameter.new_zeros(*parameter.shape, hypers)
        for part in self.parts.values():
            part.requires_grad_()

    def offset(self, name: str, z: Tensor) -> Tensor:
        """Return how far z moves a weight."""
        if f"{name}/W1" in self.parts:
            return self.parts[f"{name}/W1"] @ z
        u, v = self.parts[f"{name}/U"], self.parts[f"{name}/V"]
        return (v @ z).view(-1, *[1] * (u.dim() - 1)) * u

    def weights(self, z: Tensor) -> dict[str, Tensor]:
        """Return the weights at z; frozen ones stay as they are."""
        own = dict(self.model.named_parameters())
        return {name: own[name] + self.offset(name, z) if name in self.names else own[name] for name in own}

    @torch.no_grad()
    def move(self, z: Tensor) -> None:
        """Make the weights at z the model's own: the same affine function, about another point."""
        own = dict(self.model.named_parameters())
        for name in self.names:
            own[name].add_(self.offset(name, z))

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the parts."""
        return {name: part.detach().clone() for name, part in self.parts.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over saved parts in place."""
        for name, part in self.parts.items():
            part.copy_(state[name])
