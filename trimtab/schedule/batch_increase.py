"""A growing batch in place of a decaying learning rate.

    B(t) = B_0 / f(t),  lr(t) = lr_0      while B_0 / f(t) <= B_max
    B(t) = B_max,       lr(t) = lr_0 f(t) B_max / B_0   after

with f the decay that the learning rate would have had. SGD's noise scale is lr N / B (N samples), so that both ways
anneal it alike, and the growing batch needs fewer, more parallel steps (Smith et al. 2018, arXiv:1711.00489).
"""

from __future__ import annotations

from trimtab.card import Card, Paper
from trimtab.errors import UsageError
from trimtab.schedule._shape import Shape, count
from trimtab.schedule._sizes import Sizes

__all__ = ["increase_batch"]


def increase_batch(decay: Shape, batch: int, *, largest: int) -> tuple[Sizes, Shape]:
    """Turn a learning-rate decay into batch sizes, and what is left of it into a learning rate.

    At every step lr(t) / B(t) is that of the decay with the first batch size, exactly: what a whole batch size cannot
    give, the learning rate does. A warm-up in the schedule stays one of the learning rate.

    Args:
        decay: the learning-rate schedule to replace, one with an end, such as `cosine(1000)`.
        batch: size of the first batch, B_0.
        largest: size of the largest batch, B_max, at least `batch`.

    Returns:
        Batch sizes, for a `BatchSizeSampler`, and the schedule of the learning rate, for a `ScheduleLR`.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> halved = Shape("halved", lambda step: 0.5 ** (step // 2), 6, ())
        >>> sizes, rate = increase_batch(halved, 8, largest=16)
        >>> [(sizes(step), rate(step)) for step in (0, 2, 4, 6)]
        [(8, 1.0), (16, 1.0), (16, 0.5), (16, 0.25)]

    References:
        Smith et al. 2018, arXiv:1711.00489.
    """
    if not isinstance(decay, Shape) or decay.total is None:
        raise UsageError("decay must be a schedule with an end, such as cosine(1000).")
    if count("largest", largest) < count("batch", batch):
        raise UsageError(f"largest must be at least batch, {batch}, got {largest}.")
    total = decay.total
    factors = [decay(step) for step in range(total + 1)]
    table, peak = [], 0.0
    for factor in factors:
        peak = max(peak, factor)
        if not peak:  # a warm-up from 0
            table.append(batch)
            continue
        # 1 / 0.04 in floating point may end just below 25.
        table.append(largest if factor * largest <= peak * batch else int(batch * (peak / factor) * (1 + 1e-12)))

    def size(step: int) -> int:
        return table[min(step, total)]

    def rate(step: int) -> float:
        return factors[min(step, total)] * size(step) / batch

    facts = (("decay", decay.name), *decay.facts, ("batch", batch), ("largest", largest))
    ramp = table.index(max(table))
    return Sizes("batch-increase", size, max(table), ramp, facts), Shape("batch-increase", rate, total, facts)


CARD = Card(
    name="batch-increase",
    room="schedule",
    summary="a growing batch where the learning rate would have decayed",
    paper=Paper("Don't Decay the Learning Rate, Increase the Batch Size", 2018, arxiv="1711.00489"),
    equation="B(t) = min(B_max, B_0 / f(t)), lr(t) = lr_0 f(t) B(t) / B_0",
    claim="The same learning curve on training and test sets as with a decaying rate, in fewer parameter updates.",
    acts_on="run",
    entry="trimtab.schedule.batch_increase:increase_batch",
    defaults=(),
    verified={
        "equation": (
            "tests/schedule/test_batch_increase.py::test_rate_over_batch_is_that_of_the_decay",
            "tests/schedule/test_batch_increase.py::test_a_step_decay_becomes_steps_of_the_batch",
        ),
    },
    deviations=(
        "Batch sizes are whole: what rounding down leaves is made up by the learning rate.",
        "The schedule counts steps. The paper's decays are by epochs: with growing batches an epoch has fewer steps, "
        "and the schedule given must be in the steps that will be taken.",
        "Measured (benchmarks/curricula.py, digits-mlp, SGD, 15 epochs, n=3): accuracy 97.6 % and 97.5 %, no evidence "
        "of a difference, with 282 updates in place of 630.",
        "For vanilla SGD; with momentum the paper's noise scale also has 1 / (1 - momentum), which is constant here.",
    ),
)
