"""Sinkhorn attention: attention whose rows and columns both sum to 1.

A softmax normalises what each query gives; nothing keeps all of them from giving it to the same key. Sinkformers
(Sander et al. 2022, arXiv:2110.11773) alternate the normalisation of rows and of columns, Sinkhorn's algorithm, which
converges to the doubly stochastic matrix nearest to exp(C / eps) in relative entropy:

    K^0 = exp(C / eps), C = q k / sqrt(K);   K^(l+1) = K^l / row sums (l even), / column sums (l odd)

One step is the softmax. Computed in the log domain, where a step is a log-softmax, in float32 or better. Authors' code:
michaelsdr/sinkformers, vit-pytorch/vit_pytorch/sinkhorn.py.

Shape suffixes: B batch, L length, D width, H heads, K width of a head.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.layers._self_attention import ConvertedAttention, revert_all
from trimtab.layers.attention._doubly_stochastic import check_not_causal, convert_encoders

__all__ = ["SinkhornAttention", "sinkhorn"]


def sinkhorn(logits: Tensor, *, n_iters: int = 3, eps: float = 1.0) -> Tensor:
    """Return the matrix that Sinkhorn's steps make of exp(logits / eps), in float32 or better.

    Args:
        logits: [..., L, L].
        n_iters: steps; odd ones (the first, the third, ...) normalise rows, even ones columns. At least 1.
        eps: temperature, above 0.

    Returns:
        [..., L, L]: rows sum to 1 after an odd number of steps, columns after an even one, both in the limit.

    Raises:
        UsageError: if an argument breaks its rule, or the matrices are not square.

    Example:
        >>> sinkhorn(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), n_iters=20)  # e / (e + 1) and 1 / (e + 1)
        tensor([[0.7311, 0.2689],
                [0.2689, 0.7311]])

    References:
        Sander et al. 2022, arXiv:2110.11773, section 2.
    """
    _check(n_iters, eps)
    if logits.ndim < 2 or logits.shape[-1] != logits.shape[-2]:
        raise UsageError(f"a doubly stochastic matrix is square, got {tuple(logits.shape)}: use softmax attention.")
    log_k = logits.to(torch.promote_types(logits.dtype, torch.float32)) / eps
    for step in range(n_iters):
        log_k = torch.log_softmax(log_k, dim=-1 if step % 2 == 0 else -2)
    return log_k.exp()


class SinkhornAttention(ConvertedAttention):
    """Self-attention with Sinkhorn's steps in place of the softmax; it sees everything, as an encoder does.

    Args:
        width: D, a multiple of `heads`.
        heads: H.
        bias: whether the projections have biases.
        n_iters: steps of `sinkhorn`; 1 is the softmax.
        eps: temperature, above 0.

    Shapes: [B, L, D] to [B, L, D].

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> SinkhornAttention(8, 2)(torch.ones(1, 3, 8)).shape
        torch.Size([1, 3, 8])

    References:
        Sander et al. 2022, arXiv:2110.11773.
    """

    parts: ClassVar[tuple[str, ...]] = ("n_iters", "eps")
    n_iters: int
    eps: float

    def __init__(self, width: int, heads: int, *, bias: bool = False, n_iters: int = 3, eps: float = 1.0) -> None:
        super().__init__(width, heads, causal=False, bias=bias)
        self.setup(n_iters=n_iters, eps=eps)

    def setup(self, *, n_iters: int = 3, eps: float = 1.0) -> None:
        """Keep the options.

        Raises:
            UsageError: if one breaks its rule, or the attention is causal.
        """
        _check(n_iters, eps)
        check_not_causal("sinkhorn-attention", {"this attention": self})
        self.n_iters, self.eps = n_iters, eps

    def attend(self, q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, x_BLD: Tensor) -> Tensor:
        """Return the heads' outputs, [B, H, L, K]."""
        logits_BHLL = q_BHLK @ k_BHLK.transpose(-2, -1) / math.sqrt(self.head_dim)
        p_BHLL = sinkhorn(logits_BHLL, n_iters=self.n_iters, eps=self.eps)
        return p_BHLL.to(v_BHLK.dtype) @ v_BHLK

    def extra_repr(self) -> str:
        """Return the options."""
        return f"n_iters={self.n_iters}, eps={self.eps}"


