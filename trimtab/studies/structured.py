"""Structured linear layers against dense ones, every arm with the same number of multiplications."""

from __future__ import annotations

from torch import nn

from trimtab.errors import UsageError, choose
from trimtab.layers import BlockDenseLinear, BlockShuffleLinear, LowRankLinear, MonarchLinear, finish_guidance
from trimtab.remedy import apply
from trimtab.studies._text import Trainer, build, held_out_loss, multiplications
from trimtab.workloads.lm import LanguageModel
from trimtab.workloads.workload import seeded

_WIDTH, _LAYERS, _HEADS = 64, 3, 4
_FFN = {"low-rank": {"rank": 16}, "block-shuffle": {"blocks": 4}, "block-dense": {"rank": 24, "blocks": 4}}
_STRUCTURED = (LowRankLinear, BlockShuffleLinear, BlockDenseLinear, MonarchLinear)


def language_model(
    seed: int, *, layers: str = "dense", guided: float = 0.0, budget: int = 50, lr: float = 0.01
) -> dict[str, float]:
    """Train a small language model on as many multiplications as `budget` steps of the dense one take.

    The feed-forward layers have about 32 % of the dense weights (rank a quarter of the width, 4 blocks), the paper's
    smaller setting, with the first block dense; Monarch layers, of 4 blocks, take the place of all linear layers but
    the head and start anew.

    Args:
        seed: of weights and batches.
        layers: `"dense"`, `"low-rank"`, `"block-shuffle"`, `"block-dense"` or `"monarch"`.
        guided: share of the steps with a dense branch, whose multiplications count.
        budget: steps of the dense model.
        lr: largest learning rate.

    Returns:
        Test `loss`; `early_loss`, the mean training loss of the first tenth of `budget` steps, which the warm-up of a
        schedule with fewer steps lowers by itself; `steps` taken; `share` of the dense model's multiplications that a
        step takes without guidance.
    """
    choose("kind of layers", layers, ("dense", "monarch", *_FFN))
    if not 0 <= guided <= 1 or (guided and layers not in _FFN):
        raise UsageError(f"guided must be 0 to 1, and 0 for {layers} layers, got {guided}.")
    full = multiplications(*_model(seed, "dense", 0))
    plain = multiplications(*_model(seed, layers, 0))
    model, _ = _model(seed, layers, 1)
    # A guided step takes on top of the factors what the dense layers that they replace took.
    branch = sum(part.in_features * part.out_features for part in model.modules() if isinstance(part, _STRUCTURED))
    steps = round(budget * full / (plain + guided * branch))
    guided_steps = round(guided * steps)
    model, _ = _model(seed, layers, guided_steps)
    trainer = Trainer(model, seed, steps, lr)
    for step in range(steps):
        if guided_steps and step == guided_steps:
            finish_guidance(model)
        trainer.step()
    early = max(1, budget // 10)
    return {
        "loss": held_out_loss(model),
        "early_loss": trainer.mean(0, early),
        "steps": float(steps),
        "share": plain / full,
    }


def _model(seed: int, layers: str, guided_steps: int) -> tuple[LanguageModel, int]:
    """Return the model, and the multiplications of a token in its linear layers but the head, without guidance."""
    model = build(seed, _WIDTH, _LAYERS, _HEADS)
    with seeded(seed):
        if layers == "monarch":
            apply(model, "monarch", init="uniform")
        elif layers in _FFN:
            apply(model, "structured-ffn", kind=layers, guided_steps=guided_steps, **_FFN[layers])
    total = sum(part.factor_count() for part in model.modules() if isinstance(part, _STRUCTURED))
    total += sum(part.weight.numel() for part in model.blocks.modules() if isinstance(part, nn.Linear))
    return model, total
