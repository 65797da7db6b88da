"""A list of tensors computes what each tensor does."""

from __future__ import annotations

import pytest
import torch

from trimtab.optim._lists import TensorList

EXPRESSIONS = [
    lambda x, y: x + y,
    lambda x, y: 1 + x * 2 - y / 3,
    lambda x, y: 1 - x,
    lambda x, y: 2 / (y.abs() + 1),
    lambda x, y: -(x**2),
    lambda x, y: x.clone().lerp_(y, 0.25),
    lambda x, y: x.clone().mul_(0.5).addcmul_(y, y, value=2.0),
    lambda x, y: x.clone().add_(y, alpha=-0.1),
    lambda x, y: torch.where(x > y, x, y),
    lambda x, y: torch.maximum(x, y).sqrt(),
    lambda x, y: x.sign() * y.abs().clamp_min(0.3),
    lambda x, y: x / torch.linalg.vector_norm(y),
    lambda x, y: x * y.mean(),
    lambda x, y: x.flatten()[:1].sum() + y,
    lambda x, y: torch.stack([x, y]).sum(0),
    lambda x, y: x.clamp(-0.5, 0.5),
    lambda x, y: x.clone().copy_(y),
    lambda x, y: (x <= y).to(x.dtype),
]


@pytest.mark.parametrize("index", range(len(EXPRESSIONS)))
def test_computes_what_each_tensor_does(index):
    generator = torch.Generator().manual_seed(index)
    shapes = [(3, 4), (5,), (), (2, 1, 3)] if index != 13 else [(3, 4), (5,)]
    xs = [torch.randn(shape, generator=generator) for shape in shapes]
    ys = [torch.randn(shape, generator=generator) for shape in shapes]
    results = EXPRESSIONS[index](TensorList(xs), TensorList(ys)).tensors
    for x, y, result in zip(xs, ys, results, strict=True):
        torch.testing.assert_close(result, EXPRESSIONS[index](x, y), equal_nan=True)


def test_matrices_and_tuples():
    xs = [torch.randn(4, 4), torch.randn(4, 4)]
    x = TensorList(xs)
    torch.testing.assert_close((x @ x.mT).tensors[1], xs[1] @ xs[1].mT)
    values, vectors = torch.linalg.eigh(x @ x.mT)
    torch.testing.assert_close(values.tensors[0], torch.linalg.eigh(xs[0] @ xs[0].mT).eigenvalues)
    assert vectors.shape == (4, 4)
    assert x.ndim == 2
    assert len(x) == 2


def test_in_place_operations_change_the_tensors_given():
    x = torch.ones(3)
    TensorList([x]).mul_(2).add_(1)
    assert x.tolist() == [3, 3, 3]


def test_a_name_no_tensor_has_is_an_attribute_error():
    with pytest.raises(AttributeError):
        _ = TensorList([torch.ones(1)]).no_such_name
