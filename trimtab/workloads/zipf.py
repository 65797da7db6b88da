"""A language model over words, `lm-zipf`: a few thousand classes, most of them rare.

The words of a text are distributed like 1 / rank (Zipf's law), so most of the loss stands in classes with few samples
each. That is where gradient descent is slow and Adam is not: Kunstner et al. 2024 (arXiv:2402.19449).
"""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.scalars import to_scalar
from trimtab.workloads.settings import Settings
from trimtab.workloads.transformer import Block, CausalSelfAttention, init_normal
from trimtab.workloads.workload import Data, Workload, evaluating

_BYTES = 4_000_000
_VOCABULARY = 2048
_CONTEXT = 32
_TOKEN = re.compile(r"\w+|[^\w\s]")
_UNKNOWN = 0
_SHARE = 0.9
_EVAL_TOKENS = 4096
_RARE = 0.5


class WordModel(nn.Module):
    """A causal pre-LN transformer over words; embedding and head are two matrices, both N(0, 0.02) at first.

    Args:
        width: D.
        layers: blocks.
        heads: attention heads a block.
        vocabulary: V.
        context: longest sequence, L.
    """

    def __init__(
        self, width: int, layers: int, heads: int = 4, vocabulary: int = _VOCABULARY, context: int = _CONTEXT
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, CausalSelfAttention(width, heads)) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        init_normal(self)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Return the logits of the next word, [B, L, V]."""
        x_BLD = self.embedding(tokens_BL) + self.position.weight[: tokens_BL.shape[1]]
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return self.head(self.norm(x_BLD))


class LMZipf(Workload):
    """Predict the next word of the standard library's sources; words beyond the 2,047 most frequent are one class.

    Words and signs are tokens, white space is not. The vocabulary is that of the training part, in order of frequency.
    """

    name = "lm-zipf"
    summary = "causal transformer on words of Python sources, 2,048 classes by Zipf's law: 145k parameters, width 32"
    width, depth = 32, 1
    defaults = Settings(lr=0.003, beta2=0.95, weight_decay=0.1, clip=1.0, warmup=0.1, steps=600, batch_size=16)
    sources: ClassVar[Mapping[str, str]] = {
        "lr": "ours: of 0.003, 0.01 and 0.03 the lowest test loss (3.52, 3.96, 3.71, seed 0)",
        "beta2": "as lm-small",
        "weight_decay": "as lm-small",
        "clip": "as lm-small",
        "warmup": "as lm-small",
        "steps": "ours: a few seconds",
    }

    def load(self) -> Data:
        """Read the top-level modules of the running Python's standard library, in order of name, as words."""
        root = Path(sysconfig.get_path("stdlib"))
        content = b"".join(path.read_bytes() for path in sorted(root.glob("*.py")))[:_BYTES]
        words = _TOKEN.findall(content.decode("utf-8", errors="replace"))
        cut = int(_SHARE * len(words))
        counts = Counter(words[:cut])
        # Ties are broken by the word itself, so that the numbering does not depend on the order of a dict.
        ranked = sorted(counts, key=lambda word: (-counts[word], word))[: _VOCABULARY - 1]
        numbers = {word: place for place, word in enumerate(ranked, start=1)}
        tokens = torch.tensor([numbers.get(word, _UNKNOWN) for word in words])
        source = "words of the sources of the Python standard library"
        return Data(*_windows(tokens[:cut]), *_windows(tokens[cut:]), source=source)

    def build(self, width: int, depth: int) -> nn.Module:
        """Build the transformer."""
        return WordModel(width, depth)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats a word; logits [B, L, V], targets [B, L]."""
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the mean cross-entropy over 4,096 words in windows evenly spaced over the test part.

        `rare_loss` is that of the rarer half of them, by the frequency of their class; words outside the vocabulary
        are none of them.
        """
        data = self.data
        count = min(_EVAL_TOKENS // _CONTEXT, len(data.test_inputs))
        chosen = torch.arange(count) * len(data.test_inputs) // count
        targets = data.test_targets[chosen].flatten()
        with evaluating(model):
            losses = F.cross_entropy(model(data.test_inputs[chosen]).flatten(0, -2), targets, reduction="none")
        known = targets != _UNKNOWN
        # Classes are numbered by rank: the larger the number, the rarer the class.
        rare = known & (targets > torch.quantile(targets[known].double(), _RARE))
        return {"loss": to_scalar(losses.mean()), "rare_loss": to_scalar(losses[rare].mean())}


def _windows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Cut words into windows of the context's length; targets are the words one place further on."""
    end = (len(tokens) - 1) // _CONTEXT * _CONTEXT
    return tokens[:end].view(-1, _CONTEXT), tokens[1 : end + 1].view(-1, _CONTEXT)
