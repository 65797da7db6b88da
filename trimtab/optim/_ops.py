"""Updates in place whose factor is a number, or a tensor where torch.compile must not bake the number in."""

from __future__ import annotations

from typing import Any


def ema_(average: Any, value: Any, rate: Any) -> Any:
    """Move a running average towards a value: average <- average + rate (value - average)."""
    return average.lerp_(value, rate)


def add_(total: Any, value: Any, factor: Any) -> Any:
    """Add a multiple: total <- total + factor value."""
    return total.add_(value, alpha=factor) if isinstance(factor, float) else total.add_(value * factor)


def addcmul_(total: Any, left: Any, right: Any, factor: Any) -> Any:
    """Add a multiple of a product: total <- total + factor left right."""
    if isinstance(factor, float):
        return total.addcmul_(left, right, value=factor)
    return total.add_(left * right * factor)
