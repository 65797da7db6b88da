"""Periodic extrapolation of the weights: every so many optimizer steps, jump to where they are heading.

A predictor looks at the last c checkpoints of the parameters, s steps apart, and names the parameters k checkpoints
ahead. Once per period of c s steps the weights jump there, in place of that step; the optimizer's own state stays as it
is. The horizon shrinks as training goes on,

    k_r = round( (sqrt(K) + (1 - sqrt(K)) r / (R - 1))^2 ),   r = 0 .. R - 1,   R = max_steps / period

from K to 1 (K = 40, R = 10: 40 33 26 21 16 11 8 5 3 1).

The predictor here is the line that fits the checkpoints of each parameter best, read off at the horizon; the learned
one is `trimtab.optim.Nowcaster`. The schedule is that of Knyazev et al. 2025 (arXiv:2409.04434), whose baselines hold
the line; authors' code SamsungSAILMontreal/nino, optim/nino.py. Jang et al. 2023 introduced periodic nowcasting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError

__all__ = ["LineFit", "Nowcasting", "Predictor", "horizon_schedule"]


class Predictor(Protocol):
    """Names future parameters: given checkpoints [C, *shape] of each parameter, oldest first, and a horizon k >= 1."""

    def predict(self, checkpoints: Sequence[Tensor], k: int) -> list[Tensor]:
        """Return the parameters k checkpoints after the last one, one tensor [*shape] for each."""
        ...


class LineFit:
    """Least-squares line through the checkpoints of each parameter, read off k checkpoints after the last.

    With t = 0 .. C - 1: theta(t) = mean + slope (t - t_mean), slope = sum (t - t_mean) theta_t / sum (t - t_mean)^2.

    Example:
        >>> LineFit().predict([torch.tensor([[0.0], [1.0], [2.0]])], k=3)
        [tensor([5.])]
    """

    def predict(self, checkpoints: Sequence[Tensor], k: int) -> list[Tensor]:
        """Return the lines' values: see `Predictor.predict`."""
        result = []
        for theta in checkpoints:
            t = torch.arange(len(theta), dtype=theta.dtype, device=theta.device)
            centred = (t - t.mean()).reshape(-1, *[1] * (theta.dim() - 1))
            slope = (centred * theta).sum(dim=0) / centred.square().sum()
            result.append(theta.mean(dim=0) + slope * (len(theta) - 1 + k - t.mean()))
        return result


