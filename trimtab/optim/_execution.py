"""The three ways of running a chain: parameter by parameter, over lists and cache-sized pieces, and compiled."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.optim._buckets import Bucket
from trimtab.optim._lists import TensorList
from trimtab.optim._sharding import sum_over_ranks
from trimtab.optim._state import block_of, close, opened, scales_of
from trimtab.optim.transform import Transform, moments_of

if TYPE_CHECKING:
    from trimtab.optim.chain import Chain

PIECE = 2**16
"""Entries of a piece on the CPU: its gradient, weight, moments and what is computed fit in a core's cache."""

COMPILED_PIECE = 2**18
"""Entries of a piece in compiled code for 8-bit state, whose intermediate results would else go through memory."""

Stages = tuple[int, ...]


def run(chain: Chain, buckets: Sequence[Bucket]) -> None:
    """Take the step for all buckets, part by part of the chain."""
    updates: list[list[Tensor]] = [[shard.grad for shard in bucket.shards] for bucket in buckets]
    for part in _parts(chain, buckets):
        first = chain.transforms[part[0]]
        total: Tensor | None = None
        for bucket, us in zip(buckets, updates, strict=True):
            if first.due(bucket.step, bucket.group):
                _refresh(chain, first, bucket, us)
        if first.sums:
            total = _total(chain, part[0], buckets, updates)
        for index, bucket in enumerate(buckets):
            hs = [_coefficients(chain, stage, bucket) for stage in part]
            updates[index] = _advance(chain, part, hs, bucket, updates[index], total)


def first_non_finite(grads: Sequence[Tensor]) -> int | None:
    """Return the index of the first tensor with a NaN or infinity, or None."""
    if not grads:
        return None
    # One quick pass; a norm also overflows on huge finite entries, so that a suspect is looked at again.
    norms = torch._foreach_norm([grad for grad in grads if grad.numel()] or [torch.zeros(1)])
    if bool(torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).isfinite().all()):
        return None
    return next((index for index, grad in enumerate(grads) if not bool(grad.isfinite().all())), None)


def _parts(chain: Chain, buckets: Sequence[Bucket]) -> list[Stages]:
    """Split the chain before each transform that needs the updates of all parameters, or a refresh, first.

    Where lists are updated, it is also split before the entry-wise transforms at its end: these go in pieces.
    """
    transforms = chain.transforms
    tail = len(transforms)
    while chain.foreach and not chain.compile and tail and transforms[tail - 1].elementwise:
        tail -= 1
    parts: list[list[int]] = [[0]]
    for index, transform in enumerate(transforms[1:], start=1):
        due = any(transform.due(bucket.step, bucket.group) for bucket in buckets)
        if transform.sums or due or index == tail:
            parts.append([])
        parts[-1].append(index)
    return [tuple(part) for part in parts]


def _coefficients(chain: Chain, stage: int, bucket: Bucket) -> dict[str, Any]:
    return chain.transforms[stage].coefficients(bucket.step, bucket.group) | {"kind": bucket.kinds[stage]}


def _incoming(u: Any, dtype: torch.dtype, *, first: bool, maximize: bool) -> Any:
    """Return what enters a part: the gradient in the dtype of computation, its sign turned to ascend."""
    if not first:
        return u
    if u.dtype != dtype:
        u = u.to(dtype)
    return -u if maximize else u


def _refresh(chain: Chain, transform: Transform, bucket: Bucket, us: Sequence[Tensor]) -> None:
    # Only this transform's moments: another's, kept in few bits, would lose a little each time it is opened and closed.
    moments = transform.moments
    first = transform is chain.transforms[0]
    for shard, u in zip(bucket.shards, us, strict=True):
        state = opened(shard.kept, moments, bucket.form, bucket.dtype)
        generator = chain.generator(shard.place, bucket.step)
        incoming = _incoming(u, bucket.dtype, first=first, maximize=bucket.group["maximize"])
        transform.refresh(incoming, shard.value.to(bucket.dtype), state, bucket.step, bucket.group, generator)
        close(state, shard.kept, moments, bucket.form)


def _total(chain: Chain, stage: int, buckets: Sequence[Bucket], updates: Sequence[Sequence[Tensor]]) -> Tensor:
    moments = chain.transforms[stage].moments
    sums: list[Tensor] = []
    for bucket, us in zip(buckets, updates, strict=True):
        h = _coefficients(chain, stage, bucket)
        parts = []
        for shard, u in zip(bucket.shards, us, strict=True):
            state = opened(shard.kept, moments, bucket.form, bucket.dtype)
            incoming = _incoming(u, bucket.dtype, first=stage == 0, maximize=bucket.group["maximize"])
            parts.append(chain.transforms[stage].total(incoming, shard.value.to(bucket.dtype), state, h))
        shard = bucket.shards[0]
        sums.append(sum_over_ranks(torch.stack(parts).sum(), shard if shard.local else None))
    device = sums[0].device
    return torch.stack([part.to(device) for part in sums]).sum()


