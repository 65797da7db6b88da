"""Losses of preferences on a policy that is small enough to be known exactly.

Responses are words of up to four letters, 341 in all, so that expectations under the policy are sums. Pairs are drawn
from the reference and judged by a reward with Bradley-Terry noise.

Shape suffixes: P prompts, R all responses, B pairs, T tokens of a response, V tokens.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab import losses
from trimtab.errors import choose
from trimtab.scalars import to_scalar
from trimtab.studies._fitting import fit, minibatch

_PROMPTS, _LETTERS, _LONGEST, _WIDTH = 8, 4, 4, 32
_END, _IGNORED = 0, -100
_PAIRS, _BATCH = 256, 64
_SHARPNESS = 2.0
"""How surely the judge prefers a response whose reward is one standard deviation higher: with 88 %."""


class _Policy(nn.Module):
    """Next-token logits from the prompt, the two tokens before and the place."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        rows = {"prompt": _PROMPTS, "last": _LETTERS + 2, "before": _LETTERS + 2, "place": _LONGEST}
        self.tables = nn.ParameterDict(
            {name: torch.randn(count, _WIDTH, generator=generator) for name, count in rows.items()}
        )
        self.hidden = nn.Parameter(torch.randn(_WIDTH, _WIDTH, generator=generator) / _WIDTH**0.5)
        self.head = nn.Parameter(torch.randn(_LETTERS + 1, _WIDTH, generator=generator) / _WIDTH**0.5)

    def forward(self, prompts_B: Tensor, tokens_BT: Tensor) -> Tensor:
        """Return [B, T, V], the logits of each token of the responses from what comes before it."""
        past = F.pad(tokens_BT.masked_fill(tokens_BT == _IGNORED, _END), (2, 0), value=_LETTERS + 1)
        x = self.tables["last"][past[:, 1:-1]] + self.tables["before"][past[:, :-2]]
        x = torch.tanh(0.5 * (x + self.tables["prompt"][prompts_B].unsqueeze(1) + self.tables["place"]))
        return torch.tanh(x @ self.hidden) @ self.head.T

    def score(self, prompts_B: Tensor, tokens_BT: Tensor) -> losses.ResponseScores:
        return losses.sequence_log_probs(self(prompts_B, tokens_BT), tokens_BT)


@dataclass(frozen=True)
class _World:
    """All responses and what they are worth, and the pairs that a judge has seen."""

    responses_RT: Tensor
    letters_R: Tensor
    reward_PR: Tensor
    reference: _Policy
    prompts_B: Tensor
    chosen_B: Tensor
    rejected_B: Tensor
    covered_R: Tensor

    def log_probs(self, policy: _Policy) -> Tensor:
        """Return the log-probability of every response to every prompt, [P, R]."""
        count = len(self.responses_RT)
        prompts = torch.arange(_PROMPTS).repeat_interleave(count)
        return policy.score(prompts, self.responses_RT.repeat(_PROMPTS, 1)).log_probs.view(_PROMPTS, count)


def pairs(
    seed: int,
    *,
    loss: str = "dpo",
    lr: float = 0.003,
    steps: int = 300,
    flips: float = 0.0,
    certain: bool = False,
    length_bias: float = 0.0,
    uncovered: bool = False,
) -> dict[str, float]:
    """Train a policy on judged pairs and return what it became.

    Args:
        seed: of the reference, the reward and the pairs.
        loss: a method's name; `"sft"` imitates the chosen responses, `"none"` does nothing.
        lr: learning rate of Adam.
        steps: its steps.
        flips: share of labels that are wrong.
        certain: whether the judge always prefers the higher reward.
        length_bias: what a letter more is worth to the judge, in standard deviations of the reward.
        uncovered: whether responses that begin with the last letter are bad and in no pair.

    Returns:
        `reward`, the policy's expected reward (the reference's is about 0); `chosen_log_prob` and
        `rejected_log_prob`, the mean change over the pairs; `kl` to the reference; `letters`, the expected length;
        `uncovered`, the mass on responses that begin with the last letter.
    """
    world = _world(seed, flips=flips, certain=certain, length_bias=length_bias, uncovered=uncovered)
    loss_of = _LOSSES[choose("loss of preferences", loss, _LOSSES)]
    policy = copy.deepcopy(world.reference)

    def loss_at(step: int) -> Tensor:
        return loss_of(_Batch(world, policy, minibatch(seed, step, _BATCH, _PAIRS)))

    if loss != "none":
        fit(policy.parameters(), loss_at, steps=steps, lr=lr)
    with torch.no_grad():
        return _measure(world, policy)


