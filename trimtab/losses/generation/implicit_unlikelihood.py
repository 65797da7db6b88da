"""Implicit unlikelihood training: unlikelihood of a model's own repetitions, and a policy gradient that rewards few.

    samples y from the model;  R = 1 - seq-rep-n(y) = distinct n-grams of y / n-grams of y
    loss = -beta (R - b) sum_t log pi(y_t) - alpha sum_{t in repeated n-grams} log(1 - pi(y_t)),   divided by tokens

b is the mean reward of the batch. The second term is sequence-level unlikelihood training (Welleck et al. 2019,
arXiv:1908.04319); the first sees what the second cannot, the effect of a token on the rest of the sample. Lagutin,
Gavrilov and Kalaidin 2021 (arXiv:2101.04229); authors' code vklabmipt/implicit-unlikelihood-training,
src/once_reward_pg.py and src/unlikelihood.py. Both terms are added to training by maximum likelihood.

Shape suffixes: B samples, L positions, V classes, K n-grams.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.card import Card, Default, Experiment, Paper
from trimtab.errors import UsageError
from trimtab.losses._reduction import reduce
from trimtab.losses._stable import log1mexp
from trimtab.losses.preference._pairs import check_number
from trimtab.losses.tuning._tokens import token_log_probs

__all__ = ["implicit_unlikelihood_loss", "repeated_ngrams", "sequence_repetition"]


def _repeats(tokens: Tensor, n: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return which n-grams occurred before and which hold no ignored token, both [B, K]."""
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise UsageError(f"n must be a whole number of at least 1, got {n!r}: the length of n-grams.")
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise UsageError(f"tokens must be class indices [B, L], got {tokens.dtype} of shape {tuple(tokens.shape)}.")
    K = max(tokens.shape[1] - n + 1, 0)
    same_BLL = tokens.unsqueeze(2) == tokens.unsqueeze(1)
    equal_BKK = same_BLL[:, :K, :K]
    whole_BK = tokens[:, :K] != ignore_index
    for i in range(1, n):
        equal_BKK = equal_BKK & same_BLL[:, i : K + i, i : K + i]
        whole_BK = whole_BK & (tokens[:, i : K + i] != ignore_index)
    return equal_BKK.tril(-1).any(2) & whole_BK, whole_BK


def repeated_ngrams(tokens: Tensor, *, n: int = 4, ignore_index: int = -100) -> Tensor:
    """Return which tokens belong to an n-gram that occurred before in the same sequence.

    Args:
        tokens: [B, L], class indices.
        n: length of n-grams, at least 1.
        ignore_index: token that is none; an n-gram with it does not count.

    Returns:
        Boolean, [B, L].

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> repeated_ngrams(torch.tensor([[5, 6, 7, 5, 6, 8]]), n=2).int()
        tensor([[0, 0, 0, 1, 1, 0]], dtype=torch.int32)
    """
    repeated_BK, _ = _repeats(tokens, n, ignore_index)
    found_BL = torch.zeros_like(tokens, dtype=torch.bool)
    for i in range(n if repeated_BK.shape[1] else 0):
        found_BL[:, i : repeated_BK.shape[1] + i] |= repeated_BK
    return found_BL


def sequence_repetition(tokens: Tensor, *, n: int = 4, ignore_index: int = -100) -> Tensor:
    """Return seq-rep-n, the share of n-grams that occurred before: 1 - distinct n-grams / n-grams.

    Args:
        tokens: [B, L], class indices, of what a model generated, without its prompt.
        n: length of n-grams, at least 1.
        ignore_index: token that is none; an n-gram with it does not count.

    Returns:
        In [0, 1], [B], float32; 0 where there is no n-gram.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> sequence_repetition(torch.tensor([[1, 2, 1, 2, 1]]), n=2)  # 12, 21, 12, 21
        tensor([0.5000])
    """
    repeated_BK, whole_BK = _repeats(tokens, n, ignore_index)
    return repeated_BK.sum(1) / whole_BK.sum(1).clamp(min=1)


