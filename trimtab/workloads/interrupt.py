"""Ctrl-C that waits until the step in hand is finished."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether Ctrl-C was pressed."""

    asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal: remember it, and let a second one through."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Hold Ctrl-C back until the step in hand is finished; a second one stops at once."""
    interrupt = Interrupt()
    usual = signal.getsignal(signal.SIGINT)
    # Only the main thread may set handlers, and a caller that ignores Ctrl-C or handles it itself keeps doing so.
    if threading.current_thread() is not threading.main_thread() or usual is not signal.default_int_handler:
        yield interrupt
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, usual)
