"""What the first loss of a classifier or language model should be, for all who judge it by one rule.

A model that knows nothing guesses among V classes, and its cross-entropy is log V. Logits of standard deviation s at
initialisation add about s^2 / 2 to that: log E[exp z] = s^2 / 2 for z from N(0, s^2).
"""

from __future__ import annotations

import math

EXCESS = 1.0
"""Ours, in nats: logits of standard deviation 1.4."""
RATIO = 1.5
"""Ours: times log V: 1.07 at most in healthy runs, 2 and more with a head or loss of the wrong scale."""


def guessing_loss(classes: int) -> float:
    """Return log V, the cross-entropy in nats of a guess among V classes.

    Example:
        >>> round(guessing_loss(10), 4)
        2.3026
    """
    return math.log(classes)


def highest_first_loss(classes: int) -> float:
    """Return the first loss from which on something is of the wrong scale: `RATIO` times log V, and `EXCESS` above it.

    Example:
        >>> round(highest_first_loss(2), 3), round(highest_first_loss(50_000), 3)
        (1.693, 16.23)
    """
    guess = guessing_loss(classes)
    return max(RATIO * guess, guess + EXCESS)


def logit_spread(loss: float, classes: int) -> float:
    """Return the standard deviation of logits that lifts a guess among V classes to a loss; 0 for one that is lower.

    Example:
        >>> round(logit_spread(guessing_loss(10) + 2.0, 10), 3)
        2.0
    """
    return math.sqrt(max(0.0, 2 * (loss - guessing_loss(classes))))
