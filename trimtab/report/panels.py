"""Which signals a report draws, in which order and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Axis = Literal["linear", "log", "auto", "share"]
Worst = Literal["max", "min"]


@dataclass(frozen=True)
class Panel:
    """One chart of a report.

    Args:
        name: the chart's name; also the anchor that findings link to.
        group: the heading it stands under.
        title: what it shows, for people.
        signals: the signals that it draws together.
        axis: the value axis; `"auto"` is logarithmic when the values are positive and span more than two decades,
            `"share"` is linear from 0.
        worst: which end of the values matters over heads or modules.
        unit: the unit of the value axis, if it has one.
    """

    name: str
    group: str
    title: str
    signals: tuple[str, ...]
    axis: Axis = "auto"
    worst: Worst = "max"
    unit: str = ""


def _one(group: str, signal: str, title: str, axis: Axis = "auto", worst: Worst = "max", unit: str = "") -> Panel:
    return Panel(signal, group, title, (signal,), axis, worst, unit)


PANELS: tuple[Panel, ...] = (
    Panel("loss", "Fit", "Loss", ("loss", "eval_loss")),
    Panel("accuracy", "Fit", "Accuracy", ("train_accuracy", "eval_accuracy"), "share", "min"),
    _one("Fit", "lr", "Learning rate", "linear"),
    _one("Attention", "attention_max_logit", "Attention: largest logit", "log"),
    _one("Attention", "attention_entropy", "Attention: entropy", "linear", "min", "nats"),
    _one("Attention", "attention_entropy_ratio", "Attention: share of the possible entropy", "share", "min"),
    _one("Gradients and updates", "grad_norm", "Gradient norm before clipping", "log"),
    _one("Gradients and updates", "grad_norm_by_module", "Gradient norm by module", "log"),
    _one("Gradients and updates", "grad_clip", "Clipping factor (1 = not clipped)", "share", "min"),
    _one("Gradients and updates", "update_norm", "Update norm", "log"),
    _one("Gradients and updates", "update_norm_by_module", "Update norm by module", "log"),
    _one("Gradients and updates", "update_ratio_by_module", "Update norm / weight norm", "log"),
    _one("Output", "logits_abs_log_z", "Output logits: mean |log Z|"),
    _one("Output", "logits_max", "Output logits: largest"),
    _one("Output", "zero_loss_fraction", "Samples whose loss is exactly 0", "share"),
    _one("Activations", "activation_rms", "Activation RMS", "log"),
    _one("Activations", "activation_max", "Activation: largest value", "log"),
    _one("Activations", "activation_kurtosis", "Activation kurtosis", "log"),
    _one("Activations", "dead_fraction", "Dead units", "share"),
    _one("Activations", "saturated_fraction", "Saturated units", "share"),
    _one("Weights", "weight_norm", "Weight norm"),
    _one("Weights", "weight_norm_by_module", "Weight norm by module"),
)
"""The charts of the signals that trimtab itself records."""

_OTHER = "Other signals"


def panels_for(signals: set[str]) -> list[Panel]:
    """Return the charts for the signals of a report, known ones in their order, then one for each other signal.

    Example:
        >>> [panel.name for panel in panels_for({"temperature", "loss"})]
        ['loss', 'temperature']
    """
    known = [panel for panel in PANELS if signals & set(panel.signals)]
    drawn = {signal for panel in PANELS for signal in panel.signals}
    return known + [_one(_OTHER, signal, signal) for signal in sorted(signals - drawn)]
