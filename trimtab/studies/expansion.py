"""A model grown from a small one without loss against one trained from scratch, on the same multiplications."""

from __future__ import annotations

from torch import nn

from trimtab.errors import UsageError, choose
from trimtab.layers import lossless_expand
from trimtab.studies._text import Trainer, build, held_out_loss, multiplications
from trimtab.workloads.lm import LanguageModel

_SMALL, _LARGE = (32, 2), (64, 4)
_HEAD_WIDTH = 16


def growth(
    seed: int, *, start: str = "scratch", small: float = 0.5, budget: int = 50, lr: float = 0.01
) -> dict[str, float]:
    """Train a language model of width 64 and 4 blocks on the multiplications of `budget` steps.

    The expanded one spends a share of them on a model of width 32 and 2 blocks, with a schedule to its end, then begins
    anew with the usual largest learning rate and a schedule for what is left, as the paper advises.

    Args:
        seed: of weights and batches.
        start: `"scratch"`, or `"expanded"` from the small model.
        small: share of the multiplications that go to the small model, between 0 and 1.
        budget: steps of the large model in all.
        lr: largest learning rate.

    Returns:
        Test `loss`; `bump`, how far the loss is above the small model's right after the expansion; `early_loss`, the
        mean training loss of the large model's first tenth.
    """
    choose("start", start, ("scratch", "expanded"))
    if not 0 < small < 1:
        raise UsageError(f"small must be between 0 and 1, got {small}.")
    bump, offset, steps = 0.0, 0, budget
    model = _build(seed, *_LARGE)
    if start == "expanded":
        little = _build(seed, *_SMALL)
        offset = round(small * budget * _cost(model) / _cost(little))
        trainer = Trainer(little, seed, offset, lr)
        for _ in range(offset):
            trainer.step()
        before = held_out_loss(little)
        model = lossless_expand(little, width=_LARGE[0], depth=_LARGE[1], seed=seed)
        bump = held_out_loss(model) - before
        steps = round((1 - small) * budget)
    trainer = Trainer(model, seed, steps, lr, offset)
    for _ in range(steps):
        trainer.step()
    return {"loss": held_out_loss(model), "bump": bump, "early_loss": trainer.mean(0, max(1, steps // 10))}


def _build(seed: int, width: int, layers: int) -> LanguageModel:
    return build(seed, width, layers, width // _HEAD_WIDTH)


def _cost(model: LanguageModel) -> int:
    linear = sum(part.weight.numel() for part in model.blocks.modules() if isinstance(part, nn.Linear))
    return multiplications(model, linear)
