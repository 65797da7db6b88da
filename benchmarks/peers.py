"""Pairs of optimizers that should agree: ours, another implementation, and why it differs where it does."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trimtab import optim

MATRICES = ((24, 40), (40, 24))
ALL = (*MATRICES, (17,))


@dataclass(frozen=True)
class Pair:
    """Two optimizers on the same stream.

    Attributes:
        name: ours.
        peer: the other's package and class.
        settings: what both are given, in words.
        ours: makes ours.
        theirs: makes the other.
        package: distribution that has the other.
        dtype: of the parameters.
        bound: drift below which they agree.
        shapes: of the parameters.
        why: the reason of a known difference.
    """

    name: str
    peer: str
    settings: str
    ours: Callable[[Any], Any]
    theirs: Callable[[Any], Any]
    package: str
    dtype: torch.dtype = torch.float64
    bound: float = 1e-6
    shapes: tuple[tuple[int, ...], ...] = ALL
    why: str = ""


def pair(ours: str, theirs: str, mine: dict[str, Any], other: dict[str, Any], **facts: Any) -> Pair:
    """Return a pair from class names; `theirs` is "distribution:module:Class"."""
    package, module, name = theirs.split(":")

    def make_theirs(params: Any) -> Any:
        return getattr(importlib.import_module(module), name)(params, **other)

    def make_ours(params: Any) -> Any:
        return getattr(optim, ours)(params, **mine)

    settings = ", ".join(f"{key}={value}" for key, value in mine.items())
    return Pair(ours, f"{package} {name}", settings, make_ours, make_theirs, package, **facts)


LR = {"lr": 1e-2}
DECAY = {"lr": 1e-2, "weight_decay": 0.1}

PAIRS: tuple[Pair, ...] = (
    pair("AdamW", "torch:torch.optim:AdamW", DECAY, DECAY),
    pair("AdamW", "torch:torch.optim:AdamW", {**LR, "betas": (0.8, 0.95), "weight_decay": 0.0}, {**LR, "betas": (0.8, 0.95), "weight_decay": 0.0}),
)
