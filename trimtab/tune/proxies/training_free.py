"""Training-free ranking: scores of untrained networks, weighted by a few trainings, choose what to train (RoBoT).

No score of an untrained network is best on every task. Their weighted sum is a score too, and a few trainings tell
which weights are good (He et al. 2024, algorithm 1). With the scores M_m(a) of each candidate a scaled to [0, 1]:

    S_w(a) = sum_m w_m M_m(a),   w in [-1, 1]^M
    explore  for t = 1..T: Bayesian optimisation proposes w_t; a_t = argmax_a S_w_t(a) is trained, unless it was
    exploit  w* = the weights that found the best a; train the candidates by falling S_w* until T are trained

EXPERIMENTAL: in benchmarks/training_free.py (48 small networks on digits) it beats random search at equal trainings,
but training the first of most single scores does better: prefer one score where its sign is known.

He et al. 2024 (arXiv:2403.07591); authors' code hzf1174/RoBoT. The scores are those of `_training_free_scores`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_factor, cho_solve
from torch import Tensor, nn

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError, choose
from trimtab.tune.proxies._training_free_scores import SCORES

__all__ = ["RobotSampler", "training_free_scores"]

Array = NDArray[np.float64]

DEFAULT_SCORES = ("grad_norm", "snip", "grasp", "fisher", "synflow", "jacov")


def training_free_scores(
    candidates: Iterable[Callable[[], nn.Module]],
    inputs: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    scores: Sequence[str] = DEFAULT_SCORES,
) -> Array:
    """Return each candidate's scores on one batch, larger being better.

    Args:
        candidates: functions that build the networks (architectures, initialisations), in training mode.
        inputs: [B, ...], one batch.
        targets: [B], class indices.
        loss: takes (logits, targets) and returns the mean loss.
        scores: names: "grad_norm", "snip", "grasp", "fisher", "synflow", "jacov", "naswot" or "ntk".

    Returns:
        [N, M]; NaN where a score does not exist, such as naswot without ReLUs.

    Raises:
        UsageError: if a name is unknown, there is no candidate, or the targets are no class indices.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(8, 4, generator=generator), torch.arange(8) % 3
        >>> nets = [lambda width=width: nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
        ...         for width in (2, 50)]
        >>> table = training_free_scores(nets, x, y, nn.functional.cross_entropy, scores=["synflow", "naswot"])
        >>> table.shape, bool(table[1, 0] > table[0, 0])
        ((2, 2), True)
    """
    for name in scores:
        choose("score", name, SCORES)
    if targets.dim() != 1 or len(targets) != len(inputs) or targets.is_floating_point():
        raise UsageError(f"targets must be [{len(inputs)}] class indices, got {tuple(targets.shape)} {targets.dtype}.")
    rows = []
    for build in candidates:
        model = build()
        rows.append([SCORES[name](model, inputs, targets, loss) for name in scores])
    if not rows:
        raise UsageError("there is no candidate: give one function or more that builds a network.")
    return np.array(rows)


class RobotSampler:
    """Asks for the candidates to train, one after the other; its state follows from its arguments and what it was told.

    Args:
        scores: [N, M], each candidate's training-free scores; NaN counts as 0 after scaling.
        budget: trainings T, 2 or above; never more than N.
        scaling: "log" scales sign(m) log(1 + |m|) to [0, 1], as scores span orders of magnitude; "linear" the scores,
            "rank" their ranks.
        kappa: how far Bayesian optimisation explores, in standard deviations.
        seed: of its random proposals.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> quality = np.linspace(0, 1, 20)
        >>> sampler = RobotSampler(np.stack([quality, -quality, quality**3], 1), budget=8)
        >>> while (candidate := sampler.ask()) is not None:
        ...     sampler.tell(candidate, quality[candidate])
        >>> sampler.best, len(sampler.told)
        (19, 8)

    References:
        He et al. 2024, arXiv:2403.07591.
    """

    def __init__(
        self, scores: ArrayLike, *, budget: int = 20, scaling: str = "log", kappa: float = 2.576, seed: int = 0
    ) -> None:
        table = np.asarray(scores, float)
        choose("scaling", scaling, ("log", "linear", "rank"))
        if table.ndim != 2 or min(table.shape) < 1 or np.isinf(table).any():
            raise UsageError(f"scores must be [N, M], finite or NaN, got {table.shape}.")
        if budget < 2 or kappa < 0:
            raise UsageError(f"budget must be 2 or above and kappa 0 or above, got {budget} and {kappa}.")
        self.scaled = np.stack([_scale(column, scaling) for column in table.T], axis=1)
        self.budget = min(budget, len(table))
        self.kappa, self._rounds = kappa, 0
        self.told: dict[int, float] = {}
        self._weights: list[Array] = []
        self._values: list[float] = []
        self._asked: tuple[int, Array] | None = None
        self._generator = np.random.default_rng(seed)
        self._most = budget

    @property
    def weights(self) -> Array:
        """w* [M]: of the best candidate found while exploring; 0 before the first is told."""
        if not self._values:
            return np.zeros(self.scaled.shape[1])
        return self._weights[len(self._values) - 1 - int(np.argmax(self._values[::-1]))]

    @property
    def combined(self) -> Array:
        """S_w* [N], the combined score of all candidates."""
        return np.asarray(self.scaled @ self.weights)

    @property
    def best(self) -> int | None:
        """The best candidate told so far."""
        return max(self.told, key=self.told.__getitem__) if self.told else None

    def ask(self) -> int | None:
        """Return the next candidate to train, or None once the budget is spent.

        Raises:
            UsageError: if the last candidate was not told yet.
        """
        if self._asked is not None:
            raise UsageError(f"candidate {self._asked[0]} was asked for and not told: call tell first.")
        if len(self.told) >= self.budget:
            return None
        while self._rounds < self._most:
            self._rounds += 1
            w = self._propose()
            candidate = int(np.argmax(self.scaled @ w))
            if candidate not in self.told:
                self._asked = (candidate, w)
                return candidate
            # Trained before: the weights' value is known, and costs nothing.
            self._observe(w, self.told[candidate])
        order = np.argsort(-self.combined, kind="stable")
        candidate = next(int(index) for index in order if int(index) not in self.told)
        self._asked = (candidate, np.empty(0))
        return candidate

    def tell(self, candidate: int, value: float) -> None:
        """Say how good a candidate is after its training, larger being better.

        Raises:
            UsageError: if another candidate was asked for, or the value is not finite.
        """
        if self._asked is None or self._asked[0] != candidate:
            asked = "none" if self._asked is None else self._asked[0]
            raise UsageError(f"candidate {candidate} was not asked for: {asked} was.")
        if not np.isfinite(value):
            raise UsageError(f"the value must be finite, got {value}: tell a bad one for a failed training.")
        _, w = self._asked
        self._asked = None
        self.told[candidate] = float(value)
        if len(w):
            self._observe(w, float(value))

    def _observe(self, w: Array, value: float) -> None:
        self._weights.append(w)
        self._values.append(value)

    def _propose(self) -> Array:
        """Return the weights of the largest upper confidence bound mu + kappa sigma among random ones."""
        drawn = self._generator.uniform(-1, 1, size=(2000, self.scaled.shape[1]))
        if len(self._values) < 2 or np.ptp(self._values) == 0:
            return drawn[0]
        mean, deviation = _posterior(np.array(self._weights), np.array(self._values), drawn)
        return np.asarray(drawn[int(np.argmax(mean + self.kappa * deviation))])


def _scale(column: Array, scaling: str) -> Array:
    """Scale to [0, 1]; a constant score and NaN become 0."""
    known = np.isfinite(column)
    result = np.zeros(len(column))
    if not known.any():
        return result
    values = column[known]
    if scaling == "log":
        values = np.sign(values) * np.log1p(np.abs(values))
    elif scaling == "rank":
        values = np.searchsorted(np.sort(values), values).astype(float)
    spread = np.ptp(values)
    result[known] = (values - values.min()) / spread if spread > 0 else 0.0
    return result


def _matern(a: Array, b: Array, length: float) -> Array:
    """Matern 5/2 kernel: (1 + s + s^2 / 3) exp(-s), s = sqrt(5) |a - b| / length."""
    s = np.sqrt(5 * ((a[:, None] - b[None]) ** 2).sum(-1)) / length
    return np.asarray((1 + s + s**2 / 3) * np.exp(-s))


def _posterior(points: Array, values: Array, at: Array) -> tuple[Array, Array]:
    """Mean and deviation of a Gaussian process on standardised values, its length of the highest likelihood."""
    y = (values - values.mean()) / values.std()
    best, fitted = -np.inf, None
    for length in np.logspace(-1, 1, 21):
        factor = cho_factor(_matern(points, points, length) + 1e-6 * np.eye(len(points)), lower=True)
        likelihood = -0.5 * y @ cho_solve(factor, y) - np.log(np.diag(factor[0])).sum()
        if likelihood > best:
            best, fitted = likelihood, (length, factor)
    length, factor = fitted or (1.0, cho_factor(np.eye(len(points)), lower=True))
    cross = _matern(at, points, length)
    variance = 1 - (cross * cho_solve(factor, cross.T).T).sum(1)
    return cross @ cho_solve(factor, y), np.sqrt(np.maximum(variance, 0))


CARD = Card(
    name="robot-training-free",
    room="tune",
    summary="experimental: ranks untrained networks by training-free scores, weighted by a few trainings (RoBoT)",
    paper=Paper(
        "Robustifying and Boosting Training-Free Neural Architecture Search",
        2024,
        arxiv="2403.07591",
        code="https://github.com/hzf1174/RoBoT",
    ),
    equation="S_w(a) = sum_m w_m M_m(a); w* by Bayesian optimisation of f(argmax_a S_w(a)); then train by falling S_w*",
    claim="More robust than any single training-free score, and better architectures at the same number of trainings.",
    acts_on="run",
    entry="trimtab.tune.proxies.training_free:RobotSampler",
    defaults=(
        Default("budget", 20, "authors' code, search_nb201.py"),
        Default("kappa", 2.576, "bayes_opt's default, which the authors' code keeps"),
        Default(
            "scaling", "log", "authors' code scales logarithms of the scores to [0, 1]; their exact form is recalled"
        ),
        Default("seed", 0, "ours"),
    ),
    verified={
        "equation": (
            "tests/tune/proxies/test_training_free.py::test_scores_of_a_linear_network",
            "tests/tune/proxies/test_training_free.py::test_scores_of_a_relu_network",
            "tests/tune/proxies/test_training_free.py::test_search_follows_the_algorithm",
            "tests/tune/proxies/test_training_free.py::test_posterior_is_that_of_a_gaussian_process",
        ),
        "reference": ("tests/tune/proxies/test_training_free.py::test_posterior_equals_scikit_learn",),
    },
    deviations=(
        "Proposals are the best of 2,000 random weights under a Gaussian process whose length is chosen from a grid; "
        "bayes_opt refines random ones by L-BFGS and fits the length by gradient.",
        "fisher sums over channels; the code that the authors use counts each channel once for each of its weights.",
        "naswot counts agreeing ReLUs (Mellor et al.); the authors' copy sums x x^T of the ReLUs' inputs.",
        "jacov sums the outputs as the authors' code does, and clips eigenvalues that rounding makes negative.",
    ),
)
