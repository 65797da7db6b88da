"""Progressive learning: algorithm 1 in exact fractions, the code's departure from it, and resizing against Pillow."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trimtab.catalogue import method
from trimtab.errors import UsageError
from trimtab.schedule import mixup, progressive_stages, resize_images, set_dropout
from trimtab.workloads import train, workload


@given(first=st.integers(4, 200), more=st.integers(0, 300), M=st.integers(2, 8), total=st.integers(8, 500))
def test_equals_algorithm_1(first, more, M, total):
    at = progressive_stages(total, sizes=(first, first + more), stages=M, regularization={"a": (1, 4), "b": (0.5, 0.5)})
    trained = dict.fromkeys(range(M), 0)
    for step in range(total):
        stage = at(step)
        trained[stage.index] += 1
        i = Fraction(stage.index, M - 1)
        assert abs(stage.size - (first + more * i)) <= 0.5 + 1e-9
        assert stage.strengths["a"] == pytest.approx(float(1 + 3 * i))
        assert stage.strengths["b"] == 0.5
        assert at.stages[stage.index].first <= step
    # Each stage trains for total / M steps, up to the one that does not divide.
    assert all(abs(steps - total / M) < 1 for steps in trained.values())
    assert (at(0).size, at(total - 1).size, at(10 * total).size) == (first, first + more, first + more)


def test_code_and_paper_differ_by_a_stage():
    paper, code = (progressive_stages(100, follow=follow).stages for follow in ("paper", "code"))
    assert [stage.size for stage in paper] == [128, 185, 243, 300]
    assert [stage.size for stage in code] == [171, 214, 257, 300]
    assert [stage.strengths for stage in paper] == [stage.strengths for stage in code]
    for name, (low, high) in {"dropout": (0.1, 0.3), "randaugment": (5, 15), "mixup": (0, 0)}.items():
        assert [stage.strengths[name] for stage in paper] == pytest.approx(np.linspace(low, high, 4))


def test_downsizing_equals_pillow():
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).random((24, 24)).astype(np.float32)
    expected = np.asarray(image.fromarray(pixels).resize((10, 10), image.BILINEAR))
    resized = resize_images(torch.from_numpy(pixels)[None, None], 10)[0, 0]
    np.testing.assert_allclose(resized.numpy(), expected, atol=1e-5)


def test_flat_images_and_kept_sizes():
    x = torch.rand(3, 2 * 36, generator=torch.Generator().manual_seed(0))
    small = resize_images(x, 4, shape=(2, 6, 6))
    assert torch.equal(small.view(3, 2, 4, 4), resize_images(x.view(3, 2, 6, 6), 4))
    kept = resize_images(x, 3, shape=(2, 6, 6), keep_size=True)
    assert kept.shape == x.shape
    assert kept.view(3, -1).std() < 0.8 * x.std()
    assert torch.equal(resize_images(x, 6, shape=(2, 6, 6)), x)


def test_mixup_is_a_weighted_mean_with_the_reversed_batch():
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    mixed, probabilities = mixup(x, y, 0.5, classes=4, seed=7)
    for i in range(6):
        j = 5 - i
        # The weight is read from the first pixel; all others and the targets must agree with it.
        w = ((mixed[i, 0] - x[j, 0]) / (x[i, 0] - x[j, 0])).item()
        assert 0.5 <= w <= 1
        torch.testing.assert_close(mixed[i], w * x[i] + (1 - w) * x[j])
        expected = torch.zeros(4, dtype=torch.float64)
        expected[y[i]] += w
        expected[y[j]] += 1 - w
        torch.testing.assert_close(probabilities[i], expected)
    assert torch.equal(mixup(x, y, 0.5, classes=4, seed=7)[0], mixed)
    assert not torch.equal(mixup(x, y, 0.5, classes=4, seed=8)[0], mixed)
    assert torch.equal(mixup(x, y, 0, classes=4, seed=7)[0], x)
    # E max(b, 1 - b) = 0.5 + E|b - 0.5|, which for Beta(0.5, 0.5) is 0.5 + 1 / pi.
    ones, zeros = torch.ones(4000, 1), torch.zeros(4000, 1)
    strong = mixup(torch.cat([ones, zeros]), torch.zeros(8000).long(), 0.5, classes=1, seed=0)[0][:4000]
    assert strong.mean().item() == pytest.approx(0.5 + 1 / math.pi, abs=0.01)


def test_set_dropout():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Sequential(nn.Dropout2d(0.1)))
    assert set_dropout(model, 0.25) == 2
    assert [module.p for module in model.modules() if hasattr(module, "p")] == [0.25, 0.25]


def test_a_run_raises_size_and_dropout_together():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout(0.3))
    images = torch.rand(4, 1, 30, 30, generator=torch.Generator().manual_seed(0))
    batches = method("progressive-learning").apply(lambda _: (images, torch.zeros(4)), model=model, steps=40)
    seen = []
    for step in (0, 10, 20, 30):
        inputs, _ = batches(step)
        seen.append((inputs.shape[-1], round(model[1].p, 4)))
    assert seen == [(13, 0.1), (19, 0.1667), (24, 0.2333), (30, 0.3)]
    assert torch.equal(batches(39)[0], images)


def test_a_workload_trains():
    digits = workload("digits-vit")
    assert not train(digits, digits.defaults.replace(steps=8, remedies=("progressive-learning",))).diverged


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: progressive_stages(3), "total must be a whole number of steps, at least 4, got 3"),
        (lambda: progressive_stages(9, sizes=(9, 8)), "sizes must rise, got 9 to 8"),
        (lambda: progressive_stages(9, follow="both"), "unknown follow 'both'"),
        (lambda: resize_images(torch.ones(2, 64), 4), r"images must be \[B, C, H, W\], got \[2, 64\]"),
        (lambda: resize_images(torch.ones(2, 64), 4, shape=(1, 8, 9)), "shape must be the C, H, W of images"),
        (lambda: set_dropout(nn.Identity(), 1.5), r"p must be in \[0, 1\], got 1.5"),
        (lambda: mixup(torch.ones(1, 1), torch.zeros(1).long(), -1, classes=2, seed=0), "alpha must be at least 0"),
        (
            lambda: method("progressive-learning").apply(
                lambda _: (torch.ones(2, 63), torch.zeros(2)), model=nn.Identity(), steps=9
            )(0),
            "are not images",
        ),
    ],
)
def test_wrong_use_is_one_line(call, text):
    with pytest.raises(UsageError, match=text):
        call()
