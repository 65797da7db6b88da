"""Bayesian optimisation of one rate: the lowest confidence bound of a Gaussian process over its logarithm.

    eta = argmin mu(x) - kappa sigma(x),   x = log(eta / lr_min) / log(lr_max / lr_min) in [0, 1]

The process is scikit-learn's with scikit-optimize's kernel, which the authors of AutoLRS use: a constant times Matern
5/2, plus white noise, all fitted to the normalised losses.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from trimtab.errors import UsageError, require

_PLACES = 1001


def next_lr(
    lrs: Sequence[float], losses: Sequence[float], *, lr_min: float, lr_max: float, kappa: float = 1e6, seed: int = 0
) -> float:
    """Return the rate of the lowest confidence bound mu - kappa sigma, among those not tried.

    Args:
        lrs: rates tried; without any, a rate is drawn log-uniformly.
        losses: what each led to, finite.
        lr_min: lowest rate, above 0.
        lr_max: highest rate.
        kappa: weight of the uncertainty, at least 0; the authors' 1e6 makes the search one for the widest gaps.
        seed: of that draw and of the restarts of the kernel's fit.

    Returns:
        One of 1,001 rates, evenly spaced in the logarithm.

    Raises:
        UsageError: if the rates do not rise from above 0.
        MissingExtraError: if scikit-learn is not installed.

    Example:
        >>> lr = next_lr([1e-4, 1e-1], [2.0, 3.0], lr_min=1e-4, lr_max=1e-1)
        >>> 1e-3 < lr < 1e-2
        True
    """
    if not 0 < lr_min < lr_max < math.inf:
        raise UsageError(f"rates must rise from above 0, got lr_min {lr_min!r} and lr_max {lr_max!r}.")
    places = np.linspace(0, 1, _PLACES)
    ratio = math.log(lr_max / lr_min)
    if lrs:
        tried = np.array([math.log(lr / lr_min) / ratio for lr in lrs])
        mean, sigma, _ = _posterior(tried, np.array(losses, dtype=np.float64), places, seed)
        bound = mean - kappa * sigma
        bound[np.abs(places[:, None] - tried).min(axis=1) < 0.5 / _PLACES] = math.inf
        place = float(places[int(np.argmin(bound))])
    else:
        place = float(np.random.default_rng(seed).choice(places))
    return min(lr_max, lr_min * math.exp(ratio * place))


def _posterior(x: np.ndarray, y: np.ndarray, at: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, Any]:
    """Return mean and standard deviation of the function itself, without an observation's noise, and the kernel."""
    gp = require("sklearn.gaussian_process", extra="workloads")
    kernels = require("sklearn.gaussian_process.kernels", extra="workloads")
    kernel = kernels.ConstantKernel(1.0, (0.01, 1000.0)) * kernels.Matern(1.0, (0.01, 100.0), nu=2.5)
    model = gp.GaussianProcessRegressor(
        kernel + kernels.WhiteKernel(), normalize_y=True, n_restarts_optimizer=2, random_state=seed
    )
    one_thread = require("threadpoolctl", extra="workloads").threadpool_limits(1)  # ten points are no work for more
    with one_thread, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few points often put a length at its bound
        model.fit(x[:, None], y)
        mean, std = model.predict(at[:, None], return_std=True)
    scale = float(np.std(y)) or 1.0
    noise = model.kernel_.k2.noise_level * scale**2
    return mean, np.sqrt(np.maximum(np.square(std) - noise, 0.0)), model.kernel_
