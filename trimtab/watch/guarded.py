"""Call probes so that nothing they do reaches training."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from trimtab.watch.probe import Probe, Reading

FAILURES = 3
"""A probe that has failed this many times is switched off."""
SLOW = 0.5
"""Seconds for one call beyond which a probe counts as failing: a monitor must not hold up training."""

_MOMENTS = (
    "on_output",
    "on_activation",
    "on_attention",
    "on_classification",
    "on_gradients",
    "before_update",
    "after_update",
    "read",
)


def harmless(moment: Callable[..., None]) -> Callable[..., None]:
    """Keep a failure of the watch's own method out of the training loop: it is reported once for each method.

    The owner has `event(kind, message, data)` and a set `failed` of the methods that have failed.
    """

    @functools.wraps(moment)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            moment(self, *args, **kwargs)
        except Exception as error:
            name = moment.__name__.strip("_")
            if name in self.failed:
                return
            self.failed.add(name)
            text = f"{type(error).__name__}: {error}"
            self.event("watch-failed", f"the watch failed in {name}: {text}", {"moment": name})
            warnings.warn(
                f"trimtab: the watch failed in {name} ({text}); training goes on.", RuntimeWarning, stacklevel=2
            )

    return guarded


class Probes:
    """The probes of one watch, called under `no_grad`, outside autocast and out of sight of torch function modes.

    Args:
        probes: the probes.
        device_type: where the model lives; autocast is switched off there.
        report: called with (kind, message, data) when a probe fails or is switched off.
    """

    def __init__(
        self, probes: Iterable[Probe], device_type: str, report: Callable[[str, str, dict[str, Any]], None]
    ) -> None:
        self._device_type = device_type
        self._report = report
        self._failures: dict[Probe, int] = {}
        self._wanting: dict[str, list[Probe]] = {moment: [] for moment in _MOMENTS}
        self.all = list(probes)
        for probe in self.all:
            for moment in _MOMENTS:
                if getattr(type(probe), moment) is not getattr(Probe, moment):
                    self._wanting[moment].append(probe)

    def wanting(self, moment: str, *, sampled: bool) -> list[Probe]:
        """Return the live probes that want a moment at this step: all at a sampled step, else the every-step ones."""
        return [probe for probe in self._wanting[moment] if sampled or probe.every_step]

    def call(self, probe: Probe, moment: str, *args: Any) -> Any:
        """Call one moment of one probe; a failure is counted, reported and otherwise ignored."""
        if self._failures.get(probe, 0) >= FAILURES:
            return None
        start = time.perf_counter()
        try:
            with (
                torch._C.DisableTorchFunction(),
                torch.no_grad(),
                torch.autocast(self._device_type, enabled=False),
            ):
                result = getattr(probe, moment)(*args)
                if moment == "read":
                    result = [_checked(reading) for reading in result]
        except Exception as error:
            self._fail(probe, moment, f"{type(error).__name__}: {error}")
            return None
        elapsed = time.perf_counter() - start
        if elapsed > SLOW:
            self._fail(probe, moment, f"took {elapsed:.1f} s, a probe may take {SLOW} s")
        return result

    def broadcast(self, moment: str, *args: Any, sampled: bool) -> None:
        """Call a moment of every probe that wants it."""
        for probe in self.wanting(moment, sampled=sampled):
            self.call(probe, moment, *args)

    def readings(self, *, sampled: bool) -> list[Reading]:
        """Collect this step's readings of all probes."""
        found: list[Reading] = []
        for probe in self.wanting("read", sampled=sampled):
            found.extend(self.call(probe, "read") or ())
        return found

    def _fail(self, probe: Probe, moment: str, reason: str) -> None:
        count = self._failures[probe] = self._failures.get(probe, 0) + 1
        name = probe.name or type(probe).__name__
        data = {"probe": name, "moment": moment, "failures": count}
        if count == 1:
            self._report("probe-failed", f"probe {name} failed in {moment}: {reason}", data)
            warnings.warn(
                f"trimtab: probe {name} failed in {moment} ({reason}); training goes on.", RuntimeWarning, stacklevel=2
            )
        if count == FAILURES:
            self._report("probe-disabled", f"probe {name} is switched off after {count} failures: {reason}", data)
            for wanting in self._wanting.values():
                if probe in wanting:
                    wanting.remove(probe)


def _checked(reading: Reading) -> Reading:
    """Refuse a reading that the record could not take, so that the failure names its probe."""
    name, labels, values = reading
    if not isinstance(values, torch.Tensor):
        values = torch.as_tensor(values, dtype=torch.float64)
    if values.numel() != max(1, len(labels)):
        raise ValueError(f"signal {name!r} has {len(labels)} labels and {values.numel()} values")
    return Reading(str(name), tuple(labels), values.detach())
