"""Bootstrapped meta-gradients: learn the learning rate while training, by catching up with one's own future.

    theta_K(w):   K steps of SGD with momentum from theta_0, differentiable in w = (log lr, logit momentum)
    target:       L - 1 steps more, then one plain gradient step:   theta~ = theta' - alpha grad f(theta')
    w <- w - meta_lr grad_w mu(stop(theta~), theta_K(w));   training goes on from theta' = theta_{K+L-1}

Only K steps are differentiated, yet w learns from K + L. With L = 1 and mu = ||theta~ - theta_K||^2 / 2 the gradient is
alpha times the ordinary meta-gradient of f(theta_K). Flennerhag et al. 2022 (arXiv:2109.04504), section 3; the authors
publish no code for it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from trimtab.card import Card, Default, Paper
from trimtab.errors import RunFailedError, UsageError, choose
from trimtab.scalars import to_scalar

__all__ = ["BootstrappedMetaLR", "MetaRound"]

_METRICS = ("parameters", "softmax", "gaussian", "loss")
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class MetaRound:
    """A round of steps and what it did to the learning rate.

    Attributes:
        losses: the loss before each step of training.
        lr: the learning rate after the round.
        momentum: the momentum after the round.
        meta_loss: mu, the distance to the target, or the loss with metric `"loss"`.
        gradients: of mu with respect to `"log_lr"`, and `"logit_momentum"` where that is learnt.
    """

    losses: tuple[float, ...]
    lr: float
    momentum: float
    meta_loss: float
    gradients: Mapping[str, float]


class _Objective(nn.Module):
    """A loss or outputs of a model and a batch, as a module whose weights can be swapped."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Any) -> Tensor:
        """Return the function's value."""
        return self.function(self.model, batch)


