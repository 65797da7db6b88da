"""non-finite: a NaN or an infinity appeared; the first module and tensor that held one are named."""

from __future__ import annotations

import numpy as np

from trimtab.diagnose.papers import MIXED_PRECISION
from trimtab.diagnose.pathology import Match, Pathology, Signals
from trimtab.record.reader import Event

RUNNING = 3
"""Non-finite gradients in a row that no loss scaler skips on its way (it halves its scale at each)."""
SKIPPED = 0.01
"""Share of skipped steps that is usual with a loss scaler (PyTorch's grows every 2,000 steps)."""


def rule(signals: Signals) -> Match | None:
    """Fire on a located non-finite value, a non-finite loss, or gradients that stay non-finite."""
    events = list(signals.events("non-finite"))
    loss = signals.series("loss")
    bad_losses = loss.steps[~np.isfinite(loss.flat)] if len(loss) else np.empty(0, np.int64)
    gradient = signals.series("grad_norm")
    bad_gradients = gradient.steps[~np.isfinite(gradient.flat)] if len(gradient) else np.empty(0, np.int64)
    if not len(bad_losses) and _only_skipped(events, gradient.flat if len(gradient) else np.empty(0)):
        return None
    steps = [*(event.step for event in events), *bad_losses.tolist(), *bad_gradients.tolist()]
    if not steps:
        return None
    first, last = min(steps), max(steps)
    event = min(events, key=lambda entry: entry.step, default=None)
    place, modules = _place(event)
    evidence: dict[str, float | int | str] = {
        "signal": "loss" if len(bad_losses) else "grad_norm",
        "value": float(loss.flat[~np.isfinite(loss.flat)][0]) if len(bad_losses) else float("nan"),
        "losses": len(bad_losses),
        "gradients": len(bad_gradients),
    }
    if event is not None:
        evidence |= {key: str(event.data[key]) for key in ("tensor", "name", "where") if event.data.get(key)}
    finite = loss.flat[(loss.steps < first) & np.isfinite(loss.flat)] if len(loss) else np.empty(0)
    before = f" The last loss before it was {finite[-1]:.4g}." if len(finite) else ""
    cause = (
        f"Non-finite values from step {first} on, in {len(bad_losses)} losses and {len(bad_gradients)} gradient "
        f"norms; {place}.{before} Once such a value reaches the weights, every later step is lost."
    )
    return Match("critical", first, last, modules, evidence, cause)


def _only_skipped(events: list[Event], norms: np.ndarray) -> bool:
    """Return whether all there was are single non-finite gradients that a loss scaler steps over, as it is meant to."""
    if any(event.data.get("tensor") != "gradient" for event in events):
        return False
    bad = ~np.isfinite(norms)
    if not bad.any():
        return not events
    longest = max(len(run) for run in "".join("x" if entry else " " for entry in bad).split())
    # A scaler starts at 2^16 and halves: a handful of steps at the beginning, then one in two thousand.
    return longest < RUNNING and int(bad.sum()) <= 1 + SKIPPED * len(norms)


def _place(event: Event | None) -> tuple[str, tuple[str, ...]]:
    if event is None:
        return "where they arose was not located", ()
    module, tensor, name = (str(event.data.get(key) or "") for key in ("module", "tensor", "name"))
    modules = (module,) if module else ()
    if tensor not in ("input", "parameter", "output", "gradient"):
        return event.message or "where they arose was not located", modules
    of = f" {name}" if name and name != module else ""
    return f"the first was the {tensor}{of} of {module or 'the model'}", modules


PATHOLOGY = Pathology(
    name="non-finite",
    needs=(),
    rule=rule,
    citations=(MIXED_PRECISION,),
    refutes="the loss logged is not the one that is trained on, or a loss scaler skipped exactly these steps",
)
