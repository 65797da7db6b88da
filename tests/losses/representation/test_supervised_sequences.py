"""SupCL-Seq against loops in NumPy over the definition, its gradient and a single process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.errors import UsageError
from trimtab.losses import dropout_views, supcl_seq_loss
from trimtab.testing import run_ranks


def _views(passes=3, size=5, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(passes, size, width, dtype=torch.float64, generator=generator)


def _numpy_values(views, labels, temperature):
    """The supervised contrastive loss of each view: the mean over its positives of -log of their softmax share."""
    passes, size, _ = views.shape
    z = [(views[v, b] / np.linalg.norm(views[v, b]), labels[b]) for v in range(passes) for b in range(size)]
    values = []
    for i, (anchor, label) in enumerate(z):
        exponentials = {j: np.exp(anchor @ other / temperature) for j, (other, _) in enumerate(z) if j != i}
        total = sum(exponentials.values())
        positives = [j for j in exponentials if z[j][1] == label]
        terms = [-np.log(exponentials[j] / total) for j in positives]
        values.append(np.mean(terms) if terms else 0.0)
    return np.array(values).reshape(passes, size)


@pytest.mark.parametrize("labels", [[0, 1, 0, 2, 1], [0, 1, 2, 3, 4], [3, 3, 3, 3, 3]])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_equals_numpy(labels, temperature):
    views = _views()
    found = supcl_seq_loss(views, torch.tensor(labels), temperature=temperature, reduction="none")
    expected = _numpy_values(views.numpy(), labels, temperature)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)
    mean = supcl_seq_loss(views, torch.tensor(labels), temperature=temperature)
    assert mean.item() == pytest.approx(expected.mean())


def test_views_without_positives_do_not_count():
    views, labels = _views(1), torch.tensor([0, 1, 0, 2, 3])
    views.requires_grad_()
    each = supcl_seq_loss(views, labels, reduction="none")
    assert (each == 0).tolist() == [[False, True, False, True, True]]
    loss = supcl_seq_loss(views, labels)
    torch.testing.assert_close(loss, each.sum() / 2)
    loss.backward()
    alone = torch.arange(5)
    views.grad = None
    nothing = supcl_seq_loss(views, alone)
    nothing.backward()
    assert nothing.item() == 0
    assert not views.grad.any()
    assert supcl_seq_loss(torch.zeros(2, 0, 3), torch.zeros(0)).item() == 0


def test_gradient_is_softmax_less_the_positives():
    """In the scores s_ib = z_i z_b / tau of views of length 1: dL_i/ds_ib = softmax over b != i less 1 / |P(i)|."""
    z = nn.functional.normalize(_views(2, 3), dim=-1)
    labels, tau = [0, 1, 0], 0.3
    flat = z.reshape(6, 4).numpy()
    scores = flat @ flat.T / tau
    classes = np.tile(labels, 2)
    matrix = np.zeros((6, 6))
    for i in range(6):
        others = [b for b in range(6) if b != i]
        soft = np.exp(scores[i, others])
        matrix[i, others] = soft / soft.sum()
        positives = [b for b in others if classes[b] == classes[i]]
        matrix[i, positives] -= 1 / len(positives)
    matrix /= 6 * tau
    expected = matrix @ flat + matrix.T @ flat
    # The views are normalised in the loss: only the part of the gradient across each view is left.
    expected -= (expected * flat).sum(1, keepdims=True) * flat
    z.requires_grad_()
    supcl_seq_loss(z, torch.tensor(labels), temperature=tau).backward()
    np.testing.assert_allclose(z.grad.reshape(6, 4).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_gradcheck():
    views = _views(2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: supcl_seq_loss(z, torch.tensor([0, 1, 0, 2]), temperature=0.5), (views,))


def test_ranks_equal_the_single_process():
    views, labels = _views(2, 7), torch.tensor([0, 1, 0, 2, 1, 1, 5])
    weight = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def step(x, y, **options):
        w = weight.clone().requires_grad_()
        loss = supcl_seq_loss(x @ w, y, temperature=0.5, **options)
        loss.backward()
        return loss.detach(), w.grad

    def work(rank):
        mine = slice(0, 3) if rank == 0 else slice(3, None)
        loss, gradient = step(views[:, mine], labels[mine], all_ranks=True)
        torch.distributed.all_reduce(gradient)
        return loss, gradient / 2

    whole, expected = step(views, labels)
    for loss, gradient in run_ranks(work):
        torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_computed_in_float32_or_better(dtype):
    views, labels = _views().to(dtype).requires_grad_(), torch.tensor([0, 1, 0, 2, 1])
    loss = supcl_seq_loss(views, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), supcl_seq_loss(views.detach().double(), labels), rtol=1e-5, atol=1e-5)
    loss.backward()
    assert views.grad.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(supcl_seq_loss(views, labels), loss)


def test_dropout_views_differ_and_leave_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 4), nn.Dropout(0.3))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    seen = []
    views = dropout_views(model, lambda: seen.append((model[1].p, model[4].p)) or model(x), dropouts=(0.0, 0.5))
    assert seen == [(0.1, 0.3), (0.0, 0.0), (0.5, 0.5)]
    assert (model[1].p, model[4].p) == (0.1, 0.3)
    assert views.shape == (3, 5, 4)
    torch.testing.assert_close(views[1], model[3](model[2](model[0](x))))
    assert not torch.equal(views[0], views[1])
    with pytest.raises(ZeroDivisionError):
        dropout_views(model, lambda: x / (1 // int(model[1].p < 0.5)), dropouts=(0.5,))
    assert model[1].p == 0.1
    attention = nn.MultiheadAttention(4, 1, dropout=0.2)
    dropout_views(attention, lambda: seen.append(attention.dropout) or torch.zeros(1, 1), dropouts=(0.4,))
    assert seen[-2:] == [0.2, 0.4]
    assert attention.dropout == 0.2


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda z: supcl_seq_loss(z, torch.zeros(2)), r"labels must be one class for each of 3 samples, got \(2,\)"),
        (lambda z: supcl_seq_loss(z[0], torch.zeros(3)), r"views must be embeddings of shape \[V, B, D\]"),
        (lambda z: supcl_seq_loss(z, torch.zeros(3), temperature=0.0), "temperature must be above 0, got 0.0"),
        (lambda z: dropout_views(nn.Linear(1, 1), lambda: z), "no dropout layer in training mode"),
        (lambda z: dropout_views(nn.Dropout().eval(), lambda: z), "no dropout layer in training mode"),
        (lambda z: dropout_views(nn.Dropout(), lambda: z, dropouts=(1.0,)), r"dropouts must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(UsageError, match=text):
        call(torch.ones(2, 3, 4))
