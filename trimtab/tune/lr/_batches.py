"""Batches of a run in their order: looked at ahead, taken, and found again after a resume."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trimtab.errors import UsageError
from trimtab.record.checkpoint import rng_state, set_rng_state


class Batches:
    """The batches of a function of the step, or of a loader that is iterated again and again.

    Looking ahead at a loader keeps the batches seen until they are taken. A loader draws from torch's random generators
    as they were when this was made, apart from those of training, so that looking ahead never changes a run. For a
    resume it is brought to the start of its epoch, by torch's generators and those of its samplers, and skips what was
    taken; random numbers of other libraries are not followed.

    Args:
        source: a function from the step to its batch, or an iterable that can be iterated again and again.

    Raises:
        UsageError: if the loader can be iterated only once.
    """

    def __init__(self, source: Callable[[int], Any] | Iterable[Any]) -> None:
        if hasattr(source, "__next__"):
            raise UsageError("the loader can be iterated only once, and would lose batches: give a DataLoader.")
        self.source = source
        self.step = 0
        self._random = rng_state()
        self._epoch: dict[str, Any] = {}
        self._place = 0
        self._iterator: Iterator[Any] | None = None
        self._seen: deque[tuple[Any, dict[str, Any], int]] = deque()
        self._taken_at: tuple[dict[str, Any], int] = (self._start(), 0)

    def take(self) -> Any:
        """Return the next batch."""
        if callable(self.source):
            batch = self.source(self.step)
        else:
            self._look(1)
            batch, epoch, place = self._seen.popleft()
            self._taken_at = (epoch, place)
        self.step += 1
        return batch

    def ahead(self) -> Iterator[Any]:
        """Yield the batches to come, without taking them."""
        place = 0
        while True:
            if callable(self.source):
                yield self.source(self.step + place)
            else:
                self._look(place + 1)
                yield self._seen[place][0]
            place += 1

    def state_dict(self) -> dict[str, Any]:
        """Return where the batches stand."""
        if callable(self.source):
            return {"step": self.step}
        epoch, place = self._taken_at
        return {"step": self.step, "epoch": epoch, "place": place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go where a state was taken, loading and leaving out the batches before it in its epoch."""
        self.step = int(state["step"])
        if callable(self.source):
            return
        self._seen.clear()
        self._iterator = None
        self._random = state["epoch"]["random"]
        for generator, value in zip(self._generators(), state["epoch"]["generators"], strict=True):
            generator.set_state(value)
        self._taken_at = (state["epoch"], int(state["place"]))
        for _ in range(int(state["place"])):
            self._look(1)
            self._seen.popleft()

    def _start(self) -> dict[str, Any]:
        return {"random": self._random, "generators": [generator.get_state() for generator in self._generators()]}

    def _look(self, count: int) -> None:
        while len(self._seen) < count:
            with self._own_random():
                if self._iterator is None:
                    self._epoch, self._place = self._start(), 0
                    self._iterator = iter(self.source)  # type: ignore[arg-type]
                batch = next(self._iterator, _END)
            if batch is not _END:
                self._place += 1
                self._seen.append((batch, self._epoch, self._place))
            elif self._place == 0:
                raise UsageError("the loader is empty: training needs at least one batch.")
            else:
                self._iterator = None

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        training = rng_state()
        set_rng_state(self._random)
        try:
            yield
        finally:
            self._random = rng_state()
            set_rng_state(training)

    def _generators(self) -> list[torch.Generator]:
        found: dict[int, torch.Generator] = {}
        parts = [self.source, *(getattr(self.source, name, None) for name in ("sampler", "batch_sampler"))]
        for part in (*parts, *(getattr(part, "sampler", None) for part in parts)):
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
        return list(found.values())


_END = object()
