"""Block-wise dynamic 8-bit quantisation: how an optimizer's moments are kept in one byte an entry.

Dettmers et al. 2022 (arXiv:2110.02861), section 2. A tensor, read flat, is cut into blocks of B entries; each block has
its own scale, and an entry is the nearest of 256 values q of the dynamic tree code:

    absmax_b = max |x| over block b;   code = argmin_j |q_j - x / absmax_b|;   x' = q_code absmax_b

The code has seven decades, 10^-6 to 1; the decade 10^(i-6) (0.1 to 1) is cut into 2^i equal parts (2^(i+1) without a
sign), of which q are the middles; 0 and 1 are codes of their own, so zeros and a block's largest positive entry are
kept exactly. Entries must be finite, else codes are meaningless; but +infinity, as a square that overflowed has it, is
kept as the largest float32, and the rest of its block as tiny in comparison.

The nearest code is found without a search: the upper 16 bits of x / absmax as a float32 name an interval that holds at
most one boundary between two codes, so a table gives the lower code and one comparison the rest. Entries exactly
between two codes take the lower code. Compiled code computes instead, because tables keep it from using vectors: the
values are a convex function of the code's number, made of one straight line a decade, and its inverse is concave. It
differs from the tables by float32 rounding only.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.errors import UsageError

__all__ = ["decode", "decode_", "dynamic_code", "encode", "encode_"]

_CHUNK = 65_536
"""Entries worked on at a time in eager mode: what lies between two operations stays in the cache."""

_DECADES = 7

_LARGEST = torch.finfo(torch.float32).max


class _Tables(NamedTuple):
    code: Tensor  # [256] values, ascending
    boundary: Tensor  # [256]: a value above boundary[j] is nearer to code j + 1 than to code j
    lowest: Tensor  # [65536] uint8: lowest code of the interval of floats that share their upper 16 bits


def dynamic_code(signed: bool) -> Tensor:
    """Return the 256 values of the dynamic tree code, ascending, in float32.

    Args:
        signed: whether negative values have codes (first moments) or all are non-negative (second moments).

    Returns:
        [256], from -0.993 (signed) or 0 to 1.

    Example:
        >>> dynamic_code(signed=False)[:4]
        tensor([0.0000e+00, 3.2500e-07, 7.7500e-07, 2.1250e-06])
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(_DECADES):
        edges = torch.linspace(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1)
        middles = 10.0 ** (i + 1 - _DECADES) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def _build(signed: bool) -> _Tables:
    code = dynamic_code(signed)
    lower, upper = code[:-1].double(), code[1:].double()
    # The largest float32 that is no nearer to the upper code; float32 differences decide, as in the reference.
    middle = ((lower + upper) / 2).float()
    steps = torch.arange(-64, 65, dtype=torch.int32)
    magnitude = middle.abs().view(torch.int32).unsqueeze(1) + steps * middle.sign().int().unsqueeze(1)
    near = magnitude.view(torch.float32) * middle.sign().unsqueeze(1)
    stays = (near - code[:-1, None]).abs() <= (code[1:, None] - near).abs()
    boundary = torch.where(stays, near, -torch.inf).amax(dim=1)
    # Of an interval, the float nearest to -infinity: upper bits 0x8000 and above are negative and grow downwards.
    upper_bits = torch.arange(65_536, dtype=torch.int32)
    bits = (upper_bits << 16) | torch.where(upper_bits >= 0x8000, 0xFFFF, 0).int()
    lowest = torch.bucketize(bits.view(torch.float32).nan_to_num(), boundary).to(torch.uint8)
    return _Tables(code, torch.cat([boundary, torch.tensor([torch.inf])]), lowest)


_CPU = torch.device("cpu")
_TABLES = {(signed, _CPU): _build(signed) for signed in (False, True)}


def _tables(signed: bool, device: torch.device) -> _Tables:
    if (signed, device) not in _TABLES:
        _TABLES[signed, device] = _Tables(*(table.to(device) for table in _TABLES[signed, _CPU]))
    return _TABLES[signed, device]


