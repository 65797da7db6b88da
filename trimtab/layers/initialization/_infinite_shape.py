"""Which dimensions of a parameter grow with the width, and by what law its initialisation follows them.

A dimension is infinite where the model differs from its base model; its multiplier is size / base size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.errors import UsageError
from trimtab.scalars import to_floats

_UNIFORM_NOISE = 1.8
"""Four standard errors of the root mean square of n uniform numbers, times sqrt(n); 4 / sqrt(2) for normal ones."""
_NORMAL_NOISE = 2.83


@dataclass(frozen=True)
class MupShape:
    """A parameter's shape beside that in the base model.

    Attributes:
        shape: sizes.
        base: sizes in the base model.
        role: "hidden" (two infinite dimensions), "output" (a layer's weight with an infinite fan-in only), "input"
            (any other tensor of two dimensions or more with an infinite one), "vector" (an infinite vector) or
            "finite".
        transposed: whether the weight is stored as (fan-in, fan-out).
    """

    shape: tuple[int, ...]
    base: tuple[int, ...]
    role: str
    transposed: bool = False

    @property
    def infinite(self) -> tuple[int, ...]:
        """The infinite dimensions."""
        return tuple(dim for dim, (size, base) in enumerate(zip(self.shape, self.base, strict=True)) if size != base)

    @property
    def width_mult(self) -> float:
        """The multiplier that counts: that of the fan-in, or of the one infinite dimension; 1 if finite."""
        if not self.infinite:
            return 1.0
        return self._mult(self.infinite[0 if self.transposed else -1])

    @property
    def fan_ratio(self) -> float:
        """Multiplier of the fan-out over that of the fan-in; of a hidden weight."""
        return self._mult(self.infinite[-1 if self.transposed else 0]) / self.width_mult

    def factor(self, kind: str) -> float:
        """Return the factor of the learning rate for optimizers of the kind "adam" or "sgd"."""
        if kind == "adam":
            return 1 / self.width_mult if self.role == "hidden" else 1.0
        return self.fan_ratio if self.role == "hidden" else self.width_mult

    def _mult(self, dim: int) -> float:
        return self.shape[dim] / self.base[dim]


def infinite_shapes(model: nn.Module, base: nn.Module) -> dict[str, MupShape]:
    """Return the shapes of a model's parameters beside those of its base, by name.

    Raises:
        UsageError: if the names or numbers of dimensions differ, or more than two dimensions are infinite.
    """
    shapes, bases = ({name: tuple(p.shape) for name, p in part.named_parameters()} for part in (model, base))
    if different := sorted(shapes.keys() ^ bases.keys()):
        where = "base model" if different[0] in shapes else "model"
        raise UsageError(f"mup: the {where} has no parameter {different[0]!r}: build both with the same code.")
    owners = dict(_owners(model))
    found: dict[str, MupShape] = {}
    for name, parameter in model.named_parameters():
        shape, reference = shapes[name], bases[name]
        if len(shape) != len(reference):
            raise UsageError(f"mup: {name!r} has {len(shape)} dimensions, in the base model {len(reference)}.")
        owner = owners.get(id(parameter))
        transposed = _is_transposed(owner)
        infinite = sum(size != other for size, other in zip(shape, reference, strict=True))
        if infinite > 2:
            raise UsageError(f"mup: {name!r} has {infinite} infinite dimensions, at most two have a rule.")
        if infinite == 2:
            role = "hidden"
        elif infinite and len(shape) > 1:
            fan_in = 0 if transposed else 1
            reads = isinstance(owner, (nn.Linear, nn.modules.conv._ConvNd)) and shape[fan_in] != reference[fan_in]
            role = "output" if reads else "input"
        else:
            role = "vector" if infinite else "finite"
        found[name] = MupShape(shape, reference, role, transposed)
    return found


def biases(model: nn.Module) -> dict[str, str]:
    """Return the name of the weight beside each bias of a linear or convolutional layer."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, str] = {}
    for module in model.modules():
        if _is_affine(module) and isinstance(bias := module._parameters.get("bias"), Tensor):
            weight = module._parameters.get("weight")
            if weight is not None and id(weight) in names:
                found[names[id(bias)]] = names[id(weight)]
    return found


def layer_weights(model: nn.Module) -> set[str]:
    """Return the names of the parameters of linear, convolutional and attention layers."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = [part for part in model.modules() if _is_affine(part) or isinstance(part, nn.MultiheadAttention)]
    return {names[id(p)] for part in layers for p in part.parameters(recurse=False)}


def embeddings(model: nn.Module) -> set[str]:
    """Return the names of the weights of embeddings, shared with other layers or not."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tables = [part.weight for part in model.modules() if isinstance(part, (nn.Embedding, nn.EmbeddingBag))]
    return {names[id(table)] for table in tables if id(table) in names}


def std_ratio(law: str, shape: MupShape) -> float:
    """Return the standard deviation that a law gives a weight's shape, over what it gives the base's."""
    size, base = _fans(shape, shape.shape), _fans(shape, shape.base)
    if law == "fan_in":
        return math.sqrt(base[0] / size[0])
    return math.sqrt(sum(base) / sum(size)) if law == "xavier" else 1.0


@torch.no_grad()
def init_law(weight: Tensor, shape: MupShape, base: Tensor | None) -> str:
    """Return by what law of its shape a weight was drawn: "fan_in", "xavier", "constant", or "" for a constant tensor.

    The standard deviation is compared with those of torch's initialisers. Where none fits, the base's weights decide if
    they are there; otherwise the law is "constant".
    """
    size, largest = _sizes(weight)
    if not size or weight.numel() == 1 or bool((weight == weight.flatten()[0]).all()):
        return ""
    fan_in, fan_out = _fans(shape, shape.shape)
    # The largest of many uniform numbers is near sqrt(3) times their size, that of normal ones far beyond.
    uniform = largest <= math.sqrt(3) * size * (1 + 2 / math.sqrt(weight.numel()))
    known = {
        "fan_in": [math.sqrt(gain / fan_in) for gain in ((1 / 3, 1, 2) if uniform else (1, 2))],
        "xavier": [math.sqrt(2 / (fan_in + fan_out))],
    }
    bound = (_UNIFORM_NOISE if uniform else _NORMAL_NOISE) / math.sqrt(weight.numel()) + 1e-3
    misses = {law: min(abs(size / std - 1) for std in stds) for law, stds in known.items()}
    law = min(misses, key=lambda name: misses[name])
    if misses[law] <= bound:
        return law
    if base is None or base.is_meta or not (reference := _sizes(base)[0]):
        return "constant"
    ratios = {name: std_ratio(name, shape) for name in ("constant", "fan_in", "xavier")}
    return min(ratios, key=lambda name: abs(math.log(size / reference / ratios[name])))


@torch.no_grad()
def is_fan_in_bias(bias: Tensor, weight: MupShape) -> bool:
    """Return whether a bias was drawn as torch's layers draw it, uniformly within 1 / sqrt(fan-in of the weight)."""
    size, largest = _sizes(bias)
    bound = 1 / math.sqrt(_fans(weight, weight.shape)[0])
    near = abs(size * math.sqrt(3) / bound - 1) <= _UNIFORM_NOISE / math.sqrt(bias.numel()) + 1e-3
    return size > 0 and largest <= bound * (1 + 1e-2 * (bias.element_size() < 4) + 1e-5) and near


def _sizes(tensor: Tensor) -> tuple[float, float]:
    """Return the root mean square and the largest absolute value."""
    if not tensor.numel():
        return 0.0, 0.0
    exact = tensor.detach().double()
    [[mean_square, largest]] = to_floats([torch.stack([exact.square().mean(), exact.abs().max()])])
    return math.sqrt(mean_square), largest


def _fans(kind: MupShape, shape: Sequence[int]) -> tuple[int, int]:
    """Return fan-in and fan-out as torch's initialisers count them; of a stack of matrices those of one."""
    if len(shape) < 2:
        return shape[0] if shape else 1, 1
    if len(kind.infinite) == 2 and kind.infinite[0] > 0:
        return shape[kind.infinite[0]], shape[kind.infinite[1]]
    field = math.prod(shape[2:])
    fans = shape[1] * field, shape[0] * field
    return fans[::-1] if kind.transposed else fans


def _is_affine(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or _is_conv1d(module)


def _is_conv1d(module: nn.Module | None) -> bool:
    """Return whether a module is the linear layer of transformers' GPT-2, whose weight is (fan-in, fan-out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_transposed(module: nn.Module | None) -> bool:
    return isinstance(module, nn.modules.conv._ConvTransposeNd) or _is_conv1d(module)


def _owners(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """Yield each parameter's identity and the module that holds it; of a shared one the first comes last."""
    for module in reversed(list(model.modules())):
        for parameter in module._parameters.values():
            if parameter is not None:
                yield id(parameter), module
