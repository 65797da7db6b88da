"""Loading an optimizer's checkpoint exactly: torch's own loader casts state to the parameter's dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.errors import UsageError

if TYPE_CHECKING:
    from trimtab.optim.chain import Chain


def load(chain: Chain, torch_load: Callable[[dict[str, Any]], None], state_dict: dict[str, Any]) -> None:
    """Load a state dict with torch's checks and hooks, then put every state tensor in place as it was saved."""
    seen: dict[str, Any] = {}
    defaults = dict(chain.defaults)  # torch's loader adds one of its own

    def check(_: Any, incoming: dict[str, Any]) -> None:
        _check(chain, incoming)
        seen.update(incoming)

    # Registered now, it runs after the user's hooks and sees what they made of the state dict.
    handle = chain.register_load_state_dict_pre_hook(check)
    try:
        torch_load(state_dict)
    finally:
        handle.remove()
    for group in chain.param_groups:
        for name, value in defaults.items():
            group.setdefault(name, value)
    saved = dict(zip(_places(seen["param_groups"]), _parameters(chain), strict=True))
    for place, state in seen["state"].items():
        p = saved[place]
        chain.state[p] = {name: _on_device(value, p) for name, value in state.items()}
        chain.state[p]["step"] = int(state["step"])


def _on_device(value: Any, p: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(device=p.device, copy=True, memory_format=torch.preserve_format)


def _places(groups: list[dict[str, Any]]) -> list[Any]:
    return [place for group in groups for place in group["params"]]


def _parameters(chain: Chain) -> list[Tensor]:
    return [p for group in chain.param_groups for p in group["params"]]


def _check(chain: Chain, incoming: Mapping[str, Any]) -> None:
    """Raise a `UsageError` that names the first parameter whose saved state does not fit it."""
    if missing := [name for name in ("state", "param_groups") if name not in incoming]:
        raise UsageError(f"the state dict has no {missing[0]!r}: pass what an optimizer's state_dict() returned.")
    groups = incoming["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in chain.param_groups]:
        return  # torch's own message names the sizes
    if extra := sorted(map(str, incoming["state"].keys() - set(_places(groups)))):
        raise UsageError(f"the state dict has a state of parameter {extra[0]}, which none of its groups has.")
    for saved, own in zip(groups, chain.param_groups, strict=True):
        options = {**chain.defaults, **saved}
        chain._check(options)
        for place, p in zip(saved["params"], own["params"], strict=True):
            if place in incoming["state"]:
                _check_one(chain, place, p, incoming["state"][place], options)


def _check_one(chain: Chain, place: Any, p: Tensor, state: Mapping[str, Any], options: dict[str, Any]) -> None:
    whole = torch.empty(p.shape, dtype=p.dtype, device="meta")
    expected: dict[str, Any] = {"step": 0, **chain.fresh(p, whole, options)}
    if missing := sorted(expected.keys() - state.keys()):
        raise UsageError(f"the saved state of parameter {place} has no {missing[0]!r}: it is of another optimizer.")
    if unknown := sorted(state.keys() - expected.keys()):
        raise UsageError(
            f"the saved state of parameter {place} has {unknown[0]!r}, which this optimizer does not keep."
        )
    for name, value in expected.items():
        if not isinstance(value, Tensor):
            continue
        found = state[name]
        if not isinstance(found, Tensor):
            raise UsageError(f"the saved {name} of parameter {place} is {type(found).__name__}, but must be a tensor.")
        if found.shape != value.shape:
            raise UsageError(
                f"the saved {name} of parameter {place} has shape {tuple(found.shape)}, "
                f"but this optimizer needs {tuple(value.shape)}."
            )
