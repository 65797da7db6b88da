"""What the linear attentions share: sums of log-gates, a short convolution, a gated norm and the swap into models.

Chunked forms need products of gates over spans, alpha_{j+1} ... alpha_i. As exp(b_i - b_j) with running sums b they
lose their digits to cancellation where gates are small, and are NaN where one is 0; here every exponent is a sum of
log-gates taken over that span alone, so each is at most 0 and as exact as its terms.

Shape suffixes: B batch, L length, D width, H heads, K width of a key, V width of a value, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import UsageError
from trimtab.layers._self_attention import LOOKED_FOR, ConvertedAttention, SelfAttention, attentions


def working(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in the dtype to compute in: float32, or their own where that is wider."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return tuple(tensor.to(dtype) for tensor in tensors)


def prefix_sums(g: Tensor, dim: int) -> Tensor:
    """Return sums of what is before an entry: 0, g_0, g_0 + g_1, ..."""
    nothing = torch.zeros_like(g.narrow(dim, 0, 1))
    return torch.cat([nothing, g.narrow(dim, 0, g.shape[dim] - 1)], dim).cumsum(dim)


def suffix_sums(g: Tensor, dim: int) -> Tensor:
    """Return sums of what is behind an entry: ..., g_{n-2} + g_{n-1}, g_{n-1}, 0."""
    return prefix_sums(g.flip(dim), dim).flip(dim)


def span_sums(g: Tensor, *, inclusive: bool = True) -> Tensor:
    """Return the sums over the spans from j to i: [..., n, K] to [..., n (i), n (j), K].

    Args:
        g: log-gates, n of them.
        inclusive: sum over j < t <= i, for j <= i; else over j < t < i, for j < i. It is -inf for other pairs.
    """
    n = g.shape[-2]
    index = torch.arange(n, device=g.device)
    before = index[:, None] - index[None, :] - (0 if inclusive else 1)
    terms = g if inclusive else g.roll(1, -2)
    terms = torch.where((before > 0)[..., None], terms.unsqueeze(-2), torch.zeros((), dtype=g.dtype, device=g.device))
    return terms.cumsum(-3).masked_fill((before < 0)[..., None], float("-inf"))


def split_chunks(x: Tensor, size: int) -> Tensor:
    """Cut [B, H, L, ...] into [B, H, N, size, ...], the last chunk filled up with zeros; at least one chunk."""
    missing = max(size, -(-x.shape[2] // size) * size) - x.shape[2]
    return F.pad(x, (0, 0) * (x.dim() - 3) + (0, missing)).unflatten(2, (-1, size))


def along(dim: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Give the slices of tensors along a dimension, side by side.

    Taken by index, each slice's gradient would fill a tensor as long as the sequence: cost would grow with its square.
    """
    return zip(*(tensor.unbind(dim) for tensor in tensors), strict=True)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, gates: dict[str, tuple[Tensor, tuple[int, ...]]], chunk: int) -> None:
    """Raise a UsageError unless q, k, v and the gates of a linear attention fit together."""
    if q.dim() != 4 or k.shape != q.shape:
        raise UsageError(f"q and k must share a shape [B, H, L, K], got {tuple(q.shape)} and {tuple(k.shape)}.")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise UsageError(f"v must be [B, H, L, V] with q's B, H and L {tuple(q.shape[:3])}, got {tuple(v.shape)}.")
    for name, (gate, shape) in gates.items():
        if tuple(gate.shape) != shape:
            raise UsageError(f"{name} must have shape {shape}, got {tuple(gate.shape)}.")
    check_chunk(chunk)


def check_chunk(chunk: int) -> None:
    """Raise a UsageError unless a chunk has at least one place."""
    if chunk < 1:
        raise UsageError(f"chunk must be at least 1, got {chunk}: 64 is the default.")


def check_state(state: Tensor | None, like: Tensor, v: Tensor) -> Tensor:
    """Return the state to begin with, [B, H, K, V]: zeros if there is none.

    Raises:
        UsageError: if its shape is another.
    """
    shape = (*like.shape[:2], like.shape[-1], v.shape[-1])
    if state is None:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    if tuple(state.shape) != shape:
        raise UsageError(f"initial_state must have shape [B, H, K, V] = {shape}, got {tuple(state.shape)}.")
    return state.to(like.dtype)


