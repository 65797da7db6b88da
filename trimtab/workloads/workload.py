"""The Workload: a small real training job that comparisons, benchmarks, tests and the demo run on."""

from __future__ import annotations

import functools
import hashlib
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from trimtab.errors import UsageError, choose
from trimtab.workloads.settings import Settings


@dataclass(frozen=True)
class Data:
    """A workload's data, split once and for all: the split does not depend on a run's seed.

    Attributes:
        train_inputs: [N, ...].
        train_targets: [N, ...].
        test_inputs: [M, ...].
        test_targets: [M, ...].
        source: where it comes from, in words.
    """

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    source: str

    @functools.cached_property
    def sha256(self) -> str:
        """Fingerprint of every value: runs are compared only where it agrees."""
        digest = hashlib.sha256()
        for tensor in (self.train_inputs, self.train_targets, self.test_inputs, self.test_targets):
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


class Workload(ABC):
    """A small real training job: data, model, loss, metric and default settings.

    Everything is a pure function of its arguments: a model of the seed, a batch of (seed, step). Paired arms therefore
    start from the same weights and see the same batches, and a resumed run needs no loader state.

    Attributes:
        name: public name, lower case with hyphens.
        summary: one line.
        defaults: settings of a sane run.
        sources: where each default that was chosen comes from.
        evaluations: evaluations along a run, evenly spaced.
        width: of the model, in units; None if it has none that can be changed.
        depth: of the model, in blocks or hidden layers; None if it has none that can be changed.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    defaults: ClassVar[Settings]
    sources: ClassVar[Mapping[str, str]]
    evaluations: ClassVar[int] = 10
    width: ClassVar[int | None] = None
    depth: ClassVar[int | None] = None

    def __init__(self) -> None:
        self._data: Data | None = None

    def prepare(self, text: str | Path | None = None) -> Data:
        """Load the data and keep it.

        Args:
            text: a file or folder of your own text, for language models.

        Raises:
            UsageError: if the text cannot be used.
            MissingExtraError: if the data comes with a package that is not installed.
        """
        if text is not None:
            raise UsageError(f"{self.name} takes no text: only the language models (lm-small, lm-medium) do.")
        self._data = self.load()
        return self._data

    @property
    def data(self) -> Data:
        """The data; loaded when first used."""
        return self._data if self._data is not None else self.prepare()

    @abstractmethod
    def load(self) -> Data:
        """Load the data that comes with the workload."""

    @abstractmethod
    def build(self, width: int, depth: int) -> nn.Module:
        """Build the model from torch's global generator; called by `model` with the generator seeded.

        Args:
            width: the workload's own, or another one; 0 where the workload has none.
            depth: likewise.
        """

    def model(self, seed: int, *, width: int = 0, depth: int = 0) -> nn.Module:
        """Return a new model, a pure function of the arguments; torch's global generator is left as it was.

        Args:
            seed: of the initial weights.
            width: of the model; 0 takes the workload's own.
            depth: likewise.

        Raises:
            UsageError: if the workload's model has no such size, or cannot have it.
        """
        for name, asked, own in (("width", width, self.width), ("depth", depth, self.depth)):
            if asked and own is None:
                raise UsageError(f"the model of {self.name} has no {name} to change: leave it out.")
        with seeded(seed):
            return self.build(width or self.width or 0, depth or self.depth or 0)

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean training loss of a batch."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return metrics on the test part: `loss` always, `accuracy` and `train_accuracy` where there are classes."""

    def batch(self, seed: int, step: int, batch_size: int = 0) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of a step, a pure function of its arguments.

        Each epoch is a new permutation of the training set; samples that do not fill its last batch wait for the next.

        Args:
            seed: the run's seed.
            step: step number from 0.
            batch_size: samples; 0 returns the whole training set in its own order.

        Raises:
            UsageError: if the batch is larger than the training set.
        """
        data = self.data
        count = len(data.train_inputs)
        if batch_size > count:
            raise UsageError(
                f"batch_size {batch_size} exceeds the {count} training samples of {self.name}: "
                f"use at most {count}, or 0 for all of them."
            )
        if batch_size == 0:
            return data.train_inputs, data.train_targets
        epoch, place = divmod(step, count // batch_size)
        chosen = _permutation(count, seed, epoch)[place * batch_size : (place + 1) * batch_size]
        return data.train_inputs[chosen], data.train_targets[chosen]


@functools.lru_cache(maxsize=8)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    digest = hashlib.sha256(f"epoch {epoch} of seed {seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randperm(count, generator=generator)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside the block and restore it afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluate inside the block: no gradients, every module in evaluation mode; each gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@functools.cache
def _classes() -> dict[str, type[Workload]]:
    package = importlib.import_module("trimtab.workloads")
    for info in pkgutil.iter_modules(package.__path__, "trimtab.workloads."):
        importlib.import_module(info.name)
    found: dict[str, type[Workload]] = {}
    waiting = [Workload]
    while waiting:
        for kind in waiting.pop().__subclasses__():
            waiting.append(kind)
            if "name" in vars(kind) and kind.__module__.startswith("trimtab.workloads."):
                found[kind.name] = kind
    return dict(sorted(found.items()))


def workload(name: str) -> Workload:
    """Return a new instance of a workload.

    Raises:
        UsageError: if no workload has that name; the nearest is proposed.

    Example:
        >>> sum(p.numel() for p in workload("lm-small").model(seed=0).parameters())
        218240
    """
    return _classes()[choose("workload", name, _classes())]()


def workloads() -> list[Workload]:
    """Return one new instance of every workload, by name."""
    return [kind() for kind in _classes().values()]
