"""How a moment is kept between steps: in the dtype of computation, in bfloat16, or in 8 bits by blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import choose
from trimtab.optim._blockwise import decode, encode_

FORMATS = ("fp32", "bf16", "8bit", "8bit-2048")
SMALLEST_IN_8_BITS = 4096
"""Entries below which a moment stays in full precision (as bitsandbytes has it: small tensors save nothing)."""

_SCALE = "_absmax"


def format_of(p: Tensor, group: Mapping[str, Any]) -> str:
    """Return the storage format of a parameter's moments: the group's, unless the parameter or its size says otherwise.

    Embeddings (of a group with that role) are not kept in 8 bits, as the paper has it: rare tokens' rows have gradients
    of very uneven size.

    Raises:
        UsageError: if there is no such format.
    """
    wanted: str = getattr(p, "optim_state", group["state"])
    if wanted not in FORMATS:
        choose("state format", wanted, FORMATS)
    if wanted.startswith("8bit") and (p.numel() < SMALLEST_IN_8_BITS or group.get("role") == "embedding"):
        return "fp32"
    return wanted


def scales_of(name: str) -> str:
    """Return the name under which the scales of an 8-bit moment are kept."""
    return name + _SCALE


def block_of(form: str) -> int:
    """Return the block size of an 8-bit format, in entries."""
    return 2048 if form == "8bit-2048" else 256


def allocate(fresh: dict[str, Tensor], moments: Mapping[str, bool], form: str) -> dict[str, Tensor]:
    """Return the tensors that keep a fresh state in a storage format."""
    kept: dict[str, Tensor] = {}
    for name, value in fresh.items():
        if name not in moments or form == "fp32":
            kept[name] = value
        elif form == "bf16":
            kept[name] = value.to(torch.bfloat16)
        else:
            blocks = -(-value.numel() // block_of(form))
            kept[name] = torch.zeros_like(value, dtype=torch.uint8, memory_format=torch.contiguous_format)
            kept[scales_of(name)] = value.new_zeros(blocks, dtype=torch.float32)
            if value.device.type != "meta":
                encode_(value.float(), kept[name], kept[scales_of(name)], moments[name], block_of(form))
    return kept


def converted(
    kept: dict[str, Tensor], moments: Mapping[str, bool], like: Mapping[str, Tensor], form: str, p: Tensor
) -> dict[str, Tensor]:
    """Return a kept state in the format, dtypes and device that p needs now; itself if it has them.

    Args:
        kept: the state.
        moments: names of moments, with whether they have a sign.
        like: a fresh state in that format, for its shapes and dtypes.
        form: the format.
        p: what is updated.
    """

    def fits(name: str, value: Tensor) -> bool:
        other = like.get(name)
        return other is not None and (value.shape, value.dtype, value.device) == (other.shape, other.dtype, p.device)

    if all(fits(name, value) for name, value in kept.items()):
        return kept
    dtype = torch.promote_types(p.dtype, torch.float32)
    moved = {name: value.to(p.device) for name, value in kept.items()}
    state = opened(moved, moments, _format_kept(kept, moments), dtype)
    for name, value in state.items():
        if name in moments:
            state[name] = value.to(dtype)
        elif name in like:
            state[name] = value.to(like[name].dtype)
    return allocate(state, moments, form)


def _format_kept(kept: Mapping[str, Tensor], moments: Mapping[str, bool]) -> str:
    """Return the format that a state is in."""
    name = next((name for name in moments if name in kept), None)
    if name is None:
        return "fp32"
    if name + _SCALE in kept:
        blocks = kept[name + _SCALE].numel()
        return next(form for form in FORMATS[2:] if -(-kept[name].numel() // block_of(form)) == blocks)
    return "bf16" if kept[name].dtype == torch.bfloat16 else "fp32"


def opened(kept: Mapping[str, Tensor], moments: Mapping[str, bool], form: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a state to compute with: the kept tensors themselves, and moments in few bits in full precision."""
    if form == "fp32":
        return dict(kept)
    state: dict[str, Tensor] = {}
    for name, value in kept.items():
        if name.endswith(_SCALE):
            continue
        if name not in moments:
            state[name] = value
        elif form == "bf16":
            state[name] = value.to(dtype)
        else:
            state[name] = decode(value, kept[scales_of(name)], moments[name], block_of(form)).to(dtype)
    return state


def close(state: Mapping[str, Tensor], kept: Mapping[str, Tensor], moments: Mapping[str, bool], form: str) -> None:
    """Write the moments of a computed state back into the tensors that keep them."""
    if form == "fp32":
        return
    for name, signed in moments.items():
        if name not in kept:
            continue
        if form == "bf16":
            kept[name].copy_(state[name])
        else:
            encode_(state[name].float(), kept[name], kept[scales_of(name)], signed, block_of(form))