def _measure(world: _World, policy: _Policy) -> dict[str, float]:
    log_pi, log_ref = world.log_probs(policy), world.log_probs(world.reference)
    pi = log_pi.exp()
    change = log_pi - log_ref
    return {
        "reward": to_scalar((pi * world.reward_PR).sum(1).mean()),
        "chosen_log_prob": to_scalar(change[world.prompts_B, world.chosen_B].mean()),
        "rejected_log_prob": to_scalar(change[world.prompts_B, world.rejected_B].mean()),
        "kl": to_scalar((pi * change).sum(1).mean()),
        "letters": to_scalar((pi * world.letters_R).sum(1).mean()),
        "uncovered": to_scalar((pi * ~world.covered_R).sum(1).mean()),
    }


@torch.no_grad()
def _world(seed: int, *, flips: float, certain: bool, length_bias: float, uncovered: bool) -> _World:
    generator = torch.Generator().manual_seed(seed)
    words = [word for n in range(_LONGEST + 1) for word in itertools.product(range(1, _LETTERS + 1), repeat=n)]
    padded = [[*word, *([_END] + [_IGNORED] * _LONGEST)[: _LONGEST - len(word)]] for word in words]
    responses, letters = torch.tensor(padded), torch.tensor([float(len(word)) for word in words])
    starts = torch.tensor([word[:1] == (_LETTERS,) for word in words])
    covered = ~starts if uncovered else torch.ones_like(starts)
    reference = _Policy(generator)
    empty = torch.zeros(0, dtype=torch.int64)
    world = _World(responses, letters, torch.empty(0), reference, empty, empty, empty, ~starts)
    pi = world.log_probs(reference).exp()

    # A reward of letters and of neighbours that has nothing to do with length.
    of_letter = torch.randn(_PROMPTS, _LETTERS + 1, generator=generator)
    of_pair = torch.randn(_LETTERS + 1, _LETTERS + 1, generator=generator)
    tokens = responses.clamp(min=0)
    is_letter = tokens > 0
    raw = (of_letter[:, tokens] * is_letter).sum(-1)
    raw = raw + (of_pair[tokens[:, :-1], tokens[:, 1:]] * (is_letter[:, :-1] & is_letter[:, 1:])).sum(-1)
    raw = raw - torch.stack([raw[:, letters == n].mean(1) for n in range(_LONGEST + 1)], 1)[:, letters.long()]
    mean = (pi * raw).sum(1, keepdim=True)
    reward = (raw - mean) / (pi * (raw - mean).square()).sum(1, keepdim=True).sqrt()
    if uncovered:
        reward = reward - 3 * starts

    prompts = torch.randint(_PROMPTS, (_PAIRS,), generator=generator)
    drawn = torch.multinomial((pi * covered)[prompts], 2, generator=generator)
    judged = (reward + length_bias * letters)[prompts.unsqueeze(1), drawn]
    surely = (judged[:, 0] - judged[:, 1]) * (torch.inf if certain else _SHARPNESS)
    first_wins = torch.rand(_PAIRS, generator=generator) < torch.sigmoid(surely)
    first_wins ^= torch.rand(_PAIRS, generator=generator) < flips
    chosen, rejected = (torch.where(wins, drawn[:, 0], drawn[:, 1]) for wins in (first_wins, ~first_wins))
    return _World(responses, letters, reward, reference, prompts, chosen, rejected, ~starts)


