"""Batch-size warm-up: small batches at the start, full ones once the first samples were seen.

    B(n) = B_0 + k floor((B - B_0) n / (N k))   for n < N samples seen,   B after

with increments k. Early in training the gradient noise scale, and with it the batch that is still worth its price, is
small and grows (McCandlish et al. 2018, arXiv:1812.06162); GPT-3 therefore raised its batch linearly in the samples
seen (Brown et al. 2020, arXiv:2005.14165, section 2.3 and appendix B), which is exponential in the steps.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError, choose
from trimtab.schedule._shape import count, fraction
from trimtab.schedule._sizes import Batches, Sizes

__all__ = ["BatchSizeSampler", "batch_warmup"]


def batch_warmup(full: int, *, ramp: int, start: int = 1, increment: int = 1, by: str = "samples") -> Sizes:
    """Return a batch size that rises from `start` to `full`.

    Args:
        full: batch size at the end, B, at least `start`.
        ramp: samples (or steps) until the full size, N; 0 starts there.
        start: batch size of the first step, B_0, at least 1.
        increment: the size grows in multiples of it, k, which must divide `full - start`.
        by: what the size is linear in: `"samples"` seen, as GPT-3, or `"steps"`.

    Returns:
        The schedule: from a step to a batch size.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> size = batch_warmup(8, ramp=24, start=2, increment=2)
        >>> [size(step) for step in range(9)]
        [2, 2, 2, 2, 4, 4, 6, 6, 8]

    References:
        Brown et al. 2020, arXiv:2005.14165; McCandlish et al. 2018, arXiv:1812.06162.
    """
    choose("by", by, ("samples", "steps"))
    count("full", full), count("start", start), count("increment", increment), count("ramp", ramp, 0)
    if start > full or (full - start) % increment:
        raise UsageError(f"full must be start plus a multiple of increment, got {full} from {start} by {increment}.")

    def at(progress: int) -> int:
        return full if progress >= ramp else start + increment * ((full - start) * progress // (ramp * increment))

    if by == "steps":
        table = [at(step) for step in range(ramp)]
    else:
        table, seen = [], 0
        while seen < ramp:
            table.append(at(seen))
            seen += table[-1]
    # Steps before the ramp's end that are full already (by = "samples") belong to what comes after.
    ramp_steps = bisect.bisect_left(table, full)
    facts = (("full", full), ("ramp", ramp), ("start", start), ("increment", increment), ("by", by))
    return Sizes("batch-warmup", lambda step: table[step] if step < ramp_steps else full, full, ramp_steps, facts)


class BatchSizeSampler(Sampler[list[int]]):
    """Batches of growing size for a `DataLoader`, resumed exactly: `DataLoader(data, batch_sampler=sampler)`.

    Each epoch is a new permutation of the samples; those that do not fill its last batch wait for the next epoch. The
    sizes go on from one epoch to the next. Which samples a step gets is a pure function of (seed, step).

    Args:
        samples: number of samples of the data.
        sizes: batch size of each step, such as `batch_warmup(256, ramp=10_000)`; its largest at most `samples`.
        seed: of the permutations.
        shuffle: False keeps the samples in order.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> sampler = BatchSizeSampler(6, batch_warmup(3, ramp=6), shuffle=False)
        >>> list(sampler), list(sampler)
        ([[0], [1], [2], [3, 4]], [[0, 1], [2, 3, 4]])
    """

    def __init__(self, samples: int, sizes: Sizes, *, seed: int = 0, shuffle: bool = True) -> None:
        if not isinstance(sizes, Sizes):
            raise UsageError(f"sizes must be a schedule such as batch_warmup(256, ramp=1000), got {sizes!r:.80}.")
        if count("samples", samples) < sizes.full:
            raise UsageError(f"a batch of {sizes.full} needs as many samples, got {samples}: lower the full size.")
        self.samples, self.sizes, self.shuffle = samples, sizes, shuffle
        self.seed = count("seed", seed, 0)
        self._step, self._epoch, self._place = 0, 0, 0

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches that are left of this epoch; the next call yields those of the next epoch."""
        if not self._fits():
            self._epoch, self._place = self._epoch + 1, 0
        order = self._order(self._epoch)
        while self._fits():
            size = self.sizes(self._step)
            batch = order[self._place : self._place + size]
            self._step, self._place = self._step + 1, self._place + size
            yield batch

    def __len__(self) -> int:
        """Return how many batches the next iteration yields."""
        place, step = self._place if self._fits() else 0, self._step
        while place + self.sizes(step) <= self.samples:
            place, step = place + self.sizes(step), step + 1
        return step - self._step

    def _fits(self) -> bool:
        return self._place + self.sizes(self._step) <= self.samples

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.samples))
        # A new epoch is a new stream of its own: seeds that differ by one would share epochs otherwise.
        generator = torch.Generator().manual_seed(self.seed)
        key = int(torch.randint(2**62, (epoch + 1,), generator=generator)[-1])
        return torch.randperm(self.samples, generator=torch.Generator().manual_seed(key)).tolist()

    def state_dict(self, steps: int | None = None) -> dict[str, int]:
        """Return the place in the data.

        Args:
            steps: batches that were trained on. Give it with a loader that fetches ahead (`num_workers`): the sampler
                itself knows only how many batches were drawn.

        Returns:
            Plain numbers.
        """
        return {"step": self._step if steps is None else count("steps", steps, 0), "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place: the next batch is the one that would have followed.

        Args:
            state: what `state_dict` returned, of a sampler with the same samples, sizes and shuffling.
        """
        self.seed = count("seed", state["seed"], 0)
        self._step, self._epoch, self._place = 0, 0, 0
        for step in range(count("step", state["step"], 0)):
            if not self._fits():
                self._epoch, self._place = self._epoch + 1, 0
            self._place += self.sizes(step)
            self._step = step + 1


def _apply(batches: Batches, *, model: nn.Module, steps: int, start: float = 1 / 16, ramp: float = 0.04) -> Batches:
    """Return the batches of a run with fewer samples at its start.

    Args:
        batches: from a step to inputs and targets.
        model: is not looked at.
        steps: of the run.
        start: first batch size as a fraction of the full one.
        ramp: fraction of the run's samples until the full size.

    Returns:
        The cut batches.
    """
    del model
    fraction("start", start), fraction("ramp", ramp)
    made: dict[int, Sizes] = {}

    def cut(step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = batches(step)
        full = len(inputs)
        if full not in made:
            made[full] = batch_warmup(full, ramp=round(ramp * steps * full), start=max(1, round(start * full)))
        size = made[full](step)
        return inputs[:size], targets[:size]

    return cut


CARD = Card(
    name="batch-warmup",
    room="schedule",
    summary="a batch size that rises with the samples seen",
    paper=Paper("An Empirical Model of Large-Batch Training", 2018, arxiv="1812.06162"),
    equation="B(n) = B_0 + k floor((B - B_0) n / (N k)) for n < N samples seen, B after",
    claim=(
        "The batch that is worth its price is small at first and grows as the loss falls; batches that grow with it "
        "reach a loss with fewer samples at nearly the same number of steps."
    ),
    acts_on="batches",
    entry="trimtab.schedule.batch_size_warmup:batch_warmup",
    defaults=(
        Default("start", 1 / 16, "GPT-3 (arXiv:2005.14165): 32k tokens, of 0.5M for its smallest model (recalled)"),
        Default("ramp", 0.04, "GPT-3 (arXiv:2005.14165): the first 4 to 12 of 300 billion tokens (recalled)"),
        Default("by", "samples", "GPT-3 (arXiv:2005.14165)"),
        Default("increment", 1, "ours"),
    ),
    verified={
        "equation": (
            "tests/schedule/test_batch_size_warmup.py::test_equals_a_plain_count_of_samples",
            "tests/schedule/test_batch_size_warmup.py::test_linear_in_samples_is_exponential_in_steps",
            "tests/schedule/test_batch_size_warmup.py::test_resumes_exactly_from_any_step",
        ),
    },
    deviations=(
        "The paper measures the noise scale and adapts the batch to it; this is GPT-3's fixed ramp, in increments.",
        "In a run it takes the first samples of each batch and the number of steps stays: the run sees fewer samples "
        "than one without it.",
    ),
    apply=_apply,
)
