"""Split each matrix's gradient: a part of it has a stateful step, the rest one without state (see `FRUGAL`)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import UsageError, choose
from trimtab.optim.adaptive.adamw import adam
from trimtab.optim.projected._projection import random_subspace, top_subspace
from trimtab.optim.projected.galore import is_hidden_matrix, side_of
from trimtab.optim.transform import Transform, check_range

__all__ = ["split_gradient"]

_INDEXED = ("columns", "rows", "entries")
_PROJECTIONS = (*_INDEXED, "svd", "random")
_RESTS = ("sign", "sgd", "none")


class split_gradient(Transform):
    """Give a part of each matrix's update to a transform with state, and the rest to one without.

    Only matrices are split, not those of groups with role "embedding" or "head"; other parameters have `inner` alone.
    With density 1 matrices too, without any new start; with density 0 they have no state at all. Steps count for each
    parameter.

    Args:
        inner: what updates the chosen part and keeps its state; default `adam()`.
        projection: the part: "columns", "rows" or "entries" of a matrix, drawn at random; its strongest directions
            ("svd") or random ones ("random"), of the smaller side.
        density: the part's size, in [0, 1].
        update_gap: steps between new choices, at least 1; `inner` starts again at each.
        rest: what the rest of the update becomes: "sign" of its entries, itself ("sgd"), or nothing ("none").
        rest_scale: factor on that, at least 0.

    Raises:
        UsageError: if an option breaks its rule, or two stages share an option.

    Example:
        >>> from trimtab.optim import Chain
        >>> weight = torch.nn.Parameter(torch.zeros(2, 4))
        >>> weight.grad = torch.tensor([[1.0, -2.0, 3.0, 0.5]] * 2)
        >>> optimizer = Chain([weight], [split_gradient(projection="columns")], lr=0.1)
        >>> optimizer.step()
        >>> optimizer.state[weight]["exp_avg"].shape  # one column of four
        torch.Size([2, 1])
    """

    elementwise = False
    projections: tuple[str, ...] = _PROJECTIONS

    def __init__(
        self,
        inner: Transform | None = None,
        *,
        projection: str = "columns",
        density: float = 0.25,
        update_gap: int = 200,
        rest: str = "sign",
        rest_scale: float = 1.0,
    ) -> None:
        own = {"projection": projection, "density": density, "update_gap": update_gap}
        own |= {"rest": rest, "rest_scale": rest_scale}
        self.inner = adam() if inner is None else inner
        if self.inner.writes or self.inner.sums:
            raise UsageError(f"{type(self.inner).__name__} cannot update a part: it needs the parameters themselves.")
        if twice := sorted(own.keys() & self.inner.options.keys()):
            raise UsageError(f"the inner transform has an option {twice[0]!r} too: each name may occur once.")
        super().__init__(**own, **self.inner.options)
        self.moments = self.inner.moments

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse values out of range and unknown names."""
        choose("projection", group["projection"], self.projections)
        choose("rule for the rest", group["rest"], _RESTS)
        check_range("density", group["density"], 0, 1, open_high=False)
        check_range("rest_scale", group["rest_scale"], 0)
        gap = group["update_gap"]
        if not isinstance(gap, int) or isinstance(gap, bool) or gap < 1:
            raise UsageError(f"update_gap must be a whole number of at least 1, got {gap!r}.")
        self.inner.check(group)

    def part(self, p: Tensor, group: Mapping[str, Any]) -> str:
        """Return which part of a parameter has state: "all", "none", or the projection with its side."""
        if not is_hidden_matrix(p, group) or group["density"] == 1:
            return "all"
        if group["density"] == 0:
            return "none"
        projection: str = group["projection"]
        return side_of(p, "std") if projection in ("svd", "random") else projection

    def kind(self, p: Tensor, group: Mapping[str, Any]) -> Hashable:
        """Return which part has state, and the inner transform's kind."""
        return self.part(p, group), self.inner.kind(p, group)

    def init(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the inner state for the part, and what says which part it is."""
        part = self.part(p, group)
        if part == "all":
            return self.inner.init(p, group)
        if part == "none":
            return {}
        (m, n), density = p.shape, group["density"]
        if part in ("left", "right"):
            r = max(1, round(density * min(m, n)))
            small = p.new_zeros(m, r) if part == "right" else p.new_zeros(r, n)
            return {"basis": p.new_zeros(n if part == "right" else m, r), **self.inner.init(small, group)}
        total = {"columns": n, "rows": m, "entries": m * n}[part]
        count = max(1, round(density * total))
        small = p.new_zeros({"columns": (m, count), "rows": (count, n), "entries": (count,)}[part])
        return {"index": p.new_zeros(count, dtype=torch.int32), **self.inner.init(small, group)}

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inner coefficients, counted from the start and from the last choice, and the rule of the rest."""
        return {
            "whole": self.inner.coefficients(step, group),
            "part": self.inner.coefficients((step - 1) % group["update_gap"] + 1, group),
            "rest": group["rest"] if group["rest_scale"] else "none",
            "rest_scale": float(group["rest_scale"]),
        }

    def due(self, step: int, group: Mapping[str, Any]) -> bool:
        """Whether a part is chosen before this step."""
        return 0 < group["density"] < 1 and (step - 1) % group["update_gap"] == 0

    def refresh(
        self,
        u: Tensor,
        p: Tensor,
        state: dict[str, Tensor],
        step: int,
        group: Mapping[str, Any],
        generator: torch.Generator,
    ) -> None:
        """Choose a part, and start its state again."""
        part = self.part(p, group)
        if part not in (*_INDEXED, "left", "right"):
            return
        if "index" in state:
            total = {"columns": p.shape[1], "rows": p.shape[0], "entries": p.numel()}[part]
            drawn = torch.randperm(total, generator=generator)[: state["index"].numel()]
            state["index"].copy_(drawn.sort().values)
        elif group["projection"] == "svd":
            state["basis"].copy_(top_subspace(u, state["basis"].shape[1], part))
        else:
            state["basis"].copy_(random_subspace(u, state["basis"].shape[0], state["basis"].shape[1], generator))
        for name, value in self.inner.init(self.down(u, state, part), group).items():
            state[name].copy_(value)

    def down(self, u: Any, state: Any, part: str) -> Any:
        """Return the part of a matrix that has state."""
        if part == "left":
            return state["basis"].mT @ u
        if part == "right":
            return u @ state["basis"]
        if part == "entries":
            return u.reshape(-1).index_select(0, state["index"])
        return u.index_select(0 if part == "rows" else 1, state["index"])

    def up(self, u: Any, like: Any, state: Any, part: str) -> Any:
        """Return the matrix that has this part, and zeros elsewhere."""
        if part == "left":
            return state["basis"] @ u
        if part == "right":
            return u @ state["basis"].mT
        zero, index = torch.zeros_like(like), state["index"].long()
        if part == "entries":
            return zero.reshape(-1).index_copy(0, index, u).reshape(like.shape)
        return zero.index_copy(0 if part == "rows" else 1, index, u)

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return the inner update of the part plus that of the rest."""
        part, kind = h["kind"]
        if part == "all":
            return self.inner.update(u, p, state, {**h["whole"], "kind": kind})
        if part == "none":
            return self._free(u, h)
        full = self.down(u, state, part)
        stepped = self.up(self.inner.update(full, p, state, {**h["part"], "kind": kind}), u, state, part)
        if h["rest"] == "none":
            return stepped
        free = u - self.up(full, u, state, part)
        if part in ("left", "right"):
            # Where the subspace holds all of the gradient, the sign of rounding errors would be a step of full size.
            rounding = u.abs().amax() * (16 * torch.finfo(u.dtype).eps)
            free = torch.where(free.abs() > rounding, free, torch.zeros_like(free))
        return stepped + self._free(free, h)

    @staticmethod
    def _free(u: Any, h: Any) -> Any:
        if h["rest"] == "none":
            return torch.zeros_like(u)
        return (torch.sign(u) if h["rest"] == "sign" else u) * h["rest_scale"]
