"""Newton-Schulz orthogonalisation: the nearest semi-orthogonal matrix by matrix products alone.

For X with singular values in [0, 1], k steps of an odd polynomial move every singular value towards 1 and keep the
singular vectors, so that U S V^T goes to U V^T:

    X_0 = G / ||G||_F,    X_{k+1} = a_k X_k + (b_k A + c_k A^2) X_k with A = X_k X_k^T

A matrix with more rows than columns is transposed first, which makes A the smaller of the two Gram matrices.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from trimtab.errors import UsageError, choose
from trimtab.optim._lists import TensorList

Triple = tuple[float, float, float]
Schedule = tuple[Triple, ...]

_POLAR_EXPRESS: Schedule = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)


def _safer(schedule: Schedule, factor: float) -> Schedule:
    """Shrink the arguments of all polynomials but the last, so that rounding cannot push a singular value too far."""
    return (*((a / factor, b / factor**3, c / factor**5) for a, b, c in schedule[:-1]), schedule[-1])


SCHEDULES: dict[str, Schedule] = {
    # Keller Jordan's Muon, and torch.optim.Muon: the steepest slope at 0, singular values end in about [0.7, 1.2].
    "jordan": ((3.4445, -4.7750, 2.0315),) * 5,
    # The Taylor quintic, of third order at 1; and Newton-Schulz proper, of second order.
    "classical-quintic": ((15 / 8, -10 / 8, 3 / 8),) * 5,
    "classical-cubic": ((1.5, -0.5, 0.0),) * 5,
    # A quintic with the cubic's fixed point, for many steps or after a steeper sequence.
    "two-step": ((2.0, -1.5, 0.5),) * 5,
    # Amsel et al. 2025 (arXiv:2505.16932), algorithm 1, with its safety factor 1.01.
    "polar-express": _safer(_POLAR_EXPRESS, 1.01)[:5],
    "polar-express-8": _safer(_POLAR_EXPRESS, 1.01),
    # Jiacheng You's six steps: singular values never end above 1.
    "you": (
        (3955 / 1024, -8306 / 1024, 5008 / 1024),
        (3735 / 1024, -6681 / 1024, 3463 / 1024),
        (3799 / 1024, -6499 / 1024, 3211 / 1024),
        (4019 / 1024, -6385 / 1024, 2906 / 1024),
        (2677 / 1024, -3029 / 1024, 1162 / 1024),
        (2172 / 1024, -1833 / 1024, 682 / 1024),
    ),
    # Of modded-nanogpt's medium track; the default of dion and of timm ("quintic" there).
    "dion": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Grishina et al. 2025 (arXiv:2506.10935): Chebyshev-optimal on an adapted interval.
    "cans": (
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ),
}
"""Published coefficients by name, one triple (a, b, c) a step."""


SMALL = {True: 2**13, False: 2**18}
"""Entries up to which matrices of one shape are multiplied as a batch, on the CPU and elsewhere."""


def schedule_of(coefficients: Any) -> Schedule:
    """Return the coefficients of every step from a name or from triples.

    Raises:
        UsageError: if there is no such name, or a step is not three numbers.
    """
    if isinstance(coefficients, str):
        return SCHEDULES[choose("set of Newton-Schulz coefficients", coefficients, SCHEDULES)]
    try:
        steps = tuple((float(a), float(b), float(c)) for a, b, c in coefficients)
    except (TypeError, ValueError) as error:
        raise UsageError(f"coefficients must be a name or triples (a, b, c), got {coefficients!r}.") from error
    if not steps:
        raise UsageError("coefficients must have at least one step, got none.")
    return steps


def newton_schulz(G: Any, schedule: Schedule, *, eps: float = 1e-7) -> Any:
    """Return G with its singular values moved towards 1.

    Shapes: G [..., R, C], a tensor or a `TensorList`; the result is of the same shape and dtype.

    Args:
        G: matrices.
        schedule: coefficients of each step.
        eps: the least norm that is divided by, so that a matrix of zeros stays one.
    """
    if isinstance(G, TensorList) and len(G) > 1 and math.prod(G.shape) <= SMALL[G.device.type == "cpu"]:
        return TensorList(newton_schulz(torch.stack(G.tensors), schedule, eps=eps).unbind())
    tall = G.shape[-2] > G.shape[-1]
    X = G.mT if tall else G
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    X = X / norm.clamp_min(eps)
    product = torch.addmm if X.ndim == 2 else torch.baddbmm
    for a, b, c in schedule:
        A = X @ X.mT
        B = product(A, A, A, beta=b, alpha=c)
        X = product(X, B, X, beta=a)
    return X.mT if tall else X
