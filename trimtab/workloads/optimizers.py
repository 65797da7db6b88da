"""The optimizers of a run: torch's own AdamW and SGD as baselines, and every optimizer class of the catalogue."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimtab.card import Card
from trimtab.catalogue import methods
from trimtab.errors import UsageError, choose
from trimtab.workloads.options import Scalar, checked, kinds

if TYPE_CHECKING:
    from trimtab.workloads.settings import Settings

BASELINES: Mapping[str, tuple[str, ...]] = {"adamw": ("beta1", "beta2"), "sgd": ("momentum",)}
"""torch's own, and which of a run's moments they take."""

MOMENTS = ("beta1", "beta2", "momentum")
_ADAM = (0.9, 0.999)
_PREFIX = "trimtab-"
_LENGTH = ("num_steps", "total_steps")
_FROM_RUN = frozenset({"params", "model", "lr", "weight_decay", "betas", "seed", "maximize", *_LENGTH})
"""Parameters of optimizers that are no options of an arm: they have a setting, or no meaning there."""


def arm_name(card: Card) -> str:
    """Return what an arm calls the optimizer of a Card: `trimtab-adamw` where the plain name is torch's, else its name.

    Example:
        >>> from trimtab.catalogue import method
        >>> arm_name(method("adamw"))
        'trimtab-adamw'
    """
    return f"{_PREFIX}{card.name}" if card.name in BASELINES else card.name


def runnable(card: Card) -> bool:
    """Return whether an arm can name a Card's optimizer: a class made from parameters, stepped without a closure."""
    return card.acts_on == "optimizer" and not _obstacle(card.public())


def optimizer_class(name: object) -> type[torch.optim.Optimizer] | None:
    """Return the class behind an arm's optimizer; None for torch's own two.

    Raises:
        UsageError: if there is no such optimizer, or it cannot be stepped by a run.
    """
    if isinstance(name, str) and name in BASELINES:
        return None
    cards = {arm_name(card): card for card in methods()}
    if not isinstance(name, str) or name not in cards or cards[name].acts_on != "optimizer":
        if isinstance(name, str) and name in cards:
            raise UsageError(f"{name} acts on the {cards[name].acts_on}, it is no optimizer: write with={name}.")
        choose("optimizer", name, [*BASELINES, *(key for key, card in cards.items() if runnable(card))])
    entry = cards[str(name)].public()
    if obstacle := _obstacle(entry):
        where = cards[str(name)].entry.replace(":", ".")
        raise UsageError(f"{name} cannot be the optimizer of a run: it {obstacle}. Use {where} from Python.")
    return entry


def taken_moments(name: object) -> dict[str, float]:
    """Return which of `beta1`, `beta2` and `momentum` an optimizer takes, with its own defaults (torch's: none)."""
    kind = optimizer_class(name)
    if kind is None:
        return dict.fromkeys(BASELINES[str(name)], math.nan)
    return _moments(_accepted(kind))


def has_lr(name: object) -> bool:
    """Return whether an optimizer takes a learning rate."""
    return (kind := optimizer_class(name)) is None or "lr" in _accepted(kind)


def own_moments(name: object) -> dict[str, float]:
    """Return the moments that come with the choice of an optimizer, as its method's defaults.

    An optimizer whose betas begin with Adam's (0.9, 0.999) is a relative of Adam: it keeps the workload's, so that it
    is compared with AdamW at equal betas. Any other default belongs to the method.
    """
    if (kind := optimizer_class(name)) is None:
        return {}
    shared = {"beta1", "beta2"} if _betas(_accepted(kind))[:2] == _ADAM else set()
    return {moment: value for moment, value in taken_moments(name).items() if moment not in shared}


def option_names(name: object) -> list[str]:
    """Return the options that an optimizer has besides what every run sets."""
    kind = optimizer_class(name)
    return [] if kind is None else list(_options(kind))


