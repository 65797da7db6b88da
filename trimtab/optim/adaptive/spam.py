"""SPAM: Adam that clips spikes entry by entry, forgets its moments at intervals, and may keep them for a few entries.

Every `interval` steps both moments start again at zero, and the step is warmed up over `warmup` steps. Otherwise

    g_i <- sign(g_i) sqrt(threshold v_i)    where g_i^2 > threshold v_i
    m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2
    u = s_j m_hat / (sqrt(v_hat) + eps),    s_j = 1 - 0.99 (1 + cos(pi j / (warmup + 1))) / 2,    j steps after a reset

A density below 1 keeps moments for a random part of each matrix only, drawn anew at each reset; the rest stays.

Huang et al. 2025 (arXiv:2501.06842); authors' code TianjinYellow/SPAM-Optimizer, galore_torch/SPAM.py.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError, choose
from trimtab.optim._ops import addcmul_
from trimtab.optim.adaptive.resetting import reset_adam
from trimtab.optim.chain import Chain
from trimtab.optim.transform import Descend, Transform, check_range, check_whole

__all__ = ["SPAM", "spike_aware_adam", "spike_clip"]


def _clipped(g: Any, v: Any, h: Any) -> Any:
    """Return sign(g) min(|g|, sqrt(threshold v)); where v has seen nothing yet g is spared, if h says so."""
    bound = v.sqrt() * h["root"]
    if h["spares"]:
        bound = torch.where(v > 0, bound, math.inf)
    return torch.maximum(torch.minimum(g, bound), -bound)


class spike_clip(Transform):
    """SPAM's clipping alone, for use in chains: |u_i| <= sqrt(threshold v_i), v a running mean of clipped squares.

    Args:
        spike_beta: decay of the mean of squares, in [0, 1).
        spike_threshold: squared update over mean square above which an entry is a spike, above 0.
        spike_after: first step that clips, at least 2: the mean must have seen something.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = Chain([weight], [spike_clip(spike_beta=0.5, spike_threshold=2.0, spike_after=2)], lr=1.0)
        >>> for gradient in (1.0, 1000.0):  # v = 0.5 after the first: the second is clipped to 1
        ...     weight.grad = torch.full((1,), gradient)
        ...     optimizer.step()
        >>> weight.tolist()
        [-2.0]
    """

    moments = {"spike_sq": False}

    def __init__(self, *, spike_beta: float = 0.999, spike_threshold: float = 5000.0, spike_after: int = 20) -> None:
        super().__init__(spike_beta=spike_beta, spike_threshold=spike_threshold, spike_after=spike_after)

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse a beta outside [0, 1), a threshold that is not above 0, and a first step below 2."""
        check_range("spike_beta", group["spike_beta"], 0, 1)
        check_range("spike_threshold", group["spike_threshold"], 0, open_low=True)
        check_whole("spike_after", group["spike_after"], 2)

    def init(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the mean of squares, zero."""
        return {"spike_sq": torch.zeros_like(p)}

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the decay, and whether and where this step clips."""
        beta = float(group["spike_beta"])
        return {
            "beta": beta,
            "rate": 1 - beta,
            "clips": step >= group["spike_after"],
            "root": math.sqrt(group["spike_threshold"]),
            "spares": True,
        }

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return the update without spikes."""
        v = state["spike_sq"]
        g = _clipped(u, v, h) if h["clips"] else u
        addcmul_(v.mul_(h["beta"]), g, g, h["rate"])
        return g


class spike_aware_adam(reset_adam):
    """SPAM's step: spikes clipped, moments reset at intervals with a warm-up after, and kept for a part of a matrix.

    Args:
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator, at least 0.
        threshold: squared gradient over second moment above which an entry is a spike; 0 never clips.
        interval: steps between resets; 0 never resets.
        warmup: steps after a reset over which the step grows from a hundredth to its size.
        clip_after: steps after the start and after a reset before spikes are clipped, at least 2.
        density: part of a matrix's entries that has moments and is updated, in (0, 1].
        follow: "paper", or "code" for the authors' bias correction, eps and weight decay.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(4, 4))
        >>> weight.grad = torch.ones(4, 4)
        >>> Chain([weight], [spike_aware_adam(density=0.25)], lr=1.0).step()
        >>> (weight != 0).sum()
        tensor(4)
    """

    def __init__(
        self,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        threshold: float = 5000.0,
        interval: int = 500,
        warmup: int = 150,
        clip_after: int = 20,
        density: float = 1.0,
        follow: str = "paper",
    ) -> None:
        super().__init__(betas=betas, eps=eps, interval=interval)
        self.options |= {"threshold": threshold, "warmup": warmup, "clip_after": clip_after}
        self.options |= {"density": density, "follow": follow}
        # Entries of a matrix are not updated alike: its parts and shards cannot be taken one by one.
        self.elementwise = density == 1.0  # type: ignore[misc]

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse values out of range, an unknown source, and a group's density below 1 if the optimizer's is 1."""
        super().check(group)
        choose("source to follow", group["follow"], ("paper", "code"))
        check_range("threshold", group["threshold"], 0)
        check_whole("warmup", group["warmup"], 0)
        check_whole("clip_after", group["clip_after"], 2)
        check_range("density", group["density"], 0, 1, open_low=True, open_high=False)
        if self.elementwise and group["density"] < 1:
            raise UsageError(
                f"density is {group['density']!r} in a group but 1 for the optimizer: pass the lower density to the "
                "optimizer, and 1 to the groups that keep all their moments."
            )

    def kind(self, p: Tensor, group: Mapping[str, Any]) -> Hashable:
        """Return whether only a part of the parameter has moments."""
        return p.ndim == 2 and p.numel() > 0 and group["density"] < 1

    def init(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return both moments, zero, and the flat indices of their entries where they are a part only."""
        if not self.kind(p, group):
            return super().init(p, group)
        count = max(1, int(group["density"] * p.numel()))
        flat = p.new_zeros(count)
        return {**super().init(flat, group), "index": p.new_zeros(count, dtype=torch.int32)}

    def due(self, step: int, group: Mapping[str, Any]) -> bool:
        """Whether entries are drawn before this step: the first, and each reset."""
        return group["density"] < 1 and (step == 1 or self.resets(step, group))

    def refresh(
        self,
        u: Tensor,
        p: Tensor,
        state: dict[str, Tensor],
        step: int,
        group: Mapping[str, Any],
        generator: torch.Generator,
    ) -> None:
        """Draw the entries that have moments, without replacement."""
        if "index" in state:
            drawn = torch.randperm(p.numel(), generator=generator)[: state["index"].numel()]
            state["index"].copy_(drawn.sort().values)

    def age(self, step: int, group: Mapping[str, Any]) -> int:
        """Return what the bias corrections count: steps since the reset, or in the authors' code all steps."""
        return step if group["follow"] == "code" else super().age(step, group)

    def coefficients(self, step: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return Adam's coefficients with the warm-up in the step, and whether and where spikes are clipped."""
        h = super().coefficients(step, group)
        interval, code = group["interval"], group["follow"] == "code"
        after_reset = step % interval if interval else step
        clips = group["threshold"] > 0 and min(step, after_reset) >= group["clip_after"]
        scale = 1.0
        if interval and step >= interval and after_reset < group["warmup"]:
            scale = 1 - 0.99 * (1 + math.cos(math.pi * after_reset / (group["warmup"] + 1))) / 2
        if code:
            h["eps"] *= h["correction2"]
        return h | {
            "clips": clips,
            "root": math.sqrt(group["threshold"]),
            "spares": not code,
            "correction1": h["correction1"] * scale,
            # The authors decay after the step: the chain, which decays first, needs a step that much shorter.
            "kept": 1 - float(group["lr"]) * group["weight_decay"] if code else 1.0,
        }

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return Adam's step from the clipped gradient, zero for entries without moments."""
        g = u.reshape(-1).index_select(0, state["index"]) if h["kind"] else u
        if h["clips"]:
            g = _clipped(g, state["exp_avg_sq"], h)
        step = super().update(g, p, state, h)
        if not h["kind"]:
            return step * h["kept"]
        whole = torch.zeros_like(u).reshape(-1)
        return whole.index_copy(0, state["index"].long(), step).reshape(u.shape)


class _Descend(Descend):
    """The chain's end; following the authors' code, matrices with moments for a part are not decayed."""

    def kind(self, p: Tensor, group: Mapping[str, Any]) -> Hashable:
        return group["follow"] == "code" and p.ndim == 2 and group["density"] < 1

    def update(self, u: Any, p: Any, state: Any, h: Any) -> None:
        super().update(u, p, state, {**h, "decays": h["decays"] and not h["kind"]})


class SPAM(Chain):
    """SPAM: Adam on gradients whose entries are at most sqrt(threshold v), its moments reset every `interval` steps.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator, at least 0.
        threshold: squared gradient over second moment above which an entry is a spike; 0 never clips.
        interval: steps between resets; 0 never resets.
        warmup: steps after a reset over which the step grows from a hundredth to its size.
        clip_after: steps after the start and after a reset before spikes are clipped, at least 2.
        density: part of a matrix's entries that has moments and is updated, in (0, 1]; groups of an optimizer with a
            density below 1 may have density 1, as suits embeddings.
        weight_decay: decoupled.
        follow: "paper", or "code" for the authors' bias correction, eps and weight decay.
        options: of every `Chain`: `maximize`, `state`, `foreach`, `compile`, `nonfinite`, `seed`.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = SPAM(model.parameters(), lr=1e-3, density=0.25)

    References:
        Huang et al. 2025, arXiv:2501.06842; authors' code TianjinYellow/SPAM-Optimizer, galore_torch/SPAM.py.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        threshold: float = 5000.0,
        interval: int = 500,
        warmup: int = 150,
        clip_after: int = 20,
        density: float = 1.0,
        weight_decay: float = 0.0,
        follow: str = "paper",
        **options: Any,
    ) -> None:
        adam = spike_aware_adam(
            betas=betas,
            eps=eps,
            threshold=threshold,
            interval=interval,
            warmup=warmup,
            clip_after=clip_after,
            density=density,
            follow=follow,
        )
        super().__init__(params, [adam, _Descend()], lr=lr, weight_decay=weight_decay, **options)


CARD = Card(
    name="spam",
    room="optim",
    summary="Adam that clips spikes by entry and resets its moments at intervals",
    paper=Paper(
        "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training",
        2025,
        arxiv="2501.06842",
        code="https://github.com/TianjinYellow/SPAM-Optimizer",
    ),
    equation="|g_i| <= sqrt(threshold v_i);  Adam on g;  m = v = 0 every interval steps, then a warm-up",
    claim="Gradient spikes are up to 1000 times typical gradients; without them pre-training beats Adam's variants.",
    acts_on="optimizer",
    entry="trimtab.optim.adaptive.spam:SPAM",
    treats={"gradient-spike": 4, "loss-spike": 4},
    defaults=(
        Default("lr", 1e-3, "authors' code"),
        Default("betas", (0.9, 0.999), "authors' code"),
        Default("eps", 1e-6, "authors' code"),
        Default("threshold", 5000.0, "paper and authors' code"),
        Default("interval", 500, "paper and authors' code"),
        Default("warmup", 150, "paper and authors' code"),
        Default("clip_after", 20, "authors' code"),
        Default("density", 1.0, "authors' code"),
        Default("weight_decay", 0.0, "authors' code"),
        Default("follow", "paper", "ours"),
    ),
    verified={
        "equation": (
            "tests/optim/adaptive/test_spam.py::test_equals_the_papers_loop",
            "tests/optim/adaptive/test_spam.py::test_warm_up_after_a_reset",
            "tests/optim/adaptive/test_spam.py::test_density_updates_a_random_part",
        ),
        "reference": ("tests/optim/adaptive/test_spam.py::test_equals_the_authors_rule",),
        "claim": (
            "tests/claims/test_optimizers_adaptive.py::test_spam_bounds_what_a_spike_moves",
            "tests/claims/test_optimizers_adaptive.py::test_spam_recovers_from_a_spike_where_adam_stands_still",
            "tests/claims/test_optimizers_adaptive.py::test_spam_learns_faster_through_spikes_and_as_fast_without",
        ),
    },
    deviations=(
        "Bias correction starts again with the moments. The authors' code counts on, which makes the first step after "
        "a reset 3.2 times as long (before its warm-up); follow='code' does that.",
        "eps is added to sqrt(v_hat), as in the paper's algorithm (recalled); in the authors' code, and with "
        "follow='code', to sqrt(v) before the bias correction.",
        "weight_decay, which the paper does not have, is decoupled and precedes the step; in the authors' code it "
        "follows the step, and where there is a density it is computed and dropped; follow='code' does both.",
        "An entry with v = 0 has no history and is not clipped. By the rule, and with follow='code', it would be "
        "clipped to 0, so that an embedding row first seen after step 20 could not learn before the next reset.",
        "The wait of clip_after steps is the authors' code's: clipped at once, all entries would stay 0.",
        "Every draw of entries has exactly int(density n) of them, so that shapes do not change; the authors draw "
        "each entry with that probability after the first time. Only matrices (2-D) are thinned.",
    ),
    experiments=(
        Experiment(
            "lm-small",
            "adamw,lr=0.003,clip=0,spikes=0.05,spike_scale=1000,steps=300,batch_size=8",
            "spam,lr=0.003,clip=0,spikes=0.05,spike_scale=1000,steps=300,batch_size=8",
            outcome=(
                "no evidence: final loss 2.705 to 2.701, difference -0.003 (95 % interval -0.085 to +0.078), n=5; "
                "learning rates tuned on both sides; no reset of the moments falls into these 300 steps"
            ),
        ),
        Experiment(
            "lm-small",
            "adamw,lr=0.003,clip=1,spikes=0.05,spike_scale=1000,steps=300,batch_size=8",
            "spam,lr=0.003,clip=1,spikes=0.05,spike_scale=1000,steps=300,batch_size=8",
            outcome=(
                "no evidence: final loss 2.503 to 2.497, difference -0.006 (95 % interval -0.024 to +0.011), n=5; "
                "learning rates tuned on both sides; no reset of the moments falls into these 300 steps"
            ),
        ),
    ),
)
