"""Whether a head that has nothing to do looks at the first token, and what windows cost."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trimtab.errors import choose
from trimtab.layers.attention.long_short_attention import windowed_attention
from trimtab.remedy import apply
from trimtab.scalars import to_scalar
from trimtab.studies._fitting import fit
from trimtab.workloads.lm import LanguageModel
from trimtab.workloads.workload import seeded

_TOKENS, _TRIGGERS, _LENGTH = 63, 3, 32


def backcopy(
    seed: int, *, method: str = "none", lr: float = 0.003, steps: int = 400, batch_size: int = 32
) -> dict[str, float]:
    """Train a block with one head on a task for which the head has work at some tokens only, and look for a sink.

    In a sequence that starts with the same token, three tokens are triggers, after which the token before them is
    repeated; after every other token the next one is drawn from a fixed table. The head is needed at triggers, and the
    block's MLP suffices elsewhere: there a softmax head without a gate learns to look at the first token (the
    bigram-backcopy task of Guo et al. 2024, arXiv:2410.13835).

    Sizes, steps and learning rates were kept after a pilot on seed 100 alone, whose outcome was known and favoured the
    gate: a claim's own seeds are the evidence, not the choice of the task.

    Args:
        seed: of the initial weights, the table and the sequences.
        method: name of a method that acts on models and keeps the softmax of q k / sqrt(K), or `"none"`.
        lr: of Adam, falling along half a cosine.
        steps: optimizer steps.
        batch_size: sequences of 32 tokens a step.

    Returns:
        On 256 new sequences: `loss`, the mean cross-entropy (at most that of the first batch); `trigger_loss`, that at
        triggers alone; `first_token_share`, the mean weight that queries which are no triggers, from the third on, give
        the first token; `activation_ratio`, the largest entry of the residual stream over its median one.
    """
    generator = torch.Generator().manual_seed(seed)
    table = (2 * torch.randn(_TOKENS, _TOKENS, generator=generator)).softmax(-1)
    with seeded(seed):
        model = LanguageModel(64, _LENGTH, layers=1, heads=1)
        if method != "none":
            apply(model, method)

    def loss_at(step: int) -> Tensor:
        tokens = _sequences(table, batch_size, torch.Generator().manual_seed(seed * 1_000_003 + step))
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    start = fit(model.parameters(), loss_at, steps=steps, lr=lr)[0]
    tokens = _sequences(table, 256, generator)
    found = _look(model, tokens)
    return {name: value if math.isfinite(value) else _worst(name, start) for name, value in found.items()}


def _sequences(table: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw sequences, [count, L + 1]: token 0 first, then tokens from 1 on, of which the first three are triggers."""
    tokens = torch.zeros(count, _LENGTH + 1, dtype=torch.long)
    tokens[:, 1] = torch.randint(_TRIGGERS, _TOKENS, (count,), generator=generator) + 1
    for place in range(2, _LENGTH + 1):
        last = tokens[:, place - 1]
        drawn = torch.multinomial(table[last - 1], 1, generator=generator).squeeze(1) + 1
        tokens[:, place] = torch.where(last <= _TRIGGERS, tokens[:, place - 2], drawn)
    return tokens


@torch.no_grad()
def _look(model: LanguageModel, tokens: Tensor) -> dict[str, float]:
    """Return the losses of a model of one block, and what its attention does."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    block = model.blocks[0]
    attention: Any = block.attention
    streams: list[Tensor] = []
    products: list[Tensor] = []
    attend = attention.attend

    def seen(q_BHLK: Tensor, k_BHLK: Tensor, *rest: Tensor) -> Tensor:
        products.append(q_BHLK @ k_BHLK.transpose(-2, -1) / math.sqrt(attention.head_dim))
        return attend(q_BHLK, k_BHLK, *rest)

    attention.attend = seen
    handle = block.register_forward_hook(lambda _, args, output: streams.append(output))
    try:
        losses_BL = F.cross_entropy(model(inputs).transpose(1, 2), targets, reduction="none")
    finally:
        del attention.attend
        handle.remove()
    future_LL = torch.ones(products[0].shape[-2:], dtype=torch.bool).triu(1)
    first_BL = products[0].masked_fill(future_LL, -math.inf).softmax(-1)[:, 0, :, 0]
    trigger_BL = (inputs > 0) & (inputs <= _TRIGGERS)
    idle_BL = ~trigger_BL & (torch.arange(inputs.shape[1]) >= 2)
    return {
        "loss": to_scalar(losses_BL.mean()),
        "trigger_loss": to_scalar(losses_BL[trigger_BL].mean()),
        "first_token_share": to_scalar(first_BL[idle_BL].mean()),
        "activation_ratio": to_scalar(streams[0].abs().amax() / streams[0].abs().median()),
    }


def _worst(name: str, start: float) -> float:
    """Return what a number that is not finite counts as: the first loss, all of the weight, the largest float32."""
    return {"first_token_share": 1.0, "activation_ratio": torch.finfo(torch.float32).max}.get(name, start)


def windows(
    seed: int, *, core: str = "chunks", length: int = 1024, window: int = 32, repeats: int = 20
) -> dict[str, float]:
    """Compute windowed attention of 8 heads of width 32, forward and backward, in chunks or under a mask.

    Args:
        seed: of queries, keys and values.
        core: `"chunks"` or `"mask"`, full attention under the band.
        length: L.
        window: keys that a query sees.
        repeats: how often, for the CPU seconds that a comparison records.

    Returns:
        `gigaflops` of one computation, counted; `difference`, the largest one of the outputs from the mask's.
    """
    choose("core", core, ("chunks", "mask"))
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 8, length, 32, generator=generator).requires_grad_() for _ in range(3))
    i, j = torch.arange(length)[:, None], torch.arange(length)
    band = (j <= i) & (i - j < window)

    def compute(chosen: str) -> Tensor:
        if chosen == "chunks":
            return windowed_attention(q, k, v, window=window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=band)

    for _ in range(repeats):
        compute(core).sum().backward()
    with torch.no_grad():
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            FlopCounterMode(display=False) as counted,
        ):
            found = compute(core)
        difference = to_scalar((found - compute("mask")).abs().max())
    return {"gigaflops": counted.get_total_flops() / 1e9, "difference": difference}
