"""ScaleLong: scale the long skip connections of a UNet, the deeper the smaller.

A UNet's decoder takes the features of its encoder back in over long skips, s_1 (the first, outermost) to s_n. With all
of them at full strength the range in which hidden features and gradients oscillate during training grows with n; it
falls with the sum of the squared coefficients:

    constant:    s_i -> kappa^(i - 1) s_i
    learnable:   s_i -> sigmoid(W2 relu(W1 mean(s_i))) s_i,  one small calibration network for all skips
    sqrt2:       s_i -> s_i / sqrt(2), the older rule of thumb

Huang et al. 2023 (arXiv:2310.13545); authors' code sail-sg/ScaleLong, libs/uvit.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError, choose

__all__ = ["LongSkipScale"]

_KINDS = ("constant", "learnable", "sqrt2")


class LongSkipScale(nn.Module):
    """Scale the list of long skips that a UNet's encoder left behind, in the encoder's order.

    The learnable coefficients differ along dimension 1: the channels of feature maps [B, C, ...], and the tokens of a
    transformer's [B, L, D], as in the authors' UViT; `mean` is over all later dimensions. Skips of equal width share
    one calibration network, as in the paper; a UNet whose widths differ has one for each.

    Args:
        num_skips: n, at least 1.
        kind: `"constant"`, `"learnable"` or `"sqrt2"`.
        kappa: base of the constant coefficients, in (0, 1].
        channels: size of dimension 1 of the skips, learnable only: one number, or one for each skip.
        reduction: the calibration network's hidden width is channels // reduction, at least 1.
        shared: whether skips of equal width share a calibration network; False gives each its own.
        device: of the parameters.
        dtype: of the parameters.

    Shapes: a list of n tensors [B, C_i, ...]; the result has the same shapes and dtypes.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> scale = LongSkipScale(3, kappa=0.5)
        >>> [float(skip) for skip in scale([torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1)])]
        [1.0, 0.5, 0.25]

    References:
        Huang et al. 2023, arXiv:2310.13545, section 4; libs/uvit.py of the authors' code.
    """

    def __init__(
        self,
        num_skips: int,
        *,
        kind: str = "constant",
        kappa: float = 0.5,
        channels: int | Sequence[int] | None = None,
        reduction: int = 16,
        shared: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        choose("kind of scaling", kind, _KINDS)
        if num_skips < 1:
            raise UsageError(f"num_skips must be at least 1, got {num_skips}: give the number of long skips.")
        if not 0 < kappa <= 1:
            raise UsageError(f"kappa must be above 0 and at most 1, got {kappa}: the authors suggest 0.5 to 0.95.")
        if reduction < 1:
            raise UsageError(f"reduction must be at least 1, got {reduction}: the authors' value is 16.")
        if (channels is None) == (kind == "learnable"):
            raise UsageError(
                f"kind={kind!r} takes {'the' if kind == 'learnable' else 'no'} channels of the skips, got {channels}: "
                "they are the widths of the learnable kind's calibration networks."
            )
        self.num_skips, self.kind, self.kappa = num_skips, kind, kappa
        self.calibrations = nn.ModuleList()
        self._owners: list[int] = []
        if channels is None:
            return
        widths = [channels] * num_skips if isinstance(channels, int) else list(channels)
        if len(widths) != num_skips or min(widths) < 1:
            raise UsageError(f"channels must be {num_skips} numbers of at least 1, one for each skip, got {channels}.")
        found: list[object] = []
        for index, width in enumerate(widths):
            key = width if shared else index
            if key not in found:
                found.append(key)
                hidden = max(1, width // reduction)
                self.calibrations.append(
                    nn.Sequential(
                        nn.Linear(width, hidden, device=device, dtype=dtype),
                        nn.ReLU(),
                        nn.Linear(hidden, width, device=device, dtype=dtype),
                        nn.Sigmoid(),
                    )
                )
            self._owners.append(found.index(key))

    def coefficient(self, index: int, skip: Tensor) -> Tensor | float:
        """Return what skip number `index` (from 0, the outermost) is multiplied by: a number, or [B, C, 1, ...]."""
        if self.kind == "constant":
            return self.kappa**index
        if self.kind == "sqrt2":
            return 2**-0.5
        pooled_BC = skip.flatten(2).mean(dim=2) if skip.dim() > 2 else skip
        kappa_BC = self.calibrations[self._owners[index]](pooled_BC).to(skip.dtype)
        return kappa_BC.reshape(*kappa_BC.shape, *[1] * (skip.dim() - 2))

    def forward(self, skips: Sequence[Tensor]) -> list[Tensor]:
        """Return the scaled skips, in their order."""
        if len(skips) != self.num_skips:
            raise UsageError(f"LongSkipScale of {self.num_skips} skips was given {len(skips)}: pass all of them.")
        return [self.coefficient(index, skip) * skip for index, skip in enumerate(skips)]

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.num_skips}, kind={self.kind!r}" + (f", kappa={self.kappa}" if self.kind == "constant" else "")


CARD = Card(
    name="long-skip-scale",
    room="layers",
    summary="long skips of a UNet scaled by kappa^(i - 1), or by a small shared calibration network",
    paper=Paper(
        "ScaleLong: Towards More Stable Training of Diffusion Model via Scaling Network Long Skip Connection",
        2023,
        arxiv="2310.13545",
        code="https://github.com/sail-sg/ScaleLong",
    ),
    equation="s_i -> kappa^(i - 1) s_i, or s_i -> sigmoid(W2 relu(W1 mean(s_i))) s_i; i = 1 is the outermost skip",
    claim=(
        "Smaller oscillation of hidden features and gradients during training, and about 1.5x faster training of UNet "
        "and UViT diffusion models on four data sets."
    ),
    acts_on="model",
    entry="trimtab.layers.long_skip:LongSkipScale",
    defaults=(
        Default("kind", "constant", "paper, section 4.1; the authors' code offers it as scalelong=2"),
        Default("kappa", 0.5, "authors' code, libs/uvit.py; its README suggests 0.5 to 0.95"),
        Default("reduction", 16, "authors' code, Attentionlayer(r=16)"),
        Default("shared", True, "paper, section 4.2; the authors' code has both (scalelong=3 and 4)"),
    ),
    verified={
        "equation": (
            "tests/layers/test_long_skip.py::test_constant_coefficients_are_the_authors",
            "tests/layers/test_long_skip.py::test_learnable_equals_numpy",
            "tests/layers/test_long_skip.py::TestLearnable::test_gradcheck",
        ),
    },
    deviations=(
        "A UNet's skips differ in width, which one calibration network cannot serve: there is one for each width.",
        "The hidden width is at least 1, where the authors' channels // 16 would be 0.",
        "The authors' UViT pools each token over its width and calibrates tokens; on maps [B, C, H, W] the same rule "
        "pools each channel over space and calibrates channels.",
        "A UNet has to call it on its skips: no Card.apply, as a model does not say which of its tensors are skips.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.diffusion:long_skips",
            "scaling=none",
            "scaling=constant",
            metric="steps_to_target",
            mechanism="feature_oscillation",
            outcome=(
                "no evidence: 194.0 to 200.0, difference 6 (95 % interval -5.11 to 17.1), n=5; feature "
                "oscillation 0.0594 to 0.0605"
            ),
        ),
    ),
)
