"""The multi-level V-cycle: train a coalesced model, map it back, and interpolate with the model it came from.

    W_small = F_out W F_in        F_out averages, F_in adds the f neurons that become one
    W_large = T_out W_small T_in  T_out copies, T_in shares out: the same function, f times as wide
    depth:  every f neighbouring blocks become their mean, and each block is copied back f times
    W <- (1 - alpha) W_before + alpha W_large      breaks the symmetry of the copies

Zou et al. 2024 (arXiv:2404.07999). Neuron i of n is merged with i + n / f, in each of the parts of a fused matrix, so
that in attention whole heads are merged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError, choose

__all__ = ["Layout", "VCycle", "coalesce", "decoalesce", "interpolate", "pre_ln_layout"]

State = Mapping[str, Tensor]
_ROLE = re.compile(r"(out|in)(?:\*([1-9]\d*))?")


@dataclass(frozen=True)
class Layout:
    """What the dimensions of a model's tensors are.

    Attributes:
        roles: from patterns of parameter names, as for file names, to a role for each dimension; the first that fits
            counts. `"out"`: neurons that the tensor makes (or acts on, one by one); `"in"`: those it adds up;
            `"out*3"`: three matrices one upon the other; None: not merged, as a vocabulary.
        blocks: what the names of the blocks' tensors begin with, before the block's number (`"blocks."`).
    """

    roles: Mapping[str, tuple[str | None, ...]]
    blocks: str = "blocks."

    def of(self, name: str, tensor: Tensor) -> tuple[tuple[str, int] | None, ...]:
        """Return role and number of parts for each dimension of a tensor.

        Raises:
            UsageError: if no pattern fits the name, or the roles do not fit the tensor.
        """
        roles = next((roles for pattern, roles in self.roles.items() if fnmatchcase(name, pattern)), None)
        if roles is None:
            raise UsageError(f"the layout has no pattern for {name!r}: say what its dimensions are.")
        if len(roles) != tensor.dim():
            raise UsageError(f"the layout gives {name!r} {len(roles)} dimensions, it has {tensor.dim()}.")
        found: list[tuple[str, int] | None] = []
        for role in roles:
            match = _ROLE.fullmatch(role or "")
            if role is not None and match is None:
                raise UsageError(f"role {role!r} of {name!r} is none: write 'out', 'in', 'out*3' or None.")
            found.append(None if match is None else (match[1], int(match[2] or 1)))
        return tuple(found)


def pre_ln_layout(*, tied: bool = True, follow: str = "exact") -> Layout:
    """Return the layout of the language models of `trimtab.workloads`: pre-LN blocks with a fused qkv.

    Args:
        tied: whether the head is the embedding.
        follow: where the share of a tied embedding, which both makes and adds up neurons, goes. `"exact"`: into the
            last normalisation, so that the de-coalesced model is the same function; `"code"`: into the embeddings, as
            in the authors' code, where the residual stream begins f times smaller.

    Returns:
        The layout.

    Raises:
        UsageError: if there is no such way.
    """
    exact = choose("follow", follow, ("code", "exact")) == "exact"
    produced, normed = ("out", "in") if exact else ("in", "out")
    if not tied:
        produced, normed = "out", "out"
    return Layout(
        {
            "embedding.weight": (None, produced),
            "position.weight": (None, produced),
            "head.weight": (None, produced if tied else "in"),
            "norm.*": (normed,),
            "blocks.*.norm?.*": ("out",),
            "blocks.*.qkv.weight": ("out*3", "in"),
            "blocks.*.qkv.bias": ("out*3",),
            "blocks.*.weight": ("out", "in"),
            "blocks.*.bias": ("out",),
        }
    )


def _merge(tensor: Tensor, dim: int, role: str, parts: int, f: int, name: str) -> Tensor:
    size = tensor.shape[dim]
    if size % (parts * f):
        raise UsageError(f"{name!r}: {size} neurons in {parts} part(s) cannot be merged by {f}.")
    split = tensor.unflatten(dim, (parts, f, size // (parts * f)))
    split = split.mean(dim + 1) if role == "out" else split.sum(dim + 1)
    return split.flatten(dim, dim + 1)


def _spread(tensor: Tensor, dim: int, role: str, parts: int, f: int) -> Tensor:
    split = tensor.unflatten(dim, (parts, tensor.shape[dim] // parts)).unsqueeze(dim + 1)
    shape = list(split.shape)
    shape[dim + 1] = f
    spread = split.expand(shape).flatten(dim, dim + 2)
    return spread.clone() if role == "out" else spread / f


def _numbered(name: str, prefix: str) -> tuple[int, str] | None:
    number, dot, rest = name.removeprefix(prefix).partition(".")
    return (int(number), rest) if name.startswith(prefix) and dot and number.isdigit() else None


def _checked(state: State, width: int, depth: int) -> Iterator[tuple[str, Tensor]]:
    for what, value in (("width", width), ("depth", depth)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{what} must be a whole number, at least 1, got {value!r}.")
    for name, tensor in state.items():
        if tensor.dim() and tensor.is_floating_point():
            yield name, tensor.detach()


def coalesce(state: State, layout: Layout, *, width: int = 2, depth: int = 2) -> dict[str, Tensor]:
    """Return the parameters of a smaller model: neurons and neighbouring blocks merged.

    Args:
        state: parameters by name, as `state_dict` gives them; tensors without dimensions, and whole numbers, are left
            out.
        layout: what their dimensions are.
        width: neurons that become one, f; every width, and the number of heads, must be a multiple.
        depth: blocks that become one; their number must be a multiple.

    Returns:
        New tensors.

    Raises:
        UsageError: if a size is no multiple, or the layout does not fit.

    Example:
        >>> layout = Layout({"up": ("out", "in"), "down": ("out", "in")})
        >>> state = {"up": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
        >>> coalesce(state, layout)["up"].tolist()  # rows averaged, columns added
        [[5.0]]

    References:
        Zou et al. 2024, arXiv:2404.07999; code in https://github.com/Photooon/Multi-Level-Training-Framework.
    """
    small: dict[str, Tensor] = {}
    stacks: dict[tuple[int, str], dict[int, Tensor]] = {}
    for name, tensor in _checked(state, width, depth):
        for dim, role in enumerate(layout.of(name, tensor)):
            tensor = tensor if role is None else _merge(tensor, dim, *role, width, name)
        block = _numbered(name, layout.blocks)
        if block is None:
            small[name] = tensor.clone()
        else:
            stacks.setdefault((block[0] // depth, block[1]), {})[block[0]] = tensor
    for (number, rest), tensors in stacks.items():
        if len(tensors) != depth:
            raise UsageError(f"blocks cannot be merged by {depth}: {layout.blocks}{number}.{rest} would have too few.")
        small[f"{layout.blocks}{number}.{rest}"] = torch.stack([tensors[i] for i in sorted(tensors)]).mean(0)
    return small


def decoalesce(state: State, layout: Layout, *, width: int = 2, depth: int = 2) -> dict[str, Tensor]:
    """Return the parameters of a larger model: neurons and blocks copied. `coalesce` undoes it.

    In width the larger model is the same function. In depth each block is there `depth` times in a row, as the paper
    defines it, which is another function.

    Args:
        state: parameters by name; tensors without dimensions, and whole numbers, are left out.
        layout: what their dimensions are.
        width: copies of each neuron, f.
        depth: copies of each block.

    Returns:
        New tensors.

    Raises:
        UsageError: if the layout does not fit.
    """
    large: dict[str, Tensor] = {}
    for name, tensor in _checked(state, width, depth):
        for dim, role in enumerate(layout.of(name, tensor)):
            tensor = tensor if role is None else _spread(tensor, dim, *role, width)
        block = _numbered(name, layout.blocks)
        if block is None:
            large[name] = tensor.clone()
            continue
        for copy in range(depth):
            large[f"{layout.blocks}{block[0] * depth + copy}.{block[1]}"] = tensor.clone()
    return large


def interpolate(before: State, mapped: State, *, alpha: float = 0.5) -> dict[str, Tensor]:
    """Return (1 - alpha) before + alpha mapped, which makes copied neurons differ.

    Args:
        before: the larger model's parameters before it was coalesced.
        mapped: the trained smaller model's, de-coalesced.
        alpha: in [0, 1].

    Returns:
        New tensors, under the names of `mapped`.

    Raises:
        UsageError: if alpha is not in [0, 1], or the shapes differ.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise UsageError(f"alpha must be in [0, 1], got {alpha!r}.")
    for name, tensor in mapped.items():
        if name not in before or before[name].shape != tensor.shape:
            raise UsageError(f"{name!r} is not in both models with one shape: map with the factors it was merged by.")
    return {name: (1 - alpha) * before[name].detach() + alpha * tensor for name, tensor in mapped.items()}


@dataclass
class VCycle:
    """A V-cycle of two levels, in the form that a `GrowthSchedule` takes: `{E_a: cycle.down, E_b: cycle.up}`.

    Args:
        layout: what the dimensions of the parameters are.
        small: builds a small model; its weights do not matter.
        large: builds a large model; its weights do not matter.
        alpha: of the interpolation.
        width: factor of the widths.
        depth: factor of the depths.
    """

    layout: Layout
    small: Callable[[], nn.Module]
    large: Callable[[], nn.Module]
    alpha: float = 0.5
    width: int = 2
    depth: int = 2
    _before: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def down(self, model: nn.Module) -> nn.Module:
        """Return the coalesced model, and keep the large model's weights for the interpolation."""
        self._before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        return _loaded(self.small(), coalesce(self._before, self.layout, width=self.width, depth=self.depth))

    def up(self, model: nn.Module) -> nn.Module:
        """Return the large model: the small one de-coalesced, interpolated with what the large one was."""
        mapped = decoalesce(model.state_dict(), self.layout, width=self.width, depth=self.depth)
        return _loaded(self.large(), interpolate(self._before, mapped, alpha=self.alpha) if self._before else mapped)

    def state_dict(self) -> dict[str, Any]:
        """Return the large model's weights from before the descent: needed to resume below."""
        return {"before": dict(self._before)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the weights of the large model.

        Args:
            state: what `state_dict` returned.
        """
        self._before = dict(state["before"])


def _loaded(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load parameters; buffers that were not mapped keep their values."""
    missing = [name for name, _ in model.named_parameters() if name not in state]
    if missing:
        raise UsageError(f"the mapped weights lack {missing[0]!r}: the models differ in more than width and depth.")
    model.load_state_dict(dict(state), strict=False)
    return model


CARD = Card(
    name="multi-level",
    room="schedule",
    summary="V-cycle: train a coalesced small model, map it back and interpolate",
    paper=Paper(
        "A Multi-Level Framework for Accelerating Training Transformer Models",
        2024,
        arxiv="2404.07999",
        code="https://github.com/Photooon/Multi-Level-Training-Framework",
    ),
    equation="W_small = F_out W F_in, W_large = T_out W_small T_in, W <- (1 - alpha) W_before + alpha W_large",
    claim="About 20 % less compute for BERT-Base and GPT-Base at equal loss, up to 51.6 % for BERT-Large.",
    acts_on="run",
    entry="trimtab.schedule.multi_level:coalesce",
    defaults=(
        Default("width", 2, "paper: half the heads"),
        Default("depth", 2, "paper: half the blocks; authors' code merges neighbours"),
    ),
    verified={
        "equation": (
            "tests/schedule/test_multi_level.py::test_equals_the_matrices_of_the_paper",
            "tests/schedule/test_multi_level.py::test_a_wider_model_is_the_same_function",
            "tests/schedule/test_multi_level.py::test_a_deeper_model_repeats_each_block",
            "tests/schedule/test_multi_level.py::test_coalescing_undoes_decoalescing",
        ),
    },
    deviations=(
        "Tied embeddings: the authors multiply them by 2 in coalescing and by 0.5 in de-coalescing, so that logits "
        "keep their size but the residual stream of a pre-LN model begins at half of it and the function changes; "
        "here the last normalisation takes the factor and the function stays (follow='code' is theirs).",
        "Neurons i and i + n / f are merged, the authors' default; their published scheme merges neighbouring heads.",
        "alpha is 0.5 as in the authors' script for GPT-2; their mapper's own default is 0.25.",
        "In width every size must be a multiple of the factor.",
        "Measured (benchmarks/multi_level.py, n=3): in a run far too short for the large model the V-cycle ends below "
        "the baseline at 68 % of its compute (difference -0.291 to -0.027), and below a run from scratch of equal "
        "compute (-0.322 to -0.310); but there the small model alone has the baseline's loss at 18 %.",
    ),
)