def decode(
    codes: Tensor, absmax: Tensor, signed: bool, block: int = 256, *, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the values that codes stand for: q_code absmax.

    Args:
        codes: uint8, of any shape; read flat in blocks.
        absmax: float32 [ceil(numel / block)].
        signed: whether the code has negative values.
        block: entries of a block, at least 1.
        out_dtype: dtype of the result.

    Returns:
        A contiguous tensor in the shape of codes.

    Raises:
        UsageError: if the shape of absmax does not fit.

    Example:
        >>> decode(*encode(torch.tensor([0.0, 0.5, 1.0]), True), True)
        tensor([0.0000, 0.5008, 1.0000])
    """
    if torch.compiler.is_compiling() and codes.numel() % block == 0:
        rows = _value(codes.reshape(-1, block), signed) * absmax.unsqueeze(1)
        return rows.to(out_dtype).view(codes.shape)
    out = torch.empty_like(codes, dtype=out_dtype, memory_format=torch.contiguous_format)
    return decode_(out, codes, absmax, signed, block)


def decode_(out: Tensor, codes: Tensor, absmax: Tensor, signed: bool, block: int = 256) -> Tensor:
    """Write the values that codes stand for into `out`, contiguous and in the shape of codes; see `decode`.

    Raises:
        UsageError: if the shape of absmax does not fit or `out` is not contiguous.
    """
    _check(out, codes, absmax, block)
    if codes.device.type == "meta":
        return out
    code = _tables(signed, codes.device).code
    flat, target = codes.reshape(-1), out.view(-1)
    for start, stop, size in _pieces(flat.numel(), block):
        scale = absmax[start // block : -(-stop // block)].unsqueeze(1)
        if torch.compiler.is_compiling():
            values = _value(flat[start:stop].view(-1, size), signed) * scale
        else:
            values = code.index_select(0, flat[start:stop].int()).view(-1, size) * scale
        target[start:stop].copy_(values.view(-1))
    return out


def encode(x: Tensor, signed: bool, block: int = 256) -> tuple[Tensor, Tensor]:
    """Return the nearest codes of a tensor, and the largest magnitude of each block.

    Args:
        x: floating point, of any shape, finite (and non-negative without a sign: below 0 becomes 0).
        signed: whether the code has negative values.
        block: entries of a block, at least 1; the last block may have fewer.

    Returns:
        codes: uint8, contiguous, in the shape of x.
        absmax: float32 [ceil(numel / block)]; 0 for a block of zeros, which decodes to zeros.

    Raises:
        UsageError: if `block` is less than 1.

    Example:
        >>> encode(torch.tensor([0.0, 0.5, 1.0]), True)
        (tensor([127, 219, 255], dtype=torch.uint8), tensor([1.]))
    """
    if block < 1:
        raise UsageError(f"block must be at least 1, got {block}: use 256 or 2048.")
    codes = torch.empty_like(x, dtype=torch.uint8, memory_format=torch.contiguous_format)
    absmax = torch.empty(-(-x.numel() // block), dtype=torch.float32, device=x.device)
    encode_(x, codes, absmax, signed, block)
    return codes, absmax


def encode_(x: Tensor, codes: Tensor, absmax: Tensor, signed: bool, block: int = 256) -> None:
    """Write the nearest codes of x into `codes` and the scales into `absmax`; see `encode`.

    Raises:
        UsageError: if the shape of absmax does not fit or `codes` is not contiguous.
    """
    _check(codes, x, absmax, block)
    if codes.device.type == "meta":
        return
    if torch.compiler.is_compiling() and x.numel() % block == 0:
        rows = x.float().reshape(-1, block)
        scale = rows.abs().amax(dim=1).clamp_max(_LARGEST)
        absmax.copy_(scale)
        inverse = torch.where(scale == 0, 1.0, 1 / scale).unsqueeze(1)
        codes.copy_(_nearest(rows * inverse, signed).view(codes.shape))
        return
    tables = _tables(signed, codes.device)
    flat, target = x.reshape(-1), codes.view(-1)
    for start, stop, size in _pieces(flat.numel(), block):
        piece = flat[start:stop].float().view(-1, size)
        scale = piece.abs().amax(dim=1).clamp_max(_LARGEST)
        absmax[start // block : -(-stop // block)].copy_(scale)
        y = piece / torch.where(scale == 0, 1.0, scale).unsqueeze(1)
        if torch.compiler.is_compiling():
            target[start:stop].copy_(_nearest(y, signed).view(-1))
            continue
        y = y.view(-1)
        upper_bits = (y.view(torch.int32) >> 16) & 0xFFFF
        lowest = tables.lowest.index_select(0, upper_bits)
        above = y > tables.boundary.index_select(0, lowest.int())
        target[start:stop].copy_(lowest + above)


def _lines(signed: bool) -> list[tuple[float, int]]:
    """Return, for each decade, the width of its parts and their number n; its codes are numbered n to 2 n - 1.

    The part with number k of that decade is [w (k - 8 n / 9), w (k + 1 - 8 n / 9)).
    """
    counts = [2**i if signed else 2 ** (i + 1) for i in range(_DECADES)]
    return [(0.9 * 10.0 ** (i + 1 - _DECADES) / n, n) for i, n in enumerate(counts)]


def _value(codes: Tensor, signed: bool) -> Tensor:
    """Compute the values of codes: the middle of part k is the largest of the decades' lines at k + 1/2."""
    j = codes.to(torch.float32)
    middle = (j - 127).abs() + 0.5 if signed else j + 1.5
    lines = [middle * w - 8 / 9 * n * w for w, n in _lines(signed)]
    value = functools.reduce(torch.maximum, lines).clamp(0, 1)
    return torch.where(j < 127, -value, value) if signed else value


def _nearest(y: Tensor, signed: bool) -> Tensor:
    """Compute the nearest codes of values in [-1, 1]: the part they lie in, but for the edges of decades."""
    x = y.abs() if signed else y.clamp_min(0)
    lines = _lines(signed)
    t = functools.reduce(torch.minimum, [x * (1 / w) + 8 / 9 * n for w, n in lines])
    k = t.floor()
    # Parts are five times as wide as those of the decade below: the first fifth of a decade's first part is nearer to
    # the code below it. Below the first decade that code is 0, half its first value away.
    width, first = lines[0]
    edge = torch.where(k <= first, (0.5 * (1e-7 + 0.5 * width)) / width + 8 / 9 * first - first, 0.2)
    number = k.to(torch.int32)
    is_first_part = (number & (number - 1)) == 0
    k = (k - (is_first_part & (t - k < edge)).to(torch.float32)).clamp(first - 1.0, 127.0 if signed else 255.0)
    j = torch.where(y < 0, -k, k) + 127 if signed else k - 1
    return torch.where(y >= 1 - 0.25 * lines[-1][0], 255.0, j).to(torch.uint8)


def _pieces(numel: int, block: int) -> list[tuple[int, int, int]]:
    """Cut a flat tensor into pieces (start, stop, entries of a block): whole blocks first, then the ragged last one."""
    whole = numel - numel % block
    step = max(whole, 1) if torch.compiler.is_compiling() else max(_CHUNK // block, 1) * block
    pieces = [(start, min(start + step, whole), block) for start in range(0, whole, step)]
    return pieces + [(whole, numel, numel - whole)] * (numel > whole)


def _check(written: Tensor, read: Tensor, absmax: Tensor, block: int) -> None:
    if block < 1:
        raise UsageError(f"block must be at least 1, got {block}: use 256 or 2048.")
    if written.shape != read.shape or not written.is_contiguous():
        raise UsageError(
            f"the tensor written to must be contiguous and of shape {tuple(read.shape)}, "
            f"got {tuple(written.shape)}: allocate it with torch.contiguous_format."
        )
    if absmax.shape != (-(-read.numel() // block),):
        raise UsageError(
            f"absmax must have one entry for each block of {block}, [{-(-read.numel() // block)}], "
            f"got {list(absmax.shape)}: encode with the same block size."
        )
