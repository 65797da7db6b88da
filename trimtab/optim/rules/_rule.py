"""What the training rules share: a model cut into blocks, one optimizer a block, and state that resumes bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import UsageError

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
"""Makes the optimizer of one block from its parameters, such as `lambda parameters: torch.optim.Adam(parameters)`."""

WEIGHTED: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNN)


class Block:
    """One layer of weights with what surrounds it: modules before it (of the first block only), and those after it."""

    def __init__(self, before: Sequence[nn.Module], layer: nn.Module) -> None:
        self.before = list(before)
        self.layer = layer
        self.after: list[nn.Module] = []

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are trained."""
        modules = nn.ModuleList([*self.before, self.layer, *self.after])
        return [parameter for parameter in modules.parameters() if parameter.requires_grad]

    def __call__(self, x: Tensor) -> Tensor:
        for module in (*self.before, self.layer, *self.after):
            x = module(x)
        return x


def split(model: nn.Sequential, allowed: tuple[type[nn.Module], ...]) -> list[Block]:
    """Cut a model into blocks, each starting at a layer of weights.

    Raises:
        UsageError: if the model is not an `nn.Sequential`, has a layer that is not allowed, or shares parameters.
    """
    if not isinstance(model, nn.Sequential):
        raise UsageError(f"a training rule needs an nn.Sequential, got {type(model).__name__}.")
    blocks: list[Block] = []
    before: list[nn.Module] = []
    # Not named_children(), which passes over the second use of one module (an activation, say).
    for name, module in model._modules.items():
        if module is None:
            continue
        if isinstance(module, WEIGHTED):
            if not isinstance(module, allowed):
                kinds = ", ".join(kind.__name__ for kind in allowed)
                raise UsageError(f"layer {name} is a {type(module).__name__}: this rule trains {kinds}.")
            blocks.append(Block(before if not blocks else [], module))
        elif blocks:
            blocks[-1].after.append(module)
        else:
            before.append(module)
    if not blocks:
        raise UsageError("a training rule needs layers of weights in the nn.Sequential, got none.")
    parameters = [id(parameter) for block in blocks for parameter in block.parameters()]
    if len(set(parameters)) < len(parameters):
        raise UsageError("a training rule needs every parameter in one layer, but two layers share one.")
    return blocks


class TrainingRule:
    """Base of the rules that take the place of backpropagation.

    A rule trains an `nn.Sequential` in place: `step(x, y)` updates every block with its own optimizer and returns the
    loss, `predict(x)` gives classes, and `state_dict` holds all that a resumed run needs to go on bit for bit. Modules
    behave as their train or eval mode says.

    Args:
        model: the model; blocks start at its layers of weights.
        optimizer: makes the optimizer of a block from its parameters.
        seed: of the rule's random matrices and draws; torch's global generator is not touched.
        allowed: the layers of weights that the rule can train.
    """

    def __init__(
        self,
        model: nn.Sequential,
        optimizer: OptimizerFactory,
        seed: int,
        allowed: tuple[type[nn.Module], ...] = WEIGHTED,
    ) -> None:
        self.model = model
        self.blocks = split(model, allowed)
        self.optimizers = [optimizer(own) if (own := block.parameters()) else None for block in self.blocks]
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: list[Tensor] = []
        """What the rule keeps besides the model: its random matrices, or running averages."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Train on one batch.

        Args:
            x: [B, ...], the inputs.
            y: [B], class indices.

        Returns:
            The loss before the update, a detached scalar.
        """
        raise NotImplementedError

    def scores(self, x: Tensor) -> Tensor:
        """Return the score of every class, [B, classes], with the graph of ordinary backpropagation."""
        return self.model(x)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Return the class of the highest score, [B]."""
        return self.scores(x).argmax(dim=-1)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the model's and the optimizers' state, the rule's tensors and its generator's state."""
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizers": [optimizer and optimizer.state_dict() for optimizer in self.optimizers],
                "tensors": self.tensors,
                "generator": self.generator.get_state(),
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: the steps that follow are those of the run it was taken from.

        Args:
            state: what `state_dict` returned, for a model and optimizers of the same kind.

        Raises:
            UsageError: if it holds another number of optimizers.
        """
        if len(state["optimizers"]) != len(self.optimizers):
            raise UsageError(
                f"the state is of {len(state['optimizers'])} layers, the model has {len(self.optimizers)}: load it "
                "into a rule on the same model."
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            if optimizer is not None:
                optimizer.load_state_dict(saved)
        device = next(self.model.parameters()).device
        self.tensors = [tensor.to(device, copy=True) for tensor in state["tensors"]]
        self.generator.set_state(state["generator"].cpu())

    def _update(self, index: int, output: Tensor, gradient: Tensor | None = None) -> None:
        """Step a block's optimizer along the gradient of its own output, and free the block's graph."""
        optimizer = self.optimizers[index]
        if optimizer is None:
            return
        parameters = self.blocks[index].parameters()
        _set_gradients(parameters, torch.autograd.grad(output, parameters, gradient, allow_unused=True))
        optimizer.step()
        _set_gradients(parameters, [None] * len(parameters))

    def _random(self, draw: Callable[..., Tensor], *shape: int) -> Tensor:
        """Draw a matrix on the CPU, so that it is the same on every device, and move it to the model's."""
        parameter = next(self.model.parameters())
        return draw(*shape, generator=self.generator, dtype=torch.float32).to(parameter.device, parameter.dtype)


def _set_gradients(parameters: Sequence[nn.Parameter], gradients: Iterable[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
