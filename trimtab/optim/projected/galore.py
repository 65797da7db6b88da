"""GaLore: an optimizer that sees each weight matrix's gradient in a subspace, and keeps its state there.

    P <- the first r singular vectors of G, every update_gap steps;    R = P^T G    (R = G P where G is tall)
    N = Adam's step from R,    W <- W - lr (scale P N + weight_decay W)

Zhao et al. 2024 (arXiv:2403.03507), algorithm 2; authors' code jiaweizzhao/GaLore (galore-torch).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError, choose
from trimtab.optim.adaptive.adamw import adam
from trimtab.optim.chain import Chain
from trimtab.optim.projected._authors import early_eps_adam, late_decay
from trimtab.optim.projected._projection import top_subspace
from trimtab.optim.transform import Transform, check_range

__all__ = ["GaLoreAdamW", "low_rank"]

PROJECTIONS = ("std", "reverse_std", "left", "right", "full")


def is_hidden_matrix(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a parameter is a matrix with entries, and its group not that of embeddings or of the output layer."""
    return p.ndim == 2 and p.numel() > 0 and group.get("role") not in ("embedding", "head")


def side_of(p: Tensor, proj_type: str) -> str:
    """Return the side on which a matrix is projected: "left", "right" or, for both, "full"."""
    tall = p.shape[0] >= p.shape[1]
    if proj_type == "std":
        return "right" if tall else "left"
    if proj_type == "reverse_std":
        return "left" if tall else "right"
    return proj_type