def widths(width: int, heads: int, expand_k: float, expand_v: float) -> tuple[int, int]:
    """Return the widths of all keys and of all values.

    Raises:
        UsageError: if the heads cannot share them evenly.
    """
    if width < 1 or heads < 1:
        raise UsageError(f"width and heads must be at least 1, got {width} and {heads}.")
    found = []
    for name, ratio in (("expand_k", expand_k), ("expand_v", expand_v)):
        total = int(width * ratio)
        if total < 1 or total % heads:
            raise UsageError(
                f"{name} must give a width that {heads} heads share evenly, got {ratio} of {width} = {total}."
            )
        found.append(total)
    return found[0], found[1]


class ShortConvolution(nn.Module):
    """A causal convolution of each channel on its own, then SiLU; its state is the inputs it still has to look at."""

    def __init__(
        self, channels: int, size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if size < 1:
            raise UsageError(f"a short convolution covers at least 1 position, got {size}: 4 is the default.")
        self.conv = nn.Conv1d(channels, channels, size, groups=channels, bias=False, device=device, dtype=dtype)

    def forward(self, x_BLC: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the output, [B, L, C], and the last inputs, [B, size - 1, C]."""
        history = self.conv.kernel_size[0] - 1
        if state is None:
            state = x_BLC.new_zeros(x_BLC.shape[0], history, x_BLC.shape[2])
        seen = torch.cat([state.to(x_BLC.dtype), x_BLC], dim=1)
        if not x_BLC.shape[1]:
            return x_BLC, seen
        y = F.silu(self.conv(seen.transpose(1, 2)).transpose(1, 2)).to(x_BLC.dtype)
        return y, seen[:, seen.shape[1] - history :]


class GatedHeadNorm(nn.Module):
    """RMSNorm over each head, then times swish of a gate: y = RMSNorm(o) * g * sigmoid(g); heads share one gain."""

    def __init__(
        self, head_dim: int, eps: float, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if not eps > 0:
            raise UsageError(f"eps must be above 0, got {eps}: 1e-5 is the default.")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(head_dim, device=device, dtype=dtype))

    def forward(self, o_BHLV: Tensor, gate_BLC: Tensor) -> Tensor:
        """Return the heads [B, H, L, V], normalised and gated; the gate has them side by side, [B, L, H * V]."""
        (o, weight) = working(o_BHLV, self.weight)
        gate = split_heads(gate_BLC, o.shape[1]).to(o.dtype)
        return (F.rms_norm(o, (o.shape[-1],), weight, self.eps) * F.silu(gate)).to(o_BHLV.dtype)


def split_heads(x_BLC: Tensor, heads: int) -> Tensor:
    """Turn [B, L, H * K] into [B, H, L, K]."""
    return x_BLC.unflatten(-1, (heads, x_BLC.shape[-1] // heads)).transpose(1, 2)


def join_heads(x_BHLK: Tensor) -> Tensor:
    """Turn [B, H, L, K] into [B, L, H * K]."""
    return x_BHLK.transpose(1, 2).flatten(-2)


def swap_attention(
    model: nn.Module, name: str, kind: type[ConvertedAttention], what: str, **options: object
) -> dict[str, str]:
    """Turn every causal attention of a model into a `kind`, in place, and say what each became."""
    sites = {path: module for path, module in attentions(model, name).items() if getattr(module, "causal", False)}
    if not sites:
        raise UsageError(
            f"{name}: no causal attention to change in {type(model).__name__}. Looked for {LOOKED_FOR}, with "
            "causal=True."
        )
    for module in sites.values():
        kind.convert(module, **options)
    return dict.fromkeys(sites, what)


def like(module: SelfAttention) -> dict[str, object]:
    """Return device and dtype of an attention's projection, for the parts that a method adds."""
    return {"device": module.qkv.weight.device, "dtype": module.qkv.weight.dtype}
