"""The learning-rate range test: a short trial run whose rate rises until the loss blows up.

    lr_i = lowest (highest / lowest)^(i / (n - 1))          exponential
    lr_i = lowest + (highest - lowest) i / (n - 1)          linear
    s_0 = loss_0,   s_i = f loss_i + (1 - f) s_{i-1}        stops when loss_i is not finite or s_i > r min_j s_j

Smith 2017 (arXiv:1506.01186), section 3.3, and Smith 2018 (arXiv:1803.09820) raise the rate linearly and read the
largest useful one from the plot; the exponential ramp, the stop at r = 4 and two rules to read a number are fastai's,
f = 0.05 is torch-lr-finder's. The rules read a curve c that is smoothed from both sides, so that it does not lag:

    suggestion       the rate where c falls most steeply over log lr, up to its minimum    (fastai's "steep")
    largest_stable   the rate of the minimum of c: beyond it the loss rises; its tenth is fastai's "minimum"
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.errors import RunFailedError, UsageError, choose
from trimtab.scalars import to_scalar
from trimtab.tune.lr._snapshot import trial
from trimtab.workloads.interrupt import interruptible

__all__ = ["LRRange", "lr_range_test"]

_LEAST_STEPS = 10
_LEAST_FALL = 0.01
"""Share of the first level by which the loss must fall: less says nothing of a rate, even without noise."""
_SIGMAS = 4.0


@dataclass(frozen=True)
class LRRange:
    """What a range test found.

    Attributes:
        lrs: the rates tried, rising; those of the group with the largest rate.
        losses: the loss at each, measured before its step.
        smoothed: the losses smoothed as they came in, which the stop was decided by.
        stopped_because: "finished", "diverged" or "non-finite".
        suggestion: the rate of steepest descent, or None.
        largest_stable: the rate of the lowest loss, or None.
        reason: why there is no suggestion, or what limits it; empty otherwise.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    stopped_because: str
    suggestion: float | None
    largest_stable: float | None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        }


