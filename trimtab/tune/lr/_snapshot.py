"""Put live objects back, bit for bit and in place, after a trial run on them."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Sampler

_WALKED = (nn.Module, torch.optim.Optimizer, LRScheduler, torch.amp.GradScaler, Sampler)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)  # noqa: S311
_LOADER_PARTS = ("sampler", "batch_sampler", "dataset")


@contextmanager
def trial(*objects: Any, loader: Any) -> Iterator[None]:
    """Restore objects, a loader and every global random generator on exit, whatever happened inside.

    Objects are walked through modules, optimizers, schedulers, scalers, samplers, dataclasses and plain containers:
    every tensor (with its gradient and storage), generator and attribute in them is put back into the same object. What
    has `state_dict` and `load_state_dict` besides goes through these. Objects of other classes are put back as
    references: what changes inside them stays.

    Args:
        *objects: model, optimizer, and what belongs to them.
        loader: an iterable of batches. Its attributes, samplers, generators and state are restored; an iteration that
            is under way is neither seen nor moved.
    """
    with ExitStack() as stack:
        _keep_random_state(stack)
        kept = _Kept(stack)
        for value in objects:
            kept.keep(value)
        kept.keep_loader(loader)
        if isinstance(loader, DataLoader):
            loader._iterator = None  # persistent workers of an epoch under way must not be reset
        yield


class _Kept:
    """Puts on a stack what gives objects back their content; every entry is undone, even if another fails."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._seen: dict[int, Any] = {}

    def _is_new(self, value: Any) -> bool:
        if id(value) in self._seen:
            return False
        self._seen[id(value)] = value  # kept alive: an id must not be used twice
        return True

    def keep(self, value: Any) -> None:
        """Remember a value and all that it is made of."""
        if not self._is_new(value):
            return
        if isinstance(value, Tensor):
            self._keep_tensor(value)
        elif isinstance(value, dict):
            self._stack.callback(_refill, value, dict(value))
            self._keep_all(value.values())
        elif isinstance(value, (list, deque)):
            self._stack.callback(_refill, value, list(value))
            self._keep_all(value)
        elif isinstance(value, set):
            self._stack.callback(_refill, value, set(value))
        elif isinstance(value, tuple):
            self._keep_all(value)
        elif isinstance(value, _GENERATORS):
            self._keep_generator(value)
        elif isinstance(value, _WALKED) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
            if hasattr(value, "__dict__"):
                self.keep(vars(value))
        elif _is_stateful(value):
            self._stack.callback(value.load_state_dict, copy.deepcopy(value.state_dict()))

    def keep_loader(self, loader: Any) -> None:
        """Remember where a loader stands: its own attributes, its state, and the generators and samplers in it."""
        if not hasattr(loader, "__dict__") or not self._is_new(loader):
            return
        own = vars(loader)
        self._stack.callback(_refill, own, dict(own))
        for name, value in list(own.items()):
            if isinstance(value, (*_GENERATORS, Sampler)):
                self.keep(value)
            elif name in _LOADER_PARTS:
                self.keep_loader(value)
        if _is_stateful(loader):
            self._stack.callback(loader.load_state_dict, copy.deepcopy(loader.state_dict()))

    def _keep_all(self, values: Iterable[Any]) -> None:
        for value in list(values):
            self.keep(value)

    def _keep_generator(self, value: Any) -> None:
        if isinstance(value, random.Random):  # noqa: S311
            self._stack.callback(value.setstate, value.getstate())
        elif isinstance(value, np.random.Generator):
            self._stack.callback(setattr, value.bit_generator, "state", value.bit_generator.state)
        else:
            self._stack.callback(value.set_state, value.get_state())

    def _keep_tensor(self, value: Tensor) -> None:
        data, wanted = value.detach(), value.requires_grad
        saved = data.clone()
        grad = value.grad if value.is_leaf else None

        @torch.no_grad()
        def undo() -> None:
            if type(data) is Tensor:
                value.data = data  # the storage itself, should another have been put in its place
            data.copy_(saved)
            if value.is_leaf:
                value.requires_grad_(wanted)
                value.grad = grad

        self._stack.callback(undo)
        if grad is not None:
            self.keep(grad)


def _refill(place: Any, items: Any) -> None:
    """Give a container its items back, in their order."""
    place.clear()
    (place.extend if isinstance(items, list) else place.update)(items)


def _is_stateful(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _keep_random_state(stack: ExitStack) -> None:
    """Put the global generators of Python, numpy, torch and of every accelerator in use on the stack."""
    stack.callback(random.setstate, random.getstate())
    stack.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002
    stack.callback(torch.set_rng_state, torch.get_rng_state())
    # An accelerator that nobody has used yet is not woken up for this.
    if torch.cuda.is_initialized():
        stack.callback(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
    if torch.xpu.is_initialized():
        stack.callback(torch.xpu.set_rng_state_all, torch.xpu.get_rng_state_all())
    if torch.backends.mps.is_available():
        stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
