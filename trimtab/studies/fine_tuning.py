"""Fine-tuning of small recurrent language models on synthetic text; with neutral options each is plain training.

Shape suffixes: B rows, L positions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import choose
from trimtab.losses.tuning.advantage_weighting import advantage_weighted_loss
from trimtab.losses.tuning.control_tokens import prepend_control
from trimtab.losses.tuning.minor_finetuning import minor_sft_loss
from trimtab.losses.tuning.mixup_tuning import sftmix_loss, split_by_confidence
from trimtab.losses.tuning.negative_aware import negative_aware_loss
from trimtab.losses.tuning.tool_tuning import tl_training_loss
from trimtab.losses.tuning.unlikelihood_training import unlikelihood_loss
from trimtab.scalars import to_scalar
from trimtab.studies._fitting import fit, minibatch
from trimtab.studies._sequence_model import SequenceModel

_WORST = 20.0  # of a mean loss per token, far above that of even odds


def _chain(words: int, sharpness: float, generator: torch.Generator) -> Tensor:
    """Return the transition probabilities of a random chain of words, [words, words]."""
    return torch.softmax(sharpness * torch.randn(words, words, generator=generator), -1)


def _texts(chain: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Return rows drawn from a chain, [count, length]."""
    columns = [torch.randint(len(chain), (count,), generator=generator)]
    for _ in range(length - 1):
        columns.append(torch.multinomial(chain[columns[-1]], 1, generator=generator).squeeze(1))
    return torch.stack(columns, 1)


def _loss(model: SequenceModel, inputs: Tensor, targets: Tensor) -> float:
    """Return the mean loss per target, at most the worst."""
    with torch.no_grad():
        value = to_scalar(F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()))
    return min(value, _WORST) if math.isfinite(value) else _WORST


def preferences(
    seed: int, *, method: str = "plain", alpha: float = 1.0, beta: float = 0.5, lr: float = 0.01, steps: int = 300
) -> dict[str, float]:
    """Train on 600 texts of 12 words, a third of which have bad words in them, and draw texts.

    Args:
        seed: of texts, initialisation, batches and draws.
        method: `"plain"`, `"conditional"` (a good or a bad token before each text), `"unlikelihood"` (of bad words) or
            `"advantage"` (weights exp((reward - mean reward) / beta), the reward -1 for a text with a bad word or 0).
        alpha: weight of unlikelihood.
        beta: of the advantage.
        lr: of Adam, along half a cosine.
        steps: with batches of 32.

    Returns:
        `bad_rate`, the share of bad words in 256 texts that are drawn after the good token, and `clean_loss`, of 256
        held-out texts without bad words after it.
    """
    choose("method", method, ("plain", "conditional", "unlikelihood", "advantage"))
    generator = torch.Generator().manual_seed(seed)
    chain = _chain(10, 1.5, generator)
    rows = _texts(chain, 856, 12, generator)
    spoiled = torch.arange(856) < 200
    swap = (torch.rand(rows.shape, generator=generator) < 0.25) & spoiled.unsqueeze(1)
    rows = torch.where(swap, 10 + torch.randint(2, rows.shape, generator=generator), rows)
    train, held = rows[:600], rows[600:]
    good = ~(train >= 10).any(1)
    good_prefix, bad_prefix = torch.tensor([12]), torch.tensor([13 if method == "conditional" else 12])
    marked = prepend_control(train, train, good, good_prefix, bad_prefix)
    reward = good.float() - 1
    advantage = reward - reward.mean()
    model = SequenceModel(14, 32, seed)

    def loss_at(step: int) -> Tensor:
        batch = minibatch(seed, step, 32, 600)
        logits, targets = model(marked.inputs[batch, :-1]), marked.targets[batch, 1:]
        if method == "unlikelihood":
            return unlikelihood_loss(logits, targets, targets >= 10, alpha=alpha)
        if method == "advantage":
            return advantage_weighted_loss(logits, targets, advantage[batch], beta=beta)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    fit(model.parameters(), loss_at, steps=steps, lr=lr)
    after_good = torch.cat([good_prefix.expand(256, 1), held], 1)
    drawn = model.continued(after_good[:, :1], 12, generator)
    bad = (drawn == 10) | (drawn == 11)
    return {
        "bad_rate": to_scalar(bad.float().mean()),
        "clean_loss": _loss(model, after_good[:, :-1], held),
    }


