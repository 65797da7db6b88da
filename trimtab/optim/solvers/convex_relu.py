"""Convex training of two-layer ReLU networks: ADMM on the exact convex program, and sampled convex programs.

Training min 1/2 ||sum_j (X u_j)_+ alpha_j - y||^2 + beta/2 sum_j (||u_j||^2 + alpha_j^2) is equivalent, for enough
neurons, to a convex program over the activation patterns D_i = diag(1[X h >= 0]) that vectors h can produce:

    min over v, w   1/2 ||sum_i D_i X (v_i - w_i) - y||^2 + beta sum_i (||v_i|| + ||w_i||)
    subject to      (2 D_i - I) X v_i >= 0,  (2 D_i - I) X w_i >= 0

ADMM splits it with u = v (the norms) and s = G u (the constraints), G being block diagonal of (2 D_i - I) X and F the
row of blocks D_i X for v and -D_i X for w:

    u      = (I + F^T F / rho + G^T G)^-1 (F^T y / rho + v - lambda + G^T (s - nu))
    v_i    = (1 - beta / (rho ||u_i + lambda_i||))_+ (u_i + lambda_i),   s = (G u + nu)_+
    lambda = lambda + gamma_a / rho (u - v),   nu = nu + gamma_a / rho (G u - s)

As (2 D_i - I)^2 = I, every block of G^T G is X^T X, so that the u-step reduces to one N x N system, factored once.

A sampled convex program instead draws first-layer weights u_j on the unit sphere and trains the second layer only:

    min over alpha  1/2 ||sum_j (X u_j)_+ alpha_j - y||^2 + beta ||alpha||_1

Bai, Gautam and Sojoudi 2022 (arXiv:2201.01965), on the program of Pilanci and Ergen 2020 (arXiv:2002.10553).

Shape suffixes: N samples, D inputs, P patterns, M neurons.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.card import Card, Default, Paper
from trimtab.errors import UsageError
from trimtab.scalars import to_scalar

__all__ = [
    "ConvexReLUResult",
    "activation_patterns",
    "convex_relu_admm",
    "convex_relu_sampled",
    "relu_objective",
]


def relu_objective(x: Tensor, y: Tensor, weights: Tensor, alphas: Tensor, *, beta: float) -> Tensor:
    """Return 1/2 ||(X W^T)_+ alpha - y||^2 + beta/2 (||W||^2 + ||alpha||^2), the training loss with weight decay.

    Args:
        x: inputs [N, D].
        y: targets [N].
        weights: first layer [M, D].
        alphas: second layer [M].
        beta: weight of the decay, at least 0.

    Returns:
        A scalar.

    Example:
        >>> one = torch.ones(1, 1)
        >>> relu_objective(one, one[0], one, one[0], beta=0.5)
        tensor(0.5000)
    """
    residual = torch.relu(x @ weights.T) @ alphas - y
    return 0.5 * residual.square().sum() + 0.5 * beta * (weights.square().sum() + alphas.square().sum())


def activation_patterns(x: Tensor, count: int, *, generator: torch.Generator) -> Tensor:
    """Draw `count` vectors h ~ N(0, I) and return the different activation patterns 1[X h >= 0] among them.

    Args:
        x: inputs [N, D].
        count: vectors to draw, at least 1.
        generator: where they are drawn from.

    Returns:
        Zeros and ones [N, P] with P <= count, in the dtype of x. There are finitely many patterns, 2 N for D = 2 in
        general position: with all of them the convex program is exact.

    Raises:
        UsageError: if count is below 1 or x is not a matrix.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> activation_patterns(x, 100, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 4])
    """
    if count < 1:
        raise UsageError(f"count must be at least 1, got {count}.")
    if x.dim() != 2 or not x.is_floating_point():
        raise UsageError(f"x must be a floating-point matrix [N, D], got {x.dtype} of shape {tuple(x.shape)}.")
    h = torch.randn(x.shape[1], count, generator=generator, dtype=x.dtype, device=x.device)
    return torch.unique((x @ h >= 0).to(x.dtype), dim=1)


@dataclass(frozen=True)
class ConvexReLUResult:
    """A two-layer network without biases found by convex optimization.

    Args:
        weights: first layer [M, D]; only neurons that are not 0.
        alphas: second layer [M].
        objective: value of the convex program.
        violation: how far the worst constraint of the convex program is broken; 0 without constraints.
        iterations: iterations made.
        converged: whether the tolerance was reached.
        trace: value of the convex program after each iteration.
    """

    weights: Tensor
    alphas: Tensor
    objective: float
    violation: float
    iterations: int
    converged: bool
    trace: tuple[float, ...]

    def predict(self, x: Tensor) -> Tensor:
        """Return the outputs [N] of the network for inputs [N, D]."""
        return torch.relu(x @ self.weights.T) @ self.alphas

    def module(self) -> nn.Sequential:
        """Return the network as Linear, ReLU, Linear, trainable further."""
        neurons, width = self.weights.shape
        options = {"bias": False, "dtype": self.weights.dtype, "device": self.weights.device}
        first = nn.utils.skip_init(nn.Linear, width, neurons, **options)
        last = nn.utils.skip_init(nn.Linear, neurons, 1, **options)
        with torch.no_grad():
            first.weight.copy_(self.weights)
            last.weight.copy_(self.alphas.unsqueeze(0))
        return nn.Sequential(first, nn.ReLU(), last)


def _check(x: Tensor, y: Tensor, beta: float, max_iterations: int) -> None:
    if x.dim() != 2 or y.shape != x.shape[:1] or not x.is_floating_point() or x.dtype != y.dtype:
        raise UsageError(
            f"x [N, D] and y [N] must be of one floating-point dtype, got {x.dtype} {tuple(x.shape)} and {y.dtype} "
            f"{tuple(y.shape)}."
        )
    if not beta > 0:
        raise UsageError(f"beta must be positive, got {beta}.")
    if max_iterations < 1:
        raise UsageError(f"max_iterations must be at least 1, got {max_iterations}.")


@torch.no_grad()
def convex_relu_admm(
    x: Tensor,
    y: Tensor,
    patterns: Tensor,
    *,
    beta: float,
    rho: float = 0.01,
    dual_step: float | None = None,
    tolerance: float = 1e-7,
    max_iterations: int = 20_000,
) -> ConvexReLUResult:
    """Train a two-layer ReLU network to the global optimum over the given activation patterns, by ADMM.

    min 1/2 ||sum_i D_i X (v_i - w_i) - y||^2 + beta sum_i (||v_i|| + ||w_i||), v_i and w_i in the cone of D_i.

    Args:
        x: inputs [N, D]; append a column of ones for biases.
        y: targets [N].
        patterns: activation patterns [N, P] of zeros and ones, as `activation_patterns` gives them.
        beta: weight of the decay, positive.
        rho: penalty, positive; it sets the speed, not the solution.
        dual_step: gamma_a, positive; default rho, which is plain ADMM.
        tolerance: stop once the root mean squares of both residuals are at most this.
        max_iterations: at least 1. Each costs O(N^2 + N D P).

    Returns:
        The network recovered from v and w: u_j = v_i / sqrt(||v_i||), alpha_j = sqrt(||v_i||), and with -alpha for w_i.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> x = torch.tensor([[-1.0, 1.0], [0.0, 1.0], [1.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
        >>> y = x[:, 0].abs()
        >>> patterns = activation_patterns(x, 200, generator=torch.Generator().manual_seed(0))
        >>> network = convex_relu_admm(x, y, patterns, beta=1e-3)
        >>> (network.predict(x) - y).abs().max() < 0.01
        tensor(True)

    References:
        Bai, Gautam and Sojoudi 2022, arXiv:2201.01965, algorithm 3.1. Pilanci and Ergen 2020, arXiv:2002.10553.
    """
    _check(x, y, beta, max_iterations)
    if patterns.dim() != 2 or len(patterns) != len(x):
        raise UsageError(f"patterns must be [N, P] with N = {len(x)}, got shape {tuple(patterns.shape)}.")
    gamma_a = rho if dual_step is None else dual_step
    if not (rho > 0 and gamma_a > 0):
        raise UsageError(f"rho and dual_step must be positive, got {rho} and {gamma_a}.")
    n, width = x.shape
    d = torch.cat([patterns, patterns], dim=1).T.to(x.dtype)  # [2P, N], for v and then w
    half = len(d) // 2
    signed = torch.cat([d[:half], -d[half:]])
    turned = 2 * d - 1

    def forward(z: Tensor) -> Tensor:  # F z
        return (signed * (z @ x.T)).sum(dim=0)

    identity = torch.eye(width, dtype=x.dtype, device=x.device)
    block = torch.linalg.cholesky(identity + x.T @ x)  # every diagonal block of I + G^T G
    block_inverse = torch.cholesky_inverse(block)
    gram = (x @ block_inverse @ x.T) * (d.T @ d)  # F (I + G^T G)^-1 F^T
    inner = torch.linalg.cholesky(rho * torch.eye(n, dtype=x.dtype, device=x.device) + gram)

    v = torch.zeros(len(d), width, dtype=x.dtype, device=x.device)
    s = torch.zeros_like(d)
    lam, nu = torch.zeros_like(v), torch.zeros_like(s)
    fty = (signed * y) @ x / rho
    trace: list[float] = []
    converged = False
    for _ in range(max_iterations):
        z = (fty + v - lam + (turned * (s - nu)) @ x) @ block_inverse
        correction = torch.cholesky_solve(forward(z).unsqueeze(-1), inner).squeeze(-1)
        u = z - (signed * correction) @ x @ block_inverse
        shifted = u + lam
        norms = torch.linalg.vector_norm(shifted, dim=1, keepdim=True)
        v_old, s_old = v, s
        v = torch.where(norms > beta / rho, 1 - beta / (rho * norms.clamp(min=1e-300)), 0.0) * shifted
        gu = turned * (u @ x.T)
        s = (gu + nu).clamp(min=0)
        lam = lam + gamma_a / rho * (u - v)
        nu = nu + gamma_a / rho * (gu - s)
        objective = 0.5 * (forward(v) - y).square().sum() + beta * torch.linalg.vector_norm(v, dim=1).sum()
        primal = (u - v).square().sum() + (gu - s).square().sum()
        dual = rho**2 * ((v - v_old).square().sum() + (s - s_old).square().sum())
        trace.append(to_scalar(objective))
        if to_scalar(torch.maximum(primal, dual)) <= tolerance**2 * (v.numel() + s.numel()):
            converged = True
            break
    violation = max(0.0, -to_scalar((turned * (v @ x.T)).min()))
    norms = torch.linalg.vector_norm(v, dim=1)
    alive = norms > 0
    root = norms[alive].sqrt()
    sign = torch.cat([torch.ones_like(norms[:half]), -torch.ones_like(norms[half:])])[alive]
    return ConvexReLUResult(
        v[alive] / root.unsqueeze(1), sign * root, trace[-1], violation, len(trace), converged, tuple(trace)
    )


@torch.no_grad()
def convex_relu_sampled(
    x: Tensor,
    y: Tensor,
    neurons: int,
    *,
    beta: float,
    generator: torch.Generator,
    rho: float = 0.003,
    tolerance: float = 1e-4,
    max_iterations: int = 20_000,
) -> ConvexReLUResult:
    """Train the second layer over first-layer weights drawn on the unit sphere: a sampled, unconstrained program.

    min over alpha 1/2 ||(X U^T)_+ alpha - y||^2 + beta ||alpha||_1, by ADMM.

    Args:
        x: inputs [N, D]; append a column of ones for biases.
        y: targets [N].
        neurons: weight vectors to draw, at least 1; the more, the closer to the global optimum.
        beta: weight of the decay, positive.
        generator: where they are drawn from.
        rho: penalty, positive; it sets the speed, not the solution.
        tolerance: stop at a duality gap of at most this times the objective.
        max_iterations: at least 1.

    Returns:
        The network of the neurons that are used, their norm shared between both layers (alpha u = sqrt|alpha| u times
        sqrt|alpha|), so that `relu_objective` equals the program's value.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> x = torch.tensor([[-1.0, 1.0], [0.0, 1.0], [1.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
        >>> generator = torch.Generator().manual_seed(0)
        >>> network = convex_relu_sampled(x, x[:, 0].abs(), 500, beta=1e-2, generator=generator)
        >>> (network.predict(x) - x[:, 0].abs()).abs().max() < 0.1
        tensor(True)

    References:
        Bai, Gautam and Sojoudi 2022, arXiv:2201.01965.
    """
    _check(x, y, beta, max_iterations)
    if neurons < 1:
        raise UsageError(f"neurons must be at least 1, got {neurons}.")
    if not rho > 0:
        raise UsageError(f"rho must be positive, got {rho}.")
    u = torch.randn(neurons, x.shape[1], generator=generator, dtype=x.dtype, device=x.device)
    u = u / torch.linalg.vector_norm(u, dim=1, keepdim=True)
    a = torch.relu(x @ u.T)
    inner = torch.linalg.cholesky(rho * torch.eye(len(x), dtype=x.dtype, device=x.device) + a @ a.T)
    alpha = torch.zeros(neurons, dtype=x.dtype, device=x.device)
    lam = torch.zeros_like(alpha)
    aty, trace, converged = a.T @ y / rho, [], False
    for _ in range(max_iterations):
        z = aty + alpha - lam
        shifted = z - a.T @ torch.cholesky_solve((a @ z).unsqueeze(-1), inner).squeeze(-1) + lam
        alpha = shifted.sign() * (shifted.abs() - beta / rho).clamp(min=0)
        lam = shifted - alpha
        residual = y - a @ alpha
        objective = 0.5 * residual.square().sum() + beta * alpha.abs().sum()
        dual = residual * (beta / (a.T @ residual).abs().max().clamp(min=beta))
        gap = objective - (0.5 * y.square().sum() - 0.5 * (y - dual).square().sum())
        trace.append(to_scalar(objective))
        if to_scalar(gap) <= tolerance * trace[-1]:
            converged = True
            break
    used = alpha != 0
    root = alpha[used].abs().sqrt()
    return ConvexReLUResult(
        u[used] * root.unsqueeze(1), alpha[used].sign() * root, trace[-1], 0.0, len(trace), converged, tuple(trace)
    )


_TESTS = "tests/optim/solvers/test_convex_relu.py"
CARD = Card(
    name="convex-relu",
    room="optim",
    summary="two-layer ReLU networks trained to the global optimum by convex programs",
    paper=Paper(
        "Efficient Global Optimization of Two-layer ReLU Networks: Quadratic-time Algorithms and Adversarial Training",
        2022,
        arxiv="2201.01965",
    ),
    equation="min 1/2 ||sum_i D_i X (v_i - w_i) - y||^2 + beta sum_i (||v_i|| + ||w_i||), (2 D_i - I) X v_i, w_i >= 0",
    claim="ADMM converges linearly to the global optimum at quadratic cost per iteration.",
    acts_on="optimizer",
    entry="trimtab.optim.solvers.convex_relu:convex_relu_admm",
    defaults=(
        Default("rho", 0.01, "ours; the paper chooses it for each data set"),
        Default("dual_step", None, "ours: rho, for which the updates are standard ADMM"),
        Default("tolerance", 1e-7, "ours"),
        Default("max_iterations", 20_000, "ours"),
    ),
    verified={
        "equation": (f"{_TESTS}::test_admm_equals_dense_updates",),
        "reference": (
            f"{_TESTS}::test_equals_a_generic_solver",
            f"{_TESTS}::test_sampled_program_meets_its_optimality",
        ),
        "claim": (
            f"{_TESTS}::test_network_is_globally_optimal",
            f"{_TESTS}::test_no_worse_than_many_restarts",
            f"{_TESTS}::test_converges_linearly",
        ),
    },
    deviations=(
        "Squared loss only: the paper's other losses (solved by random block-coordinate descent inside ADMM) and its "
        "adversarial training programs are left out.",
        "The ADMM updates were checked against independent public implementations of the paper's algorithm 3.1.",
        "The u-step goes through the N x N system of the Woodbury identity: the same linear system, cheaper for "
        "N < 2 D P.",
        "The sampled program is recalled from the paper, not checked against its text; it is solved by ADMM, "
        "to a duality gap.",
        "With sampled patterns the optimum is that over these patterns; it is the network's global optimum once they "
        "are all there.",
    ),
)
