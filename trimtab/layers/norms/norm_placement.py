"""Where a residual block normalises: one option for pre-, post-, sandwich-, Peri-LN and residual post-norm.

With sublayer f and norm N, the placements are

    pre:       x + f(N(x))        Xiong et al. 2020 (arXiv:2002.04745)
    post:      N(x + f(x))        Vaswani et al. 2017 (arXiv:1706.03762)
    sandwich:  x + N(f(N(x)))     CogView, Ding et al. 2021 (arXiv:2105.13290)
    peri:      x + N(f(N(x)))     Kim et al. 2025 (arXiv:2502.02732)
    res-post:  x + N(f(x))        Swin V2, Liu et al. 2021 (arXiv:2111.09883); OLMo 2

A stack adds what the blocks leave over: a norm behind the last block where the residual stream is not normalised (all
but post), and for Peri-LN a norm of the embedding, which is what tells it from sandwich-LN.

Shape suffixes: B batch, L length, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from trimtab.errors import UsageError, choose

__all__ = ["ResidualBlock", "ResidualStack"]

_BEFORE = ("pre", "sandwich", "peri")
_AFTER = ("sandwich", "peri", "res-post")
_PLACEMENTS = ("pre", "post", "sandwich", "peri", "res-post")


class ResidualBlock(nn.Module):
    """A sublayer with its residual connection and norms, x + N(f(N(x))) for `norm_placement="peri"`.

    Args:
        width: D, at least 1.
        sublayer: f: maps [..., D] to [..., D]; a tuple's first part counts, as attention modules return.
        norm_placement: `"pre"`, `"post"`, `"sandwich"`, `"peri"` or `"res-post"`: see the module's equations.
        norm: makes a norm of a width: `nn.LayerNorm`, `nn.RMSNorm`, or a function of your own.

    Shapes: [..., D] -> [..., D].

    Attributes:
        input_norm: N in front of the sublayer; the identity where the placement has none.
        output_norm: N behind the sublayer, inside the branch; the identity where the placement has none.
        stream_norm: N behind the sum, for post; otherwise the identity.

    Raises:
        UsageError: if the placement is unknown or the width is below 1.

    Example:
        >>> import torch
        >>> block = ResidualBlock(4, nn.Linear(4, 4), "res-post")
        >>> x = torch.zeros(1, 4)
        >>> y = block(x)
        >>> [round(v, 2) for v in (y.mean().item(), y.var(correction=0).item())]
        [0.0, 1.0]

    References:
        Kim et al. 2025, arXiv:2502.02732, section 3.
    """

    def __init__(
        self,
        width: int,
        sublayer: nn.Module,
        norm_placement: str = "peri",
        *,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        _check(norm_placement, width)
        self.norm_placement = norm_placement
        self.input_norm = norm(width) if norm_placement in _BEFORE else nn.Identity()
        self.sublayer = sublayer
        self.output_norm = norm(width) if norm_placement in _AFTER else nn.Identity()
        self.stream_norm = norm(width) if norm_placement == "post" else nn.Identity()

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return the block's output; what follows `x` is handed to the sublayer."""
        branch = self.sublayer(self.input_norm(x), *args, **options)
        if isinstance(branch, tuple):
            branch = branch[0]
        return self.stream_norm(x + self.output_norm(branch))

    def extra_repr(self) -> str:
        """Return the placement."""
        return f"norm_placement={self.norm_placement!r}"


class ResidualStack(nn.Module):
    """Residual blocks in a row, with the norms that a placement wants before the first and behind the last.

    Args:
        width: D, at least 1.
        sublayers: f of each block, in order.
        norm_placement: that of every block.
        norm: makes a norm of a width.
        embedding_norm: whether to normalise what comes in; by default only for `"peri"`, where the paper has it as
            optional.

    Shapes: [..., D] -> [..., D].

    Raises:
        UsageError: if the placement is unknown, the width is below 1 or there is no sublayer.

    Example:
        >>> stack = ResidualStack(4, [nn.Linear(4, 4) for _ in range(2)], "post")
        >>> type(stack.embedding_norm).__name__, len(stack.blocks), type(stack.final_norm).__name__
        ('Identity', 2, 'Identity')
    """

    def __init__(
        self,
        width: int,
        sublayers: Iterable[nn.Module],
        norm_placement: str = "peri",
        *,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        embedding_norm: bool | None = None,
    ) -> None:
        super().__init__()
        _check(norm_placement, width)
        first = norm_placement == "peri" if embedding_norm is None else embedding_norm
        self.embedding_norm = norm(width) if first else nn.Identity()
        self.blocks = nn.ModuleList(ResidualBlock(width, part, norm_placement, norm=norm) for part in sublayers)
        if not len(self.blocks):
            raise UsageError("a stack needs at least one sublayer, got none.")
        self.final_norm = nn.Identity() if norm_placement == "post" else norm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the last block, normalised."""
        x = self.embedding_norm(x)
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)


def _check(norm_placement: str, width: int) -> None:
    choose("norm placement", norm_placement, _PLACEMENTS)
    if width < 1:
        raise UsageError(f"width must be at least 1, got {width}: give the width of the residual stream.")