class BootstrappedMetaLR:
    """Train a model by SGD whose learning rate, and momentum if asked, follow bootstrapped meta-gradients.

    It takes the place of the optimizer: each `step` takes K + L batches, makes K + L - 1 steps of training and one of
    the meta-parameters, by Adam. The gradient of the first K steps is kept for a second differentiation, so a round
    needs about K times the memory of a step.

    Args:
        model: trained in the mode it is in; parameters that do not require a gradient stay as they are.
        loss_fn: takes the model and a batch, returns the mean loss.
        lr: learning rate at the start, above 0.
        K: steps that are differentiated, at least 1.
        L: steps of the target beyond these, at least 1; the last is the gradient step.
        metric: mu. `"parameters"`: ||theta~ - theta_K||^2 / 2. `"softmax"`: KL(target || learner) of class
            probabilities, mean over the last batch. `"gaussian"`: that of outputs with unit variance, half their
            squared distance. `"loss"`: the ordinary meta-gradient, f(theta_K) on the batch after K, without a target.
        outputs: takes the model and a batch, returns what `"softmax"` and `"gaussian"` compare, in evaluation mode;
            default: the model of the batch's first entry.
        meta_lr: step size of the meta-parameters, at least 0.
        momentum: at the start, in [0, 1); as torch.optim.SGD's.
        learn_momentum: whether the momentum is learnt too; it must start above 0.
        alpha: rate of the target's gradient step; None for the learning rate itself.

    Attributes:
        rounds: rounds taken.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> x = torch.linspace(-1, 1, 32).reshape(8, 4)
        >>> tuner = BootstrappedMetaLR(model, lambda net, x: (net(x) - 3).square().mean(), lr=1e-3, meta_lr=0.1)
        >>> rounds = [tuner.step([x, x]) for _ in range(20)]
        >>> tuner.lr > 3e-3, rounds[-1].losses[-1] < rounds[0].losses[0]
        (True, True)

    References:
        Flennerhag et al. 2022, arXiv:2109.04504.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        *,
        lr: float,
        K: int = 1,
        L: int = 1,
        metric: str = "parameters",
        outputs: Callable[[nn.Module, Any], Tensor] | None = None,
        meta_lr: float = 0.01,
        momentum: float = 0.0,
        learn_momentum: bool = False,
        alpha: float | None = None,
    ) -> None:
        for name, count in (("K", K), ("L", L)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise UsageError(f"{name} must be a whole number, at least 1, got {count!r}.")
        for name, value in (("lr", lr), ("alpha", 1.0 if alpha is None else alpha)):
            if not 0 < value < math.inf:
                raise UsageError(f"{name} must be above 0 and finite, got {value!r}.")
        if not 0 <= meta_lr < math.inf:
            raise UsageError(f"meta_lr must be at least 0 and finite, got {meta_lr!r}.")
        if not 0 <= momentum < 1:
            raise UsageError(f"momentum must be in [0, 1), got {momentum!r}.")
        if learn_momentum and momentum == 0:
            raise UsageError("learn_momentum needs a momentum above 0 to start from, got 0.")
        choose("metric", metric, _METRICS)
        self.model = model
        self.K, self.L, self.metric, self.alpha = K, L, metric, alpha
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._trained:
            raise UsageError("the model has no parameter that requires a gradient: there is nothing to train.")
        some = next(iter(self._trained.values()))
        kind = torch.promote_types(some.dtype, torch.float32)
        start = math.log(momentum / (1 - momentum)) if momentum else -math.inf
        self._log_lr = torch.tensor(math.log(lr), dtype=kind, device=some.device, requires_grad=True)
        self._logit_momentum = torch.tensor(start, dtype=kind, device=some.device, requires_grad=learn_momentum)
        self._learnt = {"log_lr": self._log_lr} | ({"logit_momentum": self._logit_momentum} if learn_momentum else {})
        self._meta = torch.optim.Adam(list(self._learnt.values()), lr=meta_lr)
        self._momenta: Weights = {name: torch.zeros_like(p) for name, p in self._trained.items()}
        self._loss = _Objective(model, loss_fn)
        self._outputs = _Objective(model, outputs or (lambda net, batch: net(batch[0])))
        self.rounds = 0

    @property
    def lr(self) -> float:
        """The learning rate now."""
        return to_scalar(self._log_lr.exp())

    @property
    def momentum(self) -> float:
        """The momentum now."""
        return to_scalar(self._logit_momentum.sigmoid())

    def step(self, batches: Sequence[Any]) -> MetaRound:
        """Train on the first K + L - 1 batches and learn from all of them.

        Args:
            batches: K + L of them. The last only serves the meta-gradient: it may be the first of the next round.

        Returns:
            What the round did.

        Raises:
            UsageError: if there are not K + L batches, or the loss is no single number.
            RunFailedError: if a loss, a weight or the meta-gradient is not finite; all is as before the round, but for
                random generators.
        """
        gradients, meta_loss, losses, ahead = self._round(batches)
        weights, momenta, buffers = ahead
        checked = torch.stack([*(w.sum() for w in weights.values()), meta_loss.detach(), *gradients.values()])
        if not bool(checked.isfinite().all()) or not all(map(math.isfinite, losses)):
            raise RunFailedError(f"round {self.rounds} at lr {self.lr:.3g} is not finite: start from a lower lr.")
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(weights[name])
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])
        self._momenta = momenta
        for name, meta in self._learnt.items():
            meta.grad = gradients[name]
        self._meta.step()
        self._meta.zero_grad()
        self.rounds += 1
        values = {name: to_scalar(value) for name, value in gradients.items()}
        return MetaRound(tuple(losses), self.lr, self.momentum, to_scalar(meta_loss), values)

    def meta_gradient(self, batches: Sequence[Any]) -> dict[str, float]:
        """Return the gradient of mu that `step` would follow, and change nothing but random generators.

        Args:
            batches: K + L of them.

        Returns:
            Gradients by name, as in `MetaRound`.
        """
        return {name: to_scalar(value) for name, value in self._round(batches)[0].items()}

    def _round(
        self, batches: Sequence[Any]
    ) -> tuple[dict[str, Tensor], Tensor, list[float], tuple[Weights, Weights, Weights]]:
        """Return meta-gradients, meta-loss, losses, and the weights, momenta and buffers that training goes on from."""
        if len(batches) != self.K + self.L:
            raise UsageError(f"a round needs K + L = {self.K + self.L} batches, got {len(batches)}.")
        with torch.enable_grad():
            lr, beta = self._log_lr.exp(), self._logit_momentum.sigmoid()
            weights = {name: p.detach().requires_grad_() for name, p in self._trained.items()}
            momenta, buffers = self._momenta, dict(self.model.named_buffers())
            losses: list[float] = []
            for batch in batches[: self.K]:
                weights, momenta, buffers = self._sgd(weights, momenta, buffers, batch, lr, beta, losses, graph=True)
            learner, learner_buffers = weights, buffers
            lr, beta = lr.detach(), beta.detach()
            weights, momenta = _leaves(weights), {name: value.detach() for name, value in momenta.items()}
            for batch in batches[self.K : -1]:
                weights, momenta, buffers = self._sgd(weights, momenta, buffers, batch, lr, beta, losses, graph=False)
                weights = _leaves(weights)
            if self.metric == "loss":
                loss, _ = self._value(self._loss, learner, learner_buffers, batches[self.K])
            else:
                loss = self._distance(learner, learner_buffers, weights, buffers, batches[-1])
            found = torch.autograd.grad(loss, list(self._learnt.values()))
        ahead = ({name: w.detach() for name, w in weights.items()}, momenta, buffers)
        return dict(zip(self._learnt, found, strict=True)), loss, losses, ahead

    def _sgd(
        self,
        weights: Weights,
        momenta: Weights,
        buffers: Weights,
        batch: Any,
        lr: Tensor,
        beta: Tensor,
        losses: list[float],
        *,
        graph: bool,
    ) -> tuple[Weights, Weights, Weights]:
        """Take one step: m <- beta m + g, theta <- theta - lr m."""
        loss, buffers = self._value(self._loss, weights, buffers, batch)
        gradients = self._gradients(loss, weights, graph=graph)
        losses.append(to_scalar(loss))
        momenta = {name: (beta * momenta[name] + g).to(g.dtype) for name, g in gradients.items()}
        return {name: w - lr.to(w.dtype) * momenta[name] for name, w in weights.items()}, momenta, buffers

    def _distance(
        self, learner: Weights, learner_buffers: Weights, weights: Weights, buffers: Weights, batch: Any
    ) -> Tensor:
        """Return mu of the target, made here by the last gradient step, and the learner."""
        loss, target_buffers = self._value(self._loss, weights, buffers, batch)
        alpha = self.lr if self.alpha is None else self.alpha
        gradients = self._gradients(loss, weights, graph=False)
        target = {name: (w - alpha * gradients[name]).detach() for name, w in weights.items()}
        if self.metric == "parameters":
            parts = [(target[name] - w).square().sum() for name, w in learner.items()]
            return 0.5 * torch.stack(parts).sum()
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                ahead, _ = self._value(self._outputs, target, target_buffers, batch)
            now, _ = self._value(self._outputs, learner, learner_buffers, batch)
        finally:
            for module, mode in modes:
                module.training = mode
        if self.metric == "gaussian":
            return 0.5 * (ahead - now).square().flatten(1).sum(dim=1).mean()
        log_p, log_q = F.log_softmax(ahead, dim=-1), F.log_softmax(now, dim=-1)
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()

    def _value(self, objective: nn.Module, weights: Weights, buffers: Weights, batch: Any) -> tuple[Tensor, Weights]:
        """Return an objective's value and the buffers after it; those given stay as they are."""
        after = {f"model.{name}": value.clone() for name, value in buffers.items()}
        swapped = {f"model.{name}": value for name, value in weights.items()} | after
        value = functional_call(objective, swapped, (batch,))
        return value, {name: swapped[f"model.{name}"].detach() for name in buffers}

    def _gradients(self, loss: Tensor, weights: Weights, *, graph: bool) -> Weights:
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise UsageError("loss_fn must return a tensor of one element that depends on the model's parameters.")
        values = list(weights.values())
        found = torch.autograd.grad(loss.reshape(()), values, create_graph=graph, allow_unused=True)
        zeros = (torch.zeros_like(w) if g is None else g for w, g in zip(values, found, strict=True))
        return dict(zip(weights, zeros, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return meta-parameters, their optimizer and momenta; weights and buffers are in the model's own state."""
        return {
            "log_lr": self._log_lr.detach().clone(),
            "logit_momentum": self._logit_momentum.detach().clone(),
            "meta": copy.deepcopy(self._meta.state_dict()),
            "momenta": {name: value.clone() for name, value in self._momenta.items()},
            "rounds": self.rounds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a state was taken, with the same arguments as then."""
        with torch.no_grad():
            self._log_lr.copy_(state["log_lr"])
            self._logit_momentum.copy_(state["logit_momentum"])
            self._momenta = {
                name: torch.empty_like(p).copy_(state["momenta"][name]) for name, p in self._trained.items()
            }
        self._meta.load_state_dict(state["meta"])
        self.rounds = int(state["rounds"])


def _leaves(weights: Weights) -> Weights:
    return {name: w.detach().requires_grad_() for name, w in weights.items()}


CARD = Card(
    name="bootstrapped-meta-gradient",
    room="tune",
    summary="learns the learning rate while training, by the distance to its own state some steps on",
    paper=Paper("Bootstrapped Meta-Learning", 2022, arxiv="2109.04504"),
    equation="w <- w - meta_lr grad_w mu(stop(t - alpha grad f(t)), theta_K(w)),  t = theta_{K+L-1}",
    claim="State of the art for model-free agents on Atari; the meta-gradient looks further ahead than it unrolls.",
    acts_on="run",
    entry="trimtab.tune.bilevel.bootstrapped_meta:BootstrappedMetaLR",
    treats={"lr-too-low": 6, "lr-too-high": 6},
    defaults=(
        Default("K", 1, "ours: the cheapest; the paper's agents on Atari have it too (recalled)"),
        Default("L", 1, "ours: the horizon of the ordinary meta-gradient; the paper's are longer"),
        Default("metric", "parameters", "ours: needs no outputs; the paper's agents match policies by KL"),
        Default("meta_lr", 0.01, "ours: a hundredth of an e-fold of the learning rate a round"),
    ),
    verified={
        "equation": (
            "tests/tune/bilevel/test_bootstrapped_meta.py::test_meta_gradient_equals_central_differences",
            "tests/tune/bilevel/test_bootstrapped_meta.py::test_one_step_of_target_is_the_ordinary_meta_gradient",
            "tests/tune/bilevel/test_bootstrapped_meta.py::test_meta_gradient_of_a_quadratic_in_closed_form",
            "tests/tune/bilevel/test_bootstrapped_meta.py::test_steps_are_those_of_sgd",
        ),
    },
    deviations=(
        "The paper's formulas are recalled, its text was not read again. That training goes on from theta_{K+L-1}, "
        "before the target's last step, is also what two independent implementations for agents do.",
        "The paper tunes agents (discount, entropy weight, exploration) and few-shot learners; here w is the learning "
        "rate, and the momentum, of SGD, so that loss_fn can be that of any model.",
        "alpha is the learning rate itself where none is given. With the 'parameters' metric it only scales the last "
        "part of the target.",
        "Outputs are compared in evaluation mode, so that dropout adds no distance.",
        "Adam on log lr: the size of mu plays no part, only its sign and steadiness; the learning rate stays above 0.",
        "Measured by benchmarks/meta_gradients.py on a regression whose target drifts slowly and fast in turns, with "
        "K = 2, n = 6: L = 4 is worse than the ordinary meta-gradient (distance +0.012, 95 % interval +0.008 "
        "to +0.016), L = 10 no evidence (-0.003 to +0.022). Each round moves the rate only once. Against the "
        "tuned fixed rate L = 4 is worse (+0.010), the ordinary meta-gradient no evidence (-0.002). On digits-mlp from "
        "a thirtieth of the best rate, n = 5: test loss 0.26 with L = 4 and softmax, better than without (0.35), worse "
        "than the ordinary meta-gradient (0.15) and the best fixed rate (0.11).",
    ),
)
