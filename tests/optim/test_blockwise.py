"""Block-wise 8-bit codes against the paper's construction, a search over all codes, and the authors' library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from trimtab.errors import UsageError
from trimtab.optim._blockwise import decode, decode_, dynamic_code, encode, encode_

_SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def _values(count, signed, seed=0):
    """Values that meet every code: magnitudes over nine decades, with zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = 10 ** (9 * torch.rand(count, generator=generator) - 9)
    x *= torch.randint(3, (count,), generator=generator) - 1
    return x if signed else x.abs()


@_SIGNED
def test_code_is_the_papers_tree(signed):
    """A leading one after e zeros gives the decade 10^-e; what bits are left count linearly from 0.1 to 1."""
    bits = 7 if signed else 8
    values = {0.0, 1.0}
    for zeros in range(7):
        left = bits - 1 - zeros
        for k in range(2**left):
            value = 10.0**-zeros * (0.1 + 0.9 * (k + 0.5) / 2**left)
            values |= {value, -value} if signed else {value}
    assert len(values) == 256
    np.testing.assert_allclose(dynamic_code(signed).double().numpy(), sorted(values), rtol=2e-7, atol=0)


@_SIGNED
@pytest.mark.parametrize("block", [256, 2048])
def test_equals_the_reference(signed, block):
    functional = pytest.importorskip("bitsandbytes").functional
    code = dynamic_code(signed)
    assert torch.equal(code, functional.create_dynamic_map(signed))
    x = _values(20_003, signed)
    codes, absmax = encode(x, signed, block)
    # In float64 it searches all codes; its kernel for float32 on a CPU does not find the nearest of small values.
    expected, scales = torch.ops.bitsandbytes.quantize_blockwise(x.double(), code, block)
    assert torch.equal(absmax, scales)
    # It multiplies by 1 / absmax where here x is divided: an ulp decides only next to a boundary.
    differ = codes != expected
    assert differ.sum() <= 5
    y = x / absmax.repeat_interleave(block)[: x.numel()]
    middle = (code[codes[differ].int()].double() + code[expected[differ].int()].double()) / 2
    torch.testing.assert_close(y[differ].double(), middle, rtol=3e-7, atol=0)
    values = functional.dequantize_blockwise(codes, absmax=absmax, code=code, blocksize=block)
    assert torch.equal(decode(codes, absmax, signed, block), values)


