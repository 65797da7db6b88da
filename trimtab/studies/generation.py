"""What small language models generate: repetition in greedy text, and tokens that need a look ahead."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import require
from trimtab.losses.generation.future_ngram import future_ngram_loss
from trimtab.losses.generation.implicit_unlikelihood import implicit_unlikelihood_loss, sequence_repetition
from trimtab.scalars import to_scalar
from trimtab.studies._fitting import fit, minibatch
from trimtab.studies._sequence_model import SequenceModel

_TEXTS = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")


def _text() -> tuple[Tensor, int]:
    """Return the descriptions of scikit-learn's data sets as indices of characters, and how many there are."""
    datasets = require("sklearn.datasets", extra="workloads")
    text = "\n".join(str(getattr(datasets, f"load_{name}")().DESCR) for name in _TEXTS)
    characters = sorted(set(text))
    places = {character: place for place, character in enumerate(characters)}
    return torch.tensor([places[character] for character in text]), len(characters)


def repetition(
    seed: int,
    *,
    alpha: float = 0.0,
    beta: float = 0.0,
    lr: float = 0.003,
    steps: int = 150,
    tuned: int = 100,
    width: int = 48,
) -> dict[str, float]:
    """Train a model of characters by likelihood, then tune it on its own greedy text in every other step.

    Args:
        seed: of the split of the text, initialisation and batches.
        alpha: weight of the unlikelihood of repeated 4-grams; with `beta` 0 too it is likelihood training alone.
        beta: weight of the policy gradient.
        lr: of Adam in the tuning, along half a cosine; 0.01 before it.
        steps: of likelihood training before.
        tuned: steps of the tuning, on batches of 16 prompts of 16 characters, continued by 32.
        width: of the model.

    Returns:
        `seq_rep_4` of 64 greedy continuations of prompts from the held-out fifth of the text, and its `perplexity`.
    """
    text, tokens = _text()
    held = len(text) // 5
    start = int(torch.randint(5, (), generator=torch.Generator().manual_seed(seed))) * held
    test, train = text[start : start + held], torch.cat([text[:start], text[start + held :]])
    model = SequenceModel(tokens, width, seed)

    def rows(source: Tensor, step: int, size: int, length: int) -> Tensor:
        begins = minibatch(seed, step, size, len(source) - length)
        return source[begins.unsqueeze(1) + torch.arange(length)]

    def likelihood(step: int) -> Tensor:
        batch = rows(train, step, 16, 49)
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def tuning(step: int) -> Tensor:
        loss = likelihood(steps + step)
        if step % 2 or not (alpha or beta):
            return loss
        prompts = rows(train, steps + tuned + step, 16, 16)
        samples = model.continued(prompts, 32)
        logits = model(torch.cat([prompts, samples[:, :-1]], 1))[:, 15:]
        return loss + implicit_unlikelihood_loss(logits, samples, alpha=alpha, beta=beta)

    fit(model.parameters(), likelihood, steps=steps, lr=0.01)
    fit(model.parameters(), tuning, steps=tuned, lr=lr)
    with torch.no_grad():
        prompts = rows(test, -1, 64, 16)
        found = sequence_repetition(model.continued(prompts, 32)).mean()
        whole = test[: len(test) // 49 * 49].view(-1, 49)
        nll = to_scalar(F.cross_entropy(model(whole[:, :-1]).flatten(0, 1), whole[:, 1:].flatten()))
    worst = math.log(10 * tokens)
    return {"seq_rep_4": to_scalar(found), "perplexity": math.exp(min(nll, worst) if math.isfinite(nll) else worst)}


def lookahead(
    seed: int, *, n: int = 1, gamma: float = 1.0, lr: float = 0.03, steps: int = 300, width: int = 64
) -> dict[str, float]:
    """Train on p1 p2 p3 = q1 q2 q3 with q3 = p3, q2 = p2 + q3 and q1 = p1 + q2, modulo 7.

    Given q1, the others follow by one subtraction each; q1 itself needs all that comes after it.

    Args:
        seed: of initialisation and batches.
        n: tokens that each position predicts; at 1 it is cross-entropy.
        gamma: how fast their weights fall.
        lr: of Adam, along half a cosine.
        steps: with batches of 64 drawn anew.
        width: of the model.

    Returns:
        `first_loss`, the next-token loss of q1 over all 343 questions, its `first_accuracy`, and `later_loss` of the
        other two.
    """
    base = 7
    model = SequenceModel(base + 1, width, seed, heads=n)
    p = torch.cartesian_prod(*[torch.arange(base)] * 3)
    q3 = p[:, 2]
    q2 = (p[:, 1] + q3) % base
    q1 = (p[:, 0] + q2) % base
    rows = torch.stack([p[:, 0], p[:, 1], p[:, 2], torch.full_like(q1, base), q1, q2, q3], 1)
    targets = rows[:, 1:].clone()
    targets[:, :3] = -100

    def loss_at(step: int) -> Tensor:
        batch = minibatch(seed, step, 64, len(rows))
        states = model.states(rows[batch, :-1])
        return future_ngram_loss([head(states) for head in model.heads], targets[batch], gamma=gamma)

    fit(model.parameters(), loss_at, steps=steps, lr=lr)
    with torch.no_grad():
        logits = model(rows[:, :-1])
        each = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").nan_to_num(nan=1e3).clamp(max=1e3)
    return {
        "first_loss": to_scalar(each[:, 3].mean()),
        "first_accuracy": to_scalar((logits[:, 3].argmax(-1) == q1).float().mean()),
        "later_loss": to_scalar(each[:, 4:].mean()),
    }
