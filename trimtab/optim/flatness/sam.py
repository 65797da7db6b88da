"""SAM and ASAM: descend along the gradient of the worst point nearby, so that training ends where the loss is flat.

The loss is L(w), its gradient g, and rho the radius of the neighbourhood:

    SAM:   e = rho g / |g|                        ASAM:   e = rho T^2 g / |T g|,   T = |w| + eta
    the base optimizer steps from w along the gradient of L at w + e

so that each step takes two forward and backward passes. Norms are over all parameters. ASAM's T makes the neighbourhood
follow rescalings of the weights that leave the network's function as it is.

Foret et al. 2021 (arXiv:2010.01412); Kwon et al. 2021 (arXiv:2102.11600), authors' code SamsungLabs/ASAM, asam.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError
from trimtab.optim._sharding import Shard, sum_over_ranks
from trimtab.optim.transform import check_flag, check_range
from trimtab.scalars import to_scalar

__all__ = ["ASAM", "SAM", "sharpness"]

_OWN = ("rho", "adaptive", "eta")
_EPS = 1e-12


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation around any torch optimizer: it steps from w along the gradient at w + e(w).

    `step(closure)` calls the closure twice: at w, then at w + e. Without a closure, write the two passes out:
    backward at w, `first_step()`, zero the gradients, backward at w + e, `second_step()`. The weights are restored
    exactly before the base optimizer steps, and after any error in the second pass; `p.grad` then holds the gradient at
    w + e, the one stepped along. Save checkpoints between steps.

    Layers that keep running statistics see both passes. The state, groups and checkpoint are the base optimizer's;
    its groups get the options `rho`, `adaptive` and `eta`.

    Args:
        base: any optimizer, with its parameters.
        rho: radius of the neighbourhood, at least 0; with 0 it is the base optimizer at twice the price.
        adaptive: whether the neighbourhood is measured relative to each weight (ASAM).
        eta: added to |w| in ASAM's scale, at least 0.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)
        >>> def closure() -> Tensor:
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(3, 4)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)  # the loss at w

    References:
        Foret et al. 2021, arXiv:2010.01412.
    """

    def __init__(
        self, base: torch.optim.Optimizer, *, rho: float = 0.05, adaptive: bool = False, eta: float = 0.01
    ) -> None:
        own = {"rho": rho, "adaptive": adaptive, "eta": eta}
        for group in base.param_groups:
            _check({**own, **group})
        self.base = base
        self._weights: list[tuple[Tensor, Tensor]] = []
        super().__init__(base.param_groups, own)
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def __getstate__(self) -> dict[str, Any]:
        # torch's version keeps three attributes only. A scheduler's wrapper of `step` would, copied, step the original.
        return {name: value for name, value in self.__dict__.items() if name != "step"}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer; it may have its own `rho`, `adaptive` and `eta`.

        Raises:
            UsageError: if an option breaks its rule.
        """
        if self.param_groups is not self.base.param_groups:  # in the constructor: the base has it already
            super().add_param_group(param_group)
            return
        own = {name: param_group.get(name, self.defaults[name]) for name in _OWN}
        _check(own)
        self.base.add_param_group({name: value for name, value in param_group.items() if name not in _OWN})
        self.base.param_groups[-1].update(own)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: zeroes the gradients, computes the loss and its gradients, and returns the loss; called twice.

        Returns:
            The loss at w, from the first call.

        Raises:
            UsageError: without a closure.
        """
        if closure is None:
            raise UsageError("SAM needs two passes: pass step a closure, or call first_step() and second_step().")
        with torch.enable_grad():
            loss = closure()
        self.first_step()
        try:
            with torch.enable_grad():
                closure()
        except BaseException:
            self._restore()
            raise
        self.second_step()
        return loss

    @torch.no_grad()
    def first_step(self) -> None:
        """Move the weights from w to w + e, by the gradients at w.

        Raises:
            UsageError: if they are there already.
        """
        if self._weights:
            raise UsageError("first_step was called twice: call second_step between.")
        shards = _shards(self.param_groups)
        norm = _norm(self.param_groups, shards)
        for shard in shards:
            group = self.param_groups[shard.group]
            self._weights.append((shard.value, shard.value.clone()))
            sign = -1.0 if group.get("maximize") else 1.0
            shard.value.add_(_ascent(shard, group) * (sign * group["rho"] / (norm + _EPS)).to(shard.value.device))

    @torch.no_grad()
    def second_step(self) -> None:
        """Restore w, and take the base optimizer's step along the gradients at w + e.

        Raises:
            UsageError: without a first step.
        """
        if not self._weights and _shards(self.param_groups):
            raise UsageError("second_step needs first_step before it.")
        self._restore()
        self.base.step()

    @torch.no_grad()
    def _restore(self) -> None:
        for value, before in self._weights:
            value.copy_(before)
        self._weights = []

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's checkpoint, with SAM's options in its groups.

        Raises:
            UsageError: between the two halves of a step, when the weights are not w.
        """
        if self._weights:
            raise UsageError("the weights are perturbed: save after second_step.")
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint into the base optimizer."""
        self.base.load_state_dict(state_dict)
        self._share()


class ASAM(SAM):
    """Adaptive SAM: the neighbourhood is measured relative to each weight, e = rho T^2 g / |T g|, T = |w| + eta.

    Args:
        base: any optimizer, with its parameters.
        rho: radius of the neighbourhood, at least 0; about ten times SAM's.
        eta: added to |w|, at least 0.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = ASAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5)

    References:
        Kwon et al. 2021, arXiv:2102.11600.
    """

    def __init__(self, base: torch.optim.Optimizer, *, rho: float = 0.5, eta: float = 0.01) -> None:
        super().__init__(base, rho=rho, adaptive=True, eta=eta)


