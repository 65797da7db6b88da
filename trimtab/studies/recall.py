"""Associative recall: how much a linear attention holds in a state of fixed size, the task behind its papers' claims.

A sequence tells keys with their values, then asks for the keys again in another order; what is scored is the value of
each key that is asked for. As in multi-query associative recall (Arora et al. 2023, arXiv:2312.04927), but a key and
its value are one place of the sequence, so that only the state is in question and not the binding of neighbours.

All that is told is asked for: nothing is worth forgetting, which is what gates are for. On seed 100 the learning rate
0.01 is the best of 0.005, 0.01 and 0.03 for each of the three mixers; none has finished learning after 200 steps.

Shape suffixes: B batch, L length, D width, P pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import UsageError, choose
from trimtab.layers.linear.gated_delta import GatedDeltaNet
from trimtab.layers.linear.gla import GatedLinearAttention
from trimtab.scalars import to_scalar
from trimtab.studies._fitting import fit, last

_MIXERS = ("linear", "gla", "gated-deltanet")
_WIDTH, _HEADS = 32, 2
_EVALUATED = 512


class _Model(nn.Module):
    """A pre-LN block of a mixer and an MLP of twice the width over places, each a key and a value or a blank."""

    def __init__(self, mixer: str, kinds: int) -> None:
        super().__init__()
        self.keys, self.values = nn.Embedding(kinds, _WIDTH), nn.Embedding(kinds + 1, _WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, 2 * _WIDTH), nn.GELU(), nn.Linear(2 * _WIDTH, _WIDTH)
        )
        self.head = nn.Sequential(nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, kinds))
        # Last: what is before it starts the same whatever the mixer.
        self.mixer = nn.Sequential(nn.LayerNorm(_WIDTH), _mixer(mixer))

    def forward(self, keys_BL: Tensor, values_BL: Tensor) -> Tensor:
        x_BLD = self.keys(keys_BL) + self.values(values_BL)
        x_BLD = x_BLD + self.mixer(x_BLD)
        return self.head(x_BLD + self.mlp(x_BLD))


def _mixer(name: str) -> nn.Module:
    """Return a mixer; all have the same projections, activations, output gate and size of state."""
    if name == "gated-deltanet":
        return GatedDeltaNet(_WIDTH, _HEADS, expand_k=0.5, expand_v=1.0, short_conv=1)
    # Gates of 1: linear attention without forgetting.
    tau = 1e9 if name == "linear" else 16.0
    return GatedLinearAttention(_WIDTH, _HEADS, short_conv=1, tau=tau)


def _sequences(generator: torch.Generator, count: int, pairs: int, kinds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys and values, [B, 2 P], the second half blank and in another order, and the answers there, [B, P]."""
    told_BP = torch.rand(count, kinds, generator=generator).argsort(1)[:, :pairs]
    values_BP = torch.randint(kinds, (count, pairs), generator=generator)
    order_BP = torch.rand(count, pairs, generator=generator).argsort(1)
    keys = torch.cat([told_BP, told_BP.gather(1, order_BP)], 1)
    return keys, torch.cat([values_BP, torch.full_like(values_BP, kinds)], 1), values_BP.gather(1, order_BP)


def recall(
    seed: int, *, mixer: str = "gla", lr: float = 0.01, steps: int = 200, pairs: int = 12, kinds: int = 32
) -> dict[str, float]:
    """Train a one-layer model on recall and score it on sequences it has not seen.

    Args:
        seed: of data and initial weights.
        mixer: `"linear"` (GLA with all gates at 1), `"gla"` or `"gated-deltanet"`.
        lr: learning rate of the first step.
        steps: of 32 sequences.
        pairs: pairs of a sequence, P; a head's state has keys of width 8.
        kinds: different keys, at least `pairs`, and different values.

    Returns:
        `accuracy`: share of the values asked for that the model puts first; `loss` there, in nats; `train_loss` over
        the last tenth of the steps; `parameters` of the model.

    Raises:
        UsageError: if an option breaks its rule.
    """
    choose("mixer", mixer, _MIXERS)
    if not 1 <= pairs <= kinds:
        raise UsageError(f"pairs must be from 1 to kinds = {kinds}, got {pairs}.")
    torch.manual_seed(seed)
    model = _Model(mixer, kinds)

    def logits_and_answers(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        keys, values, answers = _sequences(generator, count, pairs, kinds)
        return model(keys, values)[:, pairs:].flatten(0, 1), answers.flatten()

    def loss_at(step: int) -> Tensor:
        return F.cross_entropy(*logits_and_answers(torch.Generator().manual_seed(seed * 1_000_003 + step), 32))

    losses = fit(model.parameters(), loss_at, steps=steps, lr=lr)
    with torch.no_grad():
        logits, answers = logits_and_answers(torch.Generator().manual_seed(seed * 1_000_003 - 1), _EVALUATED)
        logits = logits.nan_to_num(0.0)
        return {
            "accuracy": to_scalar((logits.argmax(-1) == answers).double().mean()),
            "loss": to_scalar(F.cross_entropy(logits, answers).clamp(max=100.0)),
            "train_loss": last(losses),
            "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
        }
