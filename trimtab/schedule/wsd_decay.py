"""Warm-up, stable, decay (WSD): a constant rate that can be cooled down from any of its checkpoints.

    factor(t) = (t + 1) / (w + 1)                        for t < w
    factor(t) = 1                                        for w <= t < T - D
    factor(t) = floor + (1 - floor) d((t - T + D) / D)   for T - D <= t <= T,  and its last value after

with d(x) = 1 - x, 1 - sqrt(x) or the cosine, or the exponential floor^x. Hu et al. 2024 (MiniCPM, arXiv:2404.06395)
decay exponentially over the last tenth; Hägele et al. 2024 (arXiv:2405.18392) find 1 - sqrt better.
"""

from __future__ import annotations

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError
from trimtab.schedule._shape import Shape, decay_form, falling, rising, spans, whole

__all__ = ["WSD", "wsd"]


class WSD(Shape):
    """A warm-up-stable-decay schedule, which can branch; made by `wsd`."""

    def branch(self, at: int, decay: int, *, form: str | None = None, floor: float | None = None) -> WSD:
        """Return the schedule of a run that leaves the stable phase at a step and decays.

        Up to `at` it has the factors of this schedule, so that a checkpoint written there goes on with it as if it had
        been meant to; this schedule, and the run that follows it, stay as they are.

        Args:
            at: step of the checkpoint: the number of steps taken, in the stable phase.
            decay: steps of the decay, at least 1.
            form: of the decay; default this schedule's.
            floor: last factor; default this schedule's.

        Returns:
            The branch, which ends at step `at + decay`.

        Raises:
            UsageError: if `at` is not in the stable phase.
        """
        facts = dict(self.facts)
        warmup, stable_until = facts["warmup"], facts["total"] - facts["decay"]
        if not warmup <= whole("at", at) <= stable_until:
            raise UsageError(f"at must be in the stable phase, steps {warmup} to {stable_until}, got {at}.")
        return wsd(
            at + whole("decay", decay, 1),
            warmup=warmup,
            decay=decay,
            form=facts["form"] if form is None else form,
            floor=facts["floor"] if floor is None else floor,
        )


def wsd(total: int, *, warmup: int = 0, decay: int | None = None, form: str = "1-sqrt", floor: float = 0.0) -> WSD:
    """Return a warm-up-stable-decay schedule.

    Args:
        total: steps in all, at least 1.
        warmup: steps of linear warm-up.
        decay: steps of the decay at the end; default a fifth of all, rounded.
        form: of the decay: "linear", "1-sqrt", "cosine" or "exponential".
        floor: last factor, in [0, 1]; above 0 for the exponential form.

    Returns:
        The schedule, with `branch` to fork a decay run from any step of the stable phase.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> schedule = wsd(100, warmup=10, decay=20, form="linear")
        >>> [schedule(step) for step in (10, 79, 80, 90, 100, 200)]
        [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
        >>> early = schedule.branch(50, decay=10)
        >>> early(49) == schedule(49), early(55), early.total
        (True, 0.5, 60)

    References:
        Hu et al. 2024, arXiv:2404.06395; Hägele et al. 2024, arXiv:2405.18392.
    """
    whole("total", total, 1)
    cooled = round(0.2 * total) if decay is None else decay
    spans(total, warmup=warmup, decay=cooled)
    form, floor = decay_form(form, floor)

    def factor(step: int) -> float:
        if step < warmup:
            return rising(step, warmup)
        if step < total - cooled or not cooled:
            return 1.0
        return falling(form, min(1.0, (step - (total - cooled)) / cooled), floor)

    facts = (("total", total), ("warmup", warmup), ("decay", cooled), ("form", form), ("floor", floor))
    return WSD("wsd", factor, total, facts)


CARD = Card(
    name="wsd",
    room="schedule",
    summary="warm-up, a long constant phase, and a short decay that can branch off any checkpoint",
    paper=Paper(
        "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies",
        2024,
        arxiv="2404.06395",
    ),
    equation="factor = 1 until T - D, then floor + (1 - floor) d((t - T + D) / D), d(x) = 1 - x | 1 - sqrt(x)",
    claim="The loss drops sharply in the decay and ends as low as a cosine run of that length, from any checkpoint.",
    acts_on="settings",
    entry="trimtab.schedule.wsd_decay:wsd",
    defaults=(
        Default("warmup", 0, "ours: as the other schedules"),
        Default("decay", None, "Hägele et al. 2024: a fifth of the steps (MiniCPM: a tenth)"),
        Default("form", "1-sqrt", "Hägele et al. 2024 (MiniCPM: exponential)"),
        Default("floor", 0.0, "Hägele et al. 2024"),
    ),
    verified={
        "equation": (
            "tests/schedule/test_wsd_decay.py::test_closed_form",
            "tests/schedule/test_wsd_decay.py::test_a_branch_continues_a_checkpoint_exactly",
        ),
    },
    deviations=("The decay's form, length and floor default to Hägele et al.'s, not to MiniCPM's.",),
)