def _advance(
    chain: Chain, part: Stages, hs: list[dict[str, Any]], bucket: Bucket, us: list[Tensor], total: Tensor | None
) -> list[Tensor]:
    """Run one part of the chain on one bucket, and return the updates for the next part."""
    rule = Rule(chain, part, bucket)
    ps = [shard.value for shard in bucket.shards]
    kepts = [shard.kept for shard in bucket.shards]
    if chain.compile and rule.form.startswith("8bit") and rule.splits(ps, kepts):
        for u, p, kept in zip(us, ps, kepts, strict=True):
            for one in _pieces(u.contiguous(), p, kept, rule.form, COMPILED_PIECE):
                piece_u, piece_p, piece_kept = _in_rows(*one, block_of(rule.form))
                _compiled(chain, rule, hs, [piece_u], [piece_p], [piece_kept], total)
        return us
    if chain.compile:
        return _compiled(chain, rule, hs, us, ps, kepts, total)
    if total is not None:
        hs[0]["total"] = total.to(dtype=bucket.dtype, device=ps[0].device)
    if not chain.foreach:
        return [rule(hs, u, p, kept) for u, p, kept in zip(us, ps, kepts, strict=True)]
    if rule.elementwise and rule.last and ps[0].device.type == "cpu":
        _in_pieces(rule, hs, us, ps, kepts)
        return us
    return rule.on_lists(hs, us, ps, kepts)


class Rule:
    """A part of a chain as a function of one parameter's tensors, or of lists of them."""

    def __init__(self, chain: Chain, part: Stages, bucket: Bucket) -> None:
        self.transforms = [chain.transforms[stage] for stage in part]
        self.part = part
        self.first = part[0] == 0
        self.last = part[-1] == len(chain.transforms) - 1
        # Those of these transforms only: what another part keeps in few bits would lose a little by each opening.
        self.moments = moments_of(self.transforms)
        self.elementwise = all(transform.elementwise for transform in self.transforms)
        # Not the bucket itself: a compiled rule lives on, and must not hold a step's gradients.
        self.form, self.dtype, self.maximize = bucket.form, bucket.dtype, bool(bucket.group["maximize"])

    def splits(self, ps: Sequence[Tensor], kepts: Sequence[dict[str, Tensor]]) -> bool:
        """Whether parameters may be updated in flat pieces."""
        return (
            self.elementwise
            and self.last
            and ps[0].device.type == "cpu"
            and all(value.is_contiguous() for p, kept in zip(ps, kepts, strict=True) for value in (p, *kept.values()))
        )

    def __call__(self, hs: list[dict[str, Any]], u: Tensor, p: Tensor, kept: dict[str, Tensor]) -> Any:
        """Update one parameter and its state; return what goes on to the next part."""
        state = opened(kept, self.moments, self.form, self.dtype)
        value = p if p.dtype == self.dtype else p.to(self.dtype)
        u = self._stages(hs, u, value, state)
        if self.last and value is not p:
            p.copy_(value)
        close(state, kept, self.moments, self.form)
        return u

    def on_lists(
        self, hs: list[dict[str, Any]], us: list[Tensor], ps: list[Tensor], kepts: list[dict[str, Tensor]]
    ) -> list[Tensor]:
        """Do the same for many parameters at once."""
        states = [opened(kept, self.moments, self.form, self.dtype) for kept in kepts]
        state = {name: TensorList([one[name] for one in states]) for name in states[0]}
        values = ps if ps[0].dtype == self.dtype else [p.to(self.dtype) for p in ps]
        u = self._stages(hs, TensorList(us), TensorList(values), state)
        if self.last and values is not ps:
            torch._foreach_copy_(ps, values)
        for one, kept in zip(states, kepts, strict=True):
            close(one, kept, self.moments, self.form)
        return us if u is None else u.tensors

    def _stages(self, hs: list[dict[str, Any]], u: Any, p: Any, state: Any) -> Any:
        u = _incoming(u, self.dtype, first=self.first, maximize=self.maximize)
        for transform, h in zip(self.transforms, hs, strict=True):
            u = transform.update(u, p, state, h)
        return u


