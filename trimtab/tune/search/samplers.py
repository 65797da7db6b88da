"""The samplers of a tuning, all of them Optuna's, seeded by trial."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from trimtab.errors import choose, require

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

SAMPLERS = ("gp", "qmc", "random", "tpe")
"""Gaussian process, Sobol's sequence, independent draws, and a tree of Parzen estimators."""


def sampler_for(name: str, seed: int, number: int) -> BaseSampler:
    """Return the sampler of one trial.

    What it draws is a function of seed, trial number and the trials before it, so that one worker draws the same
    again, also when it was interrupted in between.

    Args:
        name: one of `SAMPLERS`.
        seed: the tuning's.
        number: the trial's.

    Raises:
        UsageError: if there is no such sampler.
        MissingExtraError: if optuna is not installed.

    Example:
        >>> type(sampler_for("tpe", seed=0, number=3)).__name__
        'TPESampler'
    """
    choose("sampler", name, SAMPLERS)
    samplers = require("optuna", extra="tune").samplers
    own = int.from_bytes(hashlib.sha256(f"trial {number} of seed {seed}".encode()).digest()[:4], "little")
    if name == "random":
        sampler: BaseSampler = samplers.RandomSampler(seed=own)
    elif name == "tpe":
        sampler = samplers.TPESampler(seed=own)
    elif name == "gp":
        sampler = samplers.GPSampler(seed=own)
    else:
        # All trials share one scrambled sequence; what it does not cover (choices) is drawn for each trial.
        sampler = samplers.QMCSampler(
            scramble=True,
            seed=seed % 2**32,
            independent_sampler=samplers.RandomSampler(seed=own),
            warn_independent_sampling=False,
        )
    return sampler
