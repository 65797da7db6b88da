"""Data mixing laws: the validation losses of a few mixtures predict those of all, and so the best mixture.

A model trained on D sources in proportions r (sum_j r_j = 1) reaches on validation domain i the loss

    L_i(r) = c_i + k_i exp(sum_j t_ij r_j)                          (Ye et al. 2024, equation 7)
    L(r)   = sum_i s_i L_i(r)                                       s: the domains' shares of the whole validation set

As the proportions sum to 1, adding a constant to all t_ij is the same as scaling k_i: t is reported with mean 0 over
the sources. With k > 0 and s >= 0 the whole loss is convex in r, so that a mixture's distance from the best one is
bounded by the gap g . (r - v), g the gradient and v the best vertex; `best_mixture` reports that bound.

Ye et al. 2024 (arXiv:2403.16952); authors' code yegcjs/mixinglaws. It needs the arrays only: rows of mixtures, rows of
losses. The paper predicts the losses themselves from small models and short runs by scaling laws first; that part is
not here.

Shape suffixes: N runs, D sources, V validation domains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares, minimize

from trimtab.card import Card, Default, Paper
from trimtab.errors import RunFailedError, UsageError

__all__ = ["BestMixture", "MixingLaw", "fit_mixing_law"]

Array = NDArray[np.float64]

_ON_SIMPLEX = 1e-6


@dataclass(frozen=True)
class BestMixture:
    """The mixture that a law holds for the best.

    Attributes:
        mixture: its proportions [D].
        loss: the whole loss that the law predicts for it.
        gap: by how much at most another allowed mixture is better under the same law.
        low: 5th percentile of each proportion over the law's replicas, or empty without replicas.
        high: 95th percentile, likewise.
    """

    mixture: tuple[float, ...]
    loss: float
    gap: float
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class MixingLaw:
    """A fitted law L_i(r) = c_i + k_i exp(sum_j t_ij r_j).

    Attributes:
        c: [V], the losses' floors.
        k: [V], above 0.
        t: [V, D], how the sources act on the domains: the more negative, the more source j lowers loss i.
        residuals: [N, V], measured minus predicted at the mixtures it was fitted to.
        replicas: laws fitted to resampled residuals, for uncertainty.
    """

    c: Array
    k: Array
    t: Array
    residuals: Array = field(repr=False)
    replicas: tuple[MixingLaw, ...] = field(default=(), repr=False)

    def predict(self, mixtures: ArrayLike) -> Array:
        """Return the losses [N, V] that the law predicts for mixtures [N, D].

        Raises:
            UsageError: if the mixtures have another number of sources, or a row is no mixture.
        """
        return self._losses(_mixtures(mixtures, self.t.shape[1]))

    def interval(self, mixtures: ArrayLike, *, level: float = 0.9) -> tuple[Array, Array]:
        """Return lower and upper bounds [N, V] of the predictions over the replicas.

        They hold the noise of the measured losses, not a law of the wrong form.

        Args:
            mixtures: [N, D].
            level: share of the replicas between the bounds, in (0, 1).

        Returns:
            The bounds.

        Raises:
            UsageError: if the law was fitted without replicas, or an argument breaks its rule.
        """
        if not self.replicas:
            raise UsageError("the law has no replicas: fit it with bootstrap=200.")
        if not 0 < level < 1:
            raise UsageError(f"level must be in (0, 1), got {level}.")
        rows = _mixtures(mixtures, self.t.shape[1])
        predicted = np.stack([law._losses(rows) for law in self.replicas])
        low, high = np.quantile(predicted, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return low, high

    def best_mixture(
        self, weights: Sequence[float] | None = None, *, largest: Sequence[float] | None = None
    ) -> BestMixture:
        """Return the mixture of the lowest whole loss sum_i s_i L_i(r).

        Args:
            weights: s [V], 0 or above and not all 0; they are scaled to sum 1. Default: all alike.
            largest: [D], the largest share that each source can give (a small source would be repeated); default 1.

        Returns:
            The mixture, with the bound on its distance from the best and its spread over the replicas.

        Raises:
            UsageError: if an argument breaks its rule.
            RunFailedError: if the search stops further from the best mixture than 0.1 % of the loss above its floor.
        """
        domains, sources = self.t.shape
        s = np.full(domains, 1 / domains) if weights is None else np.asarray(weights, float)
        if s.shape != (domains,) or not np.isfinite(s).all() or (s < 0).any() or s.sum() == 0:
            raise UsageError(f"weights must be {domains} numbers of 0 or above, not all 0, got {weights}.")
        s = s / s.sum()
        cap = np.ones(sources) if largest is None else np.minimum(np.asarray(largest, float), 1.0)
        if cap.shape != (sources,) or not (cap >= 0).all() or cap.sum() < 1:
            raise UsageError(f"largest must be {sources} shares of 0 or above that sum to 1 or more, got {largest}.")
        mixture, loss, gap = self._minimum(s, cap)
        spread = np.array([law._minimum(s, cap)[0] for law in self.replicas])
        low, high = np.quantile(spread, [0.05, 0.95], axis=0) if self.replicas else ((), ())
        return BestMixture(tuple(map(float, mixture)), loss, gap, tuple(map(float, low)), tuple(map(float, high)))

    def _losses(self, rows: Array) -> Array:
        return self.c + self.k * np.exp(rows @ self.t.T)

    def _minimum(self, s: Array, cap: Array) -> tuple[Array, float, float]:
        """Minimise over the simplex below `cap`; the problem is convex."""
        scale = float(s @ (self.k * np.exp(self.t.max(axis=1))))

        def value(r: Array) -> float:
            return float(s @ (self.k * np.exp(self.t @ r))) / scale

        def gradient(r: Array) -> Array:
            return (s * self.k * np.exp(self.t @ r)) @ self.t / scale

        found = minimize(
            value,
            cap / cap.sum(),
            jac=gradient,
            bounds=[(0.0, float(top)) for top in cap],
            constraints={"type": "eq", "fun": lambda r: r.sum() - 1, "jac": np.ones_like},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        r = np.clip(found.x, 0.0, cap)
        r = r / r.sum()
        slope = gradient(r)
        gap = max(0.0, float(slope @ (r - _fill(np.argsort(slope), cap))))
        if gap > 1e-3:
            raise RunFailedError(f"the search for the best mixture stopped {gap:.1%} away from it: {found.message}.")
        return r, float(s @ self._losses(r[None])[0]), gap * scale


def fit_mixing_law(
    mixtures: ArrayLike,
    losses: ArrayLike,
    *,
    delta: float = 0.01,
    starts: int = 16,
    floor: float = 0.0,
    bootstrap: int = 0,
    seed: int = 0,
) -> MixingLaw:
    """Fit L_i(r) = c_i + k_i exp(sum_j t_ij r_j) to each validation domain by Huber regression.

    Args:
        mixtures: [N, D], one row of proportions for each run, of sum 1; at least D + 2 different rows.
        losses: [N, V], the runs' validation losses; [N] for one domain.
        delta: residual beyond which the penalty grows linearly, in units of the loss, above 0.
        starts: starting points for each domain: floors c on a grid from `floor` to the lowest loss, with the
            exponential fitted to log(L - c).
        floor: lowest c, 0 for losses that cannot be negative.
        bootstrap: replicas of the law for intervals: fits to the predictions plus residuals that are drawn with
            replacement (whole runs, so that domains stay together) and widened for the parameters spent.
        seed: of the draws.

    Returns:
        The law.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> r = np.linspace(0, 1, 7)
        >>> law = fit_mixing_law(np.stack([r, 1 - r], 1), np.stack([1 + np.exp(-2 * r), 2 + np.exp(r - 1)], 1))
        >>> law.predict([[0.25, 0.75]]).round(3).tolist(), [round(x, 3) for x in law.best_mixture().mixture]
        ([[1.607, 2.472]], [0.564, 0.436])

    References:
        Ye et al. 2024, arXiv:2403.16952.
    """
    rows = _mixtures(mixtures)
    measured = np.asarray(losses, float)
    measured = measured[:, None] if measured.ndim == 1 else measured
    runs, sources = rows.shape
    if measured.ndim != 2 or len(measured) != runs or not np.isfinite(measured).all():
        raise UsageError(f"losses must be finite, [{runs}, V] as there are {runs} mixtures, got {measured.shape}.")
    if len(np.unique(rows.round(9), axis=0)) < sources + 2:
        raise UsageError(f"a law of {sources} sources needs at least {sources + 2} different mixtures: add runs.")
    if np.linalg.matrix_rank(rows, tol=1e-6) < sources:
        raise UsageError("the mixtures must span all proportions: vary each source on its own.")
    if not delta > 0 or starts < 1 or bootstrap < 0:
        raise UsageError(f"delta and starts must be above 0, bootstrap 0 or above: got {delta}, {starts}, {bootstrap}.")
    if measured.min() <= floor:
        raise UsageError(f"floor must lie below all losses: got {floor}, and {measured.min():.6g} is the lowest loss.")
    fits = [_fit(rows, y, delta, floor, _grid(rows, y, floor, starts)) for y in measured.T]
    law = _law(rows, measured, np.array(fits))
    predicted = measured - law.residuals
    widening = math.sqrt(runs / max(1, runs - sources - 1))
    generator = np.random.default_rng(seed)
    replicas = []
    for _ in range(bootstrap):
        drawn = predicted + widening * law.residuals[generator.integers(runs, size=runs)]
        again = [_fit(rows, y, delta, floor, [fit]) for y, fit in zip(drawn.T, fits, strict=True)]
        replicas.append(_law(rows, drawn, np.array(again)))
    return MixingLaw(law.c, law.k, law.t, law.residuals, tuple(replicas))


def _law(rows: Array, measured: Array, fits: Array) -> MixingLaw:
    """Split exp(u_i . r) into k_i and a t_i of mean 0."""
    c, u = fits[:, 0], fits[:, 1:]
    mean = u.mean(axis=1)
    return MixingLaw(c, np.exp(mean), u - mean[:, None], measured - (c + np.exp(rows @ u.T)))


def _grid(rows: Array, y: Array, floor: float, starts: int) -> list[Array]:
    """For each floor c on a grid the u of log(y - c) = u . r, by least squares."""
    spread = max(float(y.max() - y.min()), 1e-9 * abs(float(y.max())))
    depths = np.minimum(spread * np.logspace(-2, 2, starts), float(y.min()) - floor)
    found = []
    for depth in np.unique(depths):
        c = float(y.min()) - depth
        u = np.linalg.lstsq(rows, np.log(np.maximum(y - c, 1e-3 * depth)), rcond=None)[0]
        found.append(np.concatenate([[c], u]))
    return found


def _fit(rows: Array, y: Array, delta: float, floor: float, starts: Sequence[Array]) -> Array:
    """Return (c, u) of the least Huber penalty of y - c - exp(u . r) over the starts."""

    def residuals(p: Array) -> Array:
        return p[0] + np.exp(np.minimum(rows @ p[1:], 50.0)) - y

    def jacobian(p: Array) -> Array:
        grown = np.exp(np.minimum(rows @ p[1:], 50.0))
        return np.concatenate([np.ones((len(y), 1)), grown[:, None] * rows], axis=1)

    bounds = (np.array([floor, *[-np.inf] * rows.shape[1]]), np.inf)
    fits = []
    for start in starts:
        inside = np.concatenate([[max(start[0], floor + 1e-12)], start[1:]])
        fits.append(
            least_squares(
                residuals, inside, jac=jacobian, bounds=bounds, loss="huber", f_scale=delta, x_scale="jac",
                ftol=1e-13, xtol=1e-13, gtol=1e-13, max_nfev=2000,
            )
        )  # fmt: skip
    best: Array = min(fits, key=lambda fit: fit.cost).x
    return best


def _mixtures(mixtures: ArrayLike, sources: int | None = None) -> Array:
    rows = np.asarray(mixtures, float)
    if rows.ndim != 2 or rows.shape[1] < 2 or (sources is not None and rows.shape[1] != sources):
        raise UsageError(f"mixtures must be [N, {sources or 'D of 2 or more'}], got {rows.shape}.")
    if not (rows >= -_ON_SIMPLEX).all() or not (abs(rows.sum(axis=1) - 1) <= _ON_SIMPLEX).all():
        raise UsageError("each mixture must be proportions of 0 or above with sum 1: divide the row by its sum.")
    return rows


def _fill(order: NDArray[np.intp], cap: Array) -> Array:
    """Give each source in turn as much as it can take, until the proportions sum to 1."""
    vertex = np.zeros_like(cap)
    left = 1.0
    for source in order:
        vertex[source] = min(float(cap[source]), left)
        left -= vertex[source]
    return vertex


CARD = Card(
    name="data-mixing-law",
    room="tune",
    summary="predicts the losses of all data mixtures from a few runs, and the best mixture",
    paper=Paper(
        "Data Mixing Laws: Optimizing Data Mixtures by Predicting Language Modeling Performance",
        2024,
        arxiv="2403.16952",
        code="https://github.com/yegcjs/mixinglaws",
    ),
    equation="L_i(r) = c_i + k_i exp(sum_j t_ij r_j); L(r) = sum_i s_i L_i(r), minimised over the simplex",
    claim="A 1B model on 100B tokens of the chosen mixture equals the default mixture with 48 % more steps.",
    acts_on="run",
    entry="trimtab.tune.proxies.mixing_law:fit_mixing_law",
    defaults=(
        Default("delta", 0.01, "authors' code, law.py (its notebook of two domains: 0.02)"),
        Default(
            "starts", 16, "ours; authors' code, two domains: 1,000 values of c, then 121 starts for the exponential"
        ),
        Default("floor", 0.0, "authors' code, two domains: c from 0 to the lowest loss"),
        Default("bootstrap", 0, "ours"),
    ),
    verified={
        "equation": (
            "tests/tune/proxies/test_mixing_law.py::test_recovers_known_parameters",
            "tests/tune/proxies/test_mixing_law.py::test_best_mixture_equals_the_grid",
        ),
        "reference": ("tests/tune/proxies/test_mixing_law.py::test_equals_the_authors_fit_of_two_domains",),
    },
    deviations=(
        "Floor and exponential are fitted together by scipy's Huber least squares from several floors; the authors' "
        "notebook first takes the c of the best correlation of log(L - c) with r, then fits the exponential by L-BFGS.",
        "Not here: the validation set as a mixture of unknown domains (the authors' AdaBoost of small networks, whose "
        "units are this law), and the scaling laws in steps and size that predict the losses of large runs.",
        "The best mixture is found by SLSQP with a bound on its distance from the best; the authors search a grid.",
        "Bootstrap intervals are an addition.",
    ),
)
