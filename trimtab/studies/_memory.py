"""Count the bytes of tensors that are alive at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Inside the block, `peak` is the most bytes held at once by tensors that operations in it have made.

    Tensors from before are not counted, nor is what an operation needs for itself while it runs.

    Example:
        >>> import torch
        >>> with PeakMemory() as memory:
        ...     for _ in range(3):
        ...         x = torch.ones(256)
        >>> memory.peak
        2048
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._before: set[int] = set()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it returned."""
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        self._before |= {key for leaf in given if (key := _key(leaf)) not in self._alive}
        out = func(*args, **(kwargs or {}))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (key := _key(leaf)) not in self._before:
                storage = leaf.untyped_storage()
                self._alive[key] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