def checked_options(name: object, options: Any) -> tuple[tuple[str, Scalar], ...]:
    """Return an optimizer's options by name, each in the type that the optimizer's signature gives it.

    Args:
        name: the optimizer.
        options: a mapping, or pairs of name and value; a value may be text, as a command line gives it.

    Raises:
        UsageError: if a name is unknown, a value has another type, or a required option is missing.
    """
    kind = optimizer_class(name)
    known = {} if kind is None else _options(kind)
    found = checked(str(name), options, known)
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in dict(found):
            raise UsageError(f"{name} needs {key}: write it into the arm, as in '{name},{key}=VALUE'.")
    return found


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Return the optimizer of a run.

    Optimizers of the catalogue get the model's parameters in groups by role (matrix, head, embedding, vector), all with
    the run's weight decay, as the baselines have it on every parameter.

    Raises:
        UsageError: if the optimizer refuses a value, or has no weight decay and is given one.
    """
    kind = optimizer_class(settings.optimizer)
    if kind is not None:
        return _from_catalogue(kind, model, settings)
    groups = _with_rates(model, [{"params": list(model.parameters())}], settings)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
    )


def _from_catalogue(kind: type[torch.optim.Optimizer], model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    # Imported late: plain runs do without it.
    from trimtab.optim.groups import ROLES, param_groups_for

    accepted = _accepted(kind)
    groups = param_groups_for(model, weight_decay=settings.weight_decay, decayed=ROLES)
    keywords: dict[str, Any] = dict(settings.options)
    given: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay, "seed": settings.seed}
    given |= {"model": model, **dict.fromkeys(_LENGTH, settings.steps)}
    keywords |= {name: value for name, value in given.items() if name in accepted}
    if "weight_decay" not in accepted:
        if settings.weight_decay:
            raise UsageError(f"{settings.optimizer} has no weight decay: write weight_decay=0.")
        for group in groups:
            del group["weight_decay"]
    groups = _with_rates(model, groups, settings)
    moments = {name: getattr(settings, name) for name in taken_moments(settings.optimizer)}
    if betas := _betas(accepted):
        names = [f"beta{place}" for place in range(1, len(betas) + 1)]
        own = dict(zip(names, betas, strict=True))
        keywords["betas"] = tuple(moments.pop(name, keywords.pop(name, own[name])) for name in names)
    return kind(groups, **keywords, **moments)


def _with_rates(model: nn.Module, groups: list[dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """Split groups by the learning rates of muP, where the run has it."""
    if "mup" not in settings.remedies:
        return groups
    from trimtab.layers.initialization.mup import mup_groups

    kind = optimizer_class(settings.optimizer)
    if settings.optimizer == "sgd" or (kind is not None and kind.__name__ == "SGD"):
        family = "sgd"
    elif kind is None or kind.__module__.startswith("trimtab.optim.adaptive."):
        family = "adam"
    else:
        raise UsageError(f"mup has learning rates for Adam's family and SGD, not for {settings.optimizer}.")
    return mup_groups(model, groups, family, lr=settings.lr, weight_decay=settings.weight_decay)


def state_bytes_per_parameter(optimizer: torch.optim.Optimizer, model: nn.Module) -> float:
    """Return how many bytes of tensors an optimizer keeps between steps for each parameter of the model."""
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return sum(_bytes(state) for state in optimizer.state.values()) / max(1, count)


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return 0
    return sum(map(_bytes, value))


def _obstacle(entry: Any) -> str:
    """Return why a run cannot step an entry, or nothing."""
    if not isinstance(entry, type) or not issubclass(entry, torch.optim.Optimizer):
        return "is not an optimizer class"
    parameters = list(inspect.signature(entry).parameters)
    if parameters[:1] != ["params"]:
        return f"is made from {parameters[0] if parameters else 'nothing'!r}, not from parameters"
    closure = inspect.signature(entry.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        return "needs a closure at each step"
    for name, parameter in _accepted(entry).items():
        if parameter.default is parameter.empty and name not in _FROM_RUN and not kinds(parameter):
            return f"needs {name!r}, which an arm cannot write"
    return ""


def _accepted(kind: type) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class, and of the classes that its `**options` go on to."""
    found: dict[str, inspect.Parameter] = {}
    for owner in kind.__mro__:
        if owner is torch.optim.Optimizer:
            break
        if "__init__" not in vars(owner):
            continue
        parameters = inspect.signature(owner.__init__).parameters  # type: ignore[misc]
        named = {
            name: part for name, part in parameters.items() if part.kind not in (part.VAR_KEYWORD, part.VAR_POSITIONAL)
        }
        for name in ("self", "transforms"):
            named.pop(name, None)
        found = {**named, **found}
        if not any(part.kind is part.VAR_KEYWORD for part in parameters.values()):
            break
    return found


def _betas(accepted: Mapping[str, inspect.Parameter]) -> tuple[float, ...]:
    default = accepted["betas"].default if "betas" in accepted else ()
    return tuple(default) if isinstance(default, (tuple, list)) else ()


def _moments(accepted: Mapping[str, inspect.Parameter]) -> dict[str, float]:
    """Return the default of each of a run's moments that has one: in `betas`, or as a parameter of that name."""
    found = dict(zip(("beta1", "beta2"), _betas(accepted), strict=False))
    found |= {name: accepted[name].default for name in MOMENTS if name in accepted}
    return {name: float(value) for name, value in found.items() if type(value) in (int, float)}


def _options(kind: type) -> dict[str, inspect.Parameter]:
    accepted = _accepted(kind)
    taken = {*_FROM_RUN, *_moments(accepted)}
    found = {name: part for name, part in accepted.items() if name not in taken and kinds(part)}
    for place, value in enumerate(_betas(accepted), start=1):
        name = f"beta{place}"
        if name not in taken:
            found[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation="float")
    return found
