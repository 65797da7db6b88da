"""Whether the worker that took a trial still lives: a lease that a worker holds as long as it does."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from pathlib import Path

from trimtab.errors import RecordError
from trimtab.tune.search.journal import kernel

try:
    import fcntl
except ImportError:  # Windows: the heartbeat alone
    fcntl = None  # type: ignore[assignment]

_BEAT = 5.0
_STALE = 60.0
"""Seconds without a heartbeat after which a worker of another host counts as dead."""


class Lease:
    """A file that says "I live": locked by its process, and touched every five seconds.

    On this system the lock tells: it goes with its process, however that ends. Of another host only the touches are
    seen, by the clock of the file system that both share.

    Args:
        folder: where leases are kept.
        worker: the worker's name; made up if left out.

    Raises:
        RecordError: if it cannot be written.
    """

    def __init__(self, folder: Path, worker: str = "") -> None:
        self.worker = worker or f"{platform.node() or 'host'}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._folder = folder
        self._path = _path(folder, self.worker)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", encoding="utf-8")
            self._file.write(json.dumps({"kernel": kernel(), "pid": os.getpid()}))
            self._file.flush()
        except OSError as error:
            raise RecordError(f"cannot write in {folder}: {error.strerror or error}.") from error
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._done = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self._done.wait(_BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def close(self) -> None:
        """Give the lease up."""
        self._done.set()
        self._file.close()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def lives(self, worker: str) -> bool:
        """Return whether another worker holds its lease."""
        if worker == self.worker:
            return True
        path = _path(self._folder, worker)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError:
            return False
        if f'"{kernel()}"' in text and (held := _held(path)) is not None:
            return held
        with contextlib.suppress(OSError):
            os.utime(self._path)
            return self._path.stat().st_mtime - path.stat().st_mtime < _STALE
        return time.time() - path.stat().st_mtime < _STALE if path.exists() else False


def _path(folder: Path, worker: str) -> Path:
    return folder / f"{worker}.lease"


def _held(path: Path) -> bool | None:
    """Return whether a process of this system holds a lock; None where the file system has no locks."""
    if fcntl is None:
        return None
    try:
        with path.open("r", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return False