@torch.no_grad()
def sharpness(
    loss: Callable[[], Tensor],
    params: Sequence[Tensor],
    *,
    rho: float = 0.05,
    adaptive: bool = False,
    eta: float = 0.01,
) -> float:
    """Return L(w + e) - L(w), e the step to the worst point of the neighbourhood in first order.

    A lower bound of the (adaptive) sharpness max_e L(w + e) - L(w) where the loss is smooth; weights and gradients are
    left as they were.

    Args:
        loss: computes the loss, a scalar, at the present weights; without randomness, or with the same at each call.
        params: the parameters that are moved.
        rho: radius of the neighbourhood, at least 0.
        adaptive: whether it is measured relative to each weight.
        eta: added to |w| if it is.

    Returns:
        The difference.

    Raises:
        UsageError: if an option breaks its rule.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> round(sharpness(lambda: (3 * w * w).sum(), [w], rho=0.1), 4)  # 3 (1.1^2 - 1)
        0.63

    References:
        Foret et al. 2021, arXiv:2010.01412, equation 2; Kwon et al. 2021, arXiv:2102.11600, definition 2.
    """
    params = list(params)
    kept = [p.grad for p in params]
    group = {"params": params, "rho": rho, "adaptive": adaptive, "eta": eta}
    _check(group)
    with torch.enable_grad():
        here = loss()
        found = torch.autograd.grad(here, params, allow_unused=True)
    for p, grad in zip(params, found, strict=True):
        p.grad = grad
    shards = _shards([group])
    scale = rho / (_norm([group], shards) + _EPS)
    before = [shard.value.clone() for shard in shards]
    try:
        for shard in shards:
            shard.value.add_(_ascent(shard, group) * scale.to(shard.value.device))
        return to_scalar(loss()) - to_scalar(here)
    finally:
        for shard, value in zip(shards, before, strict=True):
            shard.value.copy_(value)
        for p, old in zip(params, kept, strict=True):
            p.grad = old


def _check(options: dict[str, Any]) -> None:
    check_range("rho", options["rho"], 0)
    check_flag("adaptive", options["adaptive"])
    check_range("eta", options["eta"], 0)


def _shards(groups: Sequence[dict[str, Any]]) -> list[Shard]:
    """Every parameter with a gradient, as the shard on this rank."""
    return [
        Shard(p, index, number, 0, whole=False)
        for index, group in enumerate(groups)
        for number, p in enumerate(group["params"])
        if p.grad is not None
    ]


def _scale(shard: Shard, group: dict[str, Any]) -> Tensor | float:
    return shard.value.abs() + group["eta"] if group["adaptive"] else 1.0


def _ascent(shard: Shard, group: dict[str, Any]) -> Tensor:
    """Return T^2 g."""
    scale = _scale(shard, group)
    return shard.grad * scale * scale


def _norm(groups: Sequence[dict[str, Any]], shards: Sequence[Shard]) -> Tensor:
    """Return |T g| over all parameters, in float32 or wider."""
    total: Tensor | None = None
    for shard in shards:
        square = (shard.grad * _scale(shard, groups[shard.group])).to(
            torch.promote_types(shard.grad.dtype, torch.float32)
        )
        part = sum_over_ranks(square.square().sum(), shard if shard.local else None)
        total = part if total is None else total + part.to(total.device)
    return torch.zeros(()) if total is None else total.sqrt()


CARD = Card(
    name="sam",
    room="optim",
    summary="steps along the gradient of the worst point nearby, for flat minima; with ASAM's relative neighbourhood",
    paper=Paper("Sharpness-Aware Minimization for Efficiently Improving Generalization", 2021, arxiv="2010.01412"),
    equation="e = rho T^2 g / |T g|, T = 1 (SAM) or |w| + eta (ASAM);  step from w along the gradient at w + e",
    claim="Generalises better, is robust to label noise, and forgets less when documents are indexed one after another "
    "(DSI++, arXiv:2212.09744).",
    acts_on="optimizer",
    entry="trimtab.optim.flatness.sam:SAM",
    treats={"overfitting": 3, "sharpness-above-stability": 2, "label-noise": 3, "forgetting": 3},
    defaults=(
        Default("rho", 0.05, "paper, section 3.1"),
        Default("adaptive", False, "paper"),
        Default("eta", 0.01, "ASAM's authors' code"),
    ),
    verified={
        "equation": (
            "tests/optim/flatness/test_sam.py::test_equals_the_papers_loop",
            "tests/optim/flatness/test_sam.py::test_asam_does_not_depend_on_the_scale_of_weights",
        ),
        "reference": ("tests/optim/flatness/test_sam.py::test_equals_pytorch_optimizer",),
        "claim": ("tests/claims/test_optimizers_clipping.py::test_sam_ends_where_the_loss_is_flatter",),
    },
    deviations=(
        "1e-12 is added to the norm of the gradient.",
        "ASAM's authors scale parameters whose name has 'weight' and leave others at T = 1; here T = |w| + eta for "
        "all, as the paper's element-wise operator has it. With eta = 0 it is pytorch_optimizer's adaptive SAM.",
        "With maximize=True in the base optimizer, the worst point is that of the least objective.",
    ),
)
