"""Sequence-length warm-up: short sequences at the start of a language model's training.

    L(t) = L_s + (L_e - L_s) min(t / T, 1)^(1/d),   rounded down to a multiple of 8

with d = 1 (linear) or the root of another degree; each step trains on the first L(t) tokens of its sequences.
Li et al. 2022 (arXiv:2108.06084) find that long sequences early in training give the extreme gradient variances that
come with loss spikes and divergence at large learning rates.
"""

from __future__ import annotations

from torch import Tensor, nn

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError
from trimtab.schedule._shape import count, fraction
from trimtab.schedule._sizes import Batches, Sizes

__all__ = ["length_warmup", "truncate"]


def length_warmup(full: int, *, ramp: int, start: int = 8, degree: float = 1.0, multiple: int = 8) -> Sizes:
    """Return a sequence length that rises from `start` to `full`.

    Args:
        full: length at the end, L_e.
        ramp: steps until the full length, T; 0 starts there.
        start: first length, L_s, in [`multiple`, `full`].
        degree: of the root, d, at least 1; 1 is linear.
        multiple: lengths are rounded down to multiples of it, but for the full one.

    Returns:
        The schedule: from a step to a length.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> length = length_warmup(64, ramp=100)
        >>> [length(step) for step in (0, 14, 15, 50, 99, 100)]
        [8, 8, 16, 32, 56, 64]

    References:
        Li et al. 2022, arXiv:2108.06084; code in https://github.com/deepspeedai/DeepSpeed.
    """
    count("full", full), count("ramp", ramp, 0), count("start", start), count("multiple", multiple)
    if not multiple <= start <= full:
        raise UsageError(f"start must be in [multiple, full], here [{multiple}, {full}], got {start}.")
    if isinstance(degree, bool) or not isinstance(degree, (int, float)) or not 1 <= degree < float("inf"):
        raise UsageError(f"degree must be at least 1 and finite, got {degree!r}: 1 is linear, 2 the square root.")

    def length(step: int) -> int:
        if step >= ramp:
            return full
        reached = int(start + (full - start) * (step / ramp) ** (1 / degree))
        return min(full, reached - reached % multiple)

    facts = (("full", full), ("ramp", ramp), ("start", start), ("degree", degree), ("multiple", multiple))
    return Sizes("length-warmup", length, full, ramp, facts)


def truncate(inputs: Tensor, targets: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the first tokens of a batch of sequences.

    Args:
        inputs: [B, L, ...].
        targets: [B, L, ...], a target for each token.
        length: tokens to keep, at least 1.

    Returns:
        Views of inputs and targets, [B, length, ...].

    Raises:
        UsageError: if the targets are not one for each token.

    Example:
        >>> import torch
        >>> tokens = torch.arange(6).view(2, 3)
        >>> truncate(tokens, tokens + 1, 2)[1].tolist()
        [[1, 2], [4, 5]]
    """
    if inputs.dim() < 2 or inputs.shape[:2] != targets.shape[:2]:
        raise UsageError(
            "length-warmup needs token batches with a target for each token, [B, L] both, got inputs "
            f"{list(inputs.shape)} and targets {list(targets.shape)}."
        )
    count("length", length)
    return inputs[:, :length], targets[:, :length]


def _apply(
    batches: Batches, *, model: nn.Module, steps: int, start: int = 8, ramp: float = 0.3, degree: float = 1.0
) -> Batches:
    """Return the batches of a run with shorter sequences at its start.

    Args:
        batches: from a step to inputs and targets, [B, L] both.
        model: is not looked at.
        steps: of the run.
        start: first length; the sequences' own where that is shorter.
        ramp: fraction of the steps until the full length.
        degree: of the root; 1 is linear.

    Returns:
        The truncated batches.
    """
    del model
    fraction("ramp", ramp)

    def cut(step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = batches(step)
        full = inputs.shape[1] if inputs.dim() > 1 else 1
        first = min(start, full)
        schedule = length_warmup(full, ramp=round(ramp * steps), start=first, degree=degree, multiple=min(8, first))
        return truncate(inputs, targets, schedule(step))

    return cut


CARD = Card(
    name="length-warmup",
    room="schedule",
    summary="short sequences first: their length rises over the first steps",
    paper=Paper(
        "The Stability-Efficiency Dilemma: Investigating Sequence Length Warmup for Training GPT Models",
        2022,
        arxiv="2108.06084",
        code="https://github.com/deepspeedai/DeepSpeed",
    ),
    equation="L(t) = L_s + (L_e - L_s) min(t / T, 1)^(1/d), rounded down to a multiple of 8",
    claim=(
        "Long sequences early in training bring extreme gradient variance; with length warm-up GPT-2 trains stably "
        "with 8 times the batch and 4 times the learning rate."
    ),
    acts_on="batches",
    entry="trimtab.schedule.sequence_length_warmup:length_warmup",
    treats={"loss-spike": 5, "gradient-spike": 5, "loss-divergence": 4},
    defaults=(
        Default("start", 8, "paper: 8 for the 117M model, 64 for the 1.5B one (recalled)"),
        Default("ramp", 0.3, "ours: the paper tunes T to the longest without large early fluctuations of the loss"),
        Default("degree", 1.0, "paper: linear; the root is in the authors' code"),
        Default("multiple", 8, "authors' code, curriculum_scheduler.py"),
    ),
    verified={
        "equation": (
            "tests/schedule/test_sequence_length_warmup.py::test_equals_the_pacing_function",
            "tests/schedule/test_sequence_length_warmup.py::test_a_step_trains_on_the_first_tokens",
        ),
    },
    deviations=(
        "At full length the last multiple is not rounded: contexts that are no multiple of 8 are trained on whole.",
        "In a run the number of steps stays, so that it sees fewer tokens; the paper compares at equal tokens, and "
        "lets the learning rate decay by tokens.",
    ),
    apply=_apply,
)
