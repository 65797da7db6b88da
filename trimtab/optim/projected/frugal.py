"""FRUGAL: a part of the gradient has an optimizer with state, the rest signSGD, so that the update has full rank.

    g = g_full + g_free,    g_full = the part of g in a subspace chosen anew every update_gap steps
    u = adam(g_full) + rest_scale sign(g_free),    p <- p - lr (u + weight_decay p)

Adam's moments exist for the subspace only, and start again with it. The subspace: whole matrices, drawn at random
("blockwise", as in BAdam); columns, rows or entries of each matrix; or directions of each, the strongest of the
gradient or random ones.

Zmushko et al. 2024 (arXiv:2411.07837); authors' code fzmushko/FRUGAL, frugal/proj_optimizer_templates.py and adamw.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.optim._sharding import Shard
from trimtab.optim.adaptive.adamw import adam
from trimtab.optim.chain import Chain
from trimtab.optim.projected.galore import is_hidden_matrix
from trimtab.optim.projected.splitting import split_gradient

__all__ = ["FRUGAL"]


class _split(split_gradient):
    """The same with "blockwise", where the chain says which matrices have state: `idle` are those that have none."""

    projections = (*split_gradient.projections, "blockwise")

    def __init__(self, idle: set[Tensor], **options: Any) -> None:
        super().__init__(**options)
        self.idle = idle

    def part(self, p: Tensor, group: Mapping[str, Any]) -> str:
        part = super().part(p, group)
        return part if part != "blockwise" else "none" if p in self.idle else "block"

    def init(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        return self.inner.init(p, group) if self.part(p, group) == "block" else super().init(p, group)

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        part, kind = h["kind"]
        if part == "block":
            return self.inner.update(u, p, state, {**h["part"], "kind": kind})
        return super().update(u, p, state, h)


class FRUGAL(Chain):
    """FRUGAL: Adam for a part of the gradient that changes, signSGD for the rest, u = adam(g_full) + c sign(g_free).

    What is split is described at `split_gradient`. With "blockwise", round(density n) of the n matrices, at least one,
    have state at a time; they are drawn together, over all groups of one density and gap, when the matrices that have
    a gradient reach the boundary, and a matrix that had missed gradients counts on from there with them.

    Args:
        params: parameters or groups; `param_groups_for(model)` marks embeddings and output layer, which are not split.
        lr: learning rate, of both parts.
        projection: "blockwise", "columns", "rows", "entries", "svd" or "random".
        density: part of the matrices' entries that has state, in [0, 1].
        update_gap: steps between new choices, at least 1.
        rest: "sign", "sgd" or "none".
        rest_scale: factor on the update of the rest, at least 0.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: decoupled.
        options: of every `Chain`: `maximize`, `state`, `foreach`, `compile`, `nonfinite`, `seed`.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> optimizer = FRUGAL(model.parameters(), lr=1e-3, density=0.5)

    References:
        Zmushko et al. 2024, arXiv:2411.07837; authors' code fzmushko/FRUGAL.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        projection: str = "blockwise",
        density: float = 0.25,
        update_gap: int = 200,
        rest: str = "sign",
        rest_scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        self.idle: set[Tensor] = set()
        split = _split(
            self.idle,
            inner=adam(betas=betas, eps=eps),
            projection=projection,
            density=density,
            update_gap=update_gap,
            rest=rest,
            rest_scale=rest_scale,
        )
        super().__init__(params, [split], lr=lr, weight_decay=weight_decay, **options)

    def _usable(self, shards: Sequence[Shard]) -> bool:
        """Choose the matrices that have state, once the step is sure to be taken."""
        usable = super()._usable(shards)
        if usable:
            for pool in self._pools():
                self._choose(pool, {shard.parameter: shard for shard in shards})
        return usable

    def _pools(self) -> Iterator[list[tuple[Tensor, Mapping[str, Any]]]]:
        """Yield the matrices that are drawn together, with their groups."""
        pools: dict[tuple[float, int], list[tuple[Tensor, Mapping[str, Any]]]] = {}
        for group in self.param_groups:
            if group["projection"] == "blockwise" and 0 < group["density"] < 1:
                pool = pools.setdefault((group["density"], group["update_gap"]), [])
                pool += [(p, group) for p in group["params"] if is_hidden_matrix(p, group)]
        yield from pools.values()

    def _choose(self, pool: list[tuple[Tensor, Mapping[str, Any]]], shards: Mapping[Tensor, Shard]) -> None:
        present = [p for p, _ in pool if p in shards]
        if not present:
            return
        density, gap = pool[0][1]["density"], pool[0][1]["update_gap"]
        done = max(self.state[p].get("step", 0) for p in present)
        if done % gap:
            return
        count = max(1, round(density * len(pool)))
        order = torch.randperm(len(pool), generator=self.generator(-1, done + 1)).tolist()
        self.idle.difference_update(p for p, _ in pool)
        self.idle.update(pool[place][0] for place in order[count:])
        for p, _ in pool:
            self.state.pop(p, None)
        for p in present:
            self._prepare(shards[p])
            self.state[p]["step"] = done

    def fresh(self, parameter: Tensor, value: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step; of a matrix without state, nothing."""
        return {} if parameter in self.idle else super().fresh(parameter, value, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; which matrices have state is part of it.

        Raises:
            UsageError: if a parameter's state has missing or unknown keys, or tensors of another shape; nothing is
                changed then.
        """
        before = set(self.idle)
        places = [place for group in state_dict.get("param_groups", ()) for place in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        blocks = {p for pool in self._pools() for p, _ in pool}
        saved = {p: state_dict.get("state", {}).get(place, {}) for place, p in zip(places, own, strict=False)}
        self.idle.clear()
        self.idle.update(p for p in blocks if saved.get(p, {}).keys() == {"step"})
        try:
            super().load_state_dict(state_dict)
        except Exception:
            self.idle.clear()
            self.idle.update(before)
            raise


CARD = Card(
    name="frugal",
    room="optim",
    summary="Adam for a changing part of the matrices, signSGD for the rest",
    paper=Paper(
        "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
        2024,
        arxiv="2411.07837",
        code="https://github.com/fzmushko/FRUGAL",
    ),
    equation="g = g_full + g_free;  p <- p - lr (adam(g_full) + c sign(g_free) + weight_decay p)",
    claim="At equal state, lower perplexity in pre-training than GaLore and BAdam, close to Adam's.",
    acts_on="optimizer",
    entry="trimtab.optim.projected.frugal:FRUGAL",
    defaults=(
        Default("lr", 1e-3, "authors' code"),
        Default("projection", "blockwise", "authors' code: what its optimizer 'frugal' is"),
        Default("density", 0.25, "authors' code"),
        Default("update_gap", 200, "authors' code"),
        Default("rest", "sign", "authors' code"),
        Default("rest_scale", 1.0, "authors' code, for pre-training; 0.1 for fine-tuning"),
        Default("betas", (0.9, 0.999), "authors' code"),
        Default("eps", 1e-8, "authors' code"),
        Default("weight_decay", 0.0, "ours; authors' code: 0.01"),
    ),
    verified={
        "equation": (
            "tests/optim/projected/test_frugal.py::test_parts_sum_to_the_gradient",
            "tests/optim/projected/test_frugal.py::test_state_has_the_density",
            "tests/optim/projected/test_frugal.py::test_density_one_is_adam",
            "tests/optim/projected/test_frugal.py::test_density_zero_is_sign_descent",
            "tests/optim/projected/test_frugal.py::test_equals_the_authors_rule",
        ),
        "claim": ("tests/claims/test_optimizers_projected.py::test_full_rank_updates_reach_what_galore_misses",),
    },
    deviations=(
        "The paper's algorithm is recalled; formulas, defaults and the new start of the moments are those of the "
        "authors' code, whose option to keep moments of an earlier subspace is not offered.",
        "With density 1 moments never start again, so that it is Adam; in the authors' code they do every gap.",
        "At least one matrix, column, row, entry or direction has state where density is above 0; the authors round.",
        "Matrices of all groups of one density and gap are drawn together, in random order only; the authors draw by "
        "group, and have ordered sequences too.",
        "In the rest of directions, entries of the size of rounding errors count as 0; the authors take their sign.",
        "Random choices come from the optimizer's own seed, and resume with it.",
    ),
    experiments=(
        Experiment(
            "lm-small",
            "adamw,lr=0.003,steps=300,batch_size=8",
            "frugal,lr=0.003,density=0.25,update_gap=50,steps=300,batch_size=8",
            mechanism="state_bytes_per_parameter",
            outcome=(
                "worse: final loss 2.482 to 2.500, difference +0.018 (95 % interval +0.003 to +0.032), n=5; state "
                "8.00 to 2.47 bytes a parameter; learning rates tuned on both sides"
            ),
        ),
        Experiment(
            "lm-small",
            "galore,lr=0.03,rank=16,update_gap=50,steps=300,batch_size=8",
            "frugal,lr=0.003,density=0.25,update_gap=50,steps=300,batch_size=8",
            mechanism="state_bytes_per_parameter",
            outcome=(
                "worse: final loss 2.402 to 2.500, difference +0.098 (95 % interval +0.077 to +0.118), n=5; state "
                "2.90 to 2.47 bytes a parameter; learning rates tuned on both sides"
            ),
        ),
    ),
)
