"""Pairs of optimizers that should agree: ours, another implementation, and why it differs where it does."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab import optim

MATRICES = ((24, 40), (40, 24))
ALL = (*MATRICES, (17,))


@dataclass(frozen=True)
class Pair:
    """Two optimizers on the same stream.

    Attributes:
        name: ours.
        peer: the other's package and class.
        settings: what both are given, in words.
        ours: makes ours.
        theirs: makes the other.
        package: distribution that has the other.
        dtype: of the parameters.
        bound: drift below which they agree.
        shapes: of the parameters.
        why: the reason of a known difference.
    """

    name: str
    peer: str
    settings: str
    ours: Callable[[Any], Any]
    theirs: Callable[[Any], Any]
    package: str
    dtype: torch.dtype = torch.float64
    bound: float = 1e-6
    shapes: tuple[tuple[int, ...], ...] = ALL
    why: str = ""


def pair(ours: str, theirs: str, mine: dict[str, Any], other: dict[str, Any], **facts: Any) -> Pair:
    """Return a pair from class names; `theirs` is "distribution:module:Class"."""
    package, module, name = theirs.split(":")
    if package == "timm":
        return _from_timm(ours, module, name, mine, other, facts)

    def make_theirs(params: Any) -> Any:
        return getattr(importlib.import_module(module), name)(params, **other)

    def make_ours(params: Any) -> Any:
        return getattr(optim, ours)(params, **mine)

    settings = ", ".join(f"{key}={value}" for key, value in mine.items())
    return Pair(ours, f"{package} {name}", settings, make_ours, make_theirs, package, **facts)


def _from_timm(
    ours: str, module: str, name: str, mine: dict[str, Any], other: dict[str, Any], facts: dict[str, Any]
) -> Pair:
    """Return a pair with one of timm's, loaded without the package around it."""

    def make_theirs(params: Any) -> Any:
        import importlib.util
        import sys
        import types

        folder = Path(importlib.util.find_spec("timm").origin).parent / "optim"  # type: ignore[union-attr, arg-type]
        if "timm_optim" not in sys.modules:
            package = types.ModuleType("timm_optim")
            package.__path__ = [str(folder)]
            sys.modules["timm_optim"] = package
        return getattr(importlib.import_module(module.replace("timm.optim", "timm_optim")), name)(params, **other)

    settings = ", ".join(f"{key}={value}" for key, value in mine.items())
    return Pair(ours, f"timm {name}", settings, lambda p: getattr(optim, ours)(p, **mine), make_theirs, "timm", **facts)


class FromOptax:
    """An optax rule with the interface of a torch optimizer, in float64."""

    def __init__(self, params: Any, rule: str, **options: Any) -> None:
        self.jax, optax = importlib.import_module("jax"), importlib.import_module("optax")
        self.params = list(params)
        self.jax.config.update("jax_enable_x64", True)
        self.rule = getattr(optax, rule)(**options)
        self.state = self.rule.init(self._arrays(self.params))

    def _arrays(self, tensors: Any) -> Any:
        return [self.jax.numpy.asarray(tensor.detach().numpy().copy()) for tensor in tensors]

    def step(self) -> None:
        """Take a step with the gradients that the parameters have."""
        gradients = self._arrays([p.grad for p in self.params])
        updates, self.state = self.rule.update(gradients, self.state, self._arrays(self.params))
        for p, update in zip(self.params, updates, strict=True):
            p.data += torch.from_numpy(np.array(update))


def timm(name: str) -> str:
    """Return where timm has an optimizer; its package needs torchvision, its optimizers do not."""
    return f"timm:timm.optim.{name}"


PO = "pytorch_optimizer:pytorch_optimizer:"
LR = {"lr": 1e-2}
DECAY = {"lr": 1e-2, "weight_decay": 0.1}
SPAM = {"lr": 1e-2, "threshold": 30.0, "interval": 40, "warmup": 10}


