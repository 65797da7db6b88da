"""Listen to torch functions that a training loop calls between forward and update.

The functions are replaced while at least one watch runs and put back when the last one stops. The replacement calls the
listeners, then the original with the same arguments, and returns the original's result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

Listener = Callable[..., None]

_PLACES: dict[str, tuple[tuple[Any, str], ...]] = {
    "cross_entropy": ((functional, "cross_entropy"),),
    "clip_grad_norm_": (
        (torch.nn.utils, "clip_grad_norm_"),
        (torch.nn.utils.clip_grad, "clip_grad_norm_"),
    ),
}
_listeners: dict[str, list[Listener]] = {name: [] for name in _PLACES}
_originals: dict[str, Callable[..., Any]] = {}


def listen(name: str, listener: Listener) -> Callable[[], None]:
    """Call `listener(*args, **kwargs)` before each call of the function; return what stops it."""
    listeners = _listeners[name]
    if not listeners:
        _install(name)
    listeners.append(listener)

    def stop() -> None:
        if listener in listeners:
            listeners.remove(listener)
            if not listeners:
                _uninstall(name)

    return stop


def _install(name: str) -> None:
    module, attribute = _PLACES[name][0]
    original = getattr(module, attribute)
    listeners = _listeners[name]

    @functools.wraps(original)
    def observed(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            for listener in tuple(listeners):
                listener(*args, **kwargs)
        return original(*args, **kwargs)

    _originals[name] = original
    for module, attribute in _PLACES[name]:
        setattr(module, attribute, observed)


def _uninstall(name: str) -> None:
    original = _originals.pop(name)
    for module, attribute in _PLACES[name]:
        setattr(module, attribute, original)