def _in_pieces(
    rule: Rule, hs: list[dict[str, Any]], us: list[Tensor], ps: list[Tensor], kepts: list[dict[str, Tensor]]
) -> None:
    """Update entry-wise rules piece by piece, each small enough that the cache holds it from the first to the last."""
    small: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
    gathered = 0
    for u, p, kept in zip(us, ps, kepts, strict=True):
        if p.numel() > PIECE and rule.splits([p], [kept]):
            for piece in _pieces(u.contiguous(), p, kept, rule.form, PIECE):
                rule(hs, *piece)
            continue
        small.append((u, p, kept))
        gathered += p.numel()
        if gathered >= PIECE:
            rule.on_lists(hs, *map(list, zip(*small, strict=True)))
            small, gathered = [], 0
    if small:
        rule.on_lists(hs, *map(list, zip(*small, strict=True)))


def _pieces(
    u: Tensor, p: Tensor, kept: dict[str, Tensor], form: str, size: int
) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Return consecutive pieces of a parameter, its update and its state, as views."""
    us, ps = u.view(-1).split(size), p.view(-1).split(size)
    # Entry-wise transforms have state of the parameter's size, or its codes and scales: one scale a block, and a piece
    # is a whole number of blocks. What else is kept belongs to earlier parts of the chain.
    kepts = {name: value.view(-1).split(size) for name, value in kept.items() if value.numel() == p.numel()}
    kepts |= {
        scales: kept[scales].view(-1).split(size // block_of(form))
        for name in list(kepts)
        if (scales := scales_of(name)) in kept
    }
    return [(us[i], ps[i], {name: parts[i] for name, parts in kepts.items()}) for i in range(len(ps))]


def _in_rows(u: Tensor, p: Tensor, kept: dict[str, Tensor], block: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return a piece with one block a row, if it is whole blocks: scales are then one a row, and all loops alike."""
    if p.numel() % block:
        return u, p, kept
    rows = {name: value.view(-1, block) if value.numel() == p.numel() else value for name, value in kept.items()}
    return u.view(-1, block), p.view(-1, block), rows


def _compiled(
    chain: Chain,
    rule: Rule,
    hs: list[dict[str, Any]],
    us: list[Tensor],
    ps: list[Tensor],
    kepts: list[dict[str, Tensor]],
    total: Tensor | None,
) -> list[Tensor]:
    """Run a part of the chain in code compiled for these shapes and choices; numbers are inputs of it."""
    numbers: list[float] = []
    static = tuple(_separate(h, numbers) for h in hs)
    values = torch.tensor(numbers, dtype=rule.dtype).to(ps[0].device)
    shapes = tuple((p.shape, p.stride(), p.dtype) for p in ps)
    key = (rule.part, static, rule.form, rule.maximize, us[0].dtype, total is not None, shapes)
    if key not in chain._compiled:
        chain._compiled[key] = _compile(rule, static)
    totals = [] if total is None else [total.to(dtype=rule.dtype, device=ps[0].device)]
    vectors = [{name: _vector(value) for name, value in kept.items()} for kept in kepts]
    return chain._compiled[key]([_vector(u) for u in us], [_vector(p) for p in ps], vectors, values, totals)


def _vector(value: Tensor) -> Tensor:
    """Return a view of a scalar with one dimension: torch 2.13 compiles float64 scalars on the CPU to wrong numbers."""
    return value.view(1) if value.ndim == 0 else value


def _compile(rule: Rule, static: tuple[Any, ...]) -> Callable[..., list[Tensor]]:
    def fused(
        us: list[Tensor], ps: list[Tensor], kepts: list[dict[str, Tensor]], values: Tensor, totals: list[Tensor]
    ) -> list[Tensor]:
        numbers = values.unbind()
        hs = [_join(part, numbers) for part in static]
        if totals:
            hs[0]["total"] = totals[0]
        results = [rule(hs, u, p, kept) for u, p, kept in zip(us, ps, kepts, strict=True)]
        return [] if rule.last else results

    # torch keeps compiled variants by code object and refuses more than a few: each part gets a code object of its own.
    code = fused.__code__.replace(co_name=f"fused_{id(fused)}")
    own = types.FunctionType(code, fused.__globals__, code.co_name, None, fused.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False)


def _separate(h: dict[str, Any], numbers: list[float]) -> tuple[Any, ...]:
    """Move the floats of a tree of coefficients into a list, and return the rest, with places for them, as a key."""
    parts: list[tuple[str, str, Any]] = []
    for name, value in h.items():
        if isinstance(value, dict):
            parts.append((name, "tree", _separate(value, numbers)))
        elif isinstance(value, float):
            parts.append((name, "number", len(numbers)))
            numbers.append(value)
        else:
            parts.append((name, "static", value))
    return tuple(parts)


def _join(parts: tuple[Any, ...], numbers: Sequence[Tensor]) -> dict[str, Any]:
    """Return the tree of coefficients with tensors in the places of its floats."""
    h: dict[str, Any] = {}
    for name, sort, value in parts:
        if sort == "tree":
            h[name] = _join(value, numbers)
        else:
            h[name] = numbers[value] if sort == "number" else value
    return h
