"""Hypernetwork tuning: weights as a learnt function of hyper-parameters, both trained together in a single run.

The best response w*(lambda) = argmin_w L_T(w, lambda) is learnt near the current hyper-parameters, and the
hyper-parameters follow the validation loss through it (Lorraine & Duvenaud 2018, algorithm 3):

    phi     <-  phi    - alpha d/dphi    L_T(w_phi(lambda'), lambda'),    lambda' ~ N(lambda, sigma^2 I)
    lambda  <-  lambda - beta  d/dlambda L_V(w_phi(lambda))

w_phi is affine in lambda (`_hyper_response`): the paper's linear hypernetwork, or for larger models the row-wise one of
Self-Tuning Networks, which costs twice the weights. The hyper-parameters are those of the training loss: weight decay
of any group of parameters, dropout rates, and anything that the given training loss does with its value. Learning rate
and momentum are not among them: they do not change what the best weights are.

What to expect: a step costs four to six plain ones on small networks. In benchmarks/hypernetwork.py (digits, 5 seeds, 4
CPU seconds) it was ahead on average of both searches, whose 5 to 9 trials were short, without being established, and
level with untuned values trained as long. Training anew with the values found was better still, after as long again.

Lorraine & Duvenaud 2018 (arXiv:1802.09419), authors' code lorraine2/hypernet-hypertraining; MacKay et al. 2019
(arXiv:1903.03088), authors' code asteroidhouse/self-tuning-networks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError
from trimtab.scalars import to_scalar
from trimtab.tune.bilevel._hyper_parameters import Hyper, Hypers
from trimtab.tune.bilevel._hyper_response import Response

__all__ = ["Hyper", "HypernetworkTuner"]

Net = Callable[..., Any]
TrainLoss = Callable[[Net, Any, Mapping[str, Tensor]], Tensor]
ValidLoss = Callable[[Net, Any], Tensor]


class HypernetworkTuner:
    """Trains a model and tunes hyper-parameters of its training loss at the same time.

    The model keeps its classes: it is called with the weights of the response in place of its own, which are always
    the best response at the current hyper-parameters. Dropout rates are written into its modules after each step.

    Args:
        model: trained in place, in the mode (training, evaluation) that its modules are in.
        hypers: the hyper-parameters; `decays` and `drops` act by themselves, others through `train_loss`.
        train_loss: takes (net, batch, values) and returns the mean training loss without the weight decay; `net` is
            called like the model, `values` are the sampled hyper-parameters by name.
        valid_loss: takes (net, batch) and returns the mean validation loss; the model is in evaluation mode.
        response: "rows" (Self-Tuning Networks) or "linear" (the paper's; as many weights more as hyper-parameters).
        optimizer: makes the optimizer of the weights and the response; default Adam at 0.001. It must not decay
            weights itself; plain gradient descent learns the rows' response ten times slower.
        hyper_lr: learning rate of Adam on the raw hyper-parameters.
        warmup: steps in which the hyper-parameters stay.
        samples: hyper-parameters drawn a step; from 2 on they come in opposite pairs, in which the noise of the
            response's gradient largely cancels.
        seed: of the tuner's own generator, which draws the samples and the dropout masks.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> generator = torch.manual_seed(0)
        >>> x, y = torch.randn(20, 3, generator=generator), torch.randn(20, 1, generator=generator)
        >>> def loss(net, batch, values=None):
        ...     return (net(batch[0]) - batch[1]).square().mean()
        >>> decay = Hyper("decay", 1e-3, 1e-6, 1e2, "log", decays=("weight",))
        >>> tuner = HypernetworkTuner(nn.Linear(3, 1), [decay], train_loss=loss, valid_loss=loss, hyper_lr=0.1)
        >>> for _ in range(50):
        ...     report = tuner.step((x[:10], y[:10]), (x[10:], y[10:]))
        >>> sorted(report), tuner.values["decay"] > 1e-3  # pure noise: more decay is better
        (['train_loss', 'valid_loss'], True)

    References:
        Lorraine & Duvenaud 2018, arXiv:1802.09419; MacKay et al. 2019, arXiv:1903.03088.
    """

    def __init__(
        self,
        model: nn.Module,
        hypers: Sequence[Hyper],
        *,
        train_loss: TrainLoss,
        valid_loss: ValidLoss,
        response: str = "rows",
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
        hyper_lr: float = 3e-3,
        warmup: int = 0,
        samples: int = 1,
        seed: int = 0,
    ) -> None:
        if hyper_lr < 0 or warmup < 0 or samples < 1:
            raise UsageError(
                f"hyper_lr and warmup must be 0 or above, samples 1 or above: got {hyper_lr}, {warmup}, {samples}."
            )
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise UsageError("the model has no parameter that requires a gradient: there is nothing to train.")
        self.model = model
        self.warmup, self.samples = warmup, samples
        self.steps = 0
        self._train_loss, self._valid_loss = train_loss, valid_loss
        self._generator = torch.Generator(device=trained[0].device).manual_seed(seed)
        self._hypers = Hypers(hypers, model)
        self._raw = self._hypers.raw(trained[0]).requires_grad_()
        self._sigma = self._hypers.sigma(trained[0])
        self._response = Response(model, len(hypers), response, self._generator)
        parameters = [*trained, *self._response.parts.values()]
        self._optimizer = (optimizer or _adam)(parameters)
        self._hyper_optimizer = torch.optim.Adam([self._raw], lr=hyper_lr)
        self._hypers.set_rates(self.values)

    @property
    def values(self) -> dict[str, float]:
        """The current hyper-parameters."""
        return {name: to_scalar(value) for name, value in self._hypers.values(self._raw).items()}

    def step(self, train_batch: Any, valid_batch: Any = None) -> dict[str, float]:
        """Train on one batch; then, unless `valid_batch` is None or the warm-up lasts, move the hyper-parameters.

        Args:
            train_batch: what `train_loss` takes.
            valid_batch: what `valid_loss` takes; leave it out on every other step for two training steps to each step
                of the hyper-parameters, as in Self-Tuning Networks.

        Returns:
            "train_loss", with the decay, at the sampled hyper-parameters; "valid_loss" at the current ones, if used.
        """
        report = {"train_loss": self._train(train_batch)}
        self.steps += 1
        if valid_batch is not None and self.steps > self.warmup:
            report["valid_loss"] = self._tune(valid_batch)
        return report

    def best_response(self, values: Mapping[str, float] | None = None) -> dict[str, Tensor]:
        """Return the weights that the response gives for hyper-parameters near the current ones, by name.

        Args:
            values: hyper-parameters that differ from the current ones.

        Returns:
            Weights, detached; those of the model itself without `values`.

        Raises:
            UsageError: if a name is unknown or a value out of its range.
        """
        known = {hyper.name: index for index, hyper in enumerate(self._hypers.all)}
        raw = self._raw.detach().clone()
        for name, value in (values or {}).items():
            if name not in known:
                raise UsageError(f"unknown hyper-parameter {name!r}. Valid: {', '.join(known)}.")
            hyper = self._hypers.all[known[name]]
            raw[known[name]] = Hyper(name, value, hyper.low, hyper.high, hyper.transform).to_raw()
        weights = self._response.weights((raw - self._raw.detach()) / self._sigma)
        return {name: weight.detach() for name, weight in weights.items()}

    def hypergradient(self, valid_batch: Any) -> dict[str, float]:
        """Return d L_V / d raw for each hyper-parameter (raw: the log or logit of its value), moving nothing."""
        _, gradient = self._hypergradient(valid_batch)
        return {hyper.name: to_scalar(part) for hyper, part in zip(self._hypers.all, gradient, strict=True)}

    def _train(self, batch: Any) -> float:
        now = self._raw.detach()
        self._optimizer.zero_grad()
        total, noise = 0.0, torch.zeros_like(now)
        for sample in range(self.samples):
            draw = torch.randn(now.shape, generator=self._generator, device=now.device, dtype=now.dtype)
            noise = -noise if sample % 2 else draw
            raw = self._hypers.clamp(now + self._sigma * noise)
            weights = self._response.weights((raw - now) / self._sigma)
            values = self._hypers.values(raw)
            with self._hypers.dropping(values, self._generator):
                loss = self._train_loss(self._net(weights), batch, values)
            loss = (loss + self._hypers.penalty(values, weights)) / self.samples
            loss.backward()
            total += to_scalar(loss)
        self._optimizer.step()
        return total

    def _tune(self, batch: Any) -> float:
        loss, self._raw.grad = self._hypergradient(batch)
        before = self._raw.detach().clone()
        self._hyper_optimizer.step()
        with torch.no_grad():
            self._raw.copy_(self._hypers.clamp(self._raw))
        self._response.move((self._raw.detach() - before) / self._sigma)
        self._hypers.set_rates(self.values)
        return to_scalar(loss)

    def _hypergradient(self, batch: Any) -> tuple[Tensor, Tensor]:
        weights = self._response.weights((self._raw - self._raw.detach()) / self._sigma)
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            loss = self._valid_loss(self._net(weights), batch)
        finally:
            for module, mode in modes:
                module.training = mode
        (gradient,) = torch.autograd.grad(loss, self._raw)
        return loss.detach(), gradient

    def _net(self, weights: Mapping[str, Tensor]) -> Net:
        return lambda *args, **options: functional_call(self.model, dict(weights), args, options)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all that a run continues from bit for bit, as tensors and numbers."""
        return {
            "model": {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()},
            "response": self._response.state_dict(),
            "raw": self._raw.detach().clone(),
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "hyper_optimizer": copy.deepcopy(self._hyper_optimizer.state_dict()),
            "generator": self._generator.get_state(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of a tuner that was made alike.

        Raises:
            UsageError: if the state is of other hyper-parameters or another response.
        """
        if state["raw"].shape != self._raw.shape or state["response"].keys() != self._response.parts.keys():
            raise UsageError("the state is of other hyper-parameters or another response: make the tuner alike first.")
        self.model.load_state_dict(state["model"])
        self._response.load_state_dict(state["response"])
        with torch.no_grad():
            self._raw.copy_(state["raw"])
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self._hyper_optimizer.load_state_dict(copy.deepcopy(state["hyper_optimizer"]))
        self._generator.set_state(state["generator"])
        self.steps = int(state["steps"])
        self._hypers.set_rates(self.values)


def _adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


CARD = Card(
    name="hypernetwork-tuning",
    room="tune",
    summary="tunes decay, dropout and augmentation within one run, through learnt best responses of the weights",
    paper=Paper(
        "Stochastic Hyperparameter Optimization through Hypernetworks",
        2018,
        arxiv="1802.09419",
        code="https://github.com/lorraine2/hypernet-hypertraining",
    ),
    equation=(
        "phi <- phi - a d/dphi L_T(w_phi(l'), l'), l' ~ N(l, sigma^2 I); l <- l - b d/dl L_V(w_phi(l)); w_phi affine"
    ),
    claim="Beats random search and Bayesian optimisation at equal time; tunes thousands of hyper-parameters at once.",
    acts_on="run",
    entry="trimtab.tune.bilevel.hypernetwork:HypernetworkTuner",
    defaults=(
        Default("response", "rows", "Self-Tuning Networks"),
        Default("optimizer", None, "ours: Adam at 0.001; Self-Tuning Networks' code: SGD at 0.01 with momentum 0.9"),
        Default("hyper_lr", 3e-3, "Self-Tuning Networks' code, valid_lr, with Adam"),
        Default("warmup", 0, "Lorraine & Duvenaud; Self-Tuning Networks' code: 5 epochs"),
        Default("samples", 1, "Lorraine & Duvenaud, algorithm 3"),
        Default("seed", 0, "ours"),
    ),
    verified={
        "equation": (
            "tests/tune/bilevel/test_hypernetwork.py::test_best_response_is_that_of_ridge_regression",
            "tests/tune/bilevel/test_hypernetwork.py::test_hypergradient_is_that_of_ridge_regression",
            "tests/tune/bilevel/test_hypernetwork.py::test_reaches_the_best_decay_of_ridge_regression",
            "tests/tune/bilevel/test_hypernetwork.py::test_one_step_by_hand",
        ),
    },
    deviations=(
        "The response is written about the current hyper-parameters and carried along exactly when they move, in units "
        "of sigma: an affine map as the authors', better conditioned. It starts with the model's own weights and no "
        "response.",
        "Lorraine & Duvenaud's algorithm 4 (no samples: the moves of the hyper-parameters are the noise; their "
        "published code) is not offered: about the current point the response would never be learnt.",
        "All examples of a batch share one sample; Self-Tuning Networks draw one for each example, in modified layers. "
        "Pairs of opposite samples (`samples=2`) are an addition.",
        "Rows have no common factor elem_scalar; biases respond by a free matrix, which is the same family.",
        "The scale sigma of the samples is fixed; Self-Tuning Networks can tune it with an entropy bonus.",
        "Weight decay is 1/2 value |w|^2 in the loss, not decoupled from the optimizer.",
    ),
)