def implicit_unlikelihood_loss(
    logits: Tensor,
    samples: Tensor,
    *,
    n: int = 4,
    alpha: float = 1.0,
    beta: float = 3.0,
    baseline: float | Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return the policy gradient of few repetitions and the unlikelihood of repeated tokens, on a model's own samples.

    Args:
        logits: [B, L, V], of the model along its samples: position i predicts position i of the samples.
        samples: [B, L], what it generated (greedily in the paper); prompt and padding are `ignore_index`.
        n: length of n-grams, at least 1.
        alpha: weight of the unlikelihood of repeated tokens, at least 0; at 0 it is the policy gradient alone.
        beta: weight of the policy gradient, at least 0; at 0 it is sequence-level unlikelihood training.
        baseline: b, what is taken from each reward; None for the mean of this batch's samples that have a token
            that counts. For micro-batches and ranks that add up to a whole batch, give the whole batch's mean.
        ignore_index: token that does not count.
        reduction: `"mean"` over the tokens that count, `"sum"` or `"none"`.
        denominator: what the mean divides by in place of the number of tokens that count.

    Returns:
        A scalar, or [B, L] with reduction `"none"`, in float32 or better. The value of its first term says nothing: it
        is the gradient that does.

    Raises:
        UsageError: if an argument breaks its rule.

    Example:
        >>> samples = torch.tensor([[1, 2, 1, 2], [0, 1, 2, 3]])
        >>> loss = implicit_unlikelihood_loss(torch.zeros(2, 4, 4), samples, n=2, beta=0.0)
        >>> round(float(loss), 4)  # two of eight tokens: log(4 / 3) 2 / 8
        0.0719

    References:
        Lagutin et al. 2021, arXiv:2101.04229; Welleck et al. 2019, arXiv:1908.04319, section 5.2.
    """
    check_number("alpha", alpha, 0)
    check_number("beta", beta, 0)
    log_probs, valid = token_log_probs(logits, samples, ignore_index)
    with torch.no_grad():
        reward_B = 1 - sequence_repetition(samples, n=n, ignore_index=ignore_index).to(log_probs.dtype)
        repeated = repeated_ngrams(samples, n=n, ignore_index=ignore_index)
        if baseline is None:
            counts_B = valid.any(1)
            baseline = torch.where(counts_B, reward_B, 0).sum() / counts_B.sum().clamp(min=1)
        gain_B1 = (reward_B - baseline).unsqueeze(1)
    unlikelihood = torch.where(repeated, -log1mexp(log_probs), torch.zeros_like(log_probs))
    return reduce(alpha * unlikelihood - beta * gain_B1 * log_probs, valid, reduction, denominator)


CARD = Card(
    name="implicit-unlikelihood",
    room="losses",
    summary="unlikelihood of a model's own repetitions with a policy gradient whose reward is few repetitions",
    paper=Paper(
        "Implicit Unlikelihood Training: Improving Neural Text Generation with Reinforcement Learning",
        2021,
        arxiv="2101.04229",
        code="https://github.com/vklabmipt/implicit-unlikelihood-training",
    ),
    equation="loss = -beta (1 - seq-rep-n - b) log pi(y) - alpha sum over repeated tokens of log(1 - pi(y_t))",
    claim="Less repetition than unlikelihood training alone, without a worse language model.",
    acts_on="loss",
    entry="trimtab.losses.generation.implicit_unlikelihood:implicit_unlikelihood_loss",
    defaults=(
        Default("n", 4, "authors' code, src/run_gpt2.py: reward-ngram-n and sequence-ngram-n"),
        Default("alpha", 1.0, "authors' code: unlikelihood without a factor"),
        Default("beta", 3.0, "authors' code, src/run_gpt2.py: pg-coef"),
        Default("baseline", None, "authors' code, src/once_reward_pg.py: mean reward of the batch"),
        Default("reduction", "mean", "authors' code: over generated tokens"),
        Default("ignore_index", -100, "torch.nn.functional.cross_entropy"),
    ),
    verified={
        "equation": (
            "tests/losses/generation/test_implicit_unlikelihood.py::test_equals_a_plain_loop",
            "tests/losses/generation/test_implicit_unlikelihood.py::test_repetition_equals_a_count",
            "tests/losses/generation/test_implicit_unlikelihood.py::test_gradient_is_that_of_the_expected_reward",
        ),
    },
    deviations=(
        "The authors' code draws for each step which of likelihood, unlikelihood and policy gradient it takes (odds "
        "1/2, 1/4, 1/4); here both terms come in one loss, whose sum with likelihood has that expectation up to scale.",
        "Their mask of repeated n-grams leaves out the last n-gram of a sample; here it counts.",
        "Their clipped ratios over several epochs on the same samples and their learned value are left out.",
    ),
    experiments=(
        Experiment(
            "trimtab.studies.generation:repetition",
            "beta=0,alpha=1",
            "beta=3,alpha=1",
            metric="seq_rep_4",
            mechanism="perplexity",
            outcome=(
                "no evidence here: seq-rep-4 of greedy text 0.438 to 0.358, difference -0.080 (95 % interval "
                "-0.269 to +0.109), n=5; held-out perplexity 11.5 to 12.2, +0.71 (+0.30 to +1.12): the model "
                "gets worse, if little"
            ),
        ),
    ),
)
