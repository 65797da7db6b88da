"""L_orth against the explicit matrix of the circular convolution, written with loops, and the paper's bounds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.errors import UsageError
from trimtab.layers.convolution.orthogonality import orthogonal_convolution_loss, orthogonal_convolution_penalty


def operator(kernel, stride, outputs, dilation=1):
    """Return the matrix [M N^d, C (S N)^d] of a circular convolution with N outputs a side, entry by entry."""
    kernel = np.asarray(kernel, dtype=np.float64)
    m, c, *sizes = kernel.shape
    side, dims = stride * outputs, len(sizes)
    matrix = np.zeros((m, *[outputs] * dims, c, *[side] * dims))
    for position in itertools.product(range(outputs), repeat=dims):
        for tap in itertools.product(*map(range, sizes)):
            source = tuple((stride * p + dilation * a) % side for p, a in zip(position, tap, strict=True))
            matrix[(slice(None), *position, slice(None), *source)] += kernel[(slice(None), slice(None), *tap)]
    return matrix.reshape(m * outputs**dims, c * side**dims)


def errors(kernel, stride, outputs, **options):
    """Return the Frobenius and spectral errors of orthonormal rows, or columns where there are more rows."""
    matrix = operator(kernel, stride, outputs, **options)
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    difference = gram - np.eye(len(gram))
    return np.linalg.norm(difference), np.linalg.norm(difference, 2)


def _kernel(m, c, size, dims=2, seed=0, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(m, c, *[size] * dims, generator=generator, dtype=torch.float64)


SHAPES = [  # M, C, k, S, dims: more columns, more rows (the constant), equal, and strides
    (2, 3, 3, 1, 2),
    (5, 2, 3, 1, 2),
    (3, 3, 3, 1, 2),
    (4, 1, 3, 2, 2),
    (6, 1, 3, 2, 2),
    (3, 2, 2, 2, 2),
    (9, 2, 3, 2, 2),
    (3, 2, 5, 1, 1),
    (7, 2, 5, 3, 1),
    (2, 1, 5, 3, 1),
    (2, 3, 2, 1, 3),
]


@pytest.mark.parametrize(("m", "c", "size", "stride", "dims"), SHAPES, ids=str)
def test_is_the_error_of_the_explicit_operator(m, c, size, stride, dims):
    """Theorem 5: the squared Frobenius error is N^d L_orth, for S N >= 2 k - 1."""
    kernel = _kernel(m, c, size, dims)
    outputs = -(-(2 * size - 1) // stride)
    loss = float(orthogonal_convolution_loss(kernel, stride=stride))
    frobenius, _ = errors(kernel, stride, outputs)
    assert frobenius**2 == pytest.approx(outputs**dims * loss, rel=1e-10)


@settings(max_examples=15)
@given(
    shape=st.sampled_from([shape for shape in SHAPES if shape[-1] < 3]),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.05, 0.4]),
    extra=st.integers(0, 3),
)
def test_bounds_the_spectral_error(shape, seed, scale, extra):
    """Theorem 6: by (2 floor((k-1)/S) + 1)^d M, or (2k - 1)^d C where there are more rows, for any N."""
    m, c, size, stride, dims = shape
    kernel = _kernel(m, c, size, dims, seed, scale)
    loss = float(orthogonal_convolution_loss(kernel, stride=stride))
    _, spectral = errors(kernel, stride, -(-(2 * size - 1) // stride) + extra)
    rows = m <= c * stride**dims
    factor = (2 * ((size - 1) // stride) + 1) ** dims * m if rows else (2 * size - 1) ** dims * c
    assert spectral**2 <= factor * loss * (1 + 1e-9)


@pytest.mark.parametrize(("m", "c", "size", "stride", "dims"), [s for s in SHAPES if s[-1] == 2], ids=str)
def test_zero_exactly_for_orthogonal_operators(m, c, size, stride, dims):
    """Minimised, the singular values are 1; the bound says how near. (M = C S^2 may have poor minima: loose there.)"""
    kernel = _kernel(m, c, size).requires_grad_()
    optimizer = torch.optim.LBFGS([kernel], max_iter=400, line_search_fn="strong_wolfe", tolerance_change=1e-16)

    def closure():
        optimizer.zero_grad()
        loss = orthogonal_convolution_loss(kernel, stride=stride)
        loss.backward()
        return loss

    optimizer.step(closure)
    loss = float(orthogonal_convolution_loss(kernel.detach(), stride=stride))
    values = np.linalg.svd(operator(kernel.detach(), stride, 6), compute_uv=False)
    if loss < 1e-10:
        assert np.abs(values - 1).max() < 1e-3
    else:  # a local minimum
        assert m == c * stride**dims
        assert np.abs(values - 1).max() > 1e-2


def test_closed_forms():
    identity = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    identity[0, 0, 1, 1] = identity[1, 1, 1, 1] = 1
    assert orthogonal_convolution_loss(identity) == 0
    assert orthogonal_convolution_loss(3 * identity) == pytest.approx(2 * 64)
    # Four filters of 2 x 2 blocks: orthonormal columns and rows at stride 2.
    blocks = torch.eye(4, dtype=torch.float64).view(4, 1, 2, 2)
    assert orthogonal_convolution_loss(blocks, stride=2) == 0
    # Eight filters on one channel at stride 2: columns can be orthonormal, and the constant 8 - 4 makes that 0.
    assert orthogonal_convolution_loss(torch.cat([blocks, blocks]) / 2**0.5, stride=2) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_add_up(groups):
    kernel = _kernel(8, 2, 3)
    whole = orthogonal_convolution_loss(kernel, stride=2, groups=groups)
    parts = [orthogonal_convolution_loss(part, stride=2) for part in kernel.chunk(groups)]
    torch.testing.assert_close(whole, torch.stack(parts).sum())


@pytest.mark.parametrize("stride", [1, 2])
def test_dilation(stride):
    kernel = _kernel(3, 2, 2)
    loss = float(orthogonal_convolution_loss(kernel, stride=stride, dilation=3))
    frobenius, _ = errors(kernel, stride, 8, dilation=3)
    assert frobenius**2 == pytest.approx(64 * loss, rel=1e-10)


def test_transposed_convolutions_have_the_same_singular_values():
    conv = nn.ConvTranspose2d(4, 2, 3, stride=2, groups=2, bias=False, dtype=torch.float64)
    torch.testing.assert_close(
        orthogonal_convolution_penalty(conv), orthogonal_convolution_loss(conv.weight, stride=2, groups=2)
    )
    # The adjoint of a convolution of as many filters as this has input channels.
    single = nn.ConvTranspose2d(4, 2, 3, stride=2, bias=False, dtype=torch.float64)
    frobenius, _ = errors(single.weight.detach(), 2, 4)
    assert frobenius**2 == pytest.approx(16 * float(orthogonal_convolution_penalty(single).detach()), rel=1e-10)


def test_gradcheck_and_dtypes():
    kernel = _kernel(3, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda k: orthogonal_convolution_loss(k, stride=2), (kernel,))
    low = kernel.detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = orthogonal_convolution_loss(low)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(orthogonal_convolution_loss(low.double())), rel=1e-5)
    compiled = torch.compile(lambda k: orthogonal_convolution_loss(k, stride=2), backend="aot_eager")
    torch.testing.assert_close(compiled(kernel), orthogonal_convolution_loss(kernel, stride=2))


def test_penalty_is_the_sum_over_a_model():
    shared = nn.Conv2d(4, 4, 3)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), shared, shared, nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(2, 2)
    )
    expected = sum(orthogonal_convolution_loss(model[i].weight) for i in (0, 2, 4))
    penalty = orthogonal_convolution_penalty(model)
    torch.testing.assert_close(penalty, expected)
    penalty.backward()
    assert all(model[i].weight.grad.any() for i in (0, 2, 4))
    assert model[0].bias.grad is None
    torch.testing.assert_close(
        orthogonal_convolution_penalty(model, skip=("0", "4")), orthogonal_convolution_loss(shared.weight)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parametrized_kernel_counts_though_each_is_made_when_read(dtype):
    model = nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(12)))
    for layer in model:
        nn.utils.parametrize.register_parametrization(layer, "weight", _Doubled())
    model.to(dtype)
    with torch.no_grad():
        kernels = [layer.weight for layer in model]
        expected = sum(orthogonal_convolution_loss(kernel) for kernel in kernels)
        del kernels
        torch.testing.assert_close(orthogonal_convolution_penalty(model), expected)


class _Doubled(nn.Module):
    def forward(self, kernel):
        return 2 * kernel


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: orthogonal_convolution_loss(torch.zeros(10, 1, 3, 3), stride=4), "at most 9 are orthogonal"),
        (lambda: orthogonal_convolution_loss(torch.zeros(17, 1, 3, 3), stride=4), "leaves out pixels"),
        (lambda: orthogonal_convolution_loss(torch.zeros(3, 3)), r"must be \[M, C, k...\]"),
        (lambda: orthogonal_convolution_loss(torch.zeros(3, 3, 1, 1), stride=(1, 0)), "stride must be at least 1"),
        (lambda: orthogonal_convolution_loss(torch.zeros(3, 3, 1, 1), groups=2), "groups must divide the 3"),
        (lambda: orthogonal_convolution_penalty(nn.Linear(2, 2)), "no convolution in Linear"),
        (lambda: orthogonal_convolution_penalty(nn.Sequential(nn.Conv2d(1, 10, 3, stride=4))), "0: no orthogonal"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(UsageError, match=text):
        call()
