"""Hyper-parameters that a hypernetwork tunes: their range, their transform, and what they act on."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import UsageError, choose


@dataclass(frozen=True)
class Hyper:
    """One hyper-parameter of the training loss; it is tuned as an unbounded number that a transform maps to its range.

        log:    value = exp(raw), raw held between log low and log high
        logit:  value = low + (high - low) / (1 + exp(-raw))

    Args:
        name: a name, which the training loss finds its value by.
        start: the first value, between `low` and `high`.
        low: smallest value; above 0 for the log transform.
        high: largest value; below 1 for a dropout rate.
        transform: "log" (strengths, over orders of magnitude) or "logit" (rates).
        sigma: standard deviation of the sampled raw values around the current one, above 0.
        decays: patterns of parameter names (`"*.weight"`, `"0.*"`): adds 1/2 value |w|^2 of these to the training loss.
        drops: patterns of module names: value becomes the rate of these `nn.Dropout` modules.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> hyper = Hyper("decay", 1e-3, 1e-6, 1.0, "log", decays=("*.weight",))
        >>> round(hyper.to_raw(), 4), hyper.to_value(torch.tensor(-2.0))
        (-6.9078, tensor(0.1353))
    """

    name: str
    start: float
    low: float
    high: float
    transform: str
    sigma: float = 0.5
    decays: tuple[str, ...] = ()
    drops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        choose("transform", self.transform, ("log", "logit"))
        if not -math.inf < self.low < self.start < self.high < math.inf:
            raise UsageError(f"{self.name}: low < start < high must hold, got {self.low}, {self.start}, {self.high}.")
        if self.transform == "log" and self.low <= 0:
            raise UsageError(f"{self.name}: low must be above 0 for the log transform, got {self.low}.")
        if not self.sigma > 0:
            raise UsageError(f"{self.name}: sigma must be above 0, or no response is learnt, got {self.sigma}.")
        if self.drops and not (self.low >= 0 and self.high < 1):
            raise UsageError(f"{self.name}: a dropout rate lies in [0, 1), got {self.low} to {self.high}.")

    def to_raw(self) -> float:
        """Return the start as a raw value."""
        if self.transform == "log":
            return math.log(self.start)
        share = (self.start - self.low) / (self.high - self.low)
        return math.log(share / (1 - share))

    def to_value(self, raw: Tensor) -> Tensor:
        """Return the value of a raw value."""
        if self.transform == "log":
            return raw.exp().clamp(self.low, self.high)
        return self.low + (self.high - self.low) * raw.sigmoid()

    @property
    def bounds(self) -> tuple[float, float]:
        """Range of the raw value."""
        return (math.log(self.low), math.log(self.high)) if self.transform == "log" else (-math.inf, math.inf)


class Hypers:
    """The hyper-parameters of a model together, by name and as one vector of raw values."""

    def __init__(self, hypers: Sequence[Hyper], model: nn.Module) -> None:
        if not hypers or len({hyper.name for hyper in hypers}) < len(hypers):
            raise UsageError("hypers must be one Hyper or more, each of its own name.")
        self.all = tuple(hypers)
        parameters = [name for name, _ in model.named_parameters()]
        dropouts = {name: module for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
        self._decays = {hyper.name: _matching(hyper, hyper.decays, parameters, "parameter") for hyper in hypers}
        self._drops = {
            hyper.name: [dropouts[name] for name in _matching(hyper, hyper.drops, dropouts, "nn.Dropout module")]
            for hyper in hypers
        }
        dropped = [module for modules in self._drops.values() for module in modules]
        if len(set(dropped)) < len(dropped):
            raise UsageError("two hyper-parameters set the rate of the same nn.Dropout: narrow their `drops`.")

    def raw(self, like: Tensor) -> Tensor:
        """Return the starting raw values [H]."""
        return torch.tensor([hyper.to_raw() for hyper in self.all], dtype=like.dtype, device=like.device)

    def sigma(self, like: Tensor) -> Tensor:
        """Return the standard deviations of the samples [H]."""
        return torch.tensor([hyper.sigma for hyper in self.all], dtype=like.dtype, device=like.device)

    def clamp(self, raw: Tensor) -> Tensor:
        """Return raw values held in their range."""
        low, high = zip(*(hyper.bounds for hyper in self.all), strict=True)
        return torch.minimum(torch.maximum(raw, raw.new_tensor(low)), raw.new_tensor(high))

    def values(self, raw: Tensor) -> dict[str, Tensor]:
        """Return the values by name."""
        return {hyper.name: hyper.to_value(part) for hyper, part in zip(self.all, raw.detach(), strict=True)}

    def penalty(self, values: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor | float:
        """Return sum over the decays of 1/2 value |w|^2."""
        terms = [values[h] * weights[name].square().sum() / 2 for h, names in self._decays.items() for name in names]
        return torch.stack(terms).sum() if terms else 0.0

    def set_rates(self, values: Mapping[str, float]) -> None:
        """Give the model's own dropout modules the current rates, for its use outside the tuner."""
        for name, modules in self._drops.items():
            for module in modules:
                module.p = values[name]

    @contextmanager
    def dropping(self, values: Mapping[str, Tensor], generator: torch.Generator) -> Iterator[None]:
        """Let the dropout modules drop at these rates, with masks of the tuner's own generator."""

        def hook(rate: Tensor) -> Any:
            def drop(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                x = args[0]
                if not module.training:
                    return output
                kept = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) >= rate
                return x * kept / (1 - rate)

            return drop

        rates = [(module, module.p) for modules in self._drops.values() for module in modules]
        handles = []
        try:
            for name, modules in self._drops.items():
                for module in modules:
                    module.p = 0.0
                    handles.append(module.register_forward_hook(hook(values[name])))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, rate in rates:
                module.p = rate


def _matching(hyper: Hyper, patterns: Sequence[str], names: Iterable[str], kind: str) -> list[str]:
    names = list(names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UsageError(f"{hyper.name}: no {kind} is named {pattern!r}; there are {', '.join(names) or 'none'}.")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
