"""QK-norm: normalise queries and keys in every head before their dot product.

Attention logits q·k / sqrt(K) grow without bound when the norms of q and k do; the softmax then saturates and training
diverges. A LayerNorm over the width of the head bounds them by sqrt(K) times the product of the norms' gains:

    A = softmax( LN(q) · LN(k) / sqrt(K) ) v

Dehghani et al. 2023 (ViT-22B, arXiv:2302.05442) and Wortsman et al. 2023 (arXiv:2309.14322). The older "QKNorm" of
Henry et al. 2020 (arXiv:2010.04245) is another method: it divides q and k by their l2 norms and learns one scale in
place of 1/sqrt(K).

Shape suffixes: H heads, K width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError, choose
from trimtab.layers._attention_sites import LOOKED_FOR, Site, attention_sites, has_normalized_attention
from trimtab.layers._multihead import QKNormMultiheadAttention

__all__ = ["QKNorm", "QKNormMultiheadAttention"]

_KINDS = {"layer": "LayerNorm", "rms": "RMSNorm"}


class QKNorm(nn.Module):
    """Normalise each head of queries or keys: LN(x) = gain * (x - mean) / sqrt(variance + eps), over the head's width.

    Heads share one gain, as in Flax's `normalize_qk`. Statistics are taken in float32 or better, and the result has the
    input's dtype, under autocast too.

    Args:
        head_dim: K, width of one head.
        kind: `"layer"` (LayerNorm) or `"rms"` (RMSNorm: no mean is subtracted).
        eps: added to the variance, above 0.
        bias: whether to learn an offset too; LayerNorm only.
        device: of the parameters.
        dtype: of the parameters.

    Shapes: [..., K] with heads split, or [..., H * K] with heads side by side; the result has the input's shape.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> q = torch.tensor([[1.0, 3.0, 10.0, 30.0]])  # two heads of width 2
        >>> [round(x, 3) for x in QKNorm(head_dim=2)(q)[0].tolist()]
        [-1.0, 1.0, -1.0, 1.0]

    References:
        Dehghani et al. 2023, arXiv:2302.05442, section 2.
    """

    def __init__(
        self,
        head_dim: int,
        kind: str = "layer",
        *,
        eps: float = 1e-6,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        choose("kind of norm", kind, _KINDS)
        if head_dim < 1:
            raise UsageError(f"head_dim must be at least 1, got {head_dim}: give the width of one attention head.")
        if not eps > 0:
            raise UsageError(f"eps must be above 0, got {eps}: 1e-6 is the default.")
        if bias and kind == "rms":
            raise UsageError("RMSNorm has no bias: use kind='layer' or bias=False.")
        self.head_dim, self.kind, self.eps = head_dim, kind, eps
        self.weight = nn.Parameter(torch.ones(head_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(head_dim, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised heads, in the input's shape and dtype."""
        heads = x if x.shape[-1] == self.head_dim else x.unflatten(-1, (-1, self.head_dim))
        heads = heads.to(torch.promote_types(x.dtype, self.weight.dtype))
        if self.kind == "layer":
            y = F.layer_norm(heads, (self.head_dim,), self.weight, self.bias, self.eps)
        else:
            y = F.rms_norm(heads, (self.head_dim,), self.weight, self.eps)
        return y.reshape(x.shape).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.head_dim}, kind={self.kind!r}, eps={self.eps}, bias={self.bias is not None}"


class _FusedQKNorm(nn.Module):
    """QK-norm on the output [..., q | k | v] of a fused projection; v stays as it is."""

    def __init__(self, query: QKNorm, key: QKNorm) -> None:
        super().__init__()
        self.query, self.key = query, key

    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.chunk(3, dim=-1)
        return torch.cat([self.query(q), self.key(k), v], dim=-1)