def horizon_schedule(horizon: int, *, max_steps: int, period: int) -> list[int]:
    """Return the horizon of each jump: from `horizon` down to 1, quadratically.

    Args:
        horizon: K, at least 1.
        max_steps: length of the training run.
        period: steps from jump to jump.

    Returns:
        max(1, max_steps // period) integers.

    Example:
        >>> horizon_schedule(40, max_steps=10_000, period=1000)
        [40, 33, 26, 21, 16, 11, 8, 5, 3, 1]
    """
    count = max(1, max_steps // period)
    root = horizon**0.5
    return [round((root + (1 - root) * (r / (count - 1) if count > 1 else 0.0)) ** 2) for r in range(count)]


class Nowcasting:
    """An optimizer that jumps to predicted weights once per period.

    Wraps any `torch.optim` optimizer: `step`, `zero_grad`, `state_dict` and `load_state_dict` as usual, and schedulers
    go on the wrapped one. The predictor's own weights are not part of the state.

    Args:
        optimizer: the optimizer for all other steps.
        predictor: names future parameters; default `LineFit()`.
        period: steps from jump to jump, a multiple of `context`.
        context: checkpoints c that the predictor sees, at least 2; they are period / context steps apart.
        horizon: K, the first horizon, in checkpoints.
        max_steps: length of the run, over which the horizon falls to 1.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> w = torch.tensor([8.0], requires_grad=True)
        >>> optimizer = Nowcasting(torch.optim.SGD([w], lr=1.0), period=4, context=2, horizon=3, max_steps=8)
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     w.sum().backward()
        ...     optimizer.step()
        >>> w  # 7 is saved before the second step and 5 in place of the fourth: three checkpoints on, the line is at -1
        tensor([-1.], requires_grad=True)

    References:
        Knyazev et al. 2025, arXiv:2409.04434; code: SamsungSAILMontreal/nino.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        predictor: Predictor | None = None,
        *,
        period: int = 1000,
        context: int = 5,
        horizon: int = 40,
        max_steps: int = 10_000,
    ) -> None:
        if context < 2:
            raise UsageError(f"context must be at least 2, got {context}: take 5.")
        if period < context or period % context:
            raise UsageError(f"period must be a multiple of context = {context}, got {period}.")
        if horizon < 1 or max_steps < 1:
            raise UsageError(f"horizon and max_steps must be at least 1, got {horizon} and {max_steps}.")
        self.optimizer = optimizer
        self.predictor: Predictor = LineFit() if predictor is None else predictor
        self.period, self.context = period, context
        self.horizons = horizon_schedule(horizon, max_steps=max_steps, period=period)
        self._step = 0
        self._checkpoints: list[list[Tensor]] = []

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's groups."""
        return self.optimizer.param_groups

    @property
    def jumps_next(self) -> bool:
        """Whether the next step is a jump, which needs no gradients."""
        return (self._step + 1) % self.period == 0

    def _params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step: the wrapped optimizer's, or once per period a jump.

        Args:
            closure: as for the wrapped optimizer; on a jump it is called once, before it, for the loss.

        Returns:
            The closure's loss, or None.
        """
        params = self._params()
        if (self._step + 1) % (self.period // self.context) == 0:
            self._checkpoints.append([p.detach().clone() for p in params])
        if self.jumps_next:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._jump(params)
        else:
            loss = self.optimizer.step(closure)
        self._step += 1
        return loss

    @torch.no_grad()
    def _jump(self, params: list[Tensor]) -> None:
        k = self.horizons[min(len(self.horizons) - 1, self._step // self.period)]
        stacked = [torch.stack(states) for states in zip(*self._checkpoints, strict=True)]
        predicted = self.predictor.predict(stacked, k)
        # One bad tensor would spoil the run for good: then all weights stay where they are.
        if all(bool(torch.isfinite(new).all()) for new in predicted):
            for p, new in zip(params, predicted, strict=True):
                p.copy_(new)
        self._checkpoints = []

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state, the step count and the checkpoints of the current period."""
        checkpoints = [[p.clone() for p in states] for states in self._checkpoints]
        return {"optimizer": self.optimizer.state_dict(), "step": self._step, "checkpoints": checkpoints}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; training then goes on bit for bit.

        Raises:
            UsageError: if the checkpoints do not fit the parameters.
        """
        params = self._params()
        for states in state["checkpoints"]:
            if [p.shape for p in states] != [p.shape for p in params]:
                raise UsageError("the state's checkpoints do not have the parameters' shapes: load its own model.")
        self.optimizer.load_state_dict(state["optimizer"])
        self._step = int(state["step"])
        self._checkpoints = [
            [saved.detach().clone().to(p) for saved, p in zip(states, params, strict=True)]
            for states in state["checkpoints"]
        ]


_TESTS = "tests/optim/learned/test_extrapolation.py"
CARD = Card(
    name="line-fit-extrapolation",
    room="optim",
    summary="every period, jump along the line through the last checkpoints of each weight",
    paper=Paper(
        "Accelerating Training with Neuron Interaction and Nowcasting Networks",
        2025,
        arxiv="2409.04434",
        code="https://github.com/SamsungSAILMontreal/nino",
    ),
    equation="theta <- mean_t theta_t + slope (c - 1 + k - t_mean), least squares over c checkpoints, once per period",
    claim="A baseline of the paper: periodic linear extrapolation can shorten training, less than a learned predictor.",
    acts_on="optimizer",
    entry="trimtab.optim.learned.extrapolation:Nowcasting",
    defaults=(
        Default("predictor", None, "ours: LineFit()"),
        Default("period", 1000, "authors' code, optim/nino.py"),
        Default("context", 5, "authors' code, optim/model.py: ctx"),
        Default("horizon", 40, "authors' code, optim/model.py: max_seq_len"),
        Default("max_steps", 10_000, "authors' code, optim/nino.py"),
    ),
    verified={
        "equation": (f"{_TESTS}::test_line_is_least_squares", f"{_TESTS}::test_jumps_when_and_where_it_should"),
        "reference": (f"{_TESTS}::test_horizons_are_those_of_the_authors",),
    },
    deviations=(
        "Measured by benchmarks/learned_optimizers.py (12 tasks, rate and horizon tuned apart): no gain over Adam, "
        "1.04 and 1.05 of its steps with a constant rate, 1.02 with one that decays. Minibatch noise, not curvature, "
        "is what it extrapolates there: on a noiseless narrow quadratic it does shorten the run (a test).",
        "Horizons are rounded as the authors' code does; its comment lists truncated ones (40 32 26 20 15 11 7 4 2 1).",
        "A jump whose prediction is not finite is skipped; the authors' code raises.",
        "The authors' code extrapolates all parameters of the model; here those of the wrapped optimizer.",
        "The line's horizon follows the schedule of the learned predictor. That the paper's line is a least-squares "
        "one over the same checkpoints is recalled, not checked against its text.",
    ),
)
