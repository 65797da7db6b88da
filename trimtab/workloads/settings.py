"""Settings of one training run, and the short form of them that a command line takes (an arm)."""

from __future__ import annotations

import math
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from trimtab.catalogue import method
from trimtab.errors import UsageError, choose
from trimtab.workloads.optimizers import (
    BASELINES,
    MOMENTS,
    checked_options,
    has_lr,
    optimizer_class,
    option_names,
    own_moments,
    taken_moments,
)
from trimtab.workloads.options import Scalar, pairs
from trimtab.workloads.schedules import OWN, checked_schedule, schedule_options, shape, takes_warmup

_OPTION = "optimizer."
_SHAPE = "schedule."
_LATER = ("options", "spikes", "spike_scale", "outliers", "schedule_options", "width", "depth")
"""Settings that are not written down at their defaults, so that the record of a plain run does not mention them."""


class Settings(BaseModel):
    """Settings of one training run; a wrong value is a one-line `UsageError`.

    Args:
        optimizer: torch's own `"adamw"` (decoupled weight decay) or `"sgd"` (weight decay added to the gradient), or an
            optimizer of the catalogue (`"trimtab-adamw"` where the plain name is torch's).
        lr: peak learning rate, above 0.
        beta1: decay of the first moment, in [0, 1), for optimizers that have one.
        beta2: decay of the second moment, in [0, 1), for optimizers that have one.
        momentum: in [0, 1), for optimizers that have it.
        weight_decay: on every parameter, at least 0.
        clip: largest global gradient norm; 0 turns clipping off.
        warmup: fraction of the steps in which the learning rate rises linearly, in [0, 1).
        schedule: what follows the warm-up: `"cosine"` to 0, `"constant"`, or a schedule of the
            catalogue (`"wsd"`), which gets the run's steps and warm-up.
        schedule_options: the catalogue schedule's own options by name; a length may be a fraction below 1 of the steps.
        width: of the model, in the workload's sense (a transformer's D); 0 keeps the workload's own.
        depth: of the model, in blocks or hidden layers; 0 keeps the workload's own.
        steps: optimizer steps, at least 1.
        batch_size: samples a step; 0 takes the whole training set.
        seed: of the initialisation, the order of the batches and dropout.
        remedies: names of methods, applied in this order.
        options: the catalogue optimizer's own options by name, and those of every chain (`state`, `foreach`, `compile`,
            `nonfinite`); what is not named keeps the optimizer's default.
        spikes: probability that a step's gradient is multiplied by `spike_scale` in one parameter tensor, in [0, 1].
        spike_scale: size of the faults that `spikes` and `outliers` put into gradients, above 0.
        outliers: fraction of gradient entries that get heavy-tailed noise of `spike_scale` times their tensor's
            root mean square, at each step, in [0, 1].

    Raises:
        UsageError: if a value breaks its rule or a name is unknown.

    Example:
        >>> Settings(lr=0.1, steps=10).replace(lr=0.2).lr
        0.2
        >>> Settings(lr=0.1, steps=10).replace(optimizer="trimtab-adamw", state="bf16").options
        (('state', 'bf16'),)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    optimizer: str = "adamw"
    lr: float = Field(gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(0.0, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    schedule: str = "cosine"
    steps: int = Field(ge=1, le=10**9)
    batch_size: int = Field(0, ge=0, le=10**9)
    seed: int = Field(0, ge=0, lt=2**63)
    remedies: tuple[str, ...] = ()
    options: tuple[tuple[str, Scalar], ...] = ()
    spikes: float = Field(0.0, ge=0, le=1)
    spike_scale: float = Field(1000.0, gt=0)
    outliers: float = Field(0.0, ge=0, le=1)
    schedule_options: tuple[tuple[str, Scalar], ...] = ()
    width: int = Field(0, ge=0, le=2**20)
    depth: int = Field(0, ge=0, le=2**12)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UsageError(_one_line(error)) from None

    @model_serializer(mode="wrap")
    def _brief(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        fields = type(self).model_fields
        for name in _LATER:
            if name in values and getattr(self, name) == fields[name].default:
                del values[name]
        for name in ("options", "schedule_options"):
            if name in values:
                values[name] = dict(getattr(self, name))
        return values

    @field_validator("optimizer")
    @classmethod
    def _steppable(cls, name: str) -> str:
        optimizer_class(name)
        return name

    @field_validator("options", mode="before")
    @classmethod
    def _typed(cls, options: Any, info: ValidationInfo) -> tuple[tuple[str, Scalar], ...]:
        # An optimizer that was refused is not in the data, and its refusal is what the user reads.
        return checked_options(info.data["optimizer"], options) if "optimizer" in info.data else ()

    @field_validator("schedule")
    @classmethod
    def _named(cls, name: str) -> str:
        checked_schedule(name, ())
        return name

    @field_validator("schedule_options", mode="before")
    @classmethod
    def _shaped(cls, options: Any, info: ValidationInfo) -> tuple[tuple[str, Scalar], ...]:
        return checked_schedule(info.data["schedule"], options) if "schedule" in info.data else ()

    @model_validator(mode="after")
    def _fits(self) -> Settings:
        self.learning_rate(0)
        return self

    @field_validator("remedies")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for index, name in enumerate(names):
            card = method(name)
            if card.acts_on == "optimizer":
                raise UsageError(f"{name} is an optimizer: name it first in the arm, not with 'with='.")
            if card.apply is None:
                raise UsageError(f"{name} acts on the {card.acts_on} and cannot be put into a run with 'with='.")
            if name in names[:index]:
                raise UsageError(f"{name} is given twice: once is enough.")
        return names

    def replace(self, **changes: Any) -> Settings:
        """Return a copy with some values changed, checked like new ones.

        Names that are options of the optimizer go to `options`, and so do those after `optimizer.`, for options that
        have the name of a setting (`**{"optimizer.warmup": 150}`); those after `schedule.` go to `schedule_options`.
        Another optimizer starts without options, and with its own momentum and betas unless these are Adam's
        (0.9, 0.999): relatives of Adam keep the betas as they are. Another schedule starts without options too.

        Raises:
            UsageError: if a value breaks its rule, a name is unknown, or a changed value would have no effect with the
                chosen optimizer.
        """
        shaping = {name: value for name, value in changes.items() if name.startswith(_SHAPE)}
        changes = {name: value for name, value in changes.items() if name not in shaping}
        chosen = changes.get("optimizer", self.optimizer)
        taken, known = taken_moments(chosen), option_names(chosen)
        plain = set(Settings.model_fields) - {name for name in MOMENTS if name not in taken and name in known}
        values = {name: value for name, value in changes.items() if name in plain}
        loose = [(name.removeprefix(_OPTION), value) for name, value in changes.items() if name not in plain]
        for name, _ in loose:
            choose("setting", name, [*Settings.model_fields, *known])
        for name in MOMENTS:
            if name in values and name not in taken:
                owner = next(key for key, moments in BASELINES.items() if name in moments)
                raise UsageError(f"{name} has no effect with {chosen}: it belongs to {owner}.")
        if "lr" in values and not has_lr(chosen):
            raise UsageError(f"lr has no effect with {chosen}: it has no learning rate.")
        if chosen != self.optimizer:
            values = {**own_moments(chosen), "options": {}, **values}
        shape_name = values.get("schedule", self.schedule)
        if shape_name != self.schedule:
            values = {"schedule_options": {}, **values}
        if shaping:
            asked = {name.removeprefix(_SHAPE): value for name, value in shaping.items()}
            values["schedule_options"] = {**dict(pairs(values.get("schedule_options", self.schedule_options))), **asked}
        if loose:
            values["options"] = {**dict(pairs(values.get("options", self.options))), **dict(pairs(loose))}
        changed = Settings(**{**self.model_dump(), **values})
        if "warmup" in values and not takes_warmup(changed.schedule):
            raise UsageError(f"warmup has no effect with schedule={changed.schedule}: it rises by itself.")
        if "spike_scale" in values and not (changed.spikes or changed.outliers):
            raise UsageError("spike_scale has no effect without spikes or outliers: give one of them too.")
        return changed

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0.

        Linear warm-up from lr/w over w = warmup * steps steps, then lr * (1 + cos(pi * progress)) / 2 or lr; lr times
        the factor of a schedule of the catalogue.
        """
        if self.schedule not in OWN or self.schedule_options:
            return self.lr * shape(self.schedule, self.schedule_options, self.steps, self.warmup, self.beta2)(step)
        rising = self.warmup * self.steps
        if step + 1 < rising:
            return self.lr * (step + 1) / rising
        if self.schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * max(0.0, step - rising) / (self.steps - rising)))


