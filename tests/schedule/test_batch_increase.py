"""A growing batch in place of a decaying rate: the ratio of rate and batch is that of the decay, at every step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import UsageError
from trimtab.schedule import cosine, increase_batch, inverse_sqrt, linear, wsd
from trimtab.schedule._shape import Shape
from trimtab.testing import ScheduleTestCase


class TestRate(ScheduleTestCase):
    @staticmethod
    def schedule():
        return increase_batch(linear(40, warmup=5), 8, largest=100)[1]


@given(batch=st.integers(1, 64), times=st.floats(1, 50), warmup=st.integers(0, 20), kind=st.sampled_from("lcw"))
def test_rate_over_batch_is_that_of_the_decay(batch, times, warmup, kind):
    decay = {"l": linear, "c": cosine, "w": wsd}[kind](60, warmup=warmup)
    largest = int(batch * times)
    sizes, rate = increase_batch(decay, batch, largest=largest)
    for step in range(80):
        assert rate(step) / sizes(step) == pytest.approx(decay(step) / batch, rel=1e-12)
        assert batch <= sizes(step) <= largest
        if step >= warmup and sizes(step) < largest:
            # The rate stays what it was, but for what a whole batch size leaves over.
            assert batch / (batch + 1) < rate(step) <= 1 + 1e-11
    assert all(sizes(step) <= sizes(step + 1) for step in range(80))


def test_a_warm_up_from_0_is_one_of_the_rate():
    decay = Shape("rises", lambda step: min(1.0, step / 4) * 0.5 ** (max(0, step - 6) // 2), 12, ())
    sizes, rate = increase_batch(decay, 8, largest=32)
    assert [sizes(step) for step in range(11)] == [8, 8, 8, 8, 8, 8, 8, 8, 16, 16, 32]
    assert [rate(step) for step in (0, 2, 4, 10)] == [0, 0.5, 1, 1]
    assert sizes.ramp == 10


def test_a_step_decay_becomes_steps_of_the_batch():
    """The paper's figure 1: learning rates divided by 5 at each milestone become batches multiplied by 5."""
    decay = Shape("steps", lambda step: 0.2 ** min(3, step // 60), 200, ())
    sizes, rate = increase_batch(decay, 128, largest=128 * 125)
    assert [sizes(step) for step in (0, 59, 60, 120, 180, 199)] == [128, 128, 640, 3200, 16000, 16000]
    assert [rate(step) for step in (0, 60, 120, 180)] == pytest.approx([1, 1, 1, 1], abs=2e-3)
    # "hybrid": the batch grows once, then the rate decays.
    sizes, rate = increase_batch(decay, 128, largest=640)
    assert [(sizes(step), rate(step)) for step in (60, 120, 180)] == [
        (640, pytest.approx(1)),
        (640, pytest.approx(0.2)),
        (640, pytest.approx(0.04)),
    ]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: increase_batch(linear(10), 8, largest=4), "largest must be at least batch, 8, got 4"),
        (lambda: increase_batch(inverse_sqrt(warmup=10), 8, largest=16), "decay must be a schedule with an end"),
        (lambda: increase_batch(linear(10), 0, largest=4), "batch must be a whole number, at least 1, got 0"),
    ],
)
def test_wrong_use_is_one_line(call, text):
    with pytest.raises(UsageError, match=text):
        call()
