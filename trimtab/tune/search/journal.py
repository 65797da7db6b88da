"""The journal of a tuning: Optuna's, in one file that many processes on many hosts append to.

Optuna's own file lock is a symbolic link, which every shared file system makes atomically; a process that is killed
while it holds one keeps all others waiting for half a minute. Here a lock of the operating system stands before it,
which goes with its process: whoever holds that knows that a link of its own host is a dead one's.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import RecordError, require

try:
    import fcntl
except ImportError:  # Windows: the link alone
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from optuna.storages import JournalStorage

NAME = "trimtab"
UNBORN = -1
"""The id of a trial that is not in the journal yet, as Optuna makes them."""


def kernel() -> str:
    """Return what tells this running system from every other: within it, locks of the operating system can be trusted.

    Example:
        >>> kernel() == kernel()
        True
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


class SharedLock:
    """A lock between processes on all hosts that share a folder; it is free again soon after its holder dies.

    Args:
        path: its place; two files beside it begin with that name.
        patience: seconds without a change after which the link of another host is taken for a dead one's.
    """

    def __init__(self, path: Path, patience: float = 30.0) -> None:
        self._patience = patience
        self._local = path.with_name(f"{path.name}.local")
        self._link = path.with_name(f"{path.name}.link")
        self._file: Any = None
        self._text = ""

    def acquire(self) -> bool:
        """Wait for the lock and take it."""
        own = self._hold()
        self._text = f"{kernel()} {uuid.uuid4()}"
        seen, since, pause = "", time.monotonic(), 0.001
        while True:
            try:
                os.symlink(self._text, self._link)
                return True
            except FileExistsError:
                pass
            except OSError:
                if own:  # no links here: the lock of this system has to do
                    return True
                self.release()
                raise
            holder = self._holder()
            if own and holder.startswith(f"{kernel()} "):
                # Only one process of this system can be here, and it holds no link yet: whose ever this was is dead.
                self._break(holder)
                continue
            if holder != seen:
                seen, since = holder, time.monotonic()
            elif time.monotonic() - since > self._patience:
                self._break(holder)
                continue
            time.sleep(pause)
            pause = min(2 * pause, 0.25)

    def release(self) -> None:
        """Give the lock back."""
        self._break(self._text)  # another's, if ours was taken for a dead one's, stays
        if self._file is not None:
            self._file.close()
            self._file = None

    def _hold(self) -> bool:
        """Take the lock of this system; False where the file system has none."""
        if fcntl is None:
            return False
        self._file = self._local.open("a")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except OSError:
            self._file.close()
            self._file = None
            return False
        return True

    def _holder(self) -> str:
        try:
            return os.readlink(self._link)
        except OSError:
            return ""

    def _break(self, holder: str) -> None:
        if self._holder() == holder:
            with contextlib.suppress(OSError):
                self._link.unlink()

    def __enter__(self) -> SharedLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def open_storage(folder: Path) -> JournalStorage:
    """Open the journal in a folder; both are made if they are missing.

    Raises:
        RecordError: if the folder cannot be written, or the journal cannot be read.
        MissingExtraError: if optuna is not installed.
    """
    storages: Any = require("optuna.storages", extra="tune")
    path = folder / "journal.log"

    lock = SharedLock(folder / ".journal")

    class Free:
        """No lock: `append_logs` holds ours."""

        def acquire(self) -> bool:
            return True

        def release(self) -> None:
            return

    class Backend(storages.journal.JournalFileBackend):
        """Cuts off a line that a full disk or a crash of the system left unfinished: it was never acknowledged."""

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            with lock:
                _cut_unfinished(path)
                super().append_logs(logs)

    class Journal(storages.JournalStorage):
        """Takes what a sampler notes of a trial that is being drawn and is not in the journal yet."""

        def _sync_with_backend(self) -> None:
            try:
                super()._sync_with_backend()
            except (json.JSONDecodeError, UnicodeDecodeError, AssertionError, TypeError, AttributeError) as error:
                raise RecordError(
                    f"{path} is not a readable journal: {error}. Mend its line, or choose another folder."
                ) from error

        def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
            if trial_id != UNBORN:
                super().set_trial_system_attr(trial_id, key, value)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with quiet():
            storage: JournalStorage = Journal(Backend(str(path), lock_obj=Free()))
            return storage
    except OSError as error:
        raise RecordError(f"cannot write in {folder}: {error.strerror or error}.") from error
    except (ValueError, KeyError) as error:
        raise RecordError(f"{path} is not a readable journal: {error}.") from error


def _cut_unfinished(path: Path) -> None:
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        if not end:
            return
        file.seek(end - 1)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Optuna's log and its notes that a sampler is experimental; what we tell of a tuning is ours."""
    optuna = require("optuna", extra="tune")
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (optuna.exceptions.ExperimentalWarning, UserWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        optuna.logging.set_verbosity(before)
