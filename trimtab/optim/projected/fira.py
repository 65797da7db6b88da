"""Fira: GaLore whose update is of full rank, the rest of the gradient scaled as Adam scales what it sees.

    R = P^T G,    N = Adam's step from R,    S = (G - P R) diag(k),    k_i = |N_:i| / (|R_:i| + 1e-8)
    S <- S gamma / max(|S| / |S_previous|, gamma)
    W <- W - lr (scale (P N + S) + weight_decay W)

so that |S| grows by a factor of gamma a step at most; of a tall matrix, rows take the place of columns.

Chen et al. 2024 (arXiv:2410.01623), algorithm 1; authors' code xichen-fy/Fira, optimizer_torch/fira_adamw.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import choose
from trimtab.optim.chain import Chain
from trimtab.optim.projected._authors import early_eps_adam, late_decay
from trimtab.optim.projected.galore import low_rank
from trimtab.optim.transform import Transform, check_range

__all__ = ["Fira", "full_rank"]

_TINY = 1e-8


class full_rank(low_rank):
    """Run a transform in a subspace, and add the rest of the gradient, scaled column by column like what was seen.

    Which parameters are projected, and when subspaces change, is described at `low_rank`.

    Args:
        inner: what runs in the subspace and keeps its state there; default `adam()`.
        rank: dimensions of the subspace, at least 1, or None for `inner` alone.
        update_gap: steps between new subspaces, at least 1.
        scale: factor on the update of projected matrices, above 0.
        proj_type: "std", "reverse_std", "left" or "right".
        gamma: largest growth of the rest's norm from step to step, at least 1.
        follow: "paper", or "code" for the authors' scale and limiter.

    Example:
        >>> from trimtab.optim import Chain
        >>> weight = torch.nn.Parameter(torch.zeros(8, 6))
        >>> weight.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> Chain([weight], [full_rank(rank=2)], lr=0.1).step()
        >>> int(torch.linalg.matrix_rank(weight.detach()))
        6
    """

    def __init__(
        self,
        inner: Transform | None = None,
        *,
        rank: int | None = 128,
        update_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        gamma: float = 1.01,
        follow: str = "paper",
    ) -> None:
        super().__init__(inner, rank=rank, update_gap=update_gap, scale=scale, proj_type=proj_type, follow=follow)
        self.options["gamma"] = gamma

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse what `low_rank` refuses, a gamma below 1, and a projection of both sides, which leaves no columns."""
        super().check(group)
        choose("projection", group["proj_type"], ("std", "reverse_std", "left", "right"))
        check_range("gamma", group["gamma"], 1)

    def init(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the state in the subspace, and the norm of the rest, zero before the first step."""
        state = super().init(p, group)
        return state if self.side(p, group) is None else {**state, "rest_norm": p.new_zeros(1)}

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `low_rank` needs, and how the rest is scaled and limited."""
        h = super().coefficients(step, group)
        code = group["follow"] == "code"
        # The authors scale and limit Adam's step without its bias correction, which comes in later with the step size.
        corrected = h["inner"].get("correction1", 1.0) / h["inner"].get("correction2", 1.0) if code else 1.0
        return h | {"gamma": float(group["gamma"]), "code": code, "limits": step > 1, "corrected": float(corrected)}

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return scale (P inner(P^T u) + S)."""
        side, kind = h["kind"]
        if side is None:
            return super().update(u, p, state, h)
        seen = self.down(u, state, side)
        step = self.inner.update(seen, p, state, {**h["inner"], "kind": kind})
        dim = 0 if side == "left" else 1
        factor = torch.linalg.vector_norm(step, dim=dim, keepdim=True) / (
            torch.linalg.vector_norm(seen, dim=dim, keepdim=True) + _TINY
        )
        back = self.up(seen, state, side)
        rest = (u - (back * h["scale"] if h["code"] else back)) * factor
        rest = rest * self._limit(rest, state, h)
        stepped = self.up(step, state, side)
        return stepped * h["scale"] + rest if h["code"] else (stepped + rest) * h["scale"]

    def _limit(self, rest: Any, state: Any, h: Any) -> Any:
        """Return the factor that holds the growth of the rest's norm at gamma, and keep the norm."""
        previous = state["rest_norm"]
        norm = torch.linalg.vector_norm(rest) / h["corrected"]
        if h["code"]:
            # The first step of all is not limited.
            growth = norm / (previous + _TINY) if h["limits"] else norm * 0.0
            limit = 1.0 / (torch.clamp_min(growth / h["gamma"], 1.0))
        else:
            # Nor is one after a gradient of zero, which would leave the rest near zero for good.
            bound = previous * h["gamma"]
            limit = torch.where(previous > 0, torch.clamp_max(bound / (norm + 1e-30), 1.0), torch.ones_like(previous))
        previous.copy_(norm * limit)
        return limit


class Fira(Chain):
    """Fira with Adam: W <- W - lr (scale (P adam(P^T G) + S) + decay W), S the rest of G scaled by columns and limited.

    Args:
        params: parameters or groups; `param_groups_for(model)` marks embeddings and output layer, which are not
            projected.
        lr: learning rate, of all parameters.
        rank: dimensions of the subspace, at least 1; None in a group for plain Adam.
        update_gap: steps between new subspaces, at least 1.
        scale: factor on the update of projected matrices, above 0.
        proj_type: "std", "reverse_std", "left" or "right".
        gamma: largest growth of |S| from step to step, at least 1.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: decoupled.
        follow: "paper", or "code" for what the authors' code does differently (see the Card's deviations).
        options: of every `Chain`: `maximize`, `state`, `foreach`, `compile`, `nonfinite`.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = Fira(model.parameters(), lr=0.01, rank=16)

    References:
        Chen et al. 2024, arXiv:2410.01623; authors' code xichen-fy/Fira.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        *,
        rank: int | None = 128,
        update_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        gamma: float = 1.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        follow: str = "paper",
        **options: Any,
    ) -> None:
        projected = full_rank(
            early_eps_adam(betas=betas, eps=eps),
            rank=rank,
            update_gap=update_gap,
            scale=scale,
            proj_type=proj_type,
            gamma=gamma,
            follow=follow,
        )
        super().__init__(params, [projected, late_decay()], lr=lr, weight_decay=weight_decay, **options)


CARD = Card(
    name="fira",
    room="optim",
    summary="GaLore plus the rest of the gradient, scaled by columns and limited in growth",
    paper=Paper(
        "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
        2024,
        arxiv="2410.01623",
        code="https://github.com/xichen-fy/Fira",
    ),
    equation=(
        "W <- W - lr scale (P N + S),  R = P^T G,  N = adam(R),  S = (G - P R) diag(|N_:i| / |R_:i|),  "
        "|S| <= gamma |S_previous|"
    ),
    claim="Full-rank training in GaLore's memory: lower perplexity than GaLore, comparable to Adam's.",
    acts_on="optimizer",
    entry="trimtab.optim.projected.fira:Fira",
    defaults=(
        Default("lr", 0.01, "paper, appendix B.1"),
        Default("rank", 128, "GaLore's authors' code, README"),
        Default("update_gap", 200, "paper, appendix B.1"),
        Default("scale", 0.25, "paper, appendix B.1, below 1B parameters"),
        Default("proj_type", "std", "authors' code"),
        Default("gamma", 1.01, "paper and authors' code"),
        Default("betas", (0.9, 0.999), "authors' code"),
        Default("eps", 1e-6, "authors' code"),
        Default("weight_decay", 0.0, "authors' code"),
        Default("follow", "paper", "ours"),
    ),
    verified={
        "equation": (
            "tests/optim/projected/test_fira.py::test_equals_the_papers_loop",
            "tests/optim/projected/test_fira.py::test_the_limiter_bounds_growth",
            "tests/optim/projected/test_fira.py::test_the_rest_is_orthogonal_to_the_subspace",
        ),
        "reference": ("tests/optim/projected/test_fira.py::test_equals_the_authors_rule",),
        "claim": ("tests/claims/test_optimizers_projected.py::test_full_rank_updates_reach_what_galore_misses",),
    },
    deviations=(
        "In the authors' code, and with follow='code', the rest is G - scale P R, which keeps a part of the subspace, "
        "and is not multiplied by scale; the paper's algorithm has scale (P N + S), S of G - P R.",
        "In the authors' code, and with follow='code', columns are scaled and growth is limited before Adam's bias "
        "correction, eps precedes it too, weights are decayed after the step, and singular vectors are those of "
        "torch.linalg.svd in float32.",
        "A step after one without any rest is not limited; by the algorithm's eps the rest would start again from "
        "1e-8 and could grow by 1 % a step only. follow='code' does that.",
        "Matrices whose smaller side is at most the rank have plain Adam, without the scale.",
    ),
    experiments=(
        Experiment(
            "lm-small",
            "adamw,lr=0.003,steps=300,batch_size=8",
            "fira,lr=0.1,rank=16,update_gap=50,steps=300,batch_size=8",
            mechanism="state_bytes_per_parameter",
            outcome=(
                "better: final loss 2.482 to 2.408, difference -0.074 (95 % interval -0.102 to -0.047), n=5; "
                "state 8.00 to 2.90 bytes a parameter; learning rates tuned on both sides; its scale of 0.25 "
                "gives embeddings and vectors four times the matrices' rate, which may be what helps"
            ),
        ),
        Experiment(
            "lm-small",
            "galore,lr=0.03,rank=16,update_gap=50,steps=300,batch_size=8",
            "fira,lr=0.1,rank=16,update_gap=50,steps=300,batch_size=8",
            mechanism="state_bytes_per_parameter",
            outcome=(
                "no evidence: final loss 2.402 to 2.408, difference +0.006 (95 % interval -0.010 to +0.021), n=5; "
                "state 2.90 to 2.90 bytes a parameter; learning rates tuned on both sides"
            ),
        ),
    ),
)