def projected(ours: str, package: str, module: str, name: str, *, follow: str, why: str = "") -> Pair:
    """Return a pair of low-rank optimizers at rank 8, with new projectors every 20 steps."""
    theirs = {"rank": 8, "update_proj_gap": 20, "scale": 0.25}
    theirs["proj_type" if package == "galore-torch" else "projection_type"] = "std"  # type: ignore[assignment]

    def make_theirs(params: Any) -> Any:
        extra = {"no_deprecation_warning": True} if package == "galore-torch" else {"foreach": False}
        groups = [{"params": params, **theirs}]
        return getattr(importlib.import_module(module), name)(groups, lr=1e-2, weight_decay=0.1, **extra)

    def make_ours(params: Any) -> Any:
        cls = getattr(optim, ours)
        return cls(params, lr=1e-2, rank=8, update_gap=20, weight_decay=0.1, follow=follow)

    settings = f"lr=0.01, rank=8, update_gap=20, weight_decay=0.1, follow={follow}"
    return Pair(ours, f"{package} {name}", settings, make_ours, make_theirs, package, shapes=MATRICES, why=why)


PAIRS: tuple[Pair, ...] = (
    pair("AdamW", "torch:torch.optim:AdamW", DECAY, DECAY),
    pair("AdamW", "torch:torch.optim:AdamW", {**LR, "betas": (0.8, 0.95)}, {**LR, "betas": (0.8, 0.95)}),
    pair("AdamW", PO + "AdamW", DECAY, {**DECAY, "foreach": False}),
    pair("SGD", "torch:torch.optim:SGD", {**DECAY, "momentum": 0.9}, {**DECAY, "momentum": 0.9}),
    pair(
        "SGD",
        "torch:torch.optim:SGD",
        {**LR, "momentum": 0.9, "nesterov": True},
        {**LR, "momentum": 0.9, "nesterov": True},
    ),
    pair("Lion", "lion-pytorch:lion_pytorch:Lion", DECAY, DECAY),
    pair("Lion", PO + "Lion", DECAY, {**DECAY, "foreach": False}),
    pair("Lion", timm("lion:Lion"), DECAY, DECAY),
    pair(
        "RAdam",
        "torch:torch.optim:RAdam",
        {**DECAY, "follow": "code"},
        {**DECAY, "decoupled_weight_decay": True},
        why="torch rectifies above 5, the paper above 4, the authors' code from 5 on",
    ),
    pair(
        "RAdam",
        "torch:torch.optim:RAdam",
        DECAY,
        {**DECAY, "decoupled_weight_decay": True},
        why="torch rectifies above 5, the paper above 4",
    ),
    pair("RAdam", timm("radam:RAdamLegacy"), {**DECAY, "follow": "code"}, DECAY),
    pair(
        "RAdam",
        PO + "RAdam",
        {**DECAY, "follow": "code", "degenerated_to_sgd": False},
        {**DECAY, "foreach": False},
    ),
    pair("CAME", "came-pytorch:came_pytorch:CAME", DECAY, DECAY),
    pair("CAME", PO + "CAME", DECAY, {**DECAY, "foreach": False}),
    pair(
        "SPAM",
        PO + "SPAM",
        {**SPAM, "follow": "code"},
        {**LR, "threshold": 30, "update_proj_gap": 40, "warmup_epoch": 10, "foreach": False},
        why="its warm-up after a reset is one step ahead of the authors' code, and it resets one step later",
    ),
    pair(
        "SPAM",
        PO + "SPAM",
        {**SPAM, "interval": 500, "weight_decay": 0.1, "follow": "code"},
        {**DECAY, "threshold": 30, "update_proj_gap": 500, "warmup_epoch": 10, "foreach": False},
    ),
    pair("StableSPAM", PO + "StableSPAM", {**LR, "interval": 40}, {**LR, "update_proj_gap": 40}),
    pair(
        "StableAdamW",
        PO + "StableAdamW",
        {**DECAY, "betas": (0.9, 0.99), "eps": 1e-8},
        {**DECAY, "kahan_sum": False, "foreach": False},
    ),
    pair(
        "ScheduleFreeAdamW",
        "schedulefree:schedulefree:AdamWScheduleFree",
        {**LR, "weight_decay": 0.01},
        {**LR, "weight_decay": 0.01},
    ),
    pair("ScheduleFreeSGD", "schedulefree:schedulefree:SGDScheduleFree", LR, LR),
    pair("ScheduleFreeAdamW", PO + "ScheduleFreeAdamW", LR, {**LR, "foreach": False}),
    pair(
        "Ranger21",
        PO + "Ranger21",
        {**LR, "total_steps": 150, "weight_decay": 0.0, "normalize": True, "softplus": 50.0},
        {**LR, "num_iterations": 150, "weight_decay": 0.0, "foreach": False},
    ),
    projected("GaLoreAdamW", "galore-torch", "galore_torch", "GaLoreAdamW", follow="code"),
    projected(
        "GaLoreAdamW",
        "pytorch_optimizer",
        "pytorch_optimizer",
        "GaLore",
        follow="code",
        why="its steps count from 1, so its projector is refreshed a step early",
    ),
    projected(
        "Fira",
        "pytorch_optimizer",
        "pytorch_optimizer",
        "Fira",
        follow="code",
        why="its steps count from 1, so its projector is refreshed a step early; nothing else was looked for",
    ),
    Pair(
        "AdamW",
        "optax adamw",
        "lr=0.01, weight_decay=0.1",
        lambda params: optim.AdamW(params, **DECAY),
        lambda params: FromOptax(params, "adamw", learning_rate=1e-2, weight_decay=0.1),
        "optax",
    ),
    Pair(
        "Lion",
        "optax lion",
        "lr=0.01, weight_decay=0.1",
        lambda params: optim.Lion(params, **DECAY),
        lambda params: FromOptax(params, "lion", learning_rate=1e-2, weight_decay=0.1),
        "optax",
    ),
    Pair(
        "PerpGradAdamW",
        "pytorch_optimizer OrthoGrad(torch AdamW)",
        "lr=0.01, weight_decay=0.1",
        lambda params: optim.PerpGradAdamW(params, **DECAY),
        lambda params: importlib.import_module("pytorch_optimizer").OrthoGrad(torch.optim.AdamW(params, **DECAY)),
        "pytorch_optimizer",
    ),
    pair(
        "Muon",
        "torch:torch.optim:Muon",
        {**DECAY, "precision": "bf16"},
        DECAY,
        shapes=MATRICES,
        dtype=torch.float32,
        bound=1e-2,
        why="bf16 rounding",
    ),
    Pair(
        "Muon",
        "pytorch_optimizer Muon",
        "lr=0.01, precision=bf16",
        lambda params: optim.Muon(params, lr=1e-2, precision="bf16"),
        lambda params: importlib.import_module("pytorch_optimizer").Muon(
            [{"params": params, "use_muon": True}], lr=1e-2, foreach=False
        ),
        "pytorch_optimizer",
        dtype=torch.float32,
        bound=1e-2,
        shapes=MATRICES,
    ),
    pair(
        "Muon",
        timm("muon:Muon"),
        {**LR, "precision": "bf16"},
        LR,
        shapes=MATRICES,
        dtype=torch.float32,
        bound=1e-2,
        why="its default coefficients and scale differ",
    ),
    pair(
        "AdamW8bit",
        "bitsandbytes:bitsandbytes.optim:AdamW8bit",
        {**LR, "weight_decay": 0.0},
        {**LR, "weight_decay": 0.0},
        shapes=((96, 128),),
        dtype=torch.float32,
        bound=2e-2,
        why="its code on the CPU does not take the nearest code",
    ),
)
