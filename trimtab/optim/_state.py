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

    Raises:
        UsageError: if there is no such format.
    """
    wanted = choose("state format", getattr(p, "optim_state", group["state"]), FORMATS)
    if wanted.startswith("8bit") and p.numel() < SMALLEST_IN_8_BITS:
        return "fp32"
    return wanted


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
            kept[name + _SCALE] = value.new_zeros(blocks, dtype=torch.float32)
            if value.device.type != "meta":
                encode_(value.float(), kept[name], kept[name + _SCALE], moments[name], block_of(form))
    return kept


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
            state[name] = decode(value, kept[name + _SCALE], moments[name], block_of(form)).to(dtype)
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
            encode_(state[name].float(), kept[name], kept[name + _SCALE], signed, block_of(form))
