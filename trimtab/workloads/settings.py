"""Settings of one training run, and the short form of them that a command line takes (an arm)."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trimtab.catalogue import method
from trimtab.errors import UsageError, choose

OPTIMIZERS = ("adamw", "sgd")
_ONLY_FOR = {"beta1": "adamw", "beta2": "adamw", "momentum": "sgd"}


class Settings(BaseModel):
    """Settings of one training run; a wrong value is a one-line `UsageError`.

    Args:
        optimizer: `"adamw"` (decoupled weight decay) or `"sgd"` (weight decay added to the gradient).
        lr: peak learning rate, above 0.
        beta1: decay of AdamW's first moment, in [0, 1).
        beta2: decay of AdamW's second moment, in [0, 1).
        momentum: SGD's momentum, in [0, 1).
        weight_decay: on every parameter, at least 0.
        clip: largest global gradient norm; 0 turns clipping off.
        warmup: fraction of the steps in which the learning rate rises linearly, in [0, 1).
        schedule: what follows the warm-up: `"cosine"` to 0, or `"constant"`.
        steps: optimizer steps, at least 1.
        batch_size: samples a step; 0 takes the whole training set.
        seed: of the initialisation, the order of the batches and dropout.
        remedies: names of methods, applied in this order.

    Raises:
        UsageError: if a value breaks its rule or a name is unknown.

    Example:
        >>> Settings(lr=0.1, steps=10).replace(lr=0.2).lr
        0.2
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(0.0, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    steps: int = Field(ge=1, le=10**9)
    batch_size: int = Field(0, ge=0, le=10**9)
    seed: int = Field(0, ge=0, lt=2**63)
    remedies: tuple[str, ...] = ()

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UsageError(_one_line(error)) from None

    @field_validator("remedies")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for index, name in enumerate(names):
            card = method(name)
            if card.acts_on == "optimizer" or card.apply is None:
                raise UsageError(f"{name} acts on the {card.acts_on} and cannot be put into a run with 'with='.")
            if name in names[:index]:
                raise UsageError(f"{name} is given twice: once is enough.")
        return names

    def replace(self, **changes: Any) -> Settings:
        """Return a copy with some values changed, checked like new ones.

        Raises:
            UsageError: if a value breaks its rule, a name is unknown, or a changed value would have no effect with the
                chosen optimizer.
        """
        for name in changes:
            choose("setting", name, Settings.model_fields)
        changed = Settings(**{**self.model_dump(), **changes})
        for name, optimizer in _ONLY_FOR.items():
            if name in changes and changed.optimizer != optimizer:
                raise UsageError(f"{name} has no effect with {changed.optimizer}: it belongs to {optimizer}.")
        return changed

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0.

        Linear warm-up from lr/w over w = warmup * steps steps, then lr * (1 + cos(pi * progress)) / 2 or lr.
        """
        rising = self.warmup * self.steps
        if step + 1 < rising:
            return self.lr * (step + 1) / rising
        if self.schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * max(0.0, step - rising) / (self.steps - rising)))


def parse_arm(text: str, defaults: Settings) -> Settings:
    """Read an arm as a command line gives it: an optimizer, `name=value` pairs and `with=METHOD`, joined by commas.

    Args:
        text: such as `"adamw,lr=3e-2,with=qk-norm"`; what is not named keeps its default.
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
        if not equals and place == 0 and name in OPTIMIZERS:
            name, value = "optimizer", name
        elif not equals or not name or not value:
            raise UsageError(
                f"cannot read {part!r} in the arm {text!r}: write an optimizer first ({', '.join(OPTIMIZERS)}), "
                "then name=value pairs, such as 'adamw,lr=3e-2,with=qk-norm'."
            )
        if name == "with":
            remedies.append(value)
            continue
        choose("setting", name, [*(set(Settings.model_fields) - {"remedies"}), "with"])
        if name in changes:
            raise UsageError(f"{name} is given twice in the arm {text!r}: once is enough.")
        changes[name] = value
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
