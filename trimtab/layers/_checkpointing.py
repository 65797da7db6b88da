"""Tell activation checkpointing's second forward from a first one, for layers that count their forwards."""

from __future__ import annotations

import torch


def recomputing() -> bool:
    """Return whether this forward runs inside a backward pass: it must then see what the first forward saw."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