def _check(n_iters: int, eps: float) -> None:
    if n_iters < 1:
        raise UsageError(f"n_iters must be at least 1, got {n_iters}: 1 is the softmax, 3 the authors' default.")
    if not eps > 0:
        raise UsageError(f"eps must be above 0, got {eps}: 1 is the default.")


def _apply(model: torch.nn.Module, *, n_iters: int = 3, eps: float = 1.0) -> dict[str, str]:
    """Normalise every attention that is recognised by Sinkhorn's steps; options as those of `SinkhornAttention`."""
    found = convert_encoders(model, "sinkhorn-attention", SinkhornAttention, n_iters=n_iters, eps=eps)
    return dict.fromkeys(found, f"{n_iters} Sinkhorn steps in place of the softmax, eps = {eps}")


def _remove(model: torch.nn.Module) -> dict[str, str]:
    """Put the softmax back: the structure is as before `apply`."""
    return revert_all(model, SinkhornAttention, "softmax again")


CARD = Card(
    name="sinkhorn-attention",
    room="layers",
    summary="doubly stochastic attention by Sinkhorn's algorithm: every token is attended to as much as it attends",
    paper=Paper(
        "Sinkformers: Transformers with Doubly Stochastic Attention",
        2022,
        arxiv="2110.11773",
        code="https://github.com/michaelsdr/sinkformers",
    ),
    equation="K^0 = exp(q k / (sqrt(K) eps)); K^(l+1) = K^l / its row sums (l even) or column sums (l odd); A = K^n",
    claim=(
        "Better accuracy than softmax attention in ViTs (MNIST, cats and dogs), on ModelNet 40 and in sentiment "
        "analysis; in small ViTs also less variance between runs (Born et al. 2025, arXiv:2504.16275)."
    ),
    acts_on="model",
    entry="trimtab.layers.attention.sinkhorn_attention:SinkhornAttention",
    treats={"attention-entropy-collapse": 5, "rank-collapse": 2, "attention-sink": 4},
    defaults=(
        Default("n_iters", 3, "authors' code, vit.py: max_iter=3 of Attention, where rows and columns count apart"),
        Default("eps", 1.0, "authors' code, vit.py: eps=1"),
        Default("bias", False, "authors' code, vit.py: to_qkv without bias"),
    ),
    verified={
        "equation": (
            "tests/layers/attention/test_sinkhorn_attention.py::test_equals_scaling_in_plain_loops",
            "tests/layers/attention/test_sinkhorn_attention.py::test_rows_and_columns_sum_to_one",
        ),
        "reference": ("tests/layers/attention/test_sinkhorn_attention.py::test_equals_the_dual_updates",),
    },
    deviations=(
        "3 steps (the authors' default) end on the rows, which then sum to 1 exactly; columns do so only roughly. "
        "For 64 random 16 x 16 logits of N(0, 1) the largest error of a column's sum is 0.14 after 3 steps and 3e-6 "
        "after 21; for N(0, 9) it is 1.1, 0.11 and, after 201 steps, 6e-6.",
        "The authors' code stops early once the row update changes by less than 1e-12: here all steps are done.",
        "Not for causal attention, whose only doubly stochastic matrix is the identity.",
    ),
    experiments=(
        Experiment(
            "digits-vit",
            "lr=0.01,steps=400",
            "lr=0.01,steps=400,with=sinkhorn-attention",
            metric="accuracy",
            higher_is_better=True,
            outcome=(
                "no evidence: accuracy 0.893 to 0.852, difference -0.042 (95 % interval -0.103 to +0.020), n=5; "
                "standard deviation over seeds 0.032 to 0.033, so no lower variance either; 14.5 to 15.2 CPU ms a step"
            ),
        ),
    ),
    apply=_apply,
    remove=_remove,
)
