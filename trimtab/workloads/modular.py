"""Modular addition: `modadd` generalises long after it has fitted (grokking), `modadd-nodecay` never does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import UsageError
from trimtab.workloads.classification import Classification, split
from trimtab.workloads.settings import Settings
from trimtab.workloads.workload import Data

_PRIME = 97
_TRAIN_SHARE = 0.4


class ModularAdder(nn.Module):
    """Embeddings of two numbers side by side, one hidden ReLU layer, and logits of their sum modulo p.

    Args:
        width: of the hidden layer; each embedding has half of it.
        prime: p.

    Raises:
        UsageError: if the width is odd.
    """

    def __init__(self, width: int = 192, prime: int = _PRIME) -> None:
        super().__init__()
        if width % 2:
            raise UsageError(f"the width of modular addition must be even, half for each number, got {width}.")
        self.embedding = nn.Embedding(prime, width // 2)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, prime, bias=False)

    def forward(self, pairs: Tensor) -> Tensor:
        """Return the logits, [B, 2] -> [B, p]."""
        return self.head(F.relu(self.hidden(self.embedding(pairs).flatten(1))))


class ModAdd(Classification):
    """(a + b) mod 97 from two fifths of all pairs, full batch, weight decay 1: fits by step 50, groks near step 575."""

    name = "modadd"
    summary = "modular addition (p = 97, 40 % of the pairs), full batch, weight decay 1: groks near step 575"
    evaluations = 40
    width = 192
    defaults = Settings(
        lr=0.01, beta2=0.95, weight_decay=1.0, warmup=0.0, schedule="constant", steps=1000, batch_size=0
    )
    sources: ClassVar[Mapping[str, str]] = {
        "beta2": "ours: theirs is 0.98; at 0.95 the softmax collapses within 1000 steps when nothing decays",
        "weight_decay": "Power et al. 2022 (arXiv:2201.02177), appendix A.1.2",
        "schedule": "constant, as there: a decaying rate would also decay the pull of weight decay",
        "lr": "ours: ten times theirs, so that it groks within 1000 steps",
        "steps": "ours",
    }

    def load(self) -> Data:
        """Enumerate all pairs and split them."""
        numbers = torch.arange(_PRIME)
        pairs = torch.cartesian_prod(numbers, numbers)
        return split(pairs, pairs.sum(1) % _PRIME, _TRAIN_SHARE, "all sums modulo 97")

    def build(self, width: int, depth: int) -> nn.Module:
        """Build the network with torch's own initialisation."""
        return ModularAdder(width)


class ModAddNoDecay(ModAdd):
    """The same without weight decay: logits drift until float32 softmax saturates, and it never generalises.

    At its defaults this run is *meant* to be unhealthy: softmax collapse and output-logit drift (Prieto et al. 2025,
    arXiv:2501.04697).
    """

    name = "modadd-nodecay"
    summary = "modadd without weight decay: logits drift, the softmax collapses, and it never generalises"
    defaults = ModAdd.defaults.replace(weight_decay=0.0)
    sources: ClassVar[Mapping[str, str]] = {
        **ModAdd.sources,
        "weight_decay": "Prieto et al. 2025 (arXiv:2501.04697): none",
    }
