"""A parameter as one rank updates it: its shard where entries are independent, gathered where matrices are whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


class Shard:
    """One parameter with a gradient: tensors to compute with, and the way back.

    Attributes:
        parameter: the user's parameter.
        group: index of its group.
        number: its index in the group.
        place: its index among all parameters.
        mesh: the device mesh that it is sharded over, or None.
        local: whether the update runs on this rank's shard alone.
        value: what is updated: the parameter, its local shard, or a gathered copy.
        grad: the gradient in the same form.
        kept: its state as it is kept.
        step: the step about to be taken, counted from 1.
        form: how its moments are kept.
    """

    def __init__(self, parameter: Tensor, group: int, number: int, place: int, *, whole: bool) -> None:
        self.parameter, self.group, self.number, self.place = parameter, group, number, place
        grad: Any = parameter.grad
        source: Any = parameter
        self.mesh = source.device_mesh if _is_sharded(parameter) else None
        self.local = self.mesh is not None and not whole
        if self.mesh is None:
            self.value, self.grad = parameter.detach(), grad.detach()
        elif self.local:
            self.value = source.detach().to_local()
            self.grad = grad.detach().redistribute(placements=source.placements).to_local()
        else:
            self.value, self.grad = source.detach().full_tensor(), grad.detach().full_tensor()
        self.kept: dict[str, Tensor] = {}
        self.step = 0
        self.form = ""

    def finish(self) -> None:
        """Write a gathered copy's new values back to this rank's shard."""
        if self.mesh is None or self.local:
            return
        from torch.distributed.tensor import DTensor, Replicate

        target: Any = self.parameter.detach()
        replicated = DTensor.from_local(self.value, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        # From replicated to sharded, every rank takes its own part: nothing is sent.
        target.to_local().copy_(replicated.redistribute(placements=target.placements).to_local())

    def wrap(self, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a new state for the checkpoint: tensors of the shard's shape are sharded like the parameter."""
        if not self.local:
            return kept
        from torch.distributed.tensor import DTensor

        source: Any = self.parameter
        return {
            name: DTensor.from_local(
                value, self.mesh, source.placements, run_check=False, shape=source.shape, stride=source.stride()
            )
            if value.shape == self.value.shape
            else value
            for name, value in kept.items()
        }

    def unwrap(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """Return the state's tensors as they are on this rank."""
        tensors: dict[str, Any] = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        return {name: value.to_local() if _is_sharded(value) else value for name, value in tensors.items()}


def any_rank(flag: bool, sharded: Shard | None) -> bool:
    """Whether the flag is set on any rank that shares a sharded parameter; without one, on this rank."""
    if sharded is None or sharded.mesh is None:
        return flag
    value = torch.tensor(float(flag), device=sharded.value.device)
    for group in sharded.mesh.get_all_groups():
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return bool(value)


def sum_over_ranks(total: Tensor, sharded: Shard | None) -> Tensor:
    """Return the sum over all ranks that share a sharded parameter; without one, the total itself."""
    if sharded is None or sharded.mesh is None:
        return total
    placements: Any = sharded.parameter
    for dim, placement in enumerate(placements.placements):
        if placement.is_shard():  # replicas hold the same sum already
            dist.all_reduce(total, group=sharded.mesh.get_group(dim))
    return total
