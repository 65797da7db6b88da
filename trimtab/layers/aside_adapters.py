"""Aside adapters: bottlenecks in a frozen transformer, joined to each other beside it.

Adapters of a frozen model are scattered: what one learns reaches the next only through frozen layers. A path aside
joins their bottlenecks, so that all that is trained is connected from the first layer to the last:

    s_l = gelu( D_l h_l ) + C_l s_(l-1),   s_0 = 0
    h_l <- h_l + U_l s_l

for the output h_l of block l, D_l [R, D], C_l [R, R] and U_l [D, R]. U_l begins at 0, which leaves the function as it
was, and C_l at the identity; without C_l these are plain (scattered) adapters. Ma et al. 2022 (arXiv:2208.09847).

Shape suffixes: B batch, L length, D width, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError

__all__ = ["AsideAdapter"]

_LOOKED_FOR = "two or more blocks of one class in an nn.ModuleList or nn.Sequential, each with a norm and linear layers"


class AsideAdapter(nn.Module):
    """One adapter, with a link to that of the block before: h + U s, s = gelu(D h) + C s_before.

    In a forward pass it hands its s on to the next adapter, which takes it once. Blocks must therefore run in order;
    activation checkpointing has to go around the whole stack.

    Args:
        width: D.
        rank: R, at least 1.
        previous: the adapter of the block before; None for the first, or for one that is not connected.
        device: of the parameters.
        dtype: of the parameters.

    Shapes: [..., D]; the result has the input's shape.

    Raises:
        UsageError: if the rank is below 1, or not that of the one before.

    Example:
        >>> first = AsideAdapter(8, 2)
        >>> second = AsideAdapter(8, 2, previous=first)
        >>> h = torch.randn(3, 8)
        >>> torch.equal(second(first(h)), h)
        True

    References:
        Ma et al. 2022, arXiv:2208.09847.
    """

    width: int
    rank: int

    def __init__(
        self,
        width: int,
        rank: int = 16,
        *,
        previous: AsideAdapter | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise UsageError(f"rank must be at least 1, got {rank}: 16 is the default.")
        if previous is not None and previous.rank != rank:
            raise UsageError(
                f"rank must be that of the adapter before, {previous.rank}, got {rank}: they share a path."
            )
        self.width, self.rank = width, rank
        self.down = nn.Linear(width, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, width, bias=False, device=device, dtype=dtype)
        nn.init.zeros_(self.up.weight)
        self.link: nn.Linear | None = None
        # In a list, or the adapter before would become a part of this one.
        self._before: list[AsideAdapter] = []
        self._hands_on = False
        self._s: Tensor | None = None
        if previous is not None:
            self.link = nn.Linear(rank, rank, bias=False, device=device, dtype=dtype)
            nn.init.eye_(self.link.weight)
            self._before.append(previous)
            previous._hands_on = True

    def forward(self, h_BLD: Tensor) -> Tensor:
        """Return the block's output with the adapter's share."""
        s_BLR = F.gelu(self.down(h_BLD))
        if self.link is not None:
            before = self._before[0]._s
            self._before[0]._s = None
            if before is not None:
                s_BLR = s_BLR + self.link(before)
        if self._hands_on:
            self._s = s_BLR
        return h_BLD + self.up(s_BLR)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is on its way to the next adapter: copies are made between forward passes."""
        return {**self.__dict__, "_s": None}

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.width}, rank={self.rank}, connected={self.link is not None}"


