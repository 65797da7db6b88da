"""Language models on bytes: `lm-small` and `lm-medium`, on the Python standard library's sources or your own text."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import UsageError
from trimtab.scalars import to_scalar
from trimtab.workloads.settings import Settings
from trimtab.workloads.transformer import Block, CausalSelfAttention, init_normal
from trimtab.workloads.workload import Data, Workload, evaluating

_STDLIB_BYTES = 4_000_000
_OWN_BYTES = 64_000_000
_VOCABULARY = 256
_EVAL_TOKENS = 32_768
_EVAL_BATCH = 32


class LanguageModel(nn.Module):
    """A causal pre-LN transformer over bytes with learned positions and the head tied to the embedding.

    Linear layers have no bias, LayerNorms have one; every matrix starts as N(0, 0.02).

    Args:
        width: D.
        context: longest sequence, L.
        layers: blocks.
        heads: attention heads a block.
    """

    def __init__(self, width: int, context: int, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, CausalSelfAttention(width, heads)) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        init_normal(self)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Return the logits of the next byte, [B, L, V]."""
        x_BLD = self.embedding(tokens_BL) + self.position.weight[: tokens_BL.shape[1]]
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return self.head(self.norm(x_BLD))


class _LanguageModelling(Workload):
    """Predict the next byte of a text cut into windows; nine tenths to train on, the last tenth to test on."""

    evaluations = 5
    depth = 4
    context: ClassVar[int]

    def prepare(self, text: str | Path | None = None) -> Data:
        """Load the standard library's sources, or a file or folder of your own text.

        Raises:
            UsageError: if the text is missing, unreadable or too short.
        """
        if text is None:
            return super().prepare()
        content = _read(Path(text))
        self._data = _windows(content, self.context, f"text of {text}")
        return self._data

    def load(self) -> Data:
        """Read the top-level modules of the running Python's standard library, in order of name."""
        root = Path(sysconfig.get_path("stdlib"))
        content = b"".join(path.read_bytes() for path in sorted(root.glob("*.py")))[:_STDLIB_BYTES]
        return _windows(content, self.context, "sources of the Python standard library")

    def build(self, width: int, depth: int) -> nn.Module:
        """Build the transformer."""
        return LanguageModel(width, self.context, depth)

    def batch(self, seed: int, step: int, batch_size: int = 0) -> tuple[Tensor, Tensor]:
        """Return tokens and next tokens of a step, int64 [B, L]."""
        inputs, targets = super().batch(seed, step, batch_size)
        return inputs.long(), targets.long()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats a byte; logits [B, L, V], targets [B, L]."""
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the mean cross-entropy over 32,768 tokens in windows evenly spaced over the test part."""
        data = self.data
        count = min(_EVAL_TOKENS // self.context, len(data.test_inputs))
        chosen = torch.arange(count) * len(data.test_inputs) // count
        total = 0.0
        with evaluating(model):
            for part in chosen.split(_EVAL_BATCH):
                loss = self.loss(model(data.test_inputs[part].long()), data.test_targets[part].long())
                total += to_scalar(loss) * len(part)
        return {"loss": total / count}


class LMSmall(_LanguageModelling):
    """A 218,240-parameter language model: 4 blocks, width 64, context 64."""

    name = "lm-small"
    summary = "causal transformer on bytes of Python sources: 218k parameters, 4 layers, width 64, context 64"
    width, context = 64, 64
    defaults = Settings(
        lr=0.01, beta2=0.95, weight_decay=0.1, clip=1.0, warmup=0.1, steps=1000, batch_size=32, schedule="cosine"
    )
    sources: ClassVar[Mapping[str, str]] = {
        "lr": "ours: of 0.003, 0.01 and 0.03 the lowest test loss (1.81, 1.68, 1.81 at 1000 steps, seed 0)",
        "beta2": "GPT-3 (arXiv:2005.14165), appendix B",
        "weight_decay": "GPT-3 (arXiv:2005.14165), appendix B",
        "clip": "GPT-3 (arXiv:2005.14165), appendix B",
        "warmup": "ours: a tenth of the steps",
    }


class LMMedium(_LanguageModelling):
    """An 837,888-parameter language model: 4 blocks, width 128, context 128."""

    name = "lm-medium"
    summary = "causal transformer on bytes of Python sources: 838k parameters, 4 layers, width 128, context 128"
    width, context = 128, 128
    defaults = LMSmall.defaults.replace(lr=0.005)
    sources: ClassVar[Mapping[str, str]] = {**LMSmall.sources, "lr": "ours: half of lm-small's, for twice the width"}


def _windows(content: bytes, context: int, source: str) -> Data:
    """Cut a text into windows of `context` tokens; targets are the tokens one place further on."""
    cut = int(0.9 * len(content))
    if min(cut, len(content) - cut) <= context:
        raise UsageError(
            f"{source} has {len(content)} bytes, too few for windows of {context}: give at least {10 * (context + 1)}."
        )
    tokens = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return Data(*_pairs(tokens[:cut], context), *_pairs(tokens[cut:], context), source=source)


def _pairs(tokens: Tensor, context: int) -> tuple[Tensor, Tensor]:
    end = (len(tokens) - 1) // context * context
    return tokens[:end].view(-1, context), tokens[1 : end + 1].view(-1, context)


def _read(path: Path) -> bytes:
    """Read a file, or every file below a folder in order of name, hidden ones left out; at most 64 MB."""
    if not path.exists():
        raise UsageError(f"text {str(path)!r} does not exist: give a file or a folder.")
    files = [path] if not path.is_dir() else sorted(entry for entry in path.rglob("*") if _visible(entry, path))
    content = bytearray()
    try:
        for file in files:
            with file.open("rb") as stream:
                content += stream.read(_OWN_BYTES - len(content))
            if len(content) >= _OWN_BYTES:
                break
    except OSError as error:
        raise UsageError(f"text {str(path)!r} cannot be read: {error.strerror or error}.") from error
    return bytes(content)


def _visible(entry: Path, root: Path) -> bool:
    return entry.is_file() and not any(part.startswith(".") for part in entry.relative_to(root).parts)
