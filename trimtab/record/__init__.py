"""The append-only store of a run, and its checkpoints."""

from trimtab.record.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from trimtab.record.reader import Event, Run, Series
from trimtab.record.writer import Recorder

__all__ = [
    "Event",
    "Recorder",
    "Run",
    "Series",
    "latest_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
]
