"""The Card: what a method says of itself, and where that is verified."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from trimtab.names import FINDING_NAMES, ROOMS

ActsOn = Literal["model", "loss", "optimizer", "settings", "batches", "run"]
Level = Literal["equation", "reference", "claim"]

_ACTS_ON = get_args(ActsOn)
_LEVELS = ("equation", "reference", "claim")


@dataclass(frozen=True)
class Paper:
    """A publication: title and year, and where to find it."""

    title: str
    year: int
    arxiv: str = ""
    doi: str = ""
    code: str = ""

    @property
    def url(self) -> str:
        """Address of the paper: arXiv before DOI before code."""
        if self.arxiv:
            return f"https://arxiv.org/abs/{self.arxiv}"
        return f"https://doi.org/{self.doi}" if self.doi else self.code

    def __str__(self) -> str:
        where = f"arXiv:{self.arxiv}" if self.arxiv else self.doi or self.code
        return f"{self.title} ({self.year}{', ' + where if where else ''})"


@dataclass(frozen=True)
class Default:
    """A default value and where it comes from ('paper, section 3', 'authors' code', 'ours')."""

    name: str
    value: Any
    source: str


@dataclass(frozen=True)
class Experiment:
    """A claim as a paired comparison that anyone can run again with `trimtab reproduce NAME`.

    Args:
        workload: name of the workload; or, for what no training run of a workload shows, a study: the import path of a
            function of a seed and options that returns metrics, `"trimtab.studies.bandit:preferences"`.
        baseline: settings of the untreated arm, as on the command line (`"lr=0.1"`); of a study, its options.
        treated: settings of the treated arm (`"lr=0.1,with=qk-norm"`), or options.
        metric: what is compared, lower is better (`"loss"`) unless `higher_is_better`.
        mechanism: a signal that shows *why* (`"attention_max_logit"`), or empty.
        seeds: pairs to run.
        outcome: what was found when it was last run: verdict, n, interval, in words.
    """

    workload: str
    baseline: str
    treated: str
    metric: str = "loss"
    higher_is_better: bool = False
    mechanism: str = ""
    seeds: int = 5
    outcome: str = ""

    @property
    def is_study(self) -> bool:
        """Whether it runs a function of its own instead of a workload."""
        return ":" in self.workload


@dataclass(frozen=True)
class Card:
    """What a method says of itself.

    Args:
        name: the method's public name, lower case with hyphens (`"qk-norm"`).
        room: the package under `trimtab` that it lives in.
        summary: one line.
        paper: where it comes from.
        equation: the method in one or two lines of plain text mathematics.
        claim: what the paper says it achieves.
        acts_on: what `apply` changes: a model in place, a loss function, an optimizer, an arm's settings or the
            batches; a method that acts on a run goes around it and is called by its own name.
        entry: import path of the public object, `"trimtab.layers.attention.qk_norm:QKNorm"`.
        treats: findings it remedies, each with its place in the order of remedies (1 is tried first).
        defaults: default values with their source.
        verified: test ids (`"tests/layers/attention/test_qk_norm.py::test_x"`) by level: equation, reference, claim.
        deviations: where it departs from the paper or its code, and why.
        experiments: its claims as paired comparisons.
        apply: for `"model"`: changes the model in place and returns what it changed, `{module: what}`; for `"loss"`:
            takes a loss function of (logits, targets) and returns one; for `"settings"`: takes a mapping of settings
            and returns the changed ones; for `"batches"`: takes a function of the step that returns (inputs, targets),
            with `model` and `steps` by name, and returns one.
        remove: the inverse of `apply` for models, where that is meaningful.

    Raises:
        ValueError: if a name is not one of the fixed names.
    """

    name: str
    room: str
    summary: str
    paper: Paper
    equation: str
    claim: str
    acts_on: ActsOn
    entry: str
    treats: Mapping[str, int] = field(default_factory=dict)
    defaults: tuple[Default, ...] = ()
    verified: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    deviations: tuple[str, ...] = ()
    experiments: tuple[Experiment, ...] = ()
    apply: Callable[..., Any] | None = field(default=None, compare=False, repr=False)
    remove: Callable[..., Any] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.room not in ROOMS:
            raise ValueError(f"Card {self.name!r}: room {self.room!r} is not one of {', '.join(ROOMS)}.")
        if self.acts_on not in _ACTS_ON:
            raise ValueError(f"Card {self.name!r}: acts_on {self.acts_on!r} is not one of {', '.join(_ACTS_ON)}.")
        if unknown := sorted(set(self.treats) - FINDING_NAMES):
            raise ValueError(f"Card {self.name!r} treats {unknown[0]!r}, which is not a finding's name.")
        if unknown := sorted(set(self.verified) - set(_LEVELS)):
            raise ValueError(f"Card {self.name!r}: level {unknown[0]!r} is not one of {', '.join(_LEVELS)}.")

    def public(self) -> Any:
        """Import and return the public object that `entry` names."""
        module, _, name = self.entry.partition(":")
        return getattr(importlib.import_module(module), name)

    def to_json(self) -> dict[str, Any]:
        """Return the Card as plain data, without its callables."""
        return {
            "name": self.name,
            "room": self.room,
            "summary": self.summary,
            "paper": {
                "title": self.paper.title,
                "year": self.paper.year,
                "url": self.paper.url,
                "code": self.paper.code,
            },
            "equation": self.equation,
            "claim": self.claim,
            "acts_on": self.acts_on,
            "entry": self.entry,
            "treats": dict(self.treats),
            "defaults": [vars(default).copy() for default in self.defaults],
            "verified": {level: list(tests) for level, tests in self.verified.items()},
            "deviations": list(self.deviations),
            "experiments": [vars(experiment).copy() for experiment in self.experiments],
        }
