"""The linear head's cross-entropy against Apple's cut-cross-entropy, by its implementation that runs on a CPU.

Optional: cut-cross-entropy 25.1.1, which imports triton. Its logits are float32, whatever it is given.
"""

from __future__ import annotations

import pytest
import torch

from trimtab.losses import linear_cross_entropy

peer = pytest.importorskip("cut_cross_entropy")


def _inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, 8, dtype=dtype, generator=generator).requires_grad_()
    weight = torch.randn(13, 8, dtype=dtype, generator=generator).requires_grad_()
    targets = torch.randint(0, 13, (3, 5), generator=generator)
    targets[0, 1] = targets[2, 4] = -100
    return hidden, weight, targets


def _theirs(*inputs, **options):
    # Its function is compiled when it is called; what it computes is the same without.
    with torch.compiler.set_stance("force_eager"):
        return peer.linear_cross_entropy(*inputs, impl="torch_compile", **options)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("blocks", [{}, {"tokens_at_once": 4, "classes_at_once": 5, "recompute": True}], ids=str)
def test_equals_cut_cross_entropy(cap, reduction, blocks):
    hidden, weight, targets = _inputs()
    theirs = _theirs(hidden, weight, targets, softcap=cap, reduction=reduction)
    ours = linear_cross_entropy(hidden, weight, targets, soft_cap=cap, reduction=reduction, **blocks)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
    cotangent = torch.linspace(0.5, 2, ours.numel()).reshape(ours.shape)
    expected, found = (torch.autograd.grad((cotangent * x).sum(), (hidden, weight)) for x in (theirs, ours))
    for mine, other in zip(found, expected, strict=True):
        assert other.abs().max() > 1e-2
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_shift_is_a_slice():
    """Theirs shifts targets inside; here the caller gives position i the target i + 1."""
    hidden, weight, targets = _inputs()
    theirs = _theirs(hidden, weight, targets, shift=True)
    torch.testing.assert_close(linear_cross_entropy(hidden[:, :-1], weight, targets[:, 1:]), theirs)


def test_known_difference_without_any_target():
    """Theirs is NaN, as torch's cross-entropy; here it is 0 with gradient 0."""
    hidden, weight, targets = _inputs()
    targets.fill_(-100)
    assert _theirs(hidden, weight, targets).isnan()
    ours = linear_cross_entropy(hidden, weight, targets)
    assert ours == 0
    assert not torch.autograd.grad(ours, hidden)[0].any()


def test_known_difference_in_bfloat16():
    """Theirs rounds logits to bfloat16 before the float32 loss; here the products are summed in float32."""
    hidden, weight, targets = _inputs(torch.bfloat16)
    exact = linear_cross_entropy(hidden.detach().double(), weight.detach().double(), targets, reduction="none")
    ours = linear_cross_entropy(hidden, weight, targets, reduction="none")
    theirs = _theirs(hidden, weight, targets, reduction="none")
    assert (ours - exact).abs().max() < 1e-5
    assert 1e-4 < (theirs - exact).abs().max() < 0.05
