"""A small autoencoder of digits, trained for squared error or for structural similarity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import choose, require
from trimtab.losses.generation.structural_similarity import ms_ssim, ms_ssim_loss
from trimtab.scalars import to_scalar
from trimtab.studies._fitting import fit, minibatch

_TRAIN, _SIDE = 1200, 24
# The paper's first two weights, at the scales that 24 pixels have room for with a window of 7.
_WEIGHTS, _WINDOW = (0.0448 / 0.3304, 0.2856 / 0.3304), 7


def autoencoder(
    seed: int, *, loss: str = "mse", lr: float = 0.01, steps: int = 200, code: int = 12, width: int = 96
) -> dict[str, float]:
    """Train an autoencoder of fully connected layers on digits of 8 x 8 pixels that are enlarged to 24 x 24.

    Args:
        seed: of split, initialisation and batches.
        loss: `"mse"` or `"ms-ssim"`.
        lr: of Adam, along half a cosine.
        steps: with batches of 32.
        code: numbers that a digit is put into.
        width: of the hidden layers.

    Returns:
        Of held-out digits: `ssim` (one scale, window of 11), `ms_ssim` (two scales, window of 7: what is trained),
        `mse`, and `probe_accuracy`, of a linear classifier fitted by least squares to the codes of the training digits.
    """
    choose("loss", loss, ("mse", "ms-ssim"))
    bunch = require("sklearn.datasets", extra="workloads").load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(seed))
    small = torch.from_numpy(bunch.images).float()[order].unsqueeze(1) / 16
    images = F.interpolate(small, (_SIDE, _SIDE), mode="bilinear")
    labels = torch.from_numpy(bunch.target).long()[order]
    pixels = _SIDE**2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, code))
        decoder = nn.Sequential(nn.Linear(code, width), nn.ReLU(), nn.Linear(width, pixels), nn.Sigmoid())

    def rebuilt(inputs: Tensor) -> Tensor:
        made: Tensor = decoder(encoder(inputs)).view_as(inputs)
        return made

    def loss_at(step: int) -> Tensor:
        batch = images[minibatch(seed, step, 32, _TRAIN)]
        if loss == "mse":
            return F.mse_loss(rebuilt(batch), batch)
        return ms_ssim_loss(rebuilt(batch), batch, weights=_WEIGHTS, window=_WINDOW)

    fit([*encoder.parameters(), *decoder.parameters()], loss_at, steps=steps, lr=lr)
    held = images[_TRAIN:]
    with torch.no_grad():
        made = rebuilt(held).nan_to_num(nan=0.0)
        codes = encoder(images).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).double()
        codes = torch.cat([codes, torch.ones_like(codes[:, :1])], 1)
        wanted = F.one_hot(labels, 10).double()
        penalty = 1e-6 * torch.eye(code + 1, dtype=torch.float64)
        fitted = codes[:_TRAIN]
        weight = torch.linalg.solve(fitted.T @ fitted + penalty, fitted.T @ wanted[:_TRAIN])
        right = (codes[_TRAIN:] @ weight).argmax(-1) == labels[_TRAIN:]
        return {
            "ssim": to_scalar(ms_ssim(made, held, weights=(1.0,)).mean()),
            "ms_ssim": to_scalar(ms_ssim(made, held, weights=_WEIGHTS, window=_WINDOW).mean()),
            "mse": to_scalar(F.mse_loss(made, held)),
            "probe_accuracy": to_scalar(right.float().mean()),
        }