class low_rank(Transform):
    """Run a transform in the subspace of each matrix's strongest gradient directions: u -> scale P inner(P^T u).

    Vectors, tensors of more than two dimensions, matrices whose smaller side is at most `rank`, and groups with role
    "embedding" or "head" or with `rank` None have `inner` alone, without the scale. Steps count for each parameter:
    one without a gradient at a boundary keeps its subspace until its own next boundary.

    Args:
        inner: what runs in the subspace and keeps its state there; default `adam()`.
        rank: dimensions of the subspace, at least 1, or None for `inner` alone.
        update_gap: steps between new subspaces, at least 1; the first is taken at the first step.
        scale: factor on what leaves the subspace, above 0.
        proj_type: "std" projects a matrix's smaller side, "reverse_std" its larger one, "left" the rows' side, "right"
            the columns', "full" both.
        follow: "paper", or "code" for the singular value decomposition of the authors' code, in float32 and with the
            signs of its vectors.

    Raises:
        UsageError: if an option breaks its rule, or two stages share an option.

    Example:
        >>> from trimtab.optim import Chain, low_rank
        >>> weight = torch.nn.Parameter(torch.zeros(8, 6))
        >>> weight.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> optimizer = Chain([weight], [low_rank(rank=2)], lr=0.1)
        >>> optimizer.step()
        >>> int(torch.linalg.matrix_rank(weight.detach())), tuple(optimizer.state[weight]["exp_avg"].shape)
        (2, (8, 2))
    """

    elementwise = False

    def __init__(
        self,
        inner: Transform | None = None,
        *,
        rank: int | None = 128,
        update_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        follow: str = "paper",
    ) -> None:
        own = {"rank": rank, "update_gap": update_gap, "scale": scale, "proj_type": proj_type, "follow": follow}
        self.inner = adam() if inner is None else inner
        if self.inner.writes or self.inner.sums:
            raise UsageError(
                f"{type(self.inner).__name__} cannot run in a subspace: it needs the parameters themselves."
            )
        if twice := sorted(own.keys() & self.inner.options.keys()):
            raise UsageError(f"the inner transform has an option {twice[0]!r} too: each name may occur once.")
        super().__init__(**own, **self.inner.options)
        self.moments = self.inner.moments

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse a rank or gap below 1, a scale that is not above 0, and unknown names."""
        for name in ("rank", "update_gap"):
            value = group[name]
            if name == "rank" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}.")
        check_range("scale", group["scale"], 0, open_low=True)
        choose("projection", group["proj_type"], PROJECTIONS)
        choose("source to follow", group["follow"], ("paper", "code"))
        self.inner.check(group)

    def side(self, p: Tensor, group: Mapping[str, Any]) -> str | None:
        """Return the side on which a parameter is projected, or None if it is not."""
        rank = group["rank"]
        if rank is None or not is_hidden_matrix(p, group) or min(p.shape) <= rank:
            return None
        return side_of(p, group["proj_type"])

    def kind(self, p: Tensor, group: Mapping[str, Any]) -> Hashable:
        """Return the side of the projection, and the inner transform's kind."""
        return self.side(p, group), self.inner.kind(p, group)

    def init(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return bases, zero until the first step, and the inner state in the shape of the subspace."""
        side = self.side(p, group)
        if side is None:
            return self.inner.init(p, group)
        (m, n), r = p.shape, group["rank"]
        bases = {}
        if side != "right":
            bases["projector_left"] = p.new_zeros(m, r)
        if side != "left":
            bases["projector_right"] = p.new_zeros(n, r)
        small = p.new_zeros(m if side == "right" else r, n if side == "left" else r)
        return bases | self.inner.init(small, group)

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the scale and the inner coefficients."""
        return {"scale": float(group["scale"]), "inner": self.inner.coefficients(step, group)}

    def renews(self, step: int, group: Mapping[str, Any]) -> bool:
        """Whether a subspace is chosen before this step."""
        return group["rank"] is not None and (step - 1) % group["update_gap"] == 0

    def due(self, step: int, group: Mapping[str, Any]) -> bool:
        """Whether a subspace is chosen before this step, or the inner transform has something to do."""
        return self.renews(step, group) or self.inner.due(step, group)

    def refresh(
        self,
        u: Tensor,
        p: Tensor,
        state: dict[str, Tensor],
        step: int,
        group: Mapping[str, Any],
        generator: torch.Generator,
    ) -> None:
        """Take the strongest directions of this step's gradient; the inner state stays."""
        side = self.side(p, group)
        if side is not None and self.renews(step, group):
            for name in ("left", "right"):
                if side in (name, "full"):
                    basis = top_subspace(u, group["rank"], name, svd=group["follow"] == "code")
                    state[f"projector_{name}"].copy_(basis)
        if self.inner.due(step, group):
            self.inner.refresh(self.down(u, state, side), p, state, step, group, generator)

    def down(self, u: Any, state: Any, side: str | None) -> Any:
        """Return the coordinates of a matrix in the subspace: P^T u, u Q, or P^T u Q."""
        if side in ("left", "full"):
            u = state["projector_left"].mT @ u
        return u @ state["projector_right"] if side in ("right", "full") else u

    def up(self, u: Any, state: Any, side: str | None) -> Any:
        """Return the matrix with these coordinates: P u, u Q^T, or P u Q^T."""
        if side in ("left", "full"):
            u = state["projector_left"] @ u
        return u @ state["projector_right"].mT if side in ("right", "full") else u

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return scale P inner(P^T u)."""
        side, kind = h["kind"]
        inner = {**h["inner"], "kind": kind}
        if side is None:
            return self.inner.update(u, p, state, inner)
        return self.up(self.inner.update(self.down(u, state, side), p, state, inner) * h["scale"], state, side)


class GaLoreAdamW(Chain):
    """GaLore with Adam: P has the gradient's r first singular vectors, W <- W - lr (scale P adam(P^T G) + decay W).

    What is projected, and when subspaces change, is described at `low_rank`.

    Args:
        params: parameters or groups; `param_groups_for(model)` marks embeddings and output layer, which are not
            projected.
        lr: learning rate, of all parameters.
        rank: dimensions of the subspace, at least 1; None in a group for plain Adam.
        update_gap: steps between new subspaces, at least 1.
        scale: factor on the projected update, above 0.
        proj_type: "std", "reverse_std", "left", "right" or "full".
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: decoupled.
        follow: "paper", or "code" for the signs of singular vectors, the eps and the decay of the authors' code.
        options: of every `Chain`: `maximize`, `state`, `foreach`, `compile`, `nonfinite`.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = GaLoreAdamW(model.parameters(), lr=0.01, rank=16)

    References:
        Zhao et al. 2024, arXiv:2403.03507; authors' code jiaweizzhao/GaLore (galore-torch).
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
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        follow: str = "paper",
        **options: Any,
    ) -> None:
        projected = low_rank(
            early_eps_adam(betas=betas, eps=eps),
            rank=rank,
            update_gap=update_gap,
            scale=scale,
            proj_type=proj_type,
            follow=follow,
        )
        super().__init__(params, [projected, late_decay()], lr=lr, weight_decay=weight_decay, **options)


