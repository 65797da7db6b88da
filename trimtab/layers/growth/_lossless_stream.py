"""Widening the tensors of a pre-LN transformer without loss: the residual stream, who writes to it and who reads it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.errors import UsageError

NORMS = (nn.LayerNorm, nn.RMSNorm)


class Draw:
    """Gaussian values in float64, from a generator of its own."""

    def __init__(self, std: float, seed: int) -> None:
        self.std, self.generator = std, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return self.std * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def gains(self, count: int) -> Tensor:
        """Return values from U(-1, 1), the authors' gains where LayerNorm's input is its own mean."""
        return 2 * torch.rand(count, generator=self.generator, dtype=torch.float64) - 1


@dataclass(frozen=True)
class Stream:
    """The residual stream's old and new width."""

    old: int
    new: int
    averaged: bool

    @property
    def copies(self) -> int:
        """Whole copies of the old stream in the new one."""
        return self.new // self.old

    @property
    def eta(self) -> float:
        """The root of the share of the new width that the whole copies take."""
        return (self.copies * self.old / self.new) ** 0.5

    def extend(self, values: Tensor, dim: int) -> Tensor:
        """Return whole copies along a dimension, then its mean, or 0 where norms do not subtract it."""
        shape = list(values.shape)
        shape[dim] = self.new - self.copies * self.old
        rest = values.mean(dim, keepdim=True) if self.averaged else torch.zeros_like(values.narrow(dim, 0, 1))
        return torch.cat([values] * self.copies + [rest.expand(shape)], dim)


def split(weight: Tensor, source: Tensor, draw: Draw) -> Tensor:
    """Return a column for each of `source`, which names an old column: copies of one differ and add up to it."""
    values = draw(weight.shape[0], len(source))
    counts = torch.bincount(source, minlength=weight.shape[1])
    sums = torch.zeros(weight.shape, dtype=torch.float64).index_add(1, source, values)
    return values + ((weight - sums) / counts)[:, source]


def exact(parameter: Tensor) -> Tensor:
    """Return values in float64, without graph."""
    return parameter.detach().to("cpu", torch.float64)


def assign(module: nn.Module, name: str, values: Tensor) -> None:
    """Put new values in the place of a parameter, as a parameter of the same kind."""
    old: nn.Parameter = getattr(module, name)
    setattr(module, name, nn.Parameter(values.to(old.device, old.dtype), requires_grad=old.requires_grad))


def set_linear(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Give a linear layer other values and widths."""
    assign(linear, "weight", weight)
    if bias is not None:
        assign(linear, "bias", bias)
    linear.out_features, linear.in_features = weight.shape


def exact_bias(linear: nn.Linear) -> Tensor | None:
    """Return the bias in float64, if there is one."""
    return None if linear.bias is None else exact(linear.bias)


def read_stream(linear: nn.Linear, rows: Tensor, stream: Stream, draw: Draw) -> None:
    """Widen a linear layer that reads a norm of the stream; `rows` names the old row of each new one."""
    weight = exact(linear.weight)[rows]
    copies = torch.arange(stream.old).repeat(stream.copies)
    # A norm gives 0 at the places left, so that any values may read them.
    rest = draw(len(rows), stream.new - len(copies))
    bias = exact_bias(linear)
    set_linear(linear, torch.cat([split(weight, copies, draw), rest], 1), None if bias is None else bias[rows])


def write_stream(linear: nn.Linear, columns: Tensor | None, stream: Stream, draw: Draw) -> None:
    """Widen a linear layer that adds to the stream; `columns` names the old column of each new one."""
    weight = stream.extend(exact(linear.weight), 0)
    bias = exact_bias(linear)
    if columns is not None:
        weight = split(weight, columns, draw)
    set_linear(linear, weight, None if bias is None else stream.extend(bias, 0))


def widen_norm(norm: nn.Module, name: str, stream: Stream, draw: Draw, scale: float = 1.0) -> None:
    """Widen a norm of the stream; its gain and bias are scaled.

    Raises:
        UsageError: if it normalises something else, or would need a gain that it has not.
    """
    if tuple(norm.normalized_shape) != (stream.old,):  # type: ignore[arg-type]
        raise UsageError(f"{name} normalises {norm.normalized_shape}, not the width {stream.old} of the stream.")
    rest = stream.new - stream.copies * stream.old
    if norm.weight is None and (rest or scale != 1.0):
        raise UsageError(
            f"{name} has no gain, so that its output cannot be scaled: widen to a multiple of {stream.old}."
        )
    if norm.weight is not None:
        gain = exact(norm.weight) * (stream.eta * scale)  # type: ignore[arg-type]
        assign(norm, "weight", torch.cat([gain] * stream.copies + [draw.gains(rest)]))
    if getattr(norm, "bias", None) is not None:
        bias = exact(norm.bias) * scale  # type: ignore[arg-type]
        assign(norm, "bias", torch.cat([bias] * stream.copies + [torch.zeros(rest, dtype=torch.float64)]))
    dtype = torch.get_default_dtype() if norm.weight is None else norm.weight.dtype
    norm.eps = (torch.finfo(dtype).eps if norm.eps is None else norm.eps) * stream.eta**2  # type: ignore[assignment, operator]
    norm.normalized_shape = (stream.new,)  # type: ignore[assignment]
