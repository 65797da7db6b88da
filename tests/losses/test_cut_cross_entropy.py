"""Cut cross-entropy against the loss of all logits: values, gradients of head and hidden states, memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.errors import MissingExtraError, UsageError
from trimtab.losses import _head_triton, linear_cross_entropy

_N, _D, _V = 7, 4, 11
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "z": {"z_loss": 0.05},
    "cap": {"soft_cap": 1.5},
    "all": {"label_smoothing": 0.1, "z_loss": 0.02, "soft_cap": 2.0},
}
CASES = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
BLOCKS = {"tokens_at_once": 3, "classes_at_once": 4}


def _head(dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_N, _D, generator=generator, dtype=torch.float64)
    weight = torch.randn(_V, _D, generator=generator, dtype=torch.float64)
    offset = torch.randn(_V, generator=generator, dtype=torch.float64)
    targets = torch.randint(_V, (_N,), generator=generator)
    targets[[1, 5]] = -100
    leaves = [value.to(dtype).requires_grad_() for value in (hidden, weight, offset)]
    return leaves if bias else [*leaves[:2], None], targets


def _dense(hidden, weight, bias, targets, label_smoothing=0.0, z_loss=0.0, soft_cap=None, reduction="mean"):
    """The same loss with all logits in memory, from torch's cross-entropy."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
    valid = targets != -100
    values = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    values = values + z_loss * logits.logsumexp(-1).square() * valid
    return values if reduction == "none" else values.sum() / valid.sum()


@CASES
def test_gradcheck(options):
    leaves, targets = _head()

    def of(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, targets, bias, **options, **BLOCKS, reduction="none")

    assert torch.autograd.gradcheck(of, leaves)


@CASES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("blocks", [(3, 4), (1, 1), (7, 11), (None, 8192)], ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["once", "twice"])
def test_equals_the_loss_of_all_logits(options, bias, blocks, recompute):
    (hidden, weight, offset), targets = _head(bias=bias)
    leaves = [hidden, weight, offset][: 2 + bias]
    sizes = {"tokens_at_once": blocks[0], "classes_at_once": blocks[1], "recompute": recompute}
    found = linear_cross_entropy(hidden, weight, targets, offset, **options, **sizes)
    expected = _dense(hidden, weight, offset, targets, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    gradients = torch.autograd.grad(found, leaves)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, leaves), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["once", "twice"])
@CASES
def test_float32_inside(dtype, options, recompute):
    """Equal to the dense loss in float64 of the same rounded inputs; gradients differ by their own rounding only."""
    leaves, targets = _head(dtype)
    found = linear_cross_entropy(*leaves[:2], targets, leaves[2], **options, **BLOCKS, recompute=recompute)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = _dense(*exact, targets, **options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    bound = 1e-5 if dtype == torch.float32 else 2**-8
    for leaf, mine, dense in zip(
        leaves, torch.autograd.grad(found, leaves), torch.autograd.grad(expected, exact), strict=True
    ):
        assert mine.dtype == leaf.dtype
        torch.testing.assert_close(mine.double(), dense, rtol=bound, atol=1e-6)


def test_autocast_does_not_lower_precision():
    (hidden, weight, _), targets = _head(torch.float32)
    expected = linear_cross_entropy(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(found, expected)


def test_equals_torch():
    (hidden, weight, bias), targets = _head(torch.float32)
    found = linear_cross_entropy(hidden, weight, targets, bias, label_smoothing=0.1, **BLOCKS)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, label_smoothing=0.1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_reductions_and_leading_dimensions(reduction):
    (hidden, weight, bias), targets = _head()
    found = linear_cross_entropy(hidden[None], weight, targets[None], bias, reduction=reduction, **BLOCKS)
    expected = _dense(hidden, weight, bias, targets, reduction="none")
    torch.testing.assert_close(found, expected[None] if reduction == "none" else expected.sum())


@pytest.mark.parametrize("sizes", [(3, 4), (1,) * _N], ids=str)
def test_micro_batches_add_up(sizes):
    (hidden, weight, bias), targets = _head()
    whole = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, bias, denominator=5), [hidden, weight])
    parts = zip(hidden.split(sizes), targets.split(sizes), strict=True)
    total = sum(linear_cross_entropy(h, weight, t, bias, denominator=5) for h, t in parts)
    torch.testing.assert_close(torch.autograd.grad(total, [hidden, weight]), whole)


def test_backward_runs_again_only_where_blocks_are_computed_again():
    (hidden, weight, _), targets = _head()
    twice = linear_cross_entropy(hidden, weight, targets, recompute=True)
    first = torch.autograd.grad(twice, weight, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(twice, weight), first)
    once = linear_cross_entropy(hidden, weight, targets)
    kept = torch.autograd.grad(3 * once, weight, retain_graph=True)[0]
    torch.testing.assert_close(kept, 3 * first[0])
    with pytest.raises(UsageError, match="recompute=True"):
        torch.autograd.grad(once, weight)


