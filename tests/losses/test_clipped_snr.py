"""The clipped-SNR loss against NumPy and its own identities: other predictions, Min-SNR, partitions, edge cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import UsageError
from trimtab.losses import clipped_snr_loss, clipped_snr_weight
from trimtab.testing import run_ranks


def _batch(samples=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x0, prediction = torch.randn(2, samples, 3, 2, generator=generator, dtype=dtype)
    alpha_bar = torch.rand(samples, generator=generator, dtype=dtype) * 0.98 + 0.01
    return prediction, x0, alpha_bar / (1 - alpha_bar)


@given(
    samples=st.integers(1, 7),
    minimum=st.sampled_from([0.0, 0.05, 0.4]),
    maximum=st.sampled_from([0.5, 1.5, 5.0]),
    seed=st.integers(0, 99),
)
def test_equals_numpy(samples, minimum, maximum, seed):
    prediction, x0, snr = _batch(samples, seed)
    expected = []
    for b in range(samples):
        weight = max(minimum, min(maximum, float(snr[b])))
        expected.append(weight * np.mean((prediction[b].numpy() - x0[b].numpy()) ** 2))
    options = {"minimum": minimum, "maximum": maximum}
    each = clipped_snr_loss(prediction, x0, snr, reduction="none", **options)
    np.testing.assert_allclose(each.numpy(), expected, rtol=1e-12)
    assert float(clipped_snr_loss(prediction, x0, snr, **options)) == pytest.approx(np.mean(expected), rel=1e-12)
    assert float(clipped_snr_loss(prediction, x0, snr, reduction="sum", **options)) == pytest.approx(np.sum(expected))


def test_loss_does_not_depend_on_what_the_model_predicts():
    """A prediction of x0 is one of the noise and one of the velocity too, given x_t; the loss must be the same."""
    x0_hat, x0, snr = _batch()
    alpha_bar = snr / (1 + snr)
    alpha, sigma = (value.view(-1, 1, 1) for value in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=x0.dtype)
    x_t = alpha * x0 + sigma * noise
    noise_hat = (x_t - alpha * x0_hat) / sigma
    v, v_hat = alpha * noise - sigma * x0, alpha * noise_hat - sigma * x0_hat
    loss = clipped_snr_loss(x0_hat, x0, snr)
    torch.testing.assert_close(clipped_snr_loss(noise_hat, noise, snr, predicts="epsilon"), loss)
    torch.testing.assert_close(clipped_snr_loss(v_hat, v, snr, predicts="v"), loss)


def test_min_snr_is_a_special_case():
    """Min-SNR-5: min(SNR, 5) / SNR on the noise, min(SNR, 5) / (SNR + 1) on the velocity (Hang et al. 2023)."""
    snr = torch.logspace(-3, 3, 50, dtype=torch.float64)
    weight = clipped_snr_weight(snr, minimum=0.0, maximum=5.0, predicts="epsilon")
    np.testing.assert_allclose(weight.numpy(), np.minimum(snr.numpy(), 5) / snr.numpy(), rtol=1e-12)
    weight = clipped_snr_weight(snr, minimum=0.0, maximum=5.0, predicts="v")
    np.testing.assert_allclose(weight.numpy(), np.minimum(snr.numpy(), 5) / (snr.numpy() + 1), rtol=1e-12)


def test_bounds_of_the_paper():
    snr = torch.tensor([0.0, 0.04, 0.05, 0.7, 1.5, 80.0, float("inf")])
    expected = torch.tensor([0.05, 0.05, 0.05, 0.7, 1.5, 1.5, 1.5])
    assert torch.equal(clipped_snr_weight(snr), expected)


@pytest.mark.parametrize("predicts", ["x0", "epsilon", "v"])
def test_gradcheck(predicts):
    prediction, x0, snr = _batch(3)
    prediction.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: clipped_snr_loss(p, x0, snr, predicts=predicts), (prediction,))


def test_half_precision_is_computed_in_float32():
    prediction, x0, snr = _batch(64)
    exact = clipped_snr_loss(prediction.bfloat16().double(), x0.bfloat16().double(), snr.bfloat16().double())
    loss = clipped_snr_loss(prediction.bfloat16(), x0.bfloat16(), snr.bfloat16())
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact), rel=1e-6)


def _gradient(prediction, x0, snr, **options):
    leaf = prediction.clone().requires_grad_()
    clipped_snr_loss(leaf, x0, snr, **options).backward()
    return leaf.grad


def test_micro_batches_and_ranks_add_up():
    prediction, x0, snr = _batch(8)
    valid = torch.tensor([True, False, True, True, False, False, False, True])
    whole = _gradient(prediction, x0, snr, valid=valid)
    parts = [slice(0, 3), slice(3, 7), slice(7, 8)]
    given = [_gradient(prediction[p], x0[p], snr[p], valid=valid[p], denominator=4) for p in parts]
    torch.testing.assert_close(torch.cat(given), whole)

    def work(rank):
        p = slice(5 * rank, 5 * rank + (5 if rank == 0 else 3))
        count = valid[p].sum().double()
        dist.all_reduce(count)
        return _gradient(prediction[p], x0[p], snr[p], valid=valid[p], denominator=count)

    torch.testing.assert_close(torch.cat(run_ranks(work)), whole)


def test_samples_that_do_not_count_may_hold_anything():
    prediction, x0, snr = _batch(3)
    prediction[1] = float("inf")
    snr[1] = float("nan")
    valid = torch.tensor([True, False, True])
    gradient = _gradient(prediction, x0, snr, valid=valid)
    assert gradient.isfinite().all()
    assert not gradient[1].any()
    assert _gradient(prediction, x0, snr, valid=torch.zeros(3, dtype=torch.bool)).abs().sum() == 0
    empty = torch.zeros(0, 3, requires_grad=True)
    loss = clipped_snr_loss(empty, torch.zeros(0, 3), torch.zeros(0))
    loss.backward()
    assert loss == 0
    assert empty.grad.shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"minimum": 2.0}, r"got \[2\.0, 1\.5\]"),
        ({"minimum": -1.0}, "0 <= minimum"),
        ({"predicts": "x_0"}, "unknown prediction 'x_0'. Did you mean 'x0'"),
        ({"snr": torch.zeros(3, 1)}, "one value a sample"),
        ({"snr": torch.zeros(3, dtype=torch.long)}, "not the times"),
        ({"target": torch.zeros(3, 1)}, "of one shape"),
        ({"valid": torch.zeros(3)}, "valid must be boolean"),
        ({"reduction": "sum", "denominator": 2}, "leave one of them out"),
    ],
)
def test_wrong_arguments(change, text):
    arguments = {"prediction": torch.zeros(3, 2), "target": torch.zeros(3, 2), "snr": torch.ones(3), **change}
    with pytest.raises(UsageError, match=text):
        clipped_snr_loss(**arguments)