def _normalize_output(projection: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Forward hook of a projection: a hook, unlike another class, composes with parametrizations, LoRA and FSDP."""
    return projection.qk_norm(output)  # type: ignore[operator]


def _apply(model: nn.Module, *, kind: str = "layer", eps: float = 1e-6, bias: bool = False) -> dict[str, str]:
    """Normalise the queries and keys of every attention module that is recognised; options as those of `QKNorm`."""
    sites = attention_sites(model)
    if not sites:
        found = "all of its attention is normalised already" if has_normalized_attention(model) else "none was found"
        raise UsageError(
            f"qk-norm: no attention to change in {type(model).__name__}, {found}. Looked for {LOOKED_FOR}."
        )
    for site in sites:
        if hasattr(site.like, "full_tensor"):
            raise UsageError(f"qk-norm: {site.name!r} is sharded already: apply it before fully_shard.")
        if site.kind == "multihead" and type(site.module) is not nn.MultiheadAttention:
            raise UsageError(
                f"qk-norm: {site.name!r} is a {type(site.module).__name__}: apply qk-norm before parametrizations."
            )
    for site in sites:
        _change(
            site,
            *(
                QKNorm(site.head_dim, kind, eps=eps, bias=bias, device=site.like.device, dtype=site.like.dtype)
                for _ in range(2)
            ),
        )
    changed = {id(site.module) for site in sites}
    for module in model.modules():
        # Its nested-tensor path, chosen when it was built, relies on the fused inference path of its layers.
        if isinstance(module, nn.TransformerEncoder) and any(id(part) in changed for part in module.modules()):
            module.use_nested_tensor = False
    what = f"{_KINDS[kind]} over each head of queries and keys, head_dim = "
    return {site.name: f"{what}{site.head_dim}" for site in sites}


def _change(site: Site, q_norm: QKNorm, k_norm: QKNorm) -> None:
    if site.kind == "slots":
        setattr(site.module, site.query, q_norm)
        setattr(site.module, site.key, k_norm)
    elif site.kind == "multihead":
        QKNormMultiheadAttention.convert(site.module, q_norm, k_norm)  # type: ignore[arg-type]
    elif site.kind == "fused":
        _attach(getattr(site.module, site.query), _FusedQKNorm(q_norm, k_norm))
    else:
        _attach(getattr(site.module, site.query), q_norm)
        _attach(getattr(site.module, site.key), k_norm)


def _attach(projection: nn.Module, norm: nn.Module) -> None:
    projection.add_module("qk_norm", norm)
    projection.register_forward_hook(_normalize_output)


def _remove(model: nn.Module) -> dict[str, str]:
    """Take the norms out again: the structure is as before `apply`, the function is that without QK-norm."""
    changes: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, QKNormMultiheadAttention):
            if type(module) is not QKNormMultiheadAttention:
                raise UsageError(f"qk-norm: {name!r} is a {type(module).__name__}: remove its parametrizations first.")
            module.revert()
            changes[name] = "nn.MultiheadAttention again"
            continue
        for slot in ("q_norm", "k_norm"):
            if isinstance(getattr(module, slot, None), QKNorm):
                setattr(module, slot, nn.Identity())
                changes[name] = "queries and keys are not normalised"
        hooks = [handle for handle, hook in module._forward_hooks.items() if hook is _normalize_output]
        for handle in hooks:
            del module._forward_hooks[handle]
            del module.qk_norm
            changes[name] = "output is not normalised"
    return changes


CARD = Card(
    name="qk-norm",
    room="layers",
    summary="LayerNorm on queries and keys in every head, so that attention logits stay bounded",
    paper=Paper("Scaling Vision Transformers to 22 Billion Parameters", 2023, arxiv="2302.05442"),
    equation="A = softmax( LN(q) · LN(k) / sqrt(head_dim) ) v, with LN over each head's width",
    claim=(
        "Training of an 8B ViT that diverged after a few thousand steps, with very large attention logits and "
        "attention entropy near zero, became stable; in small language models it removes attention-logit growth at "
        "high learning rates and lowers the sensitivity of the final loss to the learning rate (Wortsman et al. 2023)."
    ),
    acts_on="model",
    entry="trimtab.layers.attention.qk_norm:QKNorm",
    treats={"attention-logit-growth": 1, "attention-entropy-collapse": 2},
    defaults=(
        Default("kind", "layer", "paper, section 2: LayerNorm; Flax's MultiHeadDotProductAttention(normalize_qk=True)"),
        Default("eps", 1e-6, "Flax's LayerNorm, which the paper's code base uses"),
        Default("bias", False, "paper, section 2: LayerNorms without bias; Flax's normalize_qk has use_bias=False"),
    ),
    verified={
        "equation": (
            "tests/layers/attention/test_qk_norm.py::test_equals_numpy_layer_norm",
            "tests/layers/attention/test_qk_norm.py::test_logits_are_bounded",
            "tests/layers/test_multihead.py::test_equals_closed_form",
        ),
        "reference": (
            "tests/layers/attention/test_qk_norm_reference.py::test_equals_stablelm",
            "tests/layers/attention/test_qk_norm_reference.py::test_equals_qwen3",
            "tests/layers/attention/test_qk_norm_reference.py::test_equals_phi",
            "tests/layers/test_multihead.py::test_without_norm_equals_torch",
        ),
        "claim": ("tests/claims/test_remedies.py::test_attention_logits_stay_bounded_and_entropy_does_not_collapse",),
    },
    deviations=(
        "ViT-22B's LayerNorms have neither bias nor centering, which makes them RMSNorms; the equation in the paper, "
        "Flax's normalize_qk and Wortsman et al. have a LayerNorm that centers. The default centers; kind='rms' is the "
        "other one.",
        "The l2 variant of Henry et al. 2020 (arXiv:2010.04245) is a different method and is not offered here.",
        "Applied to a trained model it changes the function, as queries and keys lose their norms: it needs training "
        "again.",
    ),
    experiments=(
        Experiment(
            "lm-small",
            "lr=0.1",
            "lr=0.1,with=qk-norm",
            mechanism="attention_max_logit",
            outcome=(
                "better: final loss 2.148 to 1.752, difference -0.396 (95 % interval -0.498 to -0.293), n=5; largest "
                "attention logit 2,160 to 12.9"
            ),
        ),
    ),
    apply=_apply,
    remove=_remove,
)
