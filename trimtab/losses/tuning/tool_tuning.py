"""TL-Training: fine-tuning for tool use that drops erroneous tokens and weighs key tokens up.

    w_i  = 0 on erroneous tokens, min(n_other / n_key, w_max) on key tokens where they are fewer, 1 on the others
    loss = sum_i w_i nll_i / sum_i w_i

n_key and n_other count the tokens of one sequence. Key tokens are those that decide which tool is called: the first
token of its name, and those where names of tools part. Ye et al. 2024 (arXiv:2412.15495); authors' code
Junjie-Ye/TL-Training, code/pkt/utils.py. The third part of the method, PPO on categories of errors, is not a loss of
this kind.

Shape suffixes: B sequences, L positions, V classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.losses._reduction import reduce
from trimtab.losses.preference._pairs import check_number
from trimtab.losses.tuning._tokens import check_mask, token_log_probs

__all__ = ["key_token_weights", "tl_training_loss"]


def key_token_weights(
    valid: Tensor,
    *,
    key: Tensor | None = None,
    erroneous: Tensor | None = None,
    max_weight: float = 9.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the weight of each token, [B, L].

    Args:
        valid: which tokens count, boolean, [B, L].
        key: which tokens decide, boolean, [B, L]; none by default.
        erroneous: which tokens belong to a call that failed, boolean, [B, L]; none by default.
        max_weight: bound on the weight of a key token, at least 1.
        dtype: of the weights.

    Returns:
        Weights, [B, L].

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> valid = torch.ones(1, 4, dtype=torch.bool)
        >>> key_token_weights(valid, key=torch.tensor([[True, False, False, False]]))
        tensor([[3., 1., 1., 1.]])
    """
    check_number("max_weight", max_weight, 1)
    valid = check_mask("valid", valid, valid.shape)
    counts = valid if erroneous is None else valid & ~check_mask("erroneous", erroneous, valid.shape)
    weights = counts.to(dtype)
    if key is None:
        return weights
    decisive = counts & check_mask("key", key, valid.shape)
    n_key = decisive.sum(-1, keepdim=True)
    n_other = (counts & ~decisive).sum(-1, keepdim=True)
    weight = (n_other.to(dtype) / n_key.clamp(min=1)).clamp(min=1, max=max_weight)
    return torch.where(decisive, weight, weights)


def tl_training_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    key: Tensor | None = None,
    erroneous: Tensor | None = None,
    max_weight: float = 9.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return sum_i w_i nll_i / sum_i w_i, with the weights of `key_token_weights`.

    Args:
        logits: [B, L, V]; shift before: position i of the logits predicts position i of the targets.
        targets: [B, L], class indices.
        key: which targets decide the call, boolean, [B, L].
        erroneous: which targets belong to a call that failed, boolean, [B, L].
        max_weight: bound on the weight of a key token, at least 1; at 1, with nothing erroneous, it is plain
            fine-tuning.
        ignore_index: target that does not count.
        reduction: `"mean"`, `"sum"` of weighted values, or `"none"`.
        denominator: what the mean divides by in place of the sum of weights; for micro-batches the sum of the whole
            batch.

    Returns:
        A scalar, or [B, L] with reduction `"none"`, in float32 or better. Without any token that counts it is 0.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> loss = tl_training_loss(torch.zeros(1, 2, 4), torch.tensor([[1, 2]]), key=torch.tensor([[True, False]]))
        >>> round(float(loss), 4)  # log 4
        1.3863

    References:
        Ye et al. 2024, arXiv:2412.15495 (https://github.com/Junjie-Ye/TL-Training).
    """
    log_probs, valid = token_log_probs(logits, targets, ignore_index)
    weights = key_token_weights(valid, key=key, erroneous=erroneous, max_weight=max_weight, dtype=log_probs.dtype)
    if reduction == "mean" and denominator is None:
        total = weights.sum()
        denominator = torch.where(total > 0, total, torch.ones_like(total))
    return reduce(-weights * log_probs, None, reduction, denominator)


CARD = Card(
    name="tl-training",
    room="losses",
    summary="fine-tuning for tool use without erroneous tokens and with more weight on those that decide a call",
    paper=Paper(
        "TL-Training: A Task-Feature-Based Framework for Training Large Language Models in Tool Use",
        2024,
        arxiv="2412.15495",
        code="https://github.com/Junjie-Ye/TL-Training",
    ),
    equation="loss = sum w nll / sum w; w = 0 if erroneous, min(n_other / n_key, w_max) if key, else 1",
    claim="Matches or beats open and closed models in tool use with 1,217 training samples.",
    acts_on="loss",
    entry="trimtab.losses.tuning.tool_tuning:tl_training_loss",
    defaults=(
        Default("max_weight", 9.0, "authors' code, code/pkt/finetune.py"),
        Default("reduction", "mean", "authors' code: divided by the sum of weights"),
        Default("ignore_index", -100, "authors' code"),
    ),
    verified={
        "equation": (
            "tests/losses/tuning/test_tool_tuning.py::test_equals_a_plain_loop",
            "tests/losses/tuning/test_tool_tuning.py::test_neutral_settings_are_plain_fine_tuning",
            "tests/losses/tuning/test_contract.py::test_micro_batches_add_up",
        ),
    },
    deviations=(
        "The authors' code leaves tokens that end a parameter out of n_other; here they are other tokens. It finds key "
        "tokens from the text of one tokenizer; here the mask is the caller's.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.fine_tuning:calls",
            "max_weight=1",
            "max_weight=9,drop_errors=true",
            metric="key_error",
            mechanism="other_loss",
            outcome=(
                "no evidence here: wrong tools 4.4 % to 0.6 %, difference -3.9 points (95 % interval -7.8 to "
                "+0.04), n=5; loss of arguments 0.009 to 0.062, +0.053 (-0.027 to +0.133)"
            ),
        ),
    ),
)
