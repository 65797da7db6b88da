"""The three structured linear layers of a feed-forward block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import UsageError
from trimtab.layers.structured._guided import GuidedLinear, polar
from trimtab.layers.structured._linear import (
    block_diagonal,
    block_shuffle,
    factorize,
    project_block_shuffle,
    shuffle_shapes,
    working,
)


class LowRankLinear(GuidedLinear):
    """A linear layer of low rank: y = U V x + b.

    It starts at the truncated SVD of a matrix from N(0, 1 / in_features): U = U_r sqrt(S_r), V = sqrt(S_r) V_r^T.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: 1 to the smaller of the two widths.
        bias: whether to learn b.
        guided_steps: T, steps of self-guided training; 0 for none.
        count_forwards: whether each training forward is a step of it; otherwise `set_guided_step` says the step.
        device: of the parameters.
        dtype: of the parameters.

    Shapes: [..., in] to [..., out].

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> layer = LowRankLinear(8, 6, rank=2)
        >>> sum(p.numel() for p in layer.parameters()), torch.linalg.matrix_rank(layer.weight).tolist()
        (34, 2)

    References:
        Wei et al. 2024, arXiv:2406.16450, section 2.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        guided_steps: int = 0,
        count_forwards: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias=bias,
            guided_steps=guided_steps,
            count_forwards=count_forwards,
            device=device,
            dtype=dtype,
        )
        if not 1 <= rank <= min(in_features, out_features):
            raise UsageError(f"rank must be 1 to {min(in_features, out_features)}, the smaller width, got {rank}.")
        self.v = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.u = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        dense = torch.empty(out_features, in_features, device=device, dtype=dtype)
        self.project_(dense.normal_(std=in_features**-0.5))
        self.begin_guidance()

    @torch.no_grad()
    def project_(self, weight: Tensor) -> None:
        """Set U V to the best approximation of this rank: the truncated SVD, its singular values shared evenly."""
        u, v = factorize(working(weight), self.v.shape[0])
        self.u.copy_(u)
        self.v.copy_(v)

    def multiply(self, x: Tensor) -> Tensor:
        """Return U V x."""
        return F.linear(F.linear(x, self.v), self.u)


class BlockShuffleLinear(GuidedLinear):
    """A linear layer of two block-diagonal matrices with shuffles between: y = P2 U P1 V x + b.

    Blocks start orthonormal: the polar factors of Gaussian matrices.

    Args:
        in_features: width of the input, a multiple of `blocks`.
        out_features: width of the output, a multiple of `blocks`.
        blocks: of each factor, at least 1.
        bias: whether to learn b.
        guided_steps: T, steps of self-guided training; 0 for none.
        count_forwards: whether each training forward is a step of it; otherwise `set_guided_step` says the step.
        device: of the parameters.
        dtype: of the parameters.

    Shapes: [..., in] to [..., out].

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> layer = BlockShuffleLinear(8, 4, 2, bias=False)
        >>> [tuple(p.shape) for p in layer.parameters()]
        [(2, 2, 4), (2, 2, 2)]

    References:
        Wei et al. 2024, arXiv:2406.16450, section 2; Dao et al. 2022, arXiv:2204.00595.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: int = 2,
        *,
        bias: bool = True,
        guided_steps: int = 0,
        count_forwards: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias=bias,
            guided_steps=guided_steps,
            count_forwards=count_forwards,
            device=device,
            dtype=dtype,
        )
        if blocks < 1 or in_features % blocks or out_features % blocks:
            raise UsageError(
                f"blocks must divide both widths, got {blocks} for {in_features} and {out_features}: use MonarchLinear."
            )
        first, second = shuffle_shapes(in_features, out_features, blocks)
        self.v = nn.Parameter(polar(torch.empty(first, device=device, dtype=dtype).normal_()))
        self.u = nn.Parameter(polar(torch.empty(second, device=device, dtype=dtype).normal_()))
        self.begin_guidance()

    @torch.no_grad()
    def project_(self, weight: Tensor) -> None:
        """Set the factors to the best approximation: a truncated SVD for each pair of blocks."""
        first, second = tuple(self.v.shape), tuple(self.u.shape)
        v, u = project_block_shuffle(working(weight), first, second)  # type: ignore[arg-type]
        self.v.copy_(v)
        self.u.copy_(u)

    def multiply(self, x: Tensor) -> Tensor:
        """Return P2 U P1 V x."""
        return block_shuffle(x, self.v, self.u)


class BlockDenseLinear(GuidedLinear):
    """A linear layer of a block-diagonal and a dense matrix: y = U V x + b.

    Both start orthonormal: the polar factors of Gaussian matrices.

    Args:
        in_features: width of the input, a multiple of `blocks`.
        out_features: width of the output.
        rank: width between the two, a multiple of `blocks`; each block has rank / blocks rows, at most the smaller of
            its columns and the output's width.
        blocks: of the first factor, at least 1.
        bias: whether to learn b.
        guided_steps: T, steps of self-guided training; 0 for none.
        count_forwards: whether each training forward is a step of it; otherwise `set_guided_step` says the step.
        device: of the parameters.
        dtype: of the parameters.

    Shapes: [..., in] to [..., out].

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> layer = BlockDenseLinear(8, 6, rank=4, bias=False)
        >>> [tuple(p.shape) for p in layer.parameters()]
        [(2, 2, 4), (6, 4)]

    References:
        Wei et al. 2024, arXiv:2406.16450, section 2.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        blocks: int = 2,
        *,
        bias: bool = True,
        guided_steps: int = 0,
        count_forwards: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias=bias,
            guided_steps=guided_steps,
            count_forwards=count_forwards,
            device=device,
            dtype=dtype,
        )
        if blocks < 1 or in_features % blocks or rank % blocks:
            raise UsageError(f"blocks must divide in_features and rank, got {blocks} for {in_features} and {rank}.")
        if not 1 <= rank // blocks <= min(in_features // blocks, out_features):
            limit = blocks * min(in_features // blocks, out_features)
            raise UsageError(f"rank must be {blocks} to {limit}, as a block has no more, got {rank}.")
        first = torch.empty(blocks, rank // blocks, in_features // blocks, device=device, dtype=dtype)
        second = torch.empty(out_features, rank, device=device, dtype=dtype)
        self.v = nn.Parameter(polar(first.normal_()))
        self.u = nn.Parameter(polar(second.normal_()))
        self.begin_guidance()

    @torch.no_grad()
    def project_(self, weight: Tensor) -> None:
        """Set the factors to the best approximation: a truncated SVD of the columns of each block."""
        blocks, rank, columns = self.v.shape
        weight_KOP = working(weight).view(self.out_features, blocks, columns).transpose(0, 1)
        u_KOR, v_KRP = factorize(weight_KOP, rank)
        self.v.copy_(v_KRP)
        self.u.copy_(u_KOR.transpose(0, 1).reshape(self.u.shape))

    def multiply(self, x: Tensor) -> Tensor:
        """Return U V x."""
        return F.linear(block_diagonal(x, self.v), self.u)