def trajectories(
    seed: int, *, negative_weight: float = 0.0, prefixes: bool = True, lr: float = 0.003, steps: int = 200
) -> dict[str, float]:
    """Train on few trajectories that succeed and many that fail in their last step only.

    A trajectory answers one of 40 words by its kind, of six, and then by the word of that kind. Failed ones get the
    kind right and its word wrong. No word has both.

    Args:
        seed: of data, initialisation and batches.
        negative_weight: of failed trajectories; at 0 it is training on those that succeed.
        prefixes: whether failed ones begin with a token of their own.
        lr: of Adam, along half a cosine.
        steps: with batches of 32.

    Returns:
        `accuracy` of greedy last words after the good token, for words that no successful trajectory answers, and
        `kind_accuracy` and `loss` there.
    """
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(6, (40,), generator=generator)
    kind[:12] = torch.arange(12) % 6
    last = 46 + torch.randperm(6, generator=generator)
    positive = torch.arange(40) < 12
    wrong = last[(kind + torch.randint(1, 6, (40,), generator=generator)) % 6]
    rows = torch.stack([torch.arange(40), 40 + kind, torch.where(positive, last[kind], wrong)], 1)
    targets = rows.clone()
    targets[:, 0] = -100
    marked = prepend_control(rows, targets, positive, torch.tensor([52]), torch.tensor([53 if prefixes else 52]))
    model = SequenceModel(54, 32, seed)

    def loss_at(step: int) -> Tensor:
        # Half of each batch succeeded, whatever the weight of the other half.
        batch = torch.cat([minibatch(seed, step, 16, 12), 12 + minibatch(seed + 1, step, 16, 28)])
        logits = model(marked.inputs[batch, :-1])
        return negative_aware_loss(logits, marked.targets[batch, 1:], positive[batch], negative_weight=negative_weight)

    fit(model.parameters(), loss_at, steps=steps, lr=lr)
    right = torch.stack([torch.full((28,), 52), torch.arange(12, 40), 40 + kind[12:], last[kind[12:]]], 1)
    wanted = right[:, 1:].clone()
    wanted[:, 0] = -100
    answers = model.continued(right[:, :2], 2)
    return {
        "accuracy": to_scalar((answers[:, 1] == last[kind[12:]]).float().mean()),
        "kind_accuracy": to_scalar((answers[:, 0] == 40 + kind[12:]).float().mean()),
        "loss": _loss(model, right[:, :-1], wanted),
    }


def calls(
    seed: int, *, max_weight: float = 1.0, drop_errors: bool = False, lr: float = 0.03, steps: int = 150
) -> dict[str, float]:
    """Train on 144 calls of tools, a quarter of which are erroneous, and call tools for questions seen in training.

    A question of two words decides which of nine tools is called; eight words of arguments follow that repeat it.

    Args:
        seed: of data, initialisation and batches.
        max_weight: bound on the weight of the token that names the tool; at 1 it is plain fine-tuning.
        drop_errors: whether the tokens of erroneous calls are left out, as known from the tool's answer.
        lr: of Adam, along half a cosine.
        steps: with batches of 24.

    Returns:
        `key_error`, the share of the 36 questions whose likeliest tool is wrong, and `other_loss`, of arguments.
    """
    generator = torch.Generator().manual_seed(seed)
    questions = torch.cartesian_prod(torch.arange(6), torch.arange(6, 12))
    tool = 12 + torch.randint(9, (36,), generator=generator)
    index = torch.arange(144) % 36
    broken = torch.rand(144, generator=generator) < 0.25
    named = torch.where(broken, 12 + torch.randint(9, (144,), generator=generator), tool[index])
    arguments = questions.repeat(1, 4)
    rows = torch.cat([questions[index], named.unsqueeze(1), arguments[index]], 1)
    broken = named != tool[index]
    targets = rows[:, 1:].clone()
    targets[:, 0] = -100
    key = torch.zeros_like(targets, dtype=torch.bool)
    key[:, 1] = True
    erroneous = broken.unsqueeze(1).expand_as(targets) & drop_errors
    model = SequenceModel(21, 32, seed)

    def loss_at(step: int) -> Tensor:
        batch = minibatch(seed, step, 24, 144)
        return tl_training_loss(
            model(rows[batch, :-1]), targets[batch], key=key[batch], erroneous=erroneous[batch], max_weight=max_weight
        )

    fit(model.parameters(), loss_at, steps=steps, lr=lr)
    right = torch.cat([questions, tool.unsqueeze(1), arguments], 1)
    wanted = right[:, 1:].clone()
    wanted[:, :2] = -100
    chosen = model.continued(questions, 1)[:, 0]
    return {
        "key_error": to_scalar((chosen != tool).float().mean()),
        "other_loss": _loss(model, right[:, :-1], wanted),
    }


