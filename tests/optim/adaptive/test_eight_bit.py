"""8-bit AdamW, Lion and SGD: exact but for the storage, whose rounding a search through all codes checks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.optim import SGD, AdamW, AdamW8bit, Lion, Lion8bit, SGD8bit
from trimtab.testing import OptimizerTestCase

_SHAPE = (96, 80)
_PAIRS = [(AdamW8bit, AdamW, {}), (Lion8bit, Lion, {}), (SGD8bit, SGD, {"momentum": 0.9})]


class TestAdamW8bit(OptimizerTestCase):
    def optimizer(self, params, **options):
        return AdamW8bit(params, **{"lr": self.lr, **options})


def _gradient(seed):
    return torch.randn(_SHAPE, generator=torch.Generator().manual_seed(seed))


def _after(make, steps, **options):
    p = nn.Parameter(torch.zeros(_SHAPE))
    optimizer = make([p], lr=0.01, **options)
    for step in range(steps):
        p.grad = _gradient(step)
        optimizer.step()
    return p.detach(), optimizer.state[p]


@pytest.mark.parametrize(("ours", "exact", "options"), _PAIRS, ids=lambda value: getattr(value, "__name__", None))
def test_a_first_step_is_adams_whatever_the_code_rounds(ours, exact, options):
    # What a step computes is rounded when it is stored, so that the second is the first to see it.
    torch.testing.assert_close(_after(ours, 1)[0], _after(exact, 1, **options)[0], rtol=1e-6, atol=1e-9)
    assert (_after(ours, 5)[0] != _after(exact, 5, **options)[0]).any()


@pytest.mark.parametrize(("ours", "exact", "options"), _PAIRS, ids=lambda value: getattr(value, "__name__", None))
def test_is_the_optimizer_with_its_state_in_8_bits(ours, exact, options):
    assert torch.equal(_after(ours, 10)[0], _after(exact, 10, state="8bit", **options)[0])
    assert torch.equal(_after(ours, 5, state="8bit-2048")[0], _after(exact, 5, state="8bit-2048", **options)[0])


def _code(signed):
    """The dynamic code from the paper's words: 7 decades, the i-th cut into 2^i parts, and 0 and 1."""
    values = [0.0, 1.0]
    for i in range(7):
        parts = 2**i if signed else 2 ** (i + 1)
        edges = np.linspace(0.1, 1, parts + 1)
        for low, high in itertools.pairwise(edges):
            middle = 10.0 ** (i - 6) * (low + high) / 2
            values += [middle, -middle] if signed else [middle]
    return np.array(sorted(values))


def _rounded(x, signed):
    blocks = x.reshape(-1, 256)
    scale = np.abs(blocks).max(1, keepdims=True)
    code = _code(signed)
    nearest = np.abs(blocks[..., None] / scale[..., None] - code).argmin(-1)
    return (code[nearest] * scale).reshape(x.shape)


def test_equals_a_search_through_all_codes():
    m = v = p = np.zeros(_SHAPE)
    for t in range(1, 6):
        g = _gradient(t - 1).double().numpy()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p * (1 - 0.01 * 0.01) - 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        m, v = _rounded(m, signed=True), _rounded(v, signed=False)
    apart = (_after(AdamW8bit, 5)[0].double() - torch.tensor(p)).abs()
    # An entry halfway between two codes may go either way in float32: a few of 7,680 may differ.
    assert int((apart > 1e-6).sum()) <= 8
    assert (_after(AdamW, 5)[0].double() - torch.tensor(p)).abs().gt(1e-6).sum() > 1000


@pytest.mark.parametrize(("ours", "exact", "options"), _PAIRS, ids=lambda value: getattr(value, "__name__", None))
def test_state_is_about_a_quarter(ours, exact, options):
    sizes = []
    for make, given in ((ours, {}), (exact, options)):
        values = _after(make, 1, **given)[1].values()
        sizes.append(sum(x.numel() * x.element_size() for x in values if isinstance(x, torch.Tensor)))
    # One byte and a 256th of a float32 for each entry, instead of four bytes.
    assert sizes[0] / sizes[1] == pytest.approx(65 / 256, abs=1e-3)


def test_stays_close_to_bitsandbytes():
    peer = pytest.importorskip("bitsandbytes")
    p = nn.Parameter(torch.zeros(_SHAPE))
    try:
        optimizer = peer.optim.AdamW8bit([p], lr=0.01, weight_decay=0.01)
        p.grad = _gradient(0)
        optimizer.step()
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"this bitsandbytes has no 8-bit step on the CPU: {error}")
    for step in range(1, 5):
        p.grad = _gradient(step)
        optimizer.step()
    ours, exact = _after(AdamW8bit, 5)[0], _after(AdamW, 5)[0]
    # Its search takes the neighbouring code for one entry in forty: beside what rounding does at all, that is little.
    apart, rounding = (ours - p.detach()).abs(), (ours - exact).abs()
    assert float(apart.mean()) < 0.05 * float(rounding.mean())
    assert float((apart > 1e-6).float().mean()) < 0.1


def test_refuses_an_unknown_format():
    with pytest.raises(UsageError, match="unknown state format '7bit'"):
        AdamW8bit([nn.Parameter(torch.ones(2))], state="7bit")