def test_gradients_of_the_head_alone_or_the_hidden_states_alone():
    (hidden, weight, bias), targets = _head()
    expected = torch.autograd.grad(_dense(hidden, weight, bias, targets), [hidden, weight, bias])
    for place in range(3):
        leaves = [x if number == place else x.detach() for number, x in enumerate((hidden, weight, bias))]
        loss = linear_cross_entropy(leaves[0], leaves[1], targets, leaves[2])
        torch.testing.assert_close(torch.autograd.grad(loss, leaves[place])[0], expected[place])


def test_positions_that_do_not_count():
    (hidden, weight, bias), targets = _head()
    spoiled = hidden.detach().clone()
    spoiled[1] = math.inf
    spoiled.requires_grad_()
    loss = linear_cross_entropy(spoiled, weight, targets, bias, **BLOCKS)
    loss.backward()
    torch.testing.assert_close(loss, _dense(hidden, weight, bias, targets))
    assert not spoiled.grad[1].any()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("recompute", [False, True], ids=["once", "twice"])
def test_a_class_that_is_masked_out(recompute):
    """Class 0, which stands in for the label of positions that do not count, may have a bias of -inf."""
    (hidden, weight, bias), targets = _head()
    targets[targets == 0] = 1
    masked = bias.detach().clone()
    masked[0] = -math.inf
    loss = linear_cross_entropy(hidden, weight, targets, masked, recompute=recompute, **BLOCKS)
    expected = F.cross_entropy(F.linear(hidden, weight, masked), targets)
    torch.testing.assert_close(loss, expected)
    leaves = [hidden, weight]
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))


def test_no_target_that_counts():
    (hidden, weight, _), targets = _head()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss.detach() == 0
    assert not weight.grad.any()
    empty = linear_cross_entropy(hidden[:0], weight, targets[:0])
    assert empty.detach() == 0


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_large_logits(scale):
    (hidden, weight, _), targets = _head()
    loss = linear_cross_entropy(scale * hidden, weight, targets, **BLOCKS)
    torch.testing.assert_close(loss, _dense(scale * hidden, weight, None, targets))
    assert torch.autograd.grad(loss, weight)[0].isfinite().all()


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.size = max(self.size, value.numel())
        return out


@pytest.mark.parametrize("recompute", [False, True], ids=["once", "twice"])
def test_logits_are_never_in_memory(recompute):
    """512 tokens and 1,000 classes are 512,000 logits; nothing larger than the head or a block is made."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 16, generator=generator).requires_grad_()
    weight = torch.randn(1000, 16, generator=generator).requires_grad_()
    targets = torch.randint(1000, (512,), generator=generator)
    with _Largest() as blocks:
        sizes = {"tokens_at_once": 16, "classes_at_once": 100}
        linear_cross_entropy(hidden, weight, targets, recompute=recompute, **sizes).backward()
    assert blocks.size == weight.numel()
    with _Largest() as dense:
        F.cross_entropy(hidden @ weight.T, targets).backward()
    assert dense.size == 512_000


def test_what_does_not_fit_is_refused():
    (hidden, weight, bias), targets = _head()
    with pytest.raises(UsageError, match="weight \\[V, D\\]"):
        linear_cross_entropy(hidden, weight[:, :2], targets)
    with pytest.raises(UsageError, match="bias must have shape"):
        linear_cross_entropy(hidden, weight, targets, bias[:2])
    with pytest.raises(UsageError, match=r"targets must be in \[0, 11\)"):
        linear_cross_entropy(hidden, weight, targets.clamp(min=0) + 11)
    for options in ({"label_smoothing": 1.5}, {"soft_cap": 0.0}, {"z_loss": -1.0}, {"tokens_at_once": 0}):
        with pytest.raises(UsageError, match="must be"):
            linear_cross_entropy(hidden, weight, targets, **options)


def test_backends(monkeypatch):
    """Those without a kernel for the tensors are refused; what the kernels compute has tests of its own."""
    (hidden, weight, bias), targets = _head(torch.float32)
    by_torch = linear_cross_entropy(hidden, weight, targets, bias, backend="torch")
    assert torch.equal(linear_cross_entropy(hidden, weight, targets, bias, backend="auto"), by_torch)
    with pytest.raises(UsageError, match="unknown backend 'trito'"):
        linear_cross_entropy(hidden, weight, targets, bias, backend="trito")
    monkeypatch.setattr(_head_triton, "triton", None)
    with pytest.raises(MissingExtraError, match="pip install triton"):
        linear_cross_entropy(hidden, weight, targets, bias, backend="triton")
    monkeypatch.setattr(_head_triton, "triton", object())
    monkeypatch.setattr(_head_triton, "_INTERPRETED", False)
    with pytest.raises(UsageError, match="needs tensors on a GPU, got cpu"):
        linear_cross_entropy(hidden, weight, targets, bias, backend="triton")
    monkeypatch.setattr(_head_triton, "_INTERPRETED", True)
    with pytest.raises(UsageError, match=r"got torch\.float64 and torch\.float32"):
        linear_cross_entropy(hidden.double(), weight, targets, bias, backend="triton")