class _Batch:
    """What the losses take, of some pairs; computed when asked for."""

    def __init__(self, world: _World, policy: _Policy, places: Tensor) -> None:
        self.world, self.policy = world, policy
        self.prompts = world.prompts_B[places]
        self.chosen, self.rejected = (world.responses_RT[which[places]] for which in (world.chosen_B, world.rejected_B))
        self.won, self.lost = (policy.score(self.prompts, tokens) for tokens in (self.chosen, self.rejected))
        with torch.no_grad():
            self.ref_won, self.ref_lost = (
                world.reference.score(self.prompts, tokens).log_probs for tokens in (self.chosen, self.rejected)
            )

    @property
    def scores(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.won.log_probs, self.lost.log_probs, self.ref_won, self.ref_lost

    @property
    def lengths(self) -> dict[str, Tensor]:
        return {"chosen_lengths": self.won.lengths, "rejected_lengths": self.lost.lengths}

    def kto(self) -> Tensor:
        """KTO, whose reference point is the mean log-ratio of responses to other prompts."""
        both = torch.cat([self.chosen, self.rejected])
        others = torch.cat([self.prompts, self.prompts]).roll(1)
        with torch.no_grad():
            ratio = self.policy.score(others, both).log_probs - self.world.reference.score(others, both).log_probs
        policy = torch.cat([self.won.log_probs, self.lost.log_probs])
        desirable = torch.arange(len(policy)) < len(self.prompts)
        reference = torch.cat([self.ref_won, self.ref_lost])
        return losses.kto_loss(policy, reference, desirable, kl=ratio.mean().clamp(min=0))

    def pmpo(self, *, rejected_only: bool) -> Tensor:
        """PMPO on both kinds, or on the rejected responses alone."""
        tokens = self.rejected if rejected_only else torch.cat([self.chosen, self.rejected])
        prompts = self.prompts if rejected_only else torch.cat([self.prompts, self.prompts])
        logits = self.policy(prompts, tokens)
        with torch.no_grad():
            ref_logits = self.world.reference(prompts, tokens)
        kl = losses.reference_kl(logits, ref_logits, tokens)
        accepted = torch.arange(len(tokens)) < (0 if rejected_only else len(self.prompts))
        policy = losses.sequence_log_probs(logits, tokens).log_probs
        return losses.pmpo_loss(policy, kl, accepted, accepted_share=0.0 if rejected_only else 0.5)


_LOSSES: dict[str, Callable[[_Batch], Tensor]] = {
    "none": lambda batch: -batch.won.log_probs.mean(),
    "sft": lambda batch: -batch.won.log_probs.mean(),
    "dpo": lambda batch: losses.dpo_loss(*batch.scores),
    "robust-dpo": lambda batch: losses.robust_dpo_loss(*batch.scores, flip_rate=0.3),
    "ipo": lambda batch: losses.ipo_loss(*batch.scores),
    "kto": _Batch.kto,
    "cpo": lambda batch: losses.cpo_loss(batch.won.log_probs, batch.lost.log_probs),
    "simpo": lambda batch: losses.simpo_loss(batch.won.log_probs, batch.lost.log_probs, **batch.lengths),
    "ilr-dpo": lambda batch: losses.ilr_dpo_loss(*batch.scores, **batch.lengths),
    "iterative-rpo": lambda batch: losses.iterative_rpo_loss(*batch.scores, chosen_lengths=batch.won.lengths),
    "rpo": lambda batch: losses.rpo_loss(*batch.scores),
    "flex-dpo": lambda batch: losses.flex_dpo_loss(*batch.scores),
    "asft": lambda batch: losses.asft_loss(batch.won.log_probs, batch.lost.log_probs, **batch.lengths),
    "pmpo": lambda batch: batch.pmpo(rejected_only=False),
    "pmpo-rejected": lambda batch: batch.pmpo(rejected_only=True),
}


def rounds(seed: int, *, loss: str = "dno", steps: int = 60, lr: float = 0.05) -> dict[str, float]:
    """Play rounds of self-improvement against preferences that go round in a circle, and return where they end.

    Three responses beat each other like rock, scissors and paper, with random strengths. Each round draws pairs from
    the policy and fits it anew; `"dno"` regresses on win rates against the round's policy, `"dpo"` takes the pair's
    more often preferred response as chosen.

    Args:
        seed: of the strengths and the first policy.
        loss: `"dno"` or `"dpo"`.
        steps: rounds.
        lr: learning rate of Adam in each of them.

    Returns:
        `exploitability`, by how much the best answer to the average policy beats it (0 at the Nash mixture), and
        `last_exploitability` of the last policy.
    """
    choose("loss of rounds", loss, ("dno", "dpo"))
    generator = torch.Generator().manual_seed(seed)
    strength = 0.2 + 0.3 * torch.rand(3, generator=generator)
    beats = torch.full((3, 3), 0.5)
    for winner, by in enumerate(strength.tolist()):
        loser = (winner + 1) % 3
        beats[winner, loser], beats[loser, winner] = 0.5 + by, 0.5 - by
    logits = torch.randn(3, generator=generator).requires_grad_()
    average = torch.zeros(3)
    first, second = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
    for number in range(steps):
        last = logits.detach().log_softmax(0)
        pi = last.exp()
        average = average + (pi - average) / (number + 1)
        win_rate = beats @ pi
        weight = pi[first] * pi[second]

        def loss_at(step: int, last: Tensor = last, win_rate: Tensor = win_rate, weight: Tensor = weight) -> Tensor:
            now = logits.log_softmax(0)
            if loss == "dno":
                values = losses.dno_loss(
                    now[first], now[second], last[first], last[second],
                    win_rate_first=win_rate[first], win_rate_second=win_rate[second], eta=1.0, reduction="none",
                )  # fmt: skip
            else:
                wins = beats[first, second] > 0.5
                chosen, rejected = torch.where(wins, first, second), torch.where(wins, second, first)
                values = losses.dpo_loss(
                    now[chosen], now[rejected], last[chosen], last[rejected], beta=1.0, reduction="none"
                )
            return (weight * values).sum() / weight.sum()

        fit([logits], loss_at, steps=20, lr=lr)
    now = logits.detach().softmax(0)
    return {
        "exploitability": to_scalar((beats @ average).max()) - 0.5,
        "last_exploitability": to_scalar((beats @ now).max()) - 0.5,
    }
