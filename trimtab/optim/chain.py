"""`Chain`: a torch optimizer made of gradient transforms.

A chain feeds the gradient g through its transforms T_1, ..., T_n and descends:

    u = T_n(... T_1(g)),    p <- p - lr (u + weight_decay p)

The same code runs in three ways with equal results: parameter by parameter (`foreach=False`, for reading and
debugging), over lists and cache-sized pieces of parameters (the default), and fused by torch.compile into one pass over
memory (`compile=True`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from trimtab.errors import RunFailedError, UsageError, choose
from trimtab.optim import _buckets, _checkpoint, _execution
from trimtab.optim._sharding import Shard, any_rank
from trimtab.optim._state import FORMATS, allocate, converted, format_of
from trimtab.optim.transform import Descend, Transform, check_flag, check_range, check_whole, moments_of
from trimtab.scalars import to_scalar

__all__ = ["Chain"]

_POLICIES = ("raise", "skip", "allow")
_GROUP_KEYS = (
    *("params", "param_names", "name", "role"),
    # What schedulers leave in groups: torch's, and timm's layer-wise factor.
    *("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "lr_scale"),
)


class Chain(torch.optim.Optimizer):
    r"""An optimizer from gradient transforms: u = T_n(... T_1(g)), then p <- p - lr (u + weight_decay p).

    It keeps torch's contract: parameter groups with options of their own, schedulers, closures, hooks, `state_dict`.
    Loading a checkpoint keeps every state tensor's dtype, shape and layout; a step converts state only where the
    parameter has since been cast or moved, or another format was chosen. `p.grad` is never changed. A parameter without
    a gradient is left alone, its step count too. Autocast is off within a step.

    Args:
        params: parameters, named parameters, or parameter groups; real and dense.
        transforms: applied in this order.
        lr: learning rate, at least 0; a tensor of one element is read at each step.
        weight_decay: decoupled, at least 0.
        maximize: ascend instead.
        state: how moments are kept: "fp32" (float32, or float64 for float64 parameters), "bf16", "8bit" (by blocks of
            256 entries) or "8bit-2048"; tensors below 4,096 entries stay in fp32 where 8 bits are asked. Option of
            groups too; a parameter's attribute `optim_state` comes first.
        foreach: whether parameters are updated together; False runs them one by one.
        compile: whether torch.compile fuses the step (needs a C++ compiler). The first step takes its time, and so does
            the first with each other set of parameters that have gradients.
        nonfinite: what a NaN or infinity in a gradient does, before anything is changed: "raise" a `RunFailedError`,
            "skip" the step for all parameters (counted in `skipped_steps`), or "allow" as torch's optimizers do, which
            saves reading the gradients once.
        seed: of the transforms that draw random numbers.

    Raises:
        UsageError: if an option breaks its rule, or a parameter is complex.

    Example:
        >>> from trimtab.optim import Chain, adam, perp_grad
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = Chain(model.parameters(), [perp_grad(), adam()], lr=1e-3, weight_decay=0.1)
        >>> model(torch.ones(3, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        transforms: Sequence[Transform],
        *,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        maximize: bool = False,
        state: str = "fp32",
        foreach: bool = True,
        compile: bool = False,
        nonfinite: str = "raise",
        seed: int = 0,
    ) -> None:
        self.transforms = _complete(transforms)
        check_flag("foreach", foreach)
        check_flag("compile", compile)
        check_whole("seed", seed)
        self.foreach, self.compile, self.seed = foreach, compile, seed
        self.nonfinite = choose("policy for non-finite gradients", nonfinite, _POLICIES)
        self.skipped_steps = 0
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._layouts: dict[Tensor, tuple[Any, ...]] = {}
        own = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "state": state}
        defaults: dict[str, Any] = {}
        for transform in self.transforms:
            if twice := sorted(transform.options.keys() & (defaults.keys() | own.keys() | {"params"})):
                raise UsageError(f"two stages of the chain have an option {twice[0]!r}: each name may occur once.")
            defaults |= transform.options
        super().__init__(params, own | defaults)

    def __getstate__(self) -> dict[str, Any]:
        # torch's version keeps three attributes only; compiled code cannot be copied and is made again when needed. A
        # scheduler's wrapper of `step` would, copied, step the original.
        kept = {name: value for name, value in self.__dict__.items() if name != "step"}
        return kept | {"_compiled": {}, "_layouts": {}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its options are checked like those of the constructor.

        Raises:
            UsageError: if an option breaks its rule, is unknown, or a parameter is complex.
        """
        known = {*self.defaults, *_GROUP_KEYS}
        for name in param_group:
            choose("option of the parameter group", name, known)
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.is_complex():
                self.param_groups.pop()
                raise UsageError(f"a parameter of shape {tuple(p.shape)} is complex: give its view_as_real instead.")

    def _check(self, group: Mapping[str, Any]) -> None:
        lr = group["lr"]
        one = (isinstance(lr, Real) and not isinstance(lr, bool)) or (isinstance(lr, Tensor) and lr.numel() == 1)
        check_range("lr", to_scalar(lr) if one else lr, 0)
        check_flag("maximize", group["maximize"])
        check_range("weight_decay", group["weight_decay"], 0)
        choose("state format", group["state"], FORMATS)
        for transform in self.transforms:
            transform.check(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: computes the loss and its gradients; called once, with gradients enabled.

        Returns:
            What the closure returns, or None.

        Raises:
            UsageError: if a gradient is sparse, or of another shape, dtype or device than its parameter.
            RunFailedError: if a gradient is not finite and the policy is "raise"; nothing is changed then.
        """
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        """Take one step; what a subclass extends, since torch runs the hooks of every class that defines `step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        shards = self._shards()
        # Products of matrices would else lose their precision, and the state its dtype.
        with _without_autocast({shard.value.device.type for shard in shards}):
            if not shards or not self._usable(shards):
                return loss
            for shard in shards:
                self._prepare(shard)
            _execution.run(self, _buckets.group(self, shards))
            for shard in shards:
                shard.finish()
                self.state[shard.parameter]["step"] += 1
        return loss

    def _shards(self) -> list[Shard]:
        """Every parameter with a gradient, as this rank updates it."""
        whole = not all(transform.elementwise for transform in self.transforms)
        found: list[Shard] = []
        place = -1
        for index, group in enumerate(self.param_groups):
            for number, p in enumerate(group["params"]):
                place += 1
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise UsageError(
                        f"{self._name(index, number)} has a sparse gradient: build its layer with sparse=False."
                    )
                if p.grad.dtype != p.dtype or p.grad.device != p.device or p.grad.shape != p.shape:
                    has, needs = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (p.grad, p))
                    raise UsageError(f"the gradient of {self._name(index, number)} is {has}, but must be {needs}.")
                found.append(Shard(p, index, number, place, whole=whole))
        return found

    def _name(self, index: int, number: int) -> str:
        names = self.param_groups[index].get("param_names")
        return f"parameter {names[number]!r}" if names else f"parameter {number} of group {index}"

    def _usable(self, shards: Sequence[Shard]) -> bool:
        """Whether the step may be taken: every gradient on every rank is finite, or non-finite ones are allowed."""
        if self.nonfinite == "allow":
            return True
        bad = _execution.first_non_finite([shard.grad for shard in shards])
        sharded = [shard for shard in shards if shard.mesh is not None]
        if not any_rank(bad is not None, sharded[0] if sharded else None):
            return True
        if self.nonfinite == "skip":
            self.skipped_steps += 1
            return False
        where = "a gradient on another rank"
        if bad is not None:
            shape = tuple(shards[bad].parameter.shape)
            where = f"the gradient of {self._name(shards[bad].group, shards[bad].number)}, shape {shape},"
        raise RunFailedError(
            f"{where} has NaN or infinite entries; nothing was changed: find their origin, or pass nonfinite='skip'."
        )

    def _prepare(self, shard: Shard) -> None:
        p, value, group = shard.parameter, shard.value, self.param_groups[shard.group]
        state = self.state[p]
        shard.form = format_of(p, group)
        layout = (value.dtype, value.device, shard.form)
        if "step" not in state:
            state["step"] = 0
            state.update(shard.wrap(self.fresh(p, value, group)))
        elif self._layouts.get(p) != layout:
            self._convert(shard, state, group)
        self._layouts[p] = layout
        shard.kept = shard.unwrap(state)
        shard.step = state["step"] + 1

    def _convert(self, shard: Shard, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        """Bring a state made for another dtype, device or format into the one that this step needs."""
        like = self.fresh(shard.parameter, torch.empty_like(shard.value, device="meta"), group)
        old = shard.unwrap(state)
        new = converted(old, moments_of(self.transforms), like, shard.form, shard.value)
        if new is not old:
            for name in old:
                del state[name]
            state.update(shard.wrap(new))

    def fresh(self, parameter: Tensor, value: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step, for the part or copy of it that this rank updates.

        Raises:
            UsageError: if two stages keep a state of the same name, or 8-bit state is asked for a shard.
        """
        form = format_of(parameter, group)
        if form.startswith("8bit") and value.shape != parameter.shape:
            raise UsageError("8-bit state is not kept for sharded parameters: pass state='bf16' or 'fp32'.")
        like = value.to(torch.promote_types(value.dtype, torch.float32))
        kept: dict[str, Tensor] = {}
        for transform in self.transforms:
            new = transform.init(like, group)
            if twice := sorted(new.keys() & kept.keys()):
                raise UsageError(f"two stages of the chain keep a state {twice[0]!r}: each may occur once.")
            kept |= allocate(new, transform.moments, form)
        return kept

    def generator(self, place: int, step: int) -> torch.Generator:
        """Return the random generator of a parameter at a step: the same on every rank and after a resume."""
        digest = hashlib.blake2b(f"{self.seed} {place} {step}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; every state tensor keeps the dtype, shape and layout it was saved with.

        Raises:
            UsageError: if an option breaks its rule, or a parameter's state has missing or unknown keys, or tensors of
                another shape; nothing is changed then.
        """
        _checkpoint.load(self, super().load_state_dict, state_dict)
        self._layouts.clear()


def _without_autocast(kinds: set[str]) -> contextlib.ExitStack:
    """Return a context in which autocast is off on these kinds of device."""
    stack = contextlib.ExitStack()
    for kind in kinds:
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def _complete(transforms: Sequence[Transform]) -> list[Transform]:
    stages = list(transforms)
    for stage in stages:
        if not isinstance(stage, Transform):
            raise UsageError(f"a chain is made of transforms, got {type(stage).__name__}: write adam(), not adam.")
    if any(stage.writes for stage in stages[:-1]):
        raise UsageError("a transform that writes the parameters must be the chain's last.")
    return stages if stages and stages[-1].writes else [*stages, Descend()]
