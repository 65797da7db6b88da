"""AutoLRS: each stage of training searches its own learning rate, by short trials whose end is forecast.

    stage of tau steps:  for k rates  eta = argmin mu(eta) - kappa sigma(eta)    (lower confidence bound of a GP)
                             from the stage's first state, train tau' = tau / 10 steps at eta, put everything back
                             loss after tau steps ~ a exp(b tau) + c, fitted to the tau' losses; tell the GP
                         train tau steps at the best rate of these;   tau <- min(2 tau, tau_max)

The search costs k tau' = tau steps, as many as the training it finds the rate for. Jin et al. 2021 (arXiv:2105.10762);
authors' code YuchenJin/autolrs, autolrs_server.py.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.card import Card, Default, Paper
from trimtab.errors import RunFailedError, UsageError, choose
from trimtab.record.checkpoint import rng_state, set_rng_state
from trimtab.tune.lr._batches import Batches
from trimtab.tune.lr._exponential_forecast import LEAST, exponential_forecast, jumped
from trimtab.tune.lr._next_lr import next_lr
from trimtab.tune.lr._snapshot import trial
from trimtab.tune.lr.lr_range import _set, _step, shares_of
from trimtab.workloads.interrupt import Interrupt, interruptible

__all__ = ["AutoLRS", "LRStage"]

_LEVEL = 10
"""Training losses whose mean is the level that a forecast is held against."""
_VALIDATIONS = 16


@dataclass
class LRStage:
    """A stage of AutoLRS.

    Attributes:
        start: training steps before it.
        tau: its training steps.
        tau_trial: steps of each trial; 0 for a stage too short for a search, which keeps the rate of the one before.
        lrs: the rates tried, in order.
        forecasts: the loss forecast for each after `tau` steps; None where the trial was not finite.
        lr: the rate chosen, None during the search.
        done: training steps taken.
        reached: the loss at the stage's end, None before: the mean of the last 10 training losses, or the validation's.
    """

    start: int
    tau: int
    tau_trial: int
    lrs: list[float] = field(default_factory=list)
    forecasts: list[float | None] = field(default_factory=list)
    lr: float | None = None
    done: int = 0
    reached: float | None = None

    @property
    def forecast(self) -> float | None:
        """The forecast of the rate chosen."""
        return self.forecasts[self.lrs.index(self.lr)] if self.lr in self.lrs else None


class AutoLRS:
    """Train a model with the learning rate of each stage found by Bayesian optimisation over short trials.

    Every trial starts from the stage's first state and sees the batches that training will see first; afterwards model,
    optimizer, scaler, generators and batches are bit for bit as before. A trial that is not finite counts as the worst
    loss seen in its stage.

    Args:
        model: trained in training mode.
        optimizer: steps without a closure. Groups keep the ratios of their (initial) rates.
        loss_fn: takes the model and a batch, returns the mean loss.
        batches: a function from the step to its batch, or a DataLoader, list or other iterable, of which the batches of
            a trial are held in memory.
        lr_min: lowest rate to try, above 0.
        lr_max: highest rate to try; beyond the largest stable one of a range test there is nothing to find.
        validate: takes the model and returns its loss on held-out data, without a trace. Without it the training losses
            are the signal throughout.
        validate_always: use `validate` from the first stage on, not only at stages of `tau_max` steps.
        tau: steps of the first stage.
        tau_max: steps of the longest stage; each is twice as long as the one before.
        k: rates to try a stage, at least 1.
        ratio: tau / tau', at least 1; a trial needs 5 steps.
        kappa: weight of the uncertainty, at least 0.
        fit: `"kept"` fits the forecast to the losses that are no outliers, `"smoothed"` (the authors) to their spline.
        clip: largest gradient norm; 0 for none.
        scaler: of training in half precision.
        seed: of the first rate that each stage tries.

    Attributes:
        stages: what each stage tried, chose and reached.
        losses: the training losses, search left out.
        search_steps: steps taken in finished trials.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> batch = torch.linspace(-1, 1, 32).reshape(8, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loss = lambda net, x: (net(x) - 3).square().mean()
        >>> tuner = AutoLRS(model, optimizer, loss, [batch], lr_min=1e-4, lr_max=1.0, tau=50, k=4)
        >>> tuner.train(140)
        >>> tuner.search_steps, len(tuner.losses), tuner.losses[-1] < tuner.losses[0]
        (40, 100, True)

    References:
        Jin et al. 2021, arXiv:2105.10762; https://github.com/YuchenJin/autolrs.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        batches: Callable[[int], Any] | Iterable[Any],
        *,
        lr_min: float,
        lr_max: float,
        validate: Callable[[nn.Module], float] | None = None,
        validate_always: bool = False,
        tau: int = 1000,
        tau_max: int = 8000,
        k: int = 10,
        ratio: int = 10,
        kappa: float = 1e6,
        fit: str = "kept",
        clip: float = 0.0,
        scaler: torch.amp.GradScaler | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 < lr_min < lr_max < math.inf:
            raise UsageError(f"rates must rise from above 0, got lr_min {lr_min!r} and lr_max {lr_max!r}.")
        for name, count, least in (
            ("k", k, 1),
            ("ratio", ratio, 1),
            ("tau", tau, LEAST * ratio),
            ("tau_max", tau_max, tau),
        ):
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise UsageError(f"{name} must be a whole number, at least {least}, got {count!r}.")
        for name, value in (("kappa", kappa), ("clip", clip)):
            if not 0 <= value < math.inf:
                raise UsageError(f"{name} must be at least 0 and finite, got {value!r}.")
        if validate_always and validate is None:
            raise UsageError("validate_always needs validate, got None: give a function of the model.")
        choose("fit", fit, ("kept", "smoothed"))
        self._shares = shares_of(optimizer)
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self.batches = Batches(batches)
        self.lr_min, self.lr_max, self.kappa, self.fit, self.seed = lr_min, lr_max, kappa, fit, seed
        self.validate, self.validate_always = validate, validate_always
        self.tau, self.tau_max, self.k, self.ratio = tau, tau_max, k, ratio
        self.clip, self.scaler = clip, scaler
        self.stages: list[LRStage] = []
        self.losses: list[float] = []
        self.search_steps = 0

    @property
    def spent(self) -> int:
        """Steps taken in all: training and finished trials."""
        return self.search_steps + len(self.losses)

    def train(
        self,
        steps: int,
        *,
        progress: Callable[[int, int, float], None] | None = None,
        checkpoint: Callable[[AutoLRS], None] | None = None,
        checkpoint_every: int = 0,
    ) -> None:
        """Train until `steps` steps are spent, those of the search included; what was begun is continued.

        A stage that does not fit is shortened; without room for a search the rest trains at the last rate.

        Args:
            steps: in all, at least `tau + k tau'`; on continuing, the same as before.
            progress: called after each step, of trials too, with the steps done, the steps in all and the loss.
            checkpoint: called with this tuner after each trial, and each `checkpoint_every` training steps: the moments
                to save its `state_dict()`.
            checkpoint_every: training steps between checkpoints; 0 for none while a stage trains.

        Raises:
            UsageError: if `steps` is too small.
            RunFailedError: if the loss of training, or of every trial of a stage, is not finite: the weights are those
                before that step or stage.
            KeyboardInterrupt: on Ctrl-C, once the step in hand is finished: within a trial everything is put back to
                where it began, and the trial will be run again.
        """
        least = self.tau + self.k * (self.tau // self.ratio)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < least:
            raise UsageError(f"steps must be a whole number, at least {least} for one stage, got {steps!r}.")
        self.model.train()
        if callable(turn := getattr(self.optimizer, "train", None)):  # optimizers with two modes
            turn()
        with interruptible() as interrupt, torch.enable_grad():
            while self.spent < steps or self._open():
                if not self._open():
                    self._begin(steps)
                stage = self.stages[-1]
                while stage.lr is None:
                    self._search(stage, interrupt, steps, progress)
                    if checkpoint is not None:
                        checkpoint(self)
                while stage.done < stage.tau:
                    loss = self._advance(stage, next_batch=self._taken())
                    if progress is not None:
                        progress(self.spent, steps, loss)
                    if checkpoint is not None and checkpoint_every and len(self.losses) % checkpoint_every == 0:
                        checkpoint(self)
                    _stop_if(interrupt)
                stage.reached = self._level(stage)

    def _open(self) -> bool:
        return bool(self.stages) and self.stages[-1].reached is None

    def _begin(self, steps: int) -> None:
        left, done = steps - self.spent, len(self.losses)
        tau = min(self.tau * 2 ** len(self.stages), self.tau_max)
        if tau + self.k * (tau // self.ratio) > left:
            tau = left * self.ratio // (self.ratio + self.k)
        if tau // self.ratio >= LEAST:
            self.stages.append(LRStage(done, tau, tau // self.ratio))
        else:
            self.stages.append(LRStage(done, left, 0, lr=self.stages[-1].lr))

    def _search(
        self, stage: LRStage, interrupt: Interrupt, steps: int, progress: Callable[[int, int, float], None] | None
    ) -> None:
        """Run one trial, and choose the stage's rate after the last."""
        finite = [loss for loss in stage.forecasts if loss is not None]
        worst = max(finite, default=0.0)
        lr = next_lr(
            stage.lrs,
            [worst if loss is None else loss for loss in stage.forecasts],
            lr_min=self.lr_min,
            lr_max=self.lr_max,
            kappa=self.kappa,
            seed=self.seed + len(self.stages),
        )
        forecast = self._try(stage, lr, interrupt, steps, progress)
        stage.lrs.append(lr)
        stage.forecasts.append(forecast)
        self.search_steps += stage.tau_trial
        if len(stage.lrs) == self.k:
            found = [(loss, lr) for lr, loss in zip(stage.lrs, stage.forecasts, strict=True) if loss is not None]
            if not found:
                self.search_steps -= self.k * stage.tau_trial
                self.stages.pop()
                raise RunFailedError(f"no rate from {self.lr_min} to {self.lr_max} trains: lower lr_min.")
            stage.lr = min(found)[1]

    def _try(
        self,
        stage: LRStage,
        lr: float,
        interrupt: Interrupt,
        steps: int,
        progress: Callable[[int, int, float], None] | None,
    ) -> float | None:
        """Train a trial's steps at a rate, put everything back, and return the loss forecast for the stage's end."""
        validated = self._validated(stage)
        every = max(1, stage.tau_trial // _VALIDATIONS) if validated else 1
        signal: list[float] = []
        with trial(self.model, self.optimizer, self.scaler, loader=None):
            ahead = self.batches.ahead()
            self._set_lr(lr)
            for step in range(stage.tau_trial):
                loss = self._loss_of_step(ahead)
                if validated and (step + 1) % every == 0:
                    signal.append(float(self.validate(self.model)))  # type: ignore[misc]
                elif not validated:
                    signal.append(loss)
                if not (math.isfinite(loss) and math.isfinite(signal[-1] if signal else 0.0)):
                    return None
                if progress is not None:
                    progress(self.spent + step + 1, steps, loss)
                _stop_if(interrupt)
        if (level := jumped(signal)) is not None:
            return level
        curve = exponential_forecast(signal, stage.tau / every, rounds=1 if validated else 10, fit=self.fit)
        # Validations come after their step, so that the first of them is at place 1 of their own spacing.
        value = curve(stage.tau / every - (1 if validated else 0))
        return value if math.isfinite(value) else None

    def _advance(self, stage: LRStage, *, next_batch: Iterator[Any]) -> float:
        self._set_lr(stage.lr or self.lr_min)
        loss = self._loss_of_step(next_batch)
        if not math.isfinite(loss):
            raise RunFailedError(f"training at lr {stage.lr} failed after {len(self.losses)} steps: lower lr_max.")
        stage.done += 1
        self.losses.append(loss)
        return loss

    def _loss_of_step(self, batches: Iterator[Any]) -> float:
        return _step(self.model, self.optimizer, self.loss_fn, batches, 1, self.clip, self.scaler)

    def _taken(self) -> Iterator[Any]:
        yield self.batches.take()

    def _set_lr(self, lr: float) -> None:
        for group, share in zip(self.optimizer.param_groups, self._shares, strict=True):
            _set(group, lr * share)

    def _validated(self, stage: LRStage) -> bool:
        enough = stage.tau_trial // max(1, stage.tau_trial // _VALIDATIONS) >= LEAST
        return self.validate is not None and enough and (self.validate_always or stage.tau >= self.tau_max)

    def _level(self, stage: LRStage) -> float:
        if self._validated(stage) and self.validate is not None:
            return float(self.validate(self.model))
        return statistics.fmean(self.losses[-_LEVEL:])

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resume needs: model, optimizer, scaler, torch's generators, batches and the search."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "rng": rng_state(),
            "batches": self.batches.state_dict(),
            "stages": [asdict(stage) for stage in self.stages],
            "losses": list(self.losses),
            "search_steps": self.search_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a state was taken, with the same arguments as then."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.batches.load_state_dict(state["batches"])
        self.stages = [LRStage(**stage) for stage in state["stages"]]
        self.losses = list(state["losses"])
        self.search_steps = int(state["search_steps"])
        set_rng_state(state["rng"])


def _stop_if(interrupt: Interrupt) -> None:
    if interrupt.asked:
        interrupt.asked = False  # the next one must not cut the restoring short
        raise KeyboardInterrupt


CARD = Card(
    name="autolrs",
    room="tune",
    summary="searches the learning rate of each training stage by short trials, forecasts and Bayesian optimisation",
    paper=Paper(
        "AutoLRS: Automatic Learning-Rate Schedule by Bayesian Optimization on the Fly",
        2021,
        arxiv="2105.10762",
        code="https://github.com/YuchenJin/autolrs",
    ),
    equation="eta = argmin mu - kappa sigma of a GP over forecasts a exp(b tau) + c fitted to tau' = tau / 10 losses",
    claim="Schedules found on the fly train ResNet-50, Transformer and BERT 1.22x to 1.5x faster than the papers' own.",
    acts_on="run",
    entry="trimtab.tune.lr.auto_lrs:AutoLRS",
    treats={"lr-too-high": 5, "lr-too-low": 5},
    defaults=(
        Default("tau", 1000, "authors' code, EXPLOITATION_STEP"),
        Default("tau_max", 8000, "authors' code, TAU_MAX"),
        Default("k", 10, "authors' code, LR_TO_EXPLORE"),
        Default("ratio", 10, "authors' code: LR_STEPS 100 of EXPLOITATION_STEP 1000"),
        Default("kappa", 1e6, "authors' code, acq_func_kwargs"),
        Default("fit", "kept", "ours: exact on an exponential without noise; authors' code: 'smoothed'"),
    ),
    verified={
        "equation": (
            "tests/tune/lr/test_auto_lrs.py::test_forecast_recovers_known_exponentials",
            "tests/tune/lr/test_auto_lrs.py::test_forecast_fit_is_the_least_squares_one",
            "tests/tune/lr/test_auto_lrs.py::test_next_lr_is_the_lowest_bound_of_an_independent_gp",
            "tests/tune/lr/test_auto_lrs.py::test_equals_the_algorithm_in_a_plain_loop",
            "tests/tune/lr/test_auto_lrs.py::test_search_costs_what_the_paper_counts",
        ),
    },
    deviations=(
        "Defaults and formulas are the authors' code's; the paper's own numbers (kappa above all) were not read again.",
        "Trials see the batches that training will see first, the same for every rate, and leave no trace; the authors "
        "put back weights and optimizer only, and every trial takes the next batches.",
        "The forecast is fitted to the losses themselves once outliers are out. The authors fit it to their quadratic "
        "spline, which scipy's default smoothing (a sum of squares equal to the length) makes a parabola where errors "
        "are below 1: without noise, 2 exp(-0.02 t) + 1 is then forecast 0.15 low from 100 losses (fit='smoothed').",
        "A trial that is not finite counts as the worst loss of its stage, not as 1e6; one whose loss leaps "
        "up counts with the level it ends at, where the authors do so for validation losses only.",
        "b is no slower than a tenth of an e-fold over the stage. The last stage may be shorter; no first warm-up.",
        "Measured by benchmarks/auto_lrs.py on digits-mlp, 800 steps with the search's, n = 5: no evidence (test loss "
        "0.27 to the default cosine's 0.11); worse if the search is not counted (0.28). Last losses rank rates better.",
    ),
)