def mixup(seed: int, *, mu: float = 0.0, lr: float = 0.003, steps: int = 150, rows: int = 128) -> dict[str, float]:
    """Fine-tune on few texts, each step on pairs of one that an earlier run was confident in and one that it was not.

    Args:
        seed: of texts, initialisation, batches and mixtures.
        mu: weight of the Mixup regulariser; at 0 it is plain fine-tuning on both of each pair.
        lr: of Adam, along half a cosine.
        steps: with 12 pairs.
        rows: texts, half from a sharp chain of 12 words and half from a blurred one.

    Returns:
        `held_loss` of 400 other texts of both kinds, `confident_gap` from the loss of the confident texts to that of
        other sharp ones, and `confident_sharp`, the share of confident texts from the sharp chain.
    """
    generator = torch.Generator().manual_seed(seed)
    sharp = _chain(12, 2.5, generator)
    blurred = 0.5 * sharp + 0.5 * _chain(12, 1.0, generator)
    half = rows // 2
    texts = torch.cat([_texts(chain, half, 13, generator) for chain in (sharp, blurred)])
    held = torch.cat([_texts(chain, 200, 13, generator) for chain in (sharp, blurred)])
    earlier, perplexities = SequenceModel(12, 32, seed + 1), []

    def first(step: int) -> Tensor:
        if step and step % 20 == 0:
            with torch.no_grad():
                each = F.cross_entropy(earlier(texts[:, :-1]).transpose(1, 2), texts[:, 1:], reduction="none")
            perplexities.append(each.mean(1).exp())
        batch = texts[minibatch(seed, step, 24, rows)]
        return F.cross_entropy(earlier(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    fit(earlier.parameters(), first, steps=61, lr=0.01)
    split = split_by_confidence(torch.stack(perplexities))
    model = SequenceModel(12, 32, seed)

    def loss_at(step: int) -> Tensor:
        confident = texts[split.confident[minibatch(seed, step, 12, half)]]
        unconfident = texts[split.unconfident[minibatch(seed + 1, step, 12, half)]]
        mix = torch.sin(math.pi / 2 * torch.rand(12, generator=generator)).square()
        logits = model(torch.cat([confident, unconfident])[:, :-1])
        return sftmix_loss(logits[:12], logits[12:], confident[:, 1:], unconfident[:, 1:], mix, mu=mu)

    fit(model.parameters(), loss_at, steps=steps, lr=lr)
    seen, other = texts[split.confident], held[:200]
    return {
        "held_loss": _loss(model, held[:, :-1], held[:, 1:]),
        "confident_gap": _loss(model, other[:, :-1], other[:, 1:]) - _loss(model, seen[:, :-1], seen[:, 1:]),
        "confident_sharp": to_scalar((split.confident < half).float().mean()),
    }


def deviation(
    seed: int, *, beta: float = 0.0, lr: float = 0.003, steps: int = 300, before: int = 300
) -> dict[str, float]:
    """Fine-tune a model of one chain of words on 200 texts of another until it is good at it, and see how far it moved.

    Args:
        seed: of texts, initialisation and batches.
        beta: of MinorSFT; at 0 it is plain fine-tuning.
        lr: of Adam, constant.
        steps: at most, with batches of 16.
        before: steps on the first chain.

    Returns:
        `deviation`, the mean absolute log-ratio per token to the original model on held-out texts of the first chain,
        once the loss of held-out texts of the second is four fifths of the way to its floor, or at the end; `loss`, of
        the second chain then, `old_loss`, of the first, and `steps`.
    """
    generator = torch.Generator().manual_seed(seed)
    chains = [_chain(12, 1.5, generator) for _ in range(2)]
    old, held_old = _texts(chains[0], 600, 13, generator), _texts(chains[0], 200, 13, generator)
    new, held_new = _texts(chains[1], 200, 13, generator), _texts(chains[1], 200, 13, generator)
    model = SequenceModel(12, 32, seed)

    def first(step: int) -> Tensor:
        batch = old[minibatch(seed, step, 32, 600)]
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def scores(rows: Tensor) -> Tensor:
        log_probs = torch.log_softmax(model(rows[:, :-1]), -1)
        return log_probs.gather(-1, rows[:, 1:].unsqueeze(-1)).squeeze(-1)

    fit(model.parameters(), first, steps=before, lr=0.01)
    with torch.no_grad():
        reference, on_old = scores(new).sum(1), scores(held_old)
    floor = -to_scalar(chains[1][held_new[:, :-1], held_new[:, 1:]].log().mean())
    goal = floor + 0.2 * (_loss(model, held_new[:, :-1], held_new[:, 1:]) - floor)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    taken = steps
    for step in range(steps):
        if step % 5 == 0 and _loss(model, held_new[:, :-1], held_new[:, 1:]) <= goal:
            taken = step
            break
        batch = minibatch(seed + 2, step, 16, 200)
        loss = minor_sft_loss(scores(new[batch]).sum(1), reference[batch], beta=beta) / 12
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        moved = (scores(held_old) - on_old).abs().mean()
    return {
        "deviation": to_scalar(moved.nan_to_num(nan=_WORST).clamp(max=_WORST)),
        "loss": _loss(model, held_new[:, :-1], held_new[:, 1:]),
        "old_loss": _loss(model, held_old[:, :-1], held_old[:, 1:]),
        "steps": float(taken),
    }