def _add_aside(block: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of a block."""
    adapter = block.aside_adapter
    if isinstance(output, tuple):
        return (adapter(output[0]), *output[1:])  # type: ignore[operator]
    return adapter(output)  # type: ignore[operator]


def _apply(model: nn.Module, *, rank: int = 16, connected: bool = True) -> dict[str, str]:
    """Freeze a transformer and give each of its blocks an adapter; the function is unchanged.

    Args:
        model: a transformer whose blocks pass hidden states on.
        rank: R.
        connected: whether the adapters are joined; without it they are scattered.
    """
    if rank < 1:
        raise UsageError(f"rank must be at least 1, got {rank}: 16 is the default.")
    stacks = _stacks(model)
    if not stacks:
        has = any(isinstance(part, AsideAdapter) for part in model.modules())
        found = "it has adapters already" if has else "none was found"
        raise UsageError(f"aside-adapters: no stack of blocks in {type(model).__name__}, {found}: {_LOOKED_FOR}.")
    # By name on their modules: a copied or loaded parameter has none of the attributes of the first.
    trained = {
        module: tuple(name for name, p in module._parameters.items() if p is not None and p.requires_grad)
        for module in model.modules()
    }
    changes: dict[str, str] = {}
    for blocks in stacks:
        previous: AsideAdapter | None = None
        for name, block in blocks.items():
            like = _norm_weight(block)
            adapter = AsideAdapter(like.shape[-1], rank, previous=previous, device=like.device, dtype=like.dtype)
            block.add_module("aside_adapter", adapter)
            block.register_forward_hook(_add_aside)
            count = sum(parameter.numel() for parameter in adapter.parameters())
            changes[name] = f"adapter of rank {rank}{', joined to the one before' * (previous is not None)}: {count:,}"
            changes[name] += " trained parameters"
            previous = adapter if connected else None
    for module, own in trained.items():
        if own:
            module._frozen_by_aside = own  # type: ignore[assignment]
        for part in own:
            module._parameters[part].requires_grad_(False)  # type: ignore[union-attr]
    return changes


def _remove(model: nn.Module) -> dict[str, str]:
    """Take the adapters out, and train again what `apply` froze."""
    changes: dict[str, str] = {}
    for name, block in model.named_modules():
        hooks = [handle for handle, hook in block._forward_hooks.items() if hook is _add_aside]
        for handle in hooks:
            del block._forward_hooks[handle]
            del block.aside_adapter
            changes[name] = "without adapter"
    for module in model.modules():
        for part in module.__dict__.pop("_frozen_by_aside", ()):
            if (parameter := module._parameters.get(part)) is not None:
                parameter.requires_grad_(True)
    return changes


def _stacks(model: nn.Module) -> list[dict[str, nn.Module]]:
    """Return every stack of blocks with no other inside, as stages have that change the width, block by name."""
    stacks: list[dict[str, nn.Module]] = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        blocks = {f"{name}.{key}" if name else key: block for key, block in module.named_children()}
        alike = len(blocks) >= 2 and len({type(block) for block in blocks.values()}) == 1
        if alike and all(_is_block(block) for block in blocks.values()):
            stacks.append(blocks)
    found = [{id(block) for block in blocks.values()} for blocks in stacks]
    parts = [{id(part) for block in blocks.values() for part in block.modules()} for blocks in stacks]
    return [
        blocks
        for i, blocks in enumerate(stacks)
        if not any(inner <= parts[i] for j, inner in enumerate(found) if i != j)
    ]


def _is_block(module: nn.Module) -> bool:
    linears = sum(isinstance(part, nn.Linear) for part in module.modules())
    plain = not any(hook is _add_aside for hook in module._forward_hooks.values())
    return plain and linears >= 2 and _norm_weight(module) is not None


def _norm_weight(module: nn.Module) -> Any:
    """Return the weight of a block's first norm, whose length is the width; those of heads are deeper inside it."""
    norms = [
        (name.count("."), part.weight)
        for name, part in module.named_modules()
        if "norm" in type(part).__name__.lower() and isinstance(getattr(part, "weight", None), Tensor)
    ]
    found = [(depth, weight) for depth, weight in norms if weight.dim() == 1]
    return min(found, key=lambda one: one[0])[1] if found else None


CARD = Card(
    name="aside-adapters",
    room="layers",
    summary="adapters in a frozen transformer whose bottlenecks are joined beside it, from the first to the last",
    paper=Paper(
        "Scattered or Connected? An Optimized Parameter-efficient Tuning Approach for Information Retrieval",
        2022,
        arxiv="2208.09847",
    ),
    equation="h_l + U_l s_l, s_l = gelu(D_l h_l) + C_l s_(l-1), U_l = 0 and C_l = I at first, all else frozen",
    claim=(
        "Tuned for retrieval and re-ranking, adapters that are connected beside the model beat scattered ones at under "
        "1 % of its parameters, train more stably on a smoother loss surface, and come close to tuning it whole."
    ),
    acts_on="model",
    entry="trimtab.layers.aside_adapters:AsideAdapter",
    defaults=(
        Default("rank", 16, "ours"),
        Default("connected", True, "the paper's method; False is what it compares with"),
    ),
    verified={
        "equation": (
            "tests/layers/test_aside_adapters.py::test_equals_the_equations",
            "tests/layers/test_aside_adapters.py::test_function_is_unchanged_and_the_rest_frozen",
            "tests/layers/test_aside_adapters.py::test_the_path_aside_carries_gradient",
        ),
        "claim": ("tests/studies/test_adapters.py::test_transfer",),
    },
    deviations=(
        "The paper's equations could not be read: what is built follows its abstract (trainable modules inside the "
        "layers, and modules alongside the model that connect them into one pathway); the link C_l, its start at the "
        "identity and one adapter a block are ours.",
        "A new head for a new task has to be trained too: set its requires_grad after applying.",
        "Where blocks run under activation checkpointing one by one, the path aside is not recomputed rightly: "
        "checkpoint the whole stack, or use connected=False.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.adapters:transfer",
            "connected=false,rank=19",
            "connected=true,rank=16",
            metric="loss",
            mechanism="sharpness",
            outcome=(
                "no evidence: 2.13 to 2.15, difference 0.0139 (95 % interval -0.0118 to 0.0396), n=5; sharpness "
                "2.03 to 1.47"
            ),
        ),
    ),
    apply=_apply,
    remove=_remove,
)