def lr_range_test(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    loader: Iterable[Any],
    *,
    lowest: float = 1e-7,
    highest: float = 10.0,
    steps: int = 100,
    mode: str = "exponential",
    smoothing: float = 0.05,
    diverges_at: float = 4.0,
    accumulate: int = 1,
    clip: float = 0.0,
    scaler: torch.amp.GradScaler | None = None,
    scheduler: Any = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> LRRange:
    """Train for a few steps at rising learning rates, put everything back, and read off a rate.

    Afterwards all is bit for bit as before, also after an error or Ctrl-C: weights, buffers, gradients and modes;
    optimizer, scheduler and scaler with all their attributes; the random generators of torch, its devices, numpy and
    Python; the loader's generators, samplers and state. The test iterates anew over the loader, as often as it takes.
    It keeps a copy of all this meanwhile, and is for one process: ranks that stop at different steps would wait for
    each other.

    Args:
        model: trained in training mode.
        optimizer: steps without a closure. Groups keep the ratios of their (initial) rates.
        loss_fn: takes the model and a batch of the loader, returns the mean loss.
        loader: a DataLoader, list or other iterable that can be iterated again and again.
        lowest: first rate, above 0.
        highest: last rate, above `lowest`.
        steps: optimizer steps, at least 10.
        mode: "exponential" or "linear".
        smoothing: weight f of the newest loss, in (0, 1]; 1 for none.
        diverges_at: factor r above 1; for losses below 0 the distance from the best counts, in multiples of its size.
        accumulate: batches a step, at least 1.
        clip: largest gradient norm, as in training; 0 for none.
        scaler: of training in half precision.
        scheduler: of the optimizer; it is not stepped.
        progress: called after each step with the steps done, the steps in all and the loss.

    Returns:
        Rates, losses and what they suggest; no suggestion where the loss never fell by more than noise.

    Raises:
        UsageError: if an argument breaks its rule, the loader is empty or can be iterated only once, or the loss is no
            single number.
        KeyboardInterrupt: on Ctrl-C, once the step in hand is finished and everything is put back.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> batch = torch.linspace(-1, 1, 32).reshape(8, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> found = lr_range_test(model, optimizer, lambda net, x: (net(x) - 3).square().mean(), [batch])
        >>> found.stopped_because, 1e-3 < found.suggestion < found.largest_stable < 10
        ('diverged', True)

    References:
        Smith 2017, arXiv:1506.01186; Smith 2018, arXiv:1803.09820; fastai, `fastai/callback/schedule.py`;
        torch-lr-finder (https://github.com/davidtvs/pytorch-lr-finder).
    """
    rates = ramp(lowest, highest, steps, mode)
    _check_count("accumulate", accumulate, 1)
    if not (_is_number(smoothing) and 0 < smoothing <= 1):
        raise UsageError(f"smoothing must be in (0, 1], got {smoothing!r}: 1 is none.")
    if not (_is_number(diverges_at) and diverges_at > 1):
        raise UsageError(f"diverges_at must be above 1, got {diverges_at!r}.")
    if not (_is_number(clip) and clip >= 0):
        raise UsageError(f"clip must be at least 0, got {clip!r}.")
    shares = shares_of(optimizer)
    if hasattr(loader, "__next__") and not hasattr(loader, "load_state_dict"):
        raise UsageError("the loader can be iterated only once, so that its batches would be lost: give a DataLoader.")
    lrs: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    stopped = "finished"
    with interruptible() as interrupt, trial(model, optimizer, scheduler, scaler, loader=loader), torch.enable_grad():
        model.train()
        if callable(turn := getattr(optimizer, "train", None)):  # optimizers with two modes
            turn()
        batches = _endless(loader)
        for done, lr in enumerate(rates, 1):
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                _set(group, lr * share)
            loss = _step(model, optimizer, loss_fn, batches, accumulate, clip, scaler)
            if not math.isfinite(loss):
                stopped = "non-finite"
                break
            lrs.append(lr)
            losses.append(loss)
            smoothed.append(smoothing * loss + (1 - smoothing) * smoothed[-1] if smoothed else loss)
            if progress is not None:
                progress(done, steps, loss)
            best = min(smoothed)
            if smoothed[-1] - best > (diverges_at - 1) * abs(best):
                stopped = "diverged"
                break
            if interrupt.asked:
                interrupt.asked = False  # the next one must not cut the restoring short
                raise KeyboardInterrupt
    suggestion, largest, reason = _read(lrs, losses, smoothing, stopped)
    return LRRange(tuple(lrs), tuple(losses), tuple(smoothed), stopped, suggestion, largest, reason)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def ramp(lowest: float, highest: float, steps: int, mode: str) -> list[float]:
    """Return the rates of a test, in order.

    Raises:
        UsageError: if the range, the number of steps or the mode breaks its rule.
    """
    if not (_is_number(lowest) and _is_number(highest) and 0 < lowest < highest < math.inf):
        raise UsageError(f"rates must rise from above 0, got lowest {lowest!r} and highest {highest!r}.")
    choose("mode", mode, ("exponential", "linear"))
    _check_count("steps", steps, _LEAST_STEPS)
    space = np.geomspace if mode == "exponential" else np.linspace
    return [lowest, *(float(rate) for rate in space(lowest, highest, steps)[1:-1]), highest]


def _check_count(name: str, count: Any, least: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise UsageError(f"{name} must be a whole number, at least {least}, got {count!r}.")


def shares_of(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return each group's rate as a share of the largest, as it is without warm-up.

    Raises:
        UsageError: if the optimizer needs a closure, or has no rate.
    """
    step = inspect.signature(optimizer.step).parameters
    if "closure" in step and step["closure"].default is inspect.Parameter.empty:
        raise UsageError(f"{type(optimizer).__name__} needs a closure at each step: a range test cannot drive it.")
    if not all("lr" in group for group in optimizer.param_groups):
        raise UsageError(f"{type(optimizer).__name__} has no learning rate in its groups: there is nothing to test.")
    rates = [to_scalar(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    largest = max(rates)
    return [rate / largest if largest > 0 else 1.0 for rate in rates]


def _set(group: dict[str, Any], lr: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise UsageError("the loader is empty: a range test needs at least one batch.")


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Iterator[Any],
    accumulate: int,
    clip: float,
    scaler: torch.amp.GradScaler | None,
) -> float:
    """Take one step and return the mean loss of its batches; not finite if no step can be taken."""
    optimizer.zero_grad(set_to_none=True)
    mean = 0.0
    for _ in range(accumulate):
        loss = loss_fn(model, next(batches))
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise UsageError("loss_fn must return a tensor of one element that depends on the model's parameters.")
        mean += to_scalar(loss) / accumulate
        if not math.isfinite(mean):
            return mean
        part = loss.reshape(()) / accumulate
        (part if scaler is None else scaler.scale(part)).backward()
    if clip:
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    seen: dict[str, Any] = (
        {"loss": torch.tensor(mean)} if "loss" in inspect.signature(optimizer.step).parameters else {}
    )
    try:
        if scaler is None:
            optimizer.step(**seen)
        else:
            scaler.step(optimizer, **seen)
            scaler.update()
    except RunFailedError:  # a gradient that is not finite, refused by the optimizer
        return math.nan
    return mean


def _read(
    lrs: list[float], losses: list[float], smoothing: float, stopped: str
) -> tuple[float | None, float | None, str]:
    """Return suggestion, largest stable rate and reason."""
    if len(losses) < _LEAST_STEPS:
        return None, None, f"stopped after {len(losses)} steps ({stopped}): give a smaller lowest rate."
    values = np.array(losses)
    window = max(3, len(values) // 10)
    levels = np.convolve(values, np.full(window, 1 / window), "valid")
    changes = np.diff(values)
    noise = 1.4826 * float(np.median(np.abs(changes - np.median(changes)))) / math.sqrt(2)
    fall = float(levels[0] - levels.min())
    least = max(_SIGMAS * noise * math.sqrt(2 / window), _LEAST_FALL * abs(float(levels[0])))
    if fall <= least:
        return None, None, f"the loss fell by {fall:.3g}, not more than noise ({least:.3g}): no rate can be read off."
    # A loss above the first level is lost, however far: a blow-up must not leak into the curve before it.
    curve = np.minimum(values, levels[0])
    for _ in range(2):  # once would leave the cusp of an exponential window in the slope
        curve = _from_both_sides(curve, min(1.0, 2 * smoothing))
    lowest = max(1, int(np.argmin(curve)))
    steepest = int(np.argmin(np.gradient(curve, np.log(lrs))[: lowest + 1]))
    limited = stopped == "finished" and lowest == len(values) - 1
    reason = "the loss was still falling at the highest rate: raise it to see where that ends." if limited else ""
    return lrs[steepest], lrs[lowest], reason


def _from_both_sides(values: np.ndarray, weight: float) -> np.ndarray:
    """Return the mean of all values, each weighted by (1 - weight) to the power of its distance."""
    total, weights = values.copy(), np.ones(len(values))
    for place in range(1, len(values)):
        total[place] += (1 - weight) * total[place - 1]
        weights[place] += (1 - weight) * weights[place - 1]
    back, counts = values.copy(), weights[::-1]
    for place in range(len(values) - 2, -1, -1):
        back[place] += (1 - weight) * back[place + 1]
    return (total + back - values) / (weights + counts - 1)
