"""A small recurrent language model that studies of text train and draw from.

Shape suffixes: B sequences, L positions, V tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SequenceModel(nn.Module):
    """Embedding, gated recurrent unit and linear heads; initialised from a seed of its own.

    Args:
        tokens: V.
        width: of embedding and state.
        seed: of the initialisation.
        heads: how many tokens ahead it predicts; the first head is the next token.
    """

    def __init__(self, tokens: int, width: int, seed: int, heads: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(tokens, width)
            self.core = nn.GRU(width, width, batch_first=True)
            self.heads = nn.ModuleList(nn.Linear(width, tokens) for _ in range(heads))

    def states(self, inputs: Tensor) -> Tensor:
        """Return the states along the inputs, [B, L, width]."""
        states: Tensor = self.core(self.embedding(inputs))[0]
        return states

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits of the next token along the inputs, [B, L, V]."""
        logits: Tensor = self.heads[0](self.states(inputs))
        return logits

    @torch.no_grad()
    def continued(self, prompts: Tensor, length: int, generator: torch.Generator | None = None) -> Tensor:
        """Return what the model continues prompts with, [B, length]: drawn, or the likeliest without a generator.

        Args:
            prompts: [B, P], with P at least 1.
            length: of what is generated.
            generator: of the draws.
        """
        found = []
        output, state = self.core(self.embedding(prompts))
        for _ in range(length):
            logits = self.heads[0](output[:, -1])
            if generator is None:
                token = logits.argmax(-1, keepdim=True)
            else:
                token = torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)
            found.append(token)
            output, state = self.core(self.embedding(token), state)
        return torch.cat(found, 1)