CARD = Card(
    name="galore",
    room="optim",
    summary="Adam in a subspace of each matrix's gradient that changes every few hundred steps",
    paper=Paper(
        "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
        2024,
        arxiv="2403.03507",
        code="https://github.com/jiaweizzhao/GaLore",
    ),
    equation="P = r first singular vectors of G;  W <- W - lr (scale P adam(P^T G) + weight_decay W)",
    claim="Up to 65.5 % less optimizer state than Adam at comparable perplexity in pre-training.",
    acts_on="optimizer",
    entry="trimtab.optim.projected.galore:GaLoreAdamW",
    defaults=(
        Default("lr", 0.01, "authors' code, README"),
        Default("rank", 128, "authors' code, README"),
        Default("update_gap", 200, "paper and authors' code"),
        Default("scale", 0.25, "paper and authors' code"),
        Default("proj_type", "std", "authors' code"),
        Default("betas", (0.9, 0.999), "authors' code"),
        Default("eps", 1e-6, "authors' code"),
        Default("weight_decay", 0.0, "authors' code"),
        Default("follow", "paper", "ours"),
    ),
    verified={
        "equation": (
            "tests/optim/projected/test_galore.py::test_equals_the_papers_loop",
            "tests/optim/projected/test_galore.py::test_state_follows_the_rank_formula",
        ),
        "reference": ("tests/optim/projected/test_galore.py::test_equals_galore_torch",),
        "claim": ("tests/claims/test_optimizers_projected.py::test_galore_keeps_up_with_adam_on_a_low_rank_task",),
    },
    deviations=(
        "The paper leaves the signs of singular vectors open, though moments outlive a change of subspace and so "
        "depend on them. Here a vector's largest entry is positive; the authors' code has the signs that "
        "torch.linalg.svd happens to give, and follow='code' too.",
        "Directions come from eigenvectors of the smaller Gram matrix, in the gradient's own precision, or from the "
        "singular value decomposition where those are inaccurate; follow='code' decomposes in float32.",
        "In the authors' code, and with follow='code', eps is added to sqrt(v) before the bias correction, and weights "
        "are decayed after the step.",
        "Matrices whose smaller side is at most the rank have plain Adam, without the scale; the authors' code rotates "
        "and scales them.",
        "Adam's state is kept in fewer bits if asked, the bases are not; the authors keep bases in the model's dtype.",
    ),
    experiments=(
        Experiment(
            "lm-small",
            "adamw,lr=0.003,steps=300,batch_size=8",
            "galore,lr=0.03,rank=16,update_gap=50,steps=300,batch_size=8",
            mechanism="state_bytes_per_parameter",
            outcome=(
                "better: final loss 2.482 to 2.402, difference -0.080 (95 % interval -0.100 to -0.060), n=5; "
                "state 8.00 to 2.90 bytes a parameter; learning rates tuned on both sides; its scale of 0.25 "
                "gives embeddings and vectors four times the matrices' rate, which may be what helps"
            ),
        ),
    ),
)