_SETTABLE = [name for name in Settings.model_fields if name not in ("remedies", "options", "schedule_options")]


def parse_arm(text: str, defaults: Settings) -> Settings:
    """Read an arm as a command line gives it: an optimizer, `name=value` pairs and `with=METHOD`, joined by commas.

    Args:
        text: such as `"adamw,lr=3e-2,with=qk-norm"`; what is not named keeps its default. Options of an optimizer of
            the catalogue are written like settings: `"trimtab-adamw,eps=1e-6,state=bf16"`; one that has the name of a
            setting is written `optimizer.NAME`. Options of a schedule are written `schedule.NAME`:
            `"schedule=wsd,schedule.decay=0.3"`.
        defaults: the workload's default settings.

    Returns:
        The settings of the arm.

    Raises:
        UsageError: if the text is not an arm.

    Example:
        >>> parse_arm("sgd,lr=0.5,momentum=0", Settings(lr=0.01, steps=100)).momentum
        0.0
    """
    changes: dict[str, Any] = {}
    remedies: list[str] = []
    for place, part in enumerate(text.split(",")):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and place == 0 and name and name not in Settings.model_fields:
            optimizer_class(name)
            name, value = "optimizer", name
        elif not equals or not name or not value:
            raise UsageError(
                f"cannot read {part!r} in the arm {text!r}: write an optimizer first (adamw, sgd or one of "
                "'trimtab methods --room optim'), then name=value pairs, such as 'adamw,lr=3e-2,with=qk-norm'."
            )
        if name == "with":
            remedies.append(value)
            continue
        if name in changes:
            raise UsageError(f"{name} is given twice in the arm {text!r}: once is enough.")
        changes[name] = value
    known = option_names(changes.get("optimizer", defaults.optimizer))
    schedule = changes.get("schedule", defaults.schedule)
    checked_schedule(schedule, ())
    known_shapes = [f"{_SHAPE}{option}" for option in schedule_options(schedule)]
    for name in changes:
        plain = name.removeprefix(_OPTION) if name.removeprefix(_OPTION) in known else name
        choose("setting", plain, [*_SETTABLE, *known, *known_shapes, "with"])
    if remedies:
        changes["remedies"] = (*defaults.remedies, *remedies)
    return defaults.replace(**changes)


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if isinstance(cause := first.get("ctx", {}).get("error"), UsageError):
        return str(cause)
    if first["type"] == "extra_forbidden":
        return f"unknown setting {where!r}. Valid: {', '.join(sorted(Settings.model_fields))}."
    if first["type"] == "missing":
        return f"{where} is not set: give it a value."
    rule = first["msg"].replace("Input should be", "should be").replace("\n", " ")
    return f"{where} {rule}, got {str(first['input'])[:80]!r}."