@_SIGNED
@pytest.mark.parametrize("block", [256, 2048, 7])
def test_takes_the_nearest_code(signed, block):
    x = _values(20_000, signed, seed=1)
    codes, absmax = encode(x, signed, block)
    code = dynamic_code(signed).double().numpy()
    for start in range(0, x.numel(), block):
        part = x[start : start + block].numpy()
        scale = np.abs(part).max()
        assert absmax[start // block].item() == scale
        distance = np.abs((part / (scale or 1)).astype(np.float64)[:, None] - code)
        chosen = np.take_along_axis(distance, codes[start : start + block].numpy()[:, None].astype(int), 1)[:, 0]
        # Nearest but for differences that float32 does not resolve.
        assert (chosen <= distance.min(axis=1) * (1 + 1e-5)).all()


@_SIGNED
def test_floats_around_every_boundary(signed):
    code = dynamic_code(signed)
    middle = ((code[:-1].double() + code[1:].double()) / 2).float()
    sides = [torch.nextafter(middle, torch.tensor(side)) for side in (-2.0, 2.0)]
    for _ in range(30):
        sides = [torch.nextafter(x, torch.tensor(side)) for x, side in zip(sides, (-2.0, 2.0), strict=True)]
    for x, offset in zip(sides, (0, 1), strict=True):
        codes, absmax = encode(torch.cat([x, torch.ones(1)]), signed)
        assert absmax.tolist() == [1.0]
        assert codes[:-1].tolist() == [j + offset for j in range(255)]


@_SIGNED
def test_error_of_each_decade(signed):
    y = torch.cat([torch.logspace(-7, 0, 200_001)[:-1], torch.ones(1)])
    error = (decode(*encode(y, signed, y.numel()), signed, y.numel()) - y).abs()
    for i in range(7):
        # Half a part of the decade; at its lower edge the neighbour's parts are smaller.
        part = 0.9 * 10.0 ** (i - 6) / 2 ** (i if signed else i + 1)
        inside = (y > 10.0 ** (i - 7)) & (y < 10.0 ** (i - 6))
        assert 0.4 * part < error[inside].max() <= part / 2 * 1.001


@given(
    x=npst.arrays(
        np.float32,
        npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9),
        elements=st.floats(-1e10, 1e10, width=32, allow_subnormal=False),
    ),
    signed=st.booleans(),
    block=st.sampled_from([1, 4, 7, 256, 2048]),
)
def test_shapes_and_round_trip(x, signed, block):
    x = torch.from_numpy(np.array(x))
    x = x if signed else x.abs()
    codes, absmax = encode(x, signed, block)
    assert codes.shape == x.shape
    assert codes.dtype == torch.uint8
    assert absmax.shape == (-(-x.numel() // block),)
    values = decode(codes, absmax, signed, block)
    assert values.shape == x.shape
    assert (values[x == 0] == 0).all()
    scale = absmax.repeat_interleave(block)[: x.numel()].view(x.shape)
    assert ((values - x).abs() <= scale * 0.0075).all() or signed
    assert ((values - x).abs() <= scale * 0.015).all()
    if not signed:
        again, same = encode(values, signed, block)
        assert torch.equal(same, absmax)
        assert torch.equal(again, codes)


@_SIGNED
def test_variants_in_place_and_views(signed):
    x = _values(200_000, signed).view(400, 500).t()
    codes, absmax = encode(x, signed)
    assert codes.is_contiguous()
    whole = decode(codes, absmax, signed)
    part_codes, part_absmax = torch.empty_like(codes).view(-1), torch.empty_like(absmax)
    out = torch.empty(x.numel(), dtype=torch.bfloat16)
    flat = x.reshape(-1)
    for start in range(0, x.numel(), 65_536):
        part, blocks = slice(start, start + 65_536), slice(start // 256, (start + 65_536) // 256)
        encode_(flat[part], part_codes[part], part_absmax[blocks], signed)
        decode_(out[part], part_codes[part], part_absmax[blocks], signed)
    assert torch.equal(part_codes, codes.view(-1))
    assert torch.equal(part_absmax, absmax)
    assert torch.equal(out, whole.view(-1).bfloat16())


def test_zero_blocks_scalars_and_negatives_without_a_sign():
    codes, absmax = encode(torch.zeros(300), True)
    assert absmax.tolist() == [0.0, 0.0]
    assert decode(codes, absmax, True).count_nonzero() == 0
    assert decode(*encode(torch.tensor(-3.0), True), True).item() == pytest.approx(-3.0, rel=0.0075)
    assert decode(*encode(torch.tensor([-1.0, 1.0]), False), False).tolist() == [0.0, 1.0]


def test_what_does_not_fit_is_refused():
    codes, absmax = encode(torch.ones(300), True)
    with pytest.raises(UsageError, match=r"absmax must have one entry for each block of 2048, \[1\], got \[2\]"):
        decode(codes, absmax, True, 2048)
    with pytest.raises(UsageError, match="block must be at least 1, got 0"):
        encode(torch.ones(3), True, 0)
    with pytest.raises(UsageError, match="must be contiguous and of shape"):
        encode_(torch.ones(4, 3), codes[:12].view(3, 4), absmax[:1], True)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@_SIGNED
def test_compiled_code_computes_what_the_tables_hold(signed):
    every = torch.arange(256, dtype=torch.uint8)
    compiled = torch.compile(lambda codes, scale: decode(codes, scale, signed), fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(every, torch.ones(1)), dynamic_code(signed), rtol=1e-6, atol=0)

    x = torch.cat([_values(20_003, signed), dynamic_code(signed)])
    expected, scales = encode(x, signed)
    codes, absmax = torch.compile(lambda x: encode(x, signed), fullgraph=True, dynamic=False)(x)
    assert torch.equal(absmax, scales)
    y = (x / absmax.repeat_interleave(256)[: x.numel()]).double()
    code = dynamic_code(signed).double()
    differ = codes != expected
    middle = (code[codes[differ].int()] + code[expected[differ].int()]) / 2
    torch.testing.assert_close(y[differ], middle, rtol=2e-6, atol=0)
    assert differ.sum() <= 20
