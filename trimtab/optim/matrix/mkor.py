"""MKOR: gradients of linear layers between inverse Kronecker factors, which rank-1 updates keep inverted.

For a layer with mean input a (1 appended for the bias), summed gradient g of its outputs, and gradient G of weight and
bias [R, C + 1]; every f steps, for the factor of the outputs with inverse L_ (and likewise of the inputs, R_, with a):

    if max |L_| > threshold:  L_ <- zeta L_ + (1 - zeta) I                                          (stabiliser)
    L_ <- (gamma L + (1 - gamma) g g^T)^(-1) = L_ / gamma - (1 - gamma) x x^T / (gamma (gamma + (1 - gamma) g^T x)),
    x = L_ g
    D = L_ G R_,    D <- D ||G|| / ||D||,    p <- p - lr (momentum or Adam of D + weight_decay p)

Each costs O(N^2), as no matrix is inverted. MKOR-H goes on with D = G once the loss falls no faster than at its start.

Mozaffari et al. 2023 (arXiv:2306.01685); authors' code Mohammad-Mozaffari/mkor, mkor/mkor.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError, choose
from trimtab.optim._sharding import Shard
from trimtab.optim.adaptive.adamw import adam
from trimtab.optim.adaptive.sgd import momentum as running_sum
from trimtab.optim.chain import Chain
from trimtab.optim.matrix._layer_sums import LayerSums
from trimtab.optim.transform import Transform, check_flag, check_range
from trimtab.scalars import to_scalar

__all__ = ["MKOR", "rank_one_inverse"]

_FORMULAS = ("identity", "paper", "code")
_BACKENDS = ("sgd", "adam")


def rank_one_inverse(inverse: Tensor, x: Tensor, gamma: float, follow: str = "identity") -> Tensor:
    """Return a factor's inverse after the factor has moved towards x x^T, from its inverse alone.

    Shapes: inverse [N, N], x [N]; result [N, N].

    Args:
        inverse: of the factor F, symmetric and positive.
        x: the new direction.
        gamma: what is kept of the factor, in (0, 1).
        follow: "identity" is (gamma F + (1 - gamma) x x^T)^(-1) by Sherman and Morrison; "paper" its equation 5 as
            printed; "code" the authors', which adds x x^T to the inverse of gamma F^(-1) + (1 - gamma) I.

    Returns:
        The new inverse.

    Raises:
        UsageError: if gamma or `follow` breaks its rule.

    Example:
        >>> new = rank_one_inverse(torch.eye(2), torch.tensor([2.0, 0.0]), 0.5)
        >>> torch.linalg.inv(new)  # half of the identity, and half of x x^T
        tensor([[2.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    check_range("gamma", gamma, 0, 1, open_low=True)
    choose("formula to follow", follow, _FORMULAS)
    if follow == "code":
        inverse = gamma * inverse
        inverse.diagonal().add_(1 - gamma)
        y = inverse @ x
        return inverse - torch.outer(y, y) / (1 + x @ y)
    y = inverse @ x
    if follow == "paper":
        factor = (1 - gamma) / (gamma**2 * (1 + gamma * (1 - gamma) * (x @ y)))
        return gamma * inverse + factor * torch.outer(y, y)
    factor = (1 - gamma) / (gamma * (gamma + (1 - gamma) * (x @ y)))
    return inverse / gamma - factor * torch.outer(y, y)


class rank_one_factors(Transform):
    """The options of MKOR's factors, and the stage that has sharded parameters gathered; it hands updates through."""

    elementwise = False

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse options outside their ranges."""
        check_range("gamma", group["gamma"], 0, 1, open_low=True)
        check_range("zeta", group["zeta"], 0, 1, open_high=False)
        check_range("threshold", group["threshold"], 0, open_low=True)
        for name, low in (("factor_frequency", 1), ("factor_warmup", 0)):
            value = group[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise UsageError(f"{name} must be a whole number from {low}, got {value!r}.")

    def due(self, step: int, group: Mapping[str, Any]) -> bool:
        """Never: the factors are updated by `MKOR`, which knows which bias belongs to which weight."""
        return False

    def update(self, u: Any, p: Any, state: Any, h: Any) -> Any:
        """Return the update as it is."""
        return u


class MKOR(Chain):
    """MKOR: u = momentum or Adam of L_ G R_ at the length of G, for linear layers; p <- p - lr (u + weight_decay p).

    It watches the linear layers of `model` with forward hooks of its own, which change nothing, from its construction
    to `remove_hooks()`. Gradients may be accumulated over several backward passes; over ranks, means are averaged. A
    layer counts if it was used since the last step and its weight (and bias) are among `params`; all other parameters
    take the back end's step with their gradient. Gradients of the outputs are seen as the backward pass has them: a
    loss scaled by a `GradScaler` scales the factors too.

    The defaults are the authors', for large models. On a small one factors were near the identity with them; updated at
    each step, and with a threshold of 50, they took it to its target in about half of SGD's steps.

    Args:
        params: parameters or groups.
        lr: learning rate of the back end.
        model: whose `nn.Linear` layers have factors; with None, MKOR is its back end.
        first_order: names of linear layers without factors, such as the head of a language model: its factor has a side
            for every word.
        backend: "sgd", with momentum, or "adam".
        momentum: of the back end "sgd", in [0, 1).
        betas: of the back end "adam".
        eps: of the back end "adam".
        gamma: what a factor keeps of itself at an update, in (0, 1).
        factor_frequency: steps between updates of the factors, at least 1.
        factor_warmup: first steps, at each of which factors are updated.
        threshold: largest entry of an inverse beyond which it is drawn to the identity first, above 0.
        zeta: what is kept of it then, in [0, 1].
        hybrid: whether factors are dropped when they no longer help (MKOR-H); then give `step` a closure, or each loss
            to `observe`.
        patience: steps over which MKOR-H measures the loss, at least 2.
        switch_ratio: it switches when the loss falls by less than this part of its fastest fall, in (0, 1).
        follow: formula of the inverse: "identity", "paper" (as printed) or "code"; see `rank_one_inverse`.
        weight_decay: decoupled.
        options: of every `Chain`: `maximize`, `state`, `foreach`, `compile`, `nonfinite`.

    Raises:
        UsageError: if an option breaks its rule, or a name in `first_order` is no linear layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> optimizer = MKOR(model.parameters(), lr=0.1, model=model)
        >>> model(torch.ones(3, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.state[model[0].weight]["left_inverse"].shape
        torch.Size([8, 8])

    References:
        Mozaffari et al. 2023, arXiv:2306.01685; Mohammad-Mozaffari/mkor.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        model: nn.Module | None,
        first_order: tuple[str, ...] = (),
        backend: str = "sgd",
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        gamma: float = 0.95,
        factor_frequency: int = 10,
        factor_warmup: int = 10,
        threshold: float = 2.0,
        zeta: float = 0.9,
        hybrid: bool = False,
        patience: int = 100,
        switch_ratio: float = 0.1,
        follow: str = "identity",
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        self.follow = choose("formula to follow", follow, _FORMULAS)
        self.hybrid, self.patience, self.switch_ratio = hybrid, patience, switch_ratio
        if not isinstance(patience, int) or patience < 2:
            raise UsageError(f"patience must be a whole number from 2, got {patience!r}.")
        check_flag("hybrid", hybrid)
        check_range("switch_ratio", switch_ratio, 0, 1, open_low=True)
        self._watched: list[tuple[nn.Linear, LayerSums]] = []
        self._current: dict[int, Shard] = {}
        self._linear(model, first_order)
        choose("backend", backend, _BACKENDS)
        factors = rank_one_factors(
            gamma=gamma,
            factor_frequency=factor_frequency,
            factor_warmup=factor_warmup,
            threshold=threshold,
            zeta=zeta,
            second_order=True,
            fastest_fall=0.0,
            recent_losses=(),
        )
        stage = running_sum(momentum=momentum) if backend == "sgd" else adam(betas=betas, eps=eps)
        super().__init__(params, [factors, stage], lr=lr, weight_decay=weight_decay, **options)

    def _linear(self, model: nn.Module | None, first_order: tuple[str, ...]) -> None:
        named = {} if model is None else {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        for name in first_order:
            choose("linear layer", name, named)
        self._modules = {m.weight: m for n, m in named.items() if n not in first_order}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, and watch the layers that are complete with it."""
        super().add_param_group(param_group)
        own = {p for group in self.param_groups for p in group["params"]}
        watched = {module for module, _ in self._watched}
        for weight, module in self._modules.items():
            if module not in watched and weight in own and (module.bias is None or module.bias in own):
                self._watched.append((module, LayerSums(module)))

    def remove_hooks(self) -> None:
        """Take the hooks off the model; the optimizer then goes on without factors."""
        for _, layer in self._watched:
            layer.handle.remove()
            layer.active = False
            layer.clear()

    @property
    def second_order(self) -> bool:
        """Whether factors are still in use: false once MKOR-H has switched."""
        return all(group["second_order"] for group in self.param_groups)

    def fresh(self, parameter: Tensor, value: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step, with both inverse factors for a layer's weight."""
        kept = super().fresh(parameter, value, group)
        module = next((module for module, _ in self._watched if module.weight is parameter), None)
        if module is None:
            return kept
        dtype = torch.promote_types(value.dtype, torch.float32)
        sides = {"left_inverse": value.shape[0], "right_inverse": value.shape[1] + (module.bias is not None)}
        return kept | {name: torch.eye(side, dtype=dtype, device=value.device) for name, side in sides.items()}

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        """Take one step; MKOR-H observes the closure's loss."""
        try:
            loss = super()._step(closure)
        finally:  # a refused gradient must not reach the factors later
            self._current = {}
            for _, layer in self._watched:
                layer.clear()
        if loss is not None:
            self.observe(loss)
        return loss

    def observe(self, loss: float | Tensor) -> None:
        """Give MKOR-H the loss of a step, so that it can tell when its factors no longer help.

        Means over `patience` steps are compared: the factors are dropped, for good, when their fall is less than
        `switch_ratio` times the fastest fall so far.
        """
        if not self.hybrid or not self.second_order:
            return
        losses = (*self.param_groups[0]["recent_losses"], to_scalar(loss))
        second_order, fastest = True, self.param_groups[0]["fastest_fall"]
        if len(losses) == 2 * self.patience:
            older, losses = losses[: self.patience], losses[self.patience :]
            fall = (sum(older) - sum(losses)) / self.patience
            fastest = max(fall, fastest)
            second_order = fall >= self.switch_ratio * fastest
        # In the groups, where a checkpoint finds them.
        for group in self.param_groups:
            group |= {"recent_losses": losses, "fastest_fall": fastest, "second_order": second_order}
        for _, layer in self._watched:
            layer.active = self.second_order

    def _shards(self) -> list[Shard]:
        shards = super()._shards()
        self._current = {id(shard.parameter): shard for shard in shards}
        return shards

    def _prepare(self, shard: Shard) -> None:
        super()._prepare(shard)
        for module, layer in self._watched:
            # A weight that was trained before its bias joined has no factors.
            if module.weight is shard.parameter and "left_inverse" in shard.kept and self.second_order:
                self._precondition(shard, module, layer)

    def _precondition(self, shard: Shard, module: nn.Linear, layer: LayerSums) -> None:
        """Update the factors of a layer, and put its preconditioned gradient in the gradient's place."""
        group, left, right = self.param_groups[shard.group], shard.kept["left_inverse"], shard.kept["right_inverse"]
        bias = None if module.bias is None else self._current.get(id(module.bias))
        G = shard.grad.to(left.dtype)
        if module.bias is not None:
            column = G.new_zeros(len(G)) if bias is None else bias.grad.to(left.dtype)
            G = torch.cat([G, column.unsqueeze(1)], 1)
        late = shard.step > group["factor_warmup"]
        if layer.gradients is not None and not (late and (shard.step - 1) % group["factor_frequency"]):
            a, g = self._directions(layer, left)
            if module.bias is not None:
                a = torch.cat([a, a.new_ones(1)])
            for inverse, x in ((left, g), (right, a)):
                inverse.copy_(self._updated(inverse, x, group))
        D = left @ G @ right
        # Of zero gradients too: 0 times a finite number.
        D = D * (torch.linalg.vector_norm(G) / torch.linalg.vector_norm(D).clamp_min(torch.finfo(D.dtype).tiny))
        if bias is not None:
            bias.grad = D[:, -1].to(bias.grad.dtype)
        shard.grad = (D if module.bias is None else D[:, :-1]).to(shard.grad.dtype)

    def _updated(self, inverse: Tensor, x: Tensor, group: Mapping[str, Any]) -> Tensor:
        zeta = group["zeta"]
        calmed = zeta * inverse
        calmed.diagonal().add_(1 - zeta)
        large = inverse.abs().amax() > group["threshold"]
        return rank_one_inverse(torch.where(large, calmed, inverse), x, group["gamma"], self.follow)

    @staticmethod
    def _directions(layer: LayerSums, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean input and the summed gradient of the outputs, averaged over ranks."""
        inputs, gradients = layer.inputs, layer.gradients
        if inputs is None or gradients is None:  # pragma: no cover - the caller has seen to it
            raise UsageError("the layer was not used since the last step.")
        a, g = (inputs / layer.count).to(like.dtype), gradients.to(like.dtype)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            both = torch.cat([a, g])
            dist.all_reduce(both)
            a, g = (both / dist.get_world_size()).split([len(a), len(g)])
        return a, g


CARD = Card(
    name="mkor",
    room="optim",
    summary="Kronecker-factored curvature of linear layers, kept inverted by rank-1 updates",
    paper=Paper(
        "MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer Using Rank-1 Updates",
        2023,
        arxiv="2306.01685",
        code="https://github.com/Mohammad-Mozaffari/mkor",
    ),
    equation="D = L^-1 G R^-1,  L = gamma L + (1 - gamma) g g^T, R = gamma R + (1 - gamma) a a^T,  u = D ||G|| / ||D||",
    claim="Reaches LAMB's accuracy in 2.6 times fewer steps on BERT-Large.",
    acts_on="optimizer",
    entry="trimtab.optim.matrix.mkor:MKOR",
    defaults=(
        Default("lr", 0.1, "ours"),
        Default("backend", "sgd", "authors' code"),
        Default("momentum", 0.9, "authors' code, its BERT optimizer"),
        Default("betas", (0.9, 0.999), "torch.optim.Adam, the authors' back end"),
        Default("eps", 1e-8, "torch.optim.Adam, the authors' back end"),
        Default("gamma", 0.95, "authors' code, stat_decay"),
        Default("factor_frequency", 10, "paper and authors' code"),
        Default("factor_warmup", 10, "authors' code, as its documentation sets it"),
        Default("threshold", 2.0, "authors' code"),
        Default("zeta", 0.9, "authors' code: 1 - stabilization_factor"),
        Default("hybrid", False, "ours: an option for MKOR-H"),
        Default("patience", 100, "ours: the paper gives no rule"),
        Default("switch_ratio", 0.1, "ours: the paper gives no rule"),
        Default("follow", "identity", "ours: the inverse that the paper derives"),
        Default("weight_decay", 0.0, "authors' code, its BERT optimizer"),
    ),
    verified={
        "equation": (
            "tests/optim/matrix/test_mkor.py::test_rank_one_inverse_is_the_inverse",
            "tests/optim/matrix/test_mkor.py::test_equals_the_equations",
        ),
        "reference": ("tests/optim/matrix/test_mkor.py::test_is_its_back_end_without_factors",),
        "claim": (
            "tests/claims/test_optimizers_matrix.py::test_mkor_against_its_back_end",
            "tests/claims/test_optimizers_matrix.py::test_mkor_needs_fewer_steps_than_lamb",
        ),
    },
    deviations=(
        "The paper's equation 5 has gamma where the Sherman-Morrison identity has 1 / gamma, and adds the rank-1 term "
        "that the identity subtracts: printed so, the result is not the inverse of the factor in its equation 3, and "
        "grows along frequent directions. The default is the identity; follow='paper' is the printed formula.",
        "The authors' code (follow='code') blends the inverse, not the factor, with the identity, and adds x x^T with "
        "weight 1. Its gradients are kept in float16 and clipped to [-100, 100] first; here neither.",
        "The code draws both inverses to the identity at the update after one was large; here each, before its update, "
        "as in the paper.",
        "The rank-1 directions are means over samples, as in paper and code; of the bias, the direction has a 1. "
        "Convolutions have no factors here.",
        "The paper has MKOR-H switch by the rate at which the loss falls, without a rule: the one here is ours.",
        "The norm that is restored is that of weight and bias together; the code adds their two norms.",
        "Weight decay is decoupled, as in every chain; the authors' back ends add it to the gradient.",
    ),
)
